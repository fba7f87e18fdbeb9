"""A causal language model from local files, run in this process by Hugging Face transformers.

The embedded default is SmolLM2-135M-Instruct, whose weights come with a Python package: no network, no GPU. It is a
smoke-test model: it copies facts from a grounded prompt well and invents them in a closed-book one.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from kellm_features.artifacts import sha256_file
from kellm_features.errors import EngineError, MissingExtraError, first_line
from kellm_features.knowledge.engines.base import Completion, Prompt
from kellm_features.knowledge.modelfiles import hash_model, quiet_loading
from kellm_features.knowledge.parallel import cpu_workers, side_by_side
from kellm_features.resources import EMBEDDED_LLM, package_file
from kellm_features.settings import GenerateSettings, user_cache_dir

if TYPE_CHECKING:
    import os

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(settings: GenerateSettings) -> TransformersEngine:
    """The engine with the model that the settings name.

    `generate.model` is the embedded model's name, a folder in Hugging Face layout, or a .gguf file.

    Raises:
        EngineError: no such model, or its files cannot be loaded.
        MissingExtraError: torch or transformers is not installed.
    """
    _import("torch")
    _import("transformers")
    name = settings.model
    if name == EMBEDDED_MODEL:
        source = package_file(EMBEDDED_LLM, _EMBEDDED_FILE)
    else:
        source = Path(name).expanduser()
        if not source.exists():
            raise EngineError(
                f"'generate.model' is {name!r}: accepted are {EMBEDDED_MODEL}, "
                "a model folder or a .gguf file on this machine"
            )
    if source.is_dir():
        return TransformersEngine(source, source.name, hash_model(source), settings.batch_size, settings.device)
    revision = sha256_file(source)
    folder = convert_gguf(source, user_cache_dir() / "models" / revision)
    model_id = name if name == EMBEDDED_MODEL else source.stem
    return TransformersEngine(folder, model_id, revision, settings.batch_size, settings.device)


def convert_gguf(source: Path, target: Path) -> Path:
    """Unpack a GGUF file to a bfloat16 model folder, once; later calls return the folder as it is.

    The folder is written under a temporary name and renamed when whole, so that a kill leaves nothing half-made and
    two processes may convert at the same time.

    Raises:
        EngineError: the file is no model that transformers can read.
        MissingExtraError: gguf or accelerate is not installed.
    """
    if target.exists():
        return target
    for module in ("gguf", "accelerate"):
        _import(module)
    import torch
    import transformers

    _remove_abandoned(target)
    temporary = target.parent / f"{target.name}.tmp-{psutil.Process().pid}"
    temporary.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s once; the result is kept in %s", source.name, target)
    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    # Since GGUF blocks can be computed on directly, unpacking has to be asked for.
    unpacked = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    try:
        with quiet_loading():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source.parent, dtype=torch.bfloat16, quantization_config=unpacked, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.rename(target)
    except OSError as error:
        if not target.exists():  # else another process was faster
            raise EngineError(f"{source} cannot be converted into {target}: {error}") from error
    except Exception as error:  # a foreign file's parser may raise anything
        raise EngineError(f"{source} is not a GGUF model that transformers can read: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


class TransformersEngine:
    """Batched greedy decoding in bfloat16."""

    sampling = "greedy bfloat16"
    source: Literal["llm", "template"] = "llm"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model_id: str,
        revision: str,
        batch_size: int,
        device: str | None = None,
    ) -> None:
        """Load a model.

        Args:
            folder: in Hugging Face layout.
            model_id: as it is to stand in the descriptions.
            revision: hash of the weights.
            batch_size: prompts decoded together.
            device: a torch device; None takes cuda where there is one.
        """
        import torch
        import transformers

        self.model_id = model_id
        self.revision = revision
        self._batch_size = batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with quiet_loading():
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    folder, padding_side="left", local_files_only=True
                )
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.bfloat16, local_files_only=True
                )
            self._model = model.to(self._device).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise EngineError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error
        eos = self._model.generation_config.eos_token_id
        ids = {*(eos if isinstance(eos, list) else [eos]), self._tokenizer.eos_token_id} - {None}
        if not ids:
            raise EngineError(f"the model in {folder} names no end-of-text token: it cannot be used for generation")
        self._stop = sorted(ids)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token_id = self._stop[0]
        added = self._tokenizer.added_tokens_decoder.values()
        self._control = sorted({token.content for token in added if token.special}, key=len, reverse=True)
        self._workers = cpu_workers() if self._device == "cpu" else 1
        self.shard_size = batch_size * self._workers
        self._window: int = getattr(self._model.config, "max_position_embeddings", 1 << 30)

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Greedy completions. Prompts of like length share a batch, for the least padding.

        Raises:
            EngineError: a prompt and its answer exceed the model's window.
        """
        tokens = [self._encode(request) for request in requests]
        longest = max(map(len, tokens), default=0)
        if longest + max_tokens > self._window:
            raise EngineError(
                f"a prompt of {longest} tokens and an answer of {max_tokens} exceed the {self._window} that "
                f"{self.model_id} reads: lower generate.page_tokens, generate.profile_tokens or generate.max_tokens"
            )
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), tokens[i]))
        size = min(self._batch_size, math.ceil(len(order) / self._workers)) or 1
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        prompts = [[tokens[i] for i in batch] for batch in batches]
        # On a GPU there is one worker, and one batch at a time.
        answers = list(side_by_side(lambda batch: self._decode(batch, max_tokens), prompts, self._workers))
        completions: dict[int, Completion] = {}
        for batch, answered in zip(batches, answers, strict=True):
            for i, answer in zip(batch, answered, strict=True):
                completions[i] = self._completion(tokens[i], answer)
        return [completions[i] for i in range(len(tokens))]

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt in the model's chat form; a control token spelled in a text loses its meaning."""
        system, user = self._without_control(prompt.system), self._without_control(prompt.user)
        if self._tokenizer.chat_template is None:
            text, special = f"{system}\n\n{user}\n", True
        else:
            text, special = self._chat(system, user), False  # the chat form spells its own special tokens
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _chat(self, system: str, user: str) -> str:
        import jinja2

        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:  # some chat templates refuse a system turn
            messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    def _without_control(self, text: str) -> str:
        for token in self._control:
            text = text.replace(token, " ")
        return text

    def _decode(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Answer tokens of one batch, padded on the left; runs in worker threads and touches no tokenizer."""
        import torch

        longest = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
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
        answers: list[list[int]] = output[:, longest:].tolist()
        return answers

    def _completion(self, prompt: list[int], answer: list[int]) -> Completion:
        end = next((place for place, token in enumerate(answer) if token in self._stop), None)
        text = self._tokenizer.decode(answer[:end], skip_special_tokens=True)
        spent = len(answer) if end is None else end + 1
        return Completion(text, len(prompt), spent, "length" if end is None else "stop")


def _import(module: str) -> None:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError("llm", module, "The engine 'transformers'") from error


def _remove_abandoned(target: Path) -> None:
    """Delete what killed conversions left beside the target."""
    for leftover in target.parent.glob(f"{target.name}.tmp-*"):
        if not psutil.pid_exists(int(leftover.name.rpartition("-")[2])):
            shutil.rmtree(leftover, ignore_errors=True)
