"""`kellm publish-spark`: a version straight from tables that Spark reads."""

from __future__ import annotations

from typing import Annotated

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.rollout import RepoOption, settings_with_repo
from kellm_features.cli.run import ConfigOption, SetOption
from kellm_features.errors import ConfigError


@app.command("publish-spark")
def publish_spark(
    version: Annotated[str, typer.Option("--version", help="Name of the version.")],
    items: Annotated[
        str | None, typer.Option(help="Parquet with item_id and embedding (model_id, content_hash), anywhere.")
    ] = None,
    users: Annotated[str | None, typer.Option(help="The same with user_id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder or URI of the offline partitions. Default: data/ of the repository.")
    ] = None,
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Publish embeddings from Spark's partitions straight to Redis; a killed one goes on when run again."""
    from kellm_spark.publish import publish_embeddings
    from kellm_spark.session import get_session, stop_session
    from kellm_spark.storage import read_table

    paths = {"item_knowledge_embedding": items, "user_knowledge_embedding": users}
    if not any(paths.values()):
        raise ConfigError("publish-spark needs --items or --users: a Parquet file or folder of embeddings")
    settings = settings_with_repo(config, overrides, repo)
    try:
        session = get_session(settings.spark)
        frames = {view: read_table(session, path) for view, path in paths.items() if path}
        done = publish_embeddings(session, frames, settings.store.repo, version=version, data=data)
    finally:
        stop_session()
    rows = ", ".join(f"{held.rows:,} of {view}" for view, held in done.views.items())
    stdout.print(f"published {done.name}: {rows}; serve it with  kellm promote {done.name}", soft_wrap=True)
