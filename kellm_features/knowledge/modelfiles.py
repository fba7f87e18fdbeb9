"""Model folders on local disk: what they hold, in one hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
