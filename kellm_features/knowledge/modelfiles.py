"""Model folders on local disk: what they hold, in one hash; and the folder of a model of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from kellm_features.artifacts import sha256_file
from kellm_features.errors import ConfigError, EngineError, MissingExtraError, first_line

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_SHAPING = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}

_FOREIGN = (
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.gguf"),
    *("onnx/*", "openvino/*", "coreml/*", "original/*", "consolidated*"),
)
"""The same weights in formats that neither transformers nor vLLM load: bert-base-uncased has 2.5 GB of them."""
_PICKLED = ("pytorch_model*",)
"""The same weights once more, where a model has safetensors."""


def is_hub_id(model: str) -> bool:
    """Whether a name has the form of a hub id, `name` or `organisation/name`; a path that exists wins over it."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).expanduser().exists()


def refuse_revision(section: str, model: str, revision: str | None) -> None:
    """Say that a model on disk has one version only, where settings name another.

    Raises:
        ConfigError: `revision` is given.
    """
    if revision is not None:
        raise ConfigError(
            f"'{section}.revision' is {revision!r}, and '{section}.model' = {model!r} has no revisions: leave it out, "
            "or name a hub model"
        )


def hub_folder(repo_id: str, revision: str | None, setting: str) -> Path:
    """The snapshot folder of a hub model: from the local cache where it lies there whole, else downloaded to it.

    The folder's name is the commit. A branch or tag that the cache knows is not looked up again, so that a run and
    its resumption read the same weights: to move on, set the revision to another commit, or remove the model from the
    cache. Place of the cache, mirror, token and offline mode are huggingface_hub's own (`HF_HOME`, `HF_ENDPOINT`,
    `HF_TOKEN`, `HF_HUB_OFFLINE`).

    Args:
        repo_id: `name` or `organisation/name`.
        revision: branch, tag or whole commit hash; None takes the main branch.
        setting: the setting that names the model, for the messages: `encode.model`.

    Raises:
        EngineError: the model is not in the cache and cannot be fetched.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        extra = "encode" if setting.startswith("encode.") else "llm"
        raise MissingExtraError(extra, "huggingface_hub", f"'{setting}' = {repo_id!r}, a model of the hub,") from error
    try:
        try:
            return _snapshot(repo_id, revision, offline=True)
        except LocalEntryNotFoundError:  # not there, or not whole
            logger.info("%s %s is not in the local cache: asking the hub", repo_id, revision or "")
        return _snapshot(repo_id, revision, offline=False)
    except Exception as error:  # besides OSErrors, whatever the HTTP client of this huggingface_hub raises
        at, option = (f" at revision {revision!r}", f" --revision {revision}") if revision else ("", "")
        raise EngineError(
            f"'{setting}' is {repo_id!r}: neither a model folder, nor whole in this machine's cache of the Hugging "
            f"Face hub{at}, nor to be fetched ({_reason(error)}): name a folder, correct the id, or run  "
            f"hf download {repo_id}{option}  where the hub can be reached"
        ) from error


def _snapshot(repo_id: str, revision: str | None, *, offline: bool) -> Path:
    """The snapshot without its weights' copies.

    Raises:
        LocalEntryNotFoundError: a file of it is missing on disk, and the hub is not to be asked or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(ignore: tuple[str, ...]) -> Path:
        folder = snapshot_download(repo_id, revision=revision, ignore_patterns=[*ignore], local_files_only=offline)
        return Path(folder)

    folder = fetch(_FOREIGN + _PICKLED)
    if not any(folder.rglob("*.safetensors")):
        folder = fetch(_FOREIGN)
    # Other programs leave snapshots of a config or a tokenizer alone, without the list that tells them incomplete.
    if not is_model(folder) or not any(p for suffix in ("safetensors", "bin") for p in folder.rglob(f"*.{suffix}")):
        raise LocalEntryNotFoundError(f"{folder.name[:12]} holds no configuration with safetensors or torch weights")
    return folder


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"
    if isinstance(error, GatedRepoError):
        return "its terms have to be accepted on the hub, and a token put in HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or a private one that asks for a token in HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision of it"
    return first_line(error).rstrip(". ")


def is_model(folder: Path) -> bool:
    """Whether a folder is laid out as transformers or sentence-transformers lay out a model."""
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


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
