"""`kellm fetch`: embeddings as the online store serves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, SetOption, settings_from


@app.command()
def fetch(
    ids: Annotated[list[str], typer.Argument(help="Item ids (user ids with --view user_knowledge_embedding).")],
    view: Annotated[str, typer.Option("--view", help="Feature view.")] = "item_knowledge_embedding",
    repo: Annotated[Path | None, typer.Option("--repo", help="Feast repository. Default: store.repo.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Whole vectors, one JSON object a line.")] = False,
) -> None:
    """Print embeddings' heads, found flags, version and age."""
    from kellm_features.cli.show import vector_table
    from kellm_features.store.fetch import fetch_embeddings

    fetched = fetch_embeddings(repo or settings_from(config, overrides).store.repo, ids, view=view)
    if not as_json:
        stdout.print(vector_table(fetched))
        return
    rows = zip(fetched.ids, fetched.found, fetched.version, fetched.age_s, fetched.values, strict=True)
    for key, found, version, age_s, vector in rows:
        line = {
            "id": key,
            "found": bool(found),
            "version": version,
            "age_s": float(age_s) if found else None,
            "embedding": [float(value) for value in vector] if found else None,
        }
        typer.echo(json.dumps(line))
