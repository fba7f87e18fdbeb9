"""A causal language model from local files, run in this process by Hugging Face transformers.

The embedded default is SmolLM2-135M-Instruct, whose weights come with a Python package: no network, no GPU. It is a
smoke-test model: it copies facts from a grounded prompt well and invents them in a closed-book one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from kellm_features.errors import EngineError, first_line
from kellm_features.knowledge.engines.base import Answer, Completion, Prompt
from kellm_features.knowledge.engines.deferred import Deferred
from kellm_features.knowledge.localmodel import ChatForm, LocalModel, beyond_window, loading, local_model, require
from kellm_features.knowledge.parallel import cpu_workers, side_by_side
from kellm_features.settings import GenerateSettings


def load(settings: GenerateSettings) -> Deferred:
    """The engine with the model that the settings name, loaded by its first request.

    `generate.model` is the embedded model's name, a folder in Hugging Face layout, a .gguf file, or a hub id.

    Raises:
        EngineError: no such model.
        MissingExtraError: torch or transformers is not installed.
    """
    for module in ("torch", "transformers"):
        require("llm", module, "The engine 'transformers'")
    model = local_model(settings)
    start = functools.partial(TransformersEngine, model, settings.batch_size, settings.device)
    return Deferred(model, TransformersEngine.sampling, start)


class TransformersEngine:
    """Batched greedy decoding in bfloat16."""

    sampling = "greedy bfloat16"
    source: Literal["llm", "template"] = "llm"

    def __init__(self, model: LocalModel, batch_size: int, device: str | None = None) -> None:
        """Load a model.

        Args:
            model: its folder and name.
            batch_size: prompts decoded together.
            device: a torch device; None takes cuda where there is one.
        """
        import torch
        import transformers

        self.model_id = model.model_id
        self.revision = model.revision
        self._batch_size = batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._form = ChatForm(model.folder)
        with loading(model.folder):
            network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                model.folder, dtype=torch.bfloat16, local_files_only=True
            )
            self._model = network.to(self._device).eval()
        tokenizer = self._form.tokenizer
        eos = self._model.generation_config.eos_token_id
        ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        if not ids:
            raise EngineError(
                f"the model in {model.folder} names no end-of-text token: it cannot be used for generation"
            )
        self._stop = sorted(ids)
        self._pad: int = self._stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._workers = cpu_workers() if self._device == "cpu" else 1
        self.shard_size = batch_size * self._workers
        self._window: int = getattr(self._model.config, "max_position_embeddings", 1 << 30)

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Greedy completions, a batch at a time. Prompts of like length share a batch, for the least padding.

        A prompt that has no room in the model's window is a `Failure`, and the others go on.

        Raises:
            EngineError: the model failed, as where memory ran out.
        """
        tokens = [self._form.encode(request) for request in requests]
        fitting = []
        for place, ids in enumerate(tokens):
            if failure := beyond_window(len(ids), max_tokens, self._window):
                yield place, failure
            else:
                fitting.append(place)
        order = sorted(fitting, key=lambda place: (len(tokens[place]), tokens[place]))
        size = min(self._batch_size, math.ceil(len(order) / self._workers)) or 1
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        prompts = [[tokens[place] for place in batch] for batch in batches]
        # On a GPU there is one worker, and one batch at a time.
        answers = side_by_side(lambda batch: self._decode(batch, max_tokens), prompts, self._workers)
        for batch, answered in zip(batches, answers, strict=True):
            for place, answer in zip(batch, answered, strict=True):
                yield place, self._completion(tokens[place], answer)

    def _decode(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Answer tokens of one batch, padded on the left; runs in worker threads and touches no tokenizer."""
        import torch

        longest = max(map(len, prompts))
        pad = self._pad
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        try:
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=self._stop,
                    pad_token_id=pad,
                )
        except RuntimeError as error:  # torch's OutOfMemoryError is one
            raise EngineError(
                f"{self.model_id} failed on {len(prompts)} prompts of up to {longest} tokens: {first_line(error)}; "
                "where memory ran out, lower generate.batch_size"
            ) from error
        answers: list[list[int]] = output[:, longest:].tolist()
        return answers

    def _completion(self, prompt: list[int], answer: list[int]) -> Completion:
        end = next((place for place, token in enumerate(answer) if token in self._stop), None)
        text = self._form.tokenizer.decode(answer[:end], skip_special_tokens=True)
        spent = len(answer) if end is None else end + 1
        return Completion(text, len(prompt), spent, "length" if end is None else "stop")
