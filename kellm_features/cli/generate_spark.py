"""`kellm generate-spark`: descriptions of a catalogue, or profiles of users, on Spark."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, SetOption, settings_from

if TYPE_CHECKING:
    from rich.table import Table

    from kellm_features.usage import Usage

DEAD_LETTERS_LEFT = 3
"""Exit code: every row has a text, and some requests failed for good."""


@app.command("generate-spark")
def generate_spark(
    side: Annotated[Literal["item", "user"], typer.Option(help="What is described.")],
    items: Annotated[str, typer.Option(help="Parquet or CSV with item_id, title, year and genres.")],
    out: Annotated[str, typer.Option("--out", help="Parquet folder to write; its work stays in OUT.work.")],
    links: Annotated[str | None, typer.Option(help="Items: folder of  kellm link. Without: closed-book.")] = None,
    pages: Annotated[str | None, typer.Option(help="Items: folder of  kellm wiki.")] = None,
    users: Annotated[str | None, typer.Option(help="Users: user_id, gender, age and occupation.")] = None,
    interactions: Annotated[str | None, typer.Option(help="Users: ingest/interactions.parquet of a run.")] = None,
    descriptions: Annotated[str | None, typer.Option(help="Users: what --side item wrote.")] = None,
    engine: Annotated[str | None, typer.Option(help="Default: generate.engine, or generate.user_engine.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: generate.model.")] = None,
    domain: Annotated[str | None, typer.Option(help="Default: generate.domain.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of one text. Default: generate.max_tokens.")] = None,
    factors: Annotated[bool, typer.Option("--factors", help="Ask for one text per factor.")] = False,
    shards: Annotated[int | None, typer.Option(min=1, help="Tasks. Default: one per 2048 rows.")] = None,
    work: Annotated[str | None, typer.Option(help="Work folder, on a file system that all executors see.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that others wrote.")] = False,
) -> None:
    """Write descriptions of items or profiles of users over Spark; a killed run goes on where it was.

    Exits with 3 where requests failed for good: the same command asks for those again.
    """
    given = {
        "engine" if side == "item" else "user_engine": engine,
        "model": model,
        "domain": domain,
        "max_tokens" if side == "item" else "user_max_tokens": max_tokens,
        "factors": factors or None,
    }
    told = [f"generate.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    settings = settings_from(config, [*(overrides or []), *told])
    from kellm_features.usage import measure
    from kellm_spark.descriptions import GenerateJob, run_generate_job
    from kellm_spark.session import get_session, stop_session, submitted

    paths = {
        "items": items,
        "links": links,
        "pages": pages,
        "users": users,
        "interactions": interactions,
        "descriptions": descriptions,
    }
    inputs = {name: path for name, path in paths.items() if path is not None}
    job = GenerateJob(side, inputs, out, work, shards, overwrite)
    try:
        with measure() as usage:
            manifest = run_generate_job(get_session(settings.spark), job, settings)
    finally:
        stop_session()
    stdout.print(_summary(manifest, usage, embedded=not submitted()))
    stdout.print(f"{'descriptions' if side == 'item' else 'profiles'}: {out}", soft_wrap=True)
    if manifest["dead_letters"]:
        raise typer.Exit(DEAD_LETTERS_LEFT)


def _summary(manifest: dict[str, Any], usage: Usage, *, embedded: bool) -> Table:
    from kellm_features.cli.show import add_usage, plain_table

    table = plain_table(f"Texts of {manifest['side']}s, by {manifest['engine']}", ("what", "left"), ("count", "right"))
    table.add_row(f"{manifest['side']}s", f"{manifest['rows']:,}")
    for source, rows in manifest["by_source"].items():
        table.add_row(f"  {source}", f"{rows:,}")
    table.add_row("dead letters", f"{manifest['dead_letters']:,}")
    table.add_row("shards", f"{manifest['shards']:,}")
    table.add_row("  finished before", f"{manifest['shards_skipped']:,}")
    table.add_row("completions, of this run", f"{manifest['generated']:,}")
    table.add_row("  kept from earlier ones", f"{manifest['cache_hits']:,}")
    table.add_row("tokens of prompts", f"{manifest['prompt_tokens']:,}")
    table.add_row("tokens of answers", f"{manifest['completion_tokens']:,}")
    add_usage(table, usage, embedded=embedded)
    return table
