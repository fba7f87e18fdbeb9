"""`kellm evaluate`: what knowledge is worth, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, SetOption, announce, settings_from

if TYPE_CHECKING:
    from rich.table import Table


@app.command("evaluate")
def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results; a second call goes on there.")],
    suite: Annotated[
        Literal["ctr", "cold", "all"],
        typer.Option(help="ctr: the ladder of arms. cold: items without interactions, and contrastive forms."),
    ] = "all",
    data: Annotated[
        Path | None, typer.Option(help="Folder of a MovieLens release. Default: [data] of the settings.")
    ] = None,
    wiki: Annotated[Path | None, typer.Option(help="Wikipedia dump. Default: [wiki] of the settings.")] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(help="Texts of a model that saw no page: JSON by item id, or Parquet (item_id, description)."),
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Compare arms on clicks and on cold items: tables, pictures and results.csv, every figure with its interval."""
    from kellm_features.evaluation.prepare import prepare, with_data
    from kellm_features.evaluation.publish import publish
    from kellm_features.evaluation.suite import run_suite, studies
    from kellm_features.pipeline import locked

    settings = with_data(settings_from(config, overrides), data, wiki)
    with locked(out):
        world = prepare(settings, suite, out, descriptions=descriptions, listener=announce)
        wanted = studies(world, suite)
        tables: list[Table] = []
        for known in run_suite(world, wanted):  # what is known is on disk before the next study begins
            tables = publish(world, wanted, known.rows, known.outcomes)
    for table in tables:
        stdout.print(table)
    stdout.print(f"\nresults: {out / 'results.csv'}\npage: {out / 'evaluation.html'}", soft_wrap=True)
