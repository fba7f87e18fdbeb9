"""`kellm fetch`: embeddings as the online store serves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.rollout import RepoOption, settings_with_repo
from kellm_features.cli.run import ConfigOption, SetOption
from kellm_features.errors import StoreError


@app.command()
def fetch(
    ids: Annotated[list[str], typer.Argument(help="Item ids (user ids with --view user_knowledge_embedding).")],
    view: Annotated[str, typer.Option("--view", help="Feature view.")] = "item_knowledge_embedding",
    version: Annotated[str | None, typer.Option("--version", help="A version that is not the active one.")] = None,
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Whole vectors, one JSON object a line.")] = False,
) -> None:
    """Print embeddings' heads, found flags, version and age."""
    from kellm_features.cli.show import vector_table
    from kellm_features.store.reader import EmbeddingReader

    folder: Path = settings_with_repo(config, overrides, repo).store.repo
    with EmbeddingReader.from_repo(folder, view, version=version) as reader:
        keys = ids if reader.id_type == "string" else [_integer(text) for text in ids]
        fetched = reader.get(keys)
    if not as_json:
        stdout.print(vector_table(keys, fetched))
        return
    for key, found, age_s, vector in zip(keys, fetched.found, fetched.age_s, fetched.values, strict=True):
        line = {
            "id": key,
            "found": bool(found),
            "version": fetched.version if found else None,
            "age_s": float(age_s) if found else None,
            "embedding": [float(value) for value in vector] if found else None,
        }
        typer.echo(json.dumps(line))


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise StoreError(f"id {text!r} is not an integer, and ids are int64 here: name an id like 50") from error
