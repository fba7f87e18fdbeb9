"""`kellm init`: a kellm.toml and a Feast repository for one's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from pydantic.fields import FieldInfo

from kellm_features.cli.app import app, stdout
from kellm_features.errors import ConfigError
from kellm_features.settings import Section, Settings

HEADER = """\
# Settings of kellm. Every key is shown with its default; a key with no default is commented out.
# Paths are relative to this file. `kellm run` reads ./kellm.toml; `--set section.key=value` overrides one key.
"""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Directory for kellm.toml and feature_repo/.")],
    ids: Annotated[str, typer.Option("--ids", help="Type of the ids: int64 or string.")] = "int64",
) -> None:
    """Write a kellm.toml and a feature_repo for your own data."""
    from kellm_features.store.scaffold import write_feature_repo

    if ids not in ("int64", "string"):
        raise ConfigError(f"--ids is {ids!r}: int64 and string are accepted")
    config = folder / "kellm.toml"
    if config.exists():
        raise ConfigError(f"{config} exists and is left as it is: choose another directory, or remove it")
    written = write_feature_repo(folder / "feature_repo", id_type=cast(Literal["int64", "string"], ids))
    config.write_text(HEADER + settings_toml(), encoding="utf-8")
    for path in [config, *written]:
        stdout.print(f"wrote {path}", soft_wrap=True)
    stdout.print(
        f"\nnext: name your interactions and your catalogue under [data] in {config}, then\n"
        f"  cd {folder} && kellm doctor && kellm run --out runs/first",
        soft_wrap=True,
    )


def settings_toml() -> str:
    """All settings as commented TOML, made from the models themselves; `data.format` is set to `table`."""
    settings = Settings.model_validate({"data": {"format": "table"}})
    blocks = []
    for name in Settings.model_fields:
        section = getattr(settings, name)
        doc = (type(section).__doc__ or "").strip().splitlines()[0]
        blocks.append(f"\n# {doc}\n[{name}]\n" + _section_toml(section, name))
    return "".join(blocks)


def _section_toml(section: Section, prefix: str) -> str:
    lines, nested = [], []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            doc = (type(value).__doc__ or "").strip().splitlines()[0]
            nested.append(f"\n# {doc}\n[{prefix}.{key}]\n" + _section_toml(value, f"{prefix}.{key}"))
            continue
        comment = _comment(field)
        if comment:
            lines.append(f"# {comment}")
        lines.append(f'# {key} = "…"' if value is None else f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n" + "".join(nested)


def _comment(field: FieldInfo) -> str:
    choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
    told = [field.description] if field.description else []
    if choices:
        told.append("one of: " + ", ".join(str(choice) for choice in choices))
    return "; ".join(told)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Path):
        return json.dumps(str(value))
    return json.dumps(value, ensure_ascii=False)
