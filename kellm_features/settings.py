"""One frozen, typed settings tree, read from `kellm.toml`.

Every stage gets its own section; nothing else reads the environment, and secrets never stand in the file.
An unknown key, a wrong type or a value out of range is a `ConfigError` that names the key, the value seen
and what is accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from kellm_features.errors import ConfigError
from kellm_features.sections.base import Section
from kellm_features.sections.data import (
    ColumnMap,
    DataSettings,
    HistorySettings,
    LinkSettings,
    RunSettings,
    SparkSettings,
    SwingSettings,
    WikiSettings,
)
from kellm_features.sections.knowledge import EncodeSettings, GenerateSettings, ServerSettings, VllmSettings
from kellm_features.sections.serving import StoreSettings, VerifySettings
from kellm_features.sections.training import EvaluateSettings, TrainSettings

__all__ = [
    "ColumnMap",
    "DataSettings",
    "EncodeSettings",
    "EvaluateSettings",
    "GenerateSettings",
    "HistorySettings",
    "LinkSettings",
    "RunSettings",
    "Section",
    "ServerSettings",
    "Settings",
    "SparkSettings",
    "StoreSettings",
    "SwingSettings",
    "TrainSettings",
    "VerifySettings",
    "VllmSettings",
    "WikiSettings",
    "expand_environment",
    "llm_api_key",
    "load_settings",
    "prepare_vllm",
    "serve_token",
    "share_metrics_folder",
    "show_gpus",
    "user_cache_dir",
]


class Settings(Section):
    """The whole tree. Paths are resolved against the folder of the file they stand in."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    history: HistorySettings = HistorySettings()
    spark: SparkSettings = SparkSettings()
    swing: SwingSettings = SwingSettings()
    wiki: WikiSettings = WikiSettings()
    link: LinkSettings = LinkSettings()
    generate: GenerateSettings = GenerateSettings()
    encode: EncodeSettings = EncodeSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _positives_are_kept(self) -> Settings:
        # Whoever lowers swing.top_k below a default that was never asked for means the shorter lists.
        if self.swing.top_k < self.train.top_k != TrainSettings().top_k:
            raise ValueError(
                f"train.top_k = {self.train.top_k} draws from more neighbours than swing.top_k = {self.swing.top_k} "
                f"keeps: raise swing.top_k to {self.train.top_k}, or lower train.top_k"
            )
        return self

    def hash_of(self, sections: Iterable[str]) -> str:
        """SHA-256 over the named sections, without paths (inputs are hashed themselves) and tuning knobs."""
        picked = {name: self.shaping(name) for name in sorted(sections)}
        return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()

    def shaping(self, section: str) -> dict[str, Any]:
        """The keys of a section that shape its stage's rows, with their values."""
        return _shaping(getattr(self, section))


def _shaping(section: Section) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        value = getattr(section, name)
        if (isinstance(extra, dict) and extra.get("tuning")) or isinstance(value, Path):
            continue
        kept[name] = _shaping(value) if isinstance(value, Section) else value
    return kept


def llm_api_key() -> str | None:
    """The key of the inference server: `$OPENAI_API_KEY`, None where it is unset or empty."""
    return os.environ.get("OPENAI_API_KEY") or None


def prepare_vllm(cpu_kvcache_gib: int) -> None:
    """Tell vLLM, before it is imported, what it can be told in no other way; what is set already stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_kvcache_gib))


def show_gpus(addresses: Iterable[str]) -> None:
    """Hide from this process all GPUs but these, before anything looks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(addresses)


def serve_token() -> str | None:
    """The bearer token that `kellm serve` asks for: `$KELLM_SERVE_TOKEN`, None where it is unset or empty."""
    return os.environ.get("KELLM_SERVE_TOKEN") or None


def share_metrics_folder(folder: str) -> None:
    """Tell prometheus_client, here and in processes started from here, where the workers' counts lie.

    It can be told in no other way, and before it is imported.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder


def expand_environment(text: str) -> str:
    """`$NAME` and `${NAME}` replaced by the environment, as Feast does with feature_store.yaml."""
    return os.path.expandvars(text)


def user_cache_dir() -> Path:
    """Where converted models are kept between runs: `$XDG_CACHE_HOME/kellm_features`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "kellm_features"


def load_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Read `kellm.toml` and apply `section.key=value` overrides.

    Args:
        path: the file; None takes the defaults.
        overrides: values are read as TOML (`train.dim=32`), and as plain text where they are not TOML.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of range.
    """
    tree: dict[str, Any] = {}
    where = "--set"
    if path is not None:
        where = str(path)
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist: name an existing file, or run  kellm init  first") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} is not readable TOML: {error}") from error
        tree = _resolve_paths(tree, path.parent)
    for override in overrides:
        _apply(tree, override)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {override!r}: expected section.key=value, as in train.dim=32")
    try:
        value: Any = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a section")
    node[parts[-1]] = value


_PATH_KEYS = {
    "data": ("path", "interactions", "items", "users"),
    "wiki": ("dump",),
    "train": ("tensorboard",),
    "store": ("repo",),
}
_PATH_OR_NAME_KEYS = {"generate": ("domain", "model"), "encode": ("model",)}
"""Names of something shipped or on a hub, or paths; a relative path is told by its suffix, or by being there."""


def _resolve_paths(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    resolved = {name: dict(section) if isinstance(section, Mapping) else section for name, section in tree.items()}
    for name, keys in _PATH_KEYS.items():
        section = resolved.get(name)
        for key in keys if isinstance(section, dict) else ():
            assert isinstance(section, dict)
            if isinstance(section.get(key), str):
                section[key] = str(folder / Path(section[key]).expanduser())
            elif isinstance(section.get(key), list):
                section[key] = [str(folder / Path(value).expanduser()) for value in section[key]]
    for name, keys in _PATH_OR_NAME_KEYS.items():
        section = resolved.get(name)
        for key in keys if isinstance(section, dict) else ():
            assert isinstance(section, dict)
            value = section.get(key)
            if not isinstance(value, str):
                continue
            path = folder / Path(value).expanduser()
            if value.startswith((".", "~")) or value.endswith((".toml", ".gguf")) or ("/" in value and path.exists()):
                section[key] = str(path)
    return resolved


def _explain(error: ValidationError) -> str:
    """The first complaint in one line: key, value seen, what is accepted."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "settings"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Settings
        for part in first["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
        return f"unknown key '{key}'; known there: {', '.join(section.model_fields)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # of several sections: the value seen would be all of the settings
        return f"{message}{more}"
    of_section = first["type"] == "value_error" and isinstance(first["input"], dict)  # its message names the values
    if of_section or key.startswith("generate.server"):  # whoever puts a key there is not to find it in a log as well
        return f"'{key}': {message[0].lower()}{message[1:]}{more}"
    return f"'{key}' is {first['input']!r}: {message[0].lower()}{message[1:]}{more}"
