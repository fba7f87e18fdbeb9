"""Texts to vectors with a frozen sentence encoder from local files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kellm_features.errors import ConfigError, EngineError, MissingExtraError, first_line
from kellm_features.knowledge.modelfiles import hash_model, quiet_loading
from kellm_features.knowledge.parallel import cpu_workers, side_by_side
from kellm_features.resources import EMBEDDED_ENCODER, package_file
from kellm_features.settings import EncodeSettings

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
ENCODER_VERSION = 1
"""Of the way in which texts are cut and pooled: raise it when vectors change although the weights do not."""


class Encoder:
    """A sentence-transformers model; texts beyond its window are cut into chunks and pooled.

    A text that fits the window gets exactly the vector that `SentenceTransformer.encode` gives. A longer one is cut
    at word starts into chunks that fill the window, and its vector is the mean of the chunks' vectors weighted by
    their tokens, brought to unit length where the model's own vectors have it.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        """Load the model that `encode.model` names: the embedded one, or a folder in sentence-transformers layout.

        Raises:
            ConfigError: neither of the two.
            EngineError: the folder holds no usable model.
            MissingExtraError: sentence-transformers is not installed.
        """
        folder = encoder_folder(settings.model)
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise MissingExtraError("encode", "sentence_transformers", "The stage 'encode'") from error
        try:
            with quiet_loading():
                self._model: Any = SentenceTransformer(str(folder), device=settings.device, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise EngineError(f"the encoder in {folder} cannot be loaded: {first_line(error)}") from error
        self._batch_size = settings.batch_size
        self._workers = cpu_workers() if self._model.device.type == "cpu" else 1
        # Wrapped on the instance: its class comes from a lazy import, so there is nothing to subclass up here.
        self._model.preprocess = _one_at_a_time(self._model.preprocess)  # type: ignore[method-assign]
        self._unit = any(type(module).__name__ == "Normalize" for module in self._model)
        name = settings.model if settings.model == EMBEDDED_MODEL else folder.name
        self.revision = hash_model(folder)
        self.model_id = name
        self.encoder_id = f"{name}@{self.revision[:16]}/{ENCODER_VERSION}"
        dim = self._model.get_embedding_dimension()
        if dim is None:
            raise EngineError(
                f"the encoder in {folder} does not tell the length of its vectors: choose another encode.model"
            )
        self.dim: int = dim

    def encode(self, texts: Sequence[str], advance: Callable[[float], object] | None = None) -> npt.NDArray[np.float32]:
        """Vectors of texts, in order.

        Args:
            texts: any length, any number.
            advance: called with the number of chunks after each slice of the work.

        Returns:
            float32, shape (len(texts), dim).
        """
        chunks: list[str] = []
        weights: list[int] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            for chunk, tokens in self._cut(text):
                chunks.append(chunk)
                weights.append(tokens)
                owners.append(owner)
        vectors = self._encode_chunks(chunks, weights, advance)
        pooled = np.zeros((len(texts), self.dim), dtype=np.float64)
        weight = np.asarray(weights, dtype=np.float64)
        total = np.bincount(owners, weight, minlength=len(texts)) if owners else np.zeros(0)
        np.add.at(pooled, owners, vectors * weight[:, None])
        pooled /= np.maximum(total, 1.0)[:, None]
        several = np.bincount(owners, minlength=len(texts)) > 1 if owners else np.zeros(0, dtype=bool)
        if self._unit and several.any():
            pooled[several] /= np.maximum(np.linalg.norm(pooled[several], axis=1, keepdims=True), 1e-12)
        return pooled.astype(np.float32)

    def _encode_chunks(
        self, chunks: list[str], weights: list[int], advance: Callable[[float], object] | None
    ) -> npt.NDArray[np.float64]:
        """Longest first, so that like lengths share a batch."""
        vectors = np.zeros((len(chunks), self.dim), dtype=np.float64)
        order = sorted(range(len(chunks)), key=lambda i: (-weights[i], chunks[i]))
        slices = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

        def encode(part: list[int]) -> Any:
            return self._model.encode(
                [chunks[i] for i in part], batch_size=len(part), convert_to_numpy=True, show_progress_bar=False
            )

        for part, encoded in zip(slices, side_by_side(encode, slices, self._workers), strict=True):
            vectors[part] = encoded
            if advance is not None:
                advance(len(part))
        return vectors

    def _cut(self, text: str) -> list[tuple[str, int]]:
        """Chunks of a text with their token counts: the text itself where it fits."""
        tokenizer = self._model.tokenizer
        room = self._model.get_max_seq_length() - tokenizer.num_special_tokens_to_add()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        if len(offsets) <= room:
            return [(text, max(1, len(offsets)))]
        words = encoded.word_ids()
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


def encoder_folder(model: str) -> Path:
    """The folder of an encoder.

    Raises:
        ConfigError: neither the embedded encoder's name nor a folder with a model.
        DataError: the package that ships the embedded encoder is not installed.
    """
    if model == EMBEDDED_MODEL:
        return package_file(EMBEDDED_ENCODER, "model/modules.json").parent
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"'encode.model' is {model!r}: accepted are {EMBEDDED_MODEL} or a folder with a sentence-transformers "
            "or transformers model (its config.json is looked for)"
        )
    return folder
