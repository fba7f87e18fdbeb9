"""Texts to vectors with a frozen sentence encoder."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kellm_features.errors import ConfigError, EngineError, MissingExtraError, first_line
from kellm_features.knowledge.modelfiles import (
    hash_model,
    hub_folder,
    is_hub_id,
    is_model,
    quiet_loading,
    refuse_revision,
)
from kellm_features.knowledge.parallel import cpu_workers, side_by_side
from kellm_features.resources import EMBEDDED_ENCODER, package_file
from kellm_features.settings import EncodeSettings

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
ENCODER_VERSION = 1
"""Of the way in which texts are cut and pooled: raise it when vectors change although the weights do not."""
SLICE_BATCHES = 8
"""Batches per worker or process that suit one call: texts of like length still meet, and little is lost by a kill."""


class Encoder:
    """A sentence-transformers model; texts beyond its window are cut into chunks and pooled.

    A text that fits the window gets exactly the vector that `SentenceTransformer.encode` gives; for a plain
    transformers folder that is the mean of the last hidden state over the text's tokens. A longer one is cut at word
    starts into chunks that fill the window, and its vector is the mean of the chunks' vectors weighted by their
    tokens, brought to unit length where the model's own vectors have it. Under `long_texts = "cut"` the window's
    worth of its beginning is all that is read.

    With `encode.devices` the work is done by one process on each, which start at the first text and end with the
    `with` block.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        """Load the model that `encode.model` names.

        Raises:
            ConfigError: neither the embedded model, nor a model folder, nor a hub id.
            EngineError: the folder holds no usable model, or the hub gave none.
            MissingExtraError: sentence-transformers is not installed.
        """
        folder = encoder_folder(settings)
        try:
            import torch
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise MissingExtraError("encode", "sentence_transformers", "The stage 'encode'") from error
        self._devices = settings.devices or []
        try:
            with quiet_loading():
                self._model: Any = SentenceTransformer(
                    str(folder),
                    device="cpu" if self._devices else settings.device,
                    local_files_only=True,
                    model_kwargs={"dtype": getattr(torch, settings.dtype)},
                )
        # An AssertionError is how torch says that it was built without CUDA.
        except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise EngineError(
                f"the encoder in {folder} cannot be loaded to {settings.device or 'the default device'}: "
                f"{first_line(error)}: choose another encode.model or encode.device"
            ) from error
        dim = self._model.get_embedding_dimension()
        if dim is None:
            raise EngineError(
                f"the encoder in {folder} does not tell the length of its vectors: choose another encode.model"
            )
        self.dim: int = dim
        self.model_id, self.revision = _identity(settings, folder)
        self.encoder_id = "/".join(
            [
                f"{self.model_id}@{self.revision[:16]}",
                str(ENCODER_VERSION),
                *([settings.dtype] if settings.dtype != "float32" else []),
                *([settings.long_texts] if settings.long_texts != "chunk" else []),
            ]
        )
        self._batch_size = settings.batch_size
        self._unit = any(type(module).__name__ == "Normalize" for module in self._model)
        self._rounded = settings.dtype != "float32"
        self._room = self._window() if settings.long_texts == "chunk" else math.inf
        self._pool: Any = None
        self._workers = 1
        if not self._devices and self._model.device.type == "cpu":
            self._workers = cpu_workers()
            # Wrapped on the instance: its class comes from a lazy import, so there is nothing to subclass up here.
            self._model.preprocess = _one_at_a_time(self._model.preprocess)  # type: ignore[method-assign]
        self.slice_size = SLICE_BATCHES * self._batch_size * (len(self._devices) or self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of `encode.devices`, if there are any; the next text starts them again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._model.stop_multi_process_pool(pool)

    def encode(self, texts: Sequence[str], advance: Callable[[float], object] | None = None) -> npt.NDArray[np.float32]:
        """Vectors of texts, in order.

        Args:
            texts: any length, any number; `slice_size` of them keep all workers busy.
            advance: called with the number of texts that were finished since the last call, as fractions where only
                chunks of them were.

        Returns:
            float32, shape (len(texts), dim).

        Raises:
            EngineError: a process of `encode.devices` failed or was killed.
        """
        pieces = self._cut(texts)
        chunks = [chunk for of_text in pieces for chunk, _ in of_text]
        weight = np.array([tokens for of_text in pieces for _, tokens in of_text], dtype=np.float64)
        count = np.array([len(of_text) for of_text in pieces], dtype=np.int64)
        owners = np.repeat(np.arange(len(texts)), count)
        shares = 1.0 / count[owners]
        vectors = self._encode_chunks(chunks, weight, lambda part: advance and advance(float(shares[part].sum())))
        pooled = np.zeros((len(texts), self.dim), dtype=np.float64)
        np.add.at(pooled, owners, vectors * weight[:, None])
        pooled /= np.bincount(owners, weight, minlength=len(texts))[:, None]
        if self._unit:  # half precision leaves lengths that are off by 1e-3
            bent = np.ones(len(texts), dtype=bool) if self._rounded else count > 1
            pooled[bent] /= np.maximum(np.linalg.norm(pooled[bent], axis=1, keepdims=True), 1e-12)
        return pooled.astype(np.float32)

    def _encode_chunks(
        self, chunks: list[str], weight: npt.NDArray[np.float64], finished: Callable[[list[int]], object]
    ) -> npt.NDArray[np.float64]:
        """Longest first, so that like lengths share a batch."""
        vectors = np.zeros((len(chunks), self.dim), dtype=np.float64)
        order = sorted(range(len(chunks)), key=lambda i: (-weight[i], chunks[i]))
        if self._devices:
            if order:
                vectors[order] = self._encode_in_pool([chunks[i] for i in order])
                finished(order)
            return vectors
        slices = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

        def encode(part: list[int]) -> Any:
            return self._model.encode(
                [chunks[i] for i in part], batch_size=len(part), convert_to_numpy=True, show_progress_bar=False
            )

        for part, encoded in zip(slices, side_by_side(encode, slices, self._workers), strict=True):
            vectors[part] = encoded
            finished(part)
        return vectors

    def _encode_in_pool(self, chunks: list[str]) -> Any:
        """A batch is a process's unit of work: the batches are those that one process would make."""
        size = self._batch_size
        try:
            if self._pool is None:
                self._pool = self._model.start_multi_process_pool(self._devices)
            return self._model.encode(
                chunks,
                pool=self._pool,
                batch_size=size,
                chunk_size=size,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        except Exception as error:  # a process hands on whatever it met: CUDA's errors, torch's assertions
            self.close()
            raise EngineError(
                f"a process of encode.devices = {self._devices} failed: {first_line(error)}: name devices that torch "
                "sees, lower encode.batch_size where memory ran out, or leave encode.devices out"
            ) from error
        except BaseException:
            self.close()
            raise

    def _window(self) -> float:
        """Tokens of a text that the model reads at once: those of its window, without the marks and prompt around it.

        Models without a window, as of static embeddings, have room for everything.
        """
        limit = self._model.get_max_seq_length()
        if limit is None or limit == math.inf:
            return math.inf
        prompt = self._model.prompts.get(self._model.default_prompt_name) or ""
        around = self._model.tokenizer.num_special_tokens_to_add()
        around += len(self._model.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if limit <= around:
            raise EngineError(f"the encoder {self.model_id} reads {limit} tokens, too few for any text")
        return float(limit - around)

    def _cut(self, texts: Sequence[str]) -> list[list[tuple[str, int]]]:
        """Chunks of each text with their lengths: the text itself where it fits, in characters where all do."""
        if not texts or self._room == math.inf:
            return [[(text, max(1, len(text)))] for text in texts]
        encoded = self._model.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            [(text, max(1, len(offsets)))]
            if len(offsets) <= self._room
            else _split(text, offsets, encoded.word_ids(place), int(self._room))
            for place, (text, offsets) in enumerate(zip(texts, encoded["offset_mapping"], strict=True))
        ]


def _split(text: str, offsets: list[tuple[int, int]], words: list[int | None], room: int) -> list[tuple[str, int]]:
    """Consecutive pieces of a text of `room` tokens at most, with their tokens, cut at word starts."""
    pieces = []
    start = 0
    while start < len(offsets):
        end = min(start + room, len(offsets))
        if end < len(offsets):  # back to a word's start; a word longer than the window is cut within
            end = next((k for k in range(end, start, -1) if words[k] != words[k - 1]), end)
        pieces.append((text[offsets[start][0] : offsets[end - 1][1]], end - start))
        start = end
    return pieces


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tokenizing under a lock: a fast tokenizer is shared by the workers and not made for two callers at once."""
    lock = threading.Lock()

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return function(*args, **kwargs)

    return locked


def encoder_folder(settings: EncodeSettings) -> Path:
    """The folder of the encoder that `encode.model` and `encode.revision` name; a hub model is fetched once.

    Raises:
        ConfigError: neither the embedded encoder's name, nor a folder with a model, nor a hub id; or a revision of
            what has none.
        DataError: the package that ships the embedded encoder is not installed.
        EngineError: a hub model that is not on this machine and cannot be fetched.
    """
    model = settings.model
    folder = Path(model).expanduser()
    if _is_of_hub(model):
        return hub_folder(model, settings.revision, "encode.model")
    if model != EMBEDDED_MODEL and not is_model(folder):
        raise ConfigError(
            f"'encode.model' is {model!r}: accepted are {EMBEDDED_MODEL}, a folder with a sentence-transformers or "
            "transformers model (its modules.json or config.json is looked for), or the id of a hub model, as in "
            "bert-base-uncased"
        )
    refuse_revision("encode", model, settings.revision)
    return package_file(EMBEDDED_ENCODER, "model/modules.json").parent if model == EMBEDDED_MODEL else folder


def _is_of_hub(model: str) -> bool:
    return model != EMBEDDED_MODEL and is_hub_id(model)


def _identity(settings: EncodeSettings, folder: Path) -> tuple[str, str]:
    """Name and revision: a hub model's commit, else a hash of the files."""
    if _is_of_hub(settings.model):
        return settings.model, folder.name
    return settings.model if settings.model == EMBEDDED_MODEL else folder.name, hash_model(folder)
