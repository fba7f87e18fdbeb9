"""Model folders on local disk: what they hold, in one hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from kellm_features.artifacts import sha256_file

_SHAPING = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that shape its output, by relative name: weights, configs, tokenizer."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in _SHAPING
    }


def hash_model(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model's files."""
    digest = hashlib.sha256()
    for name, path in model_files(folder).items():
        digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen while a model loads."""
    hf_logging: Any = import_module("transformers.utils.logging")
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
