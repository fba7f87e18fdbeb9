"""`kellm link`: a stage of a run, or the Wikipedia pages of any catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, SetOption, given_options, run_stage, settings_from
from kellm_features.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from kellm_features.usage import Usage


@app.command("link")
def link(
    ctx: typer.Context,
    out: Annotated[
        str, typer.Option("--out", help="Directory of the run; with --catalogue, the Parquet folder to write.")
    ] = "runs/default",
    config: ConfigOption = None,
    overrides: SetOption = None,
    catalogue: Annotated[
        str | None,
        typer.Option(help="MovieLens' movies.dat or movies.csv, or Parquet or CSV with item_id and title."),
    ] = None,
    wiki: Annotated[str | None, typer.Option(help="The folder that  kellm wiki --dump  wrote.")] = None,
    domain: Annotated[
        Literal["movies", "television", "books", "music", "games", "articles"],
        typer.Option(help="What the items are; of articles, all pages that a title mentions."),
    ] = "movies",
    method: Annotated[
        Literal["names", "edit-similarity"],
        typer.Option(help="names: right or silent. edit-similarity: KELLMRec's own, which links everything."),
    ] = "names",
    year_tolerance: Annotated[int, typer.Option(min=0, help="Years by which item and page may differ.")] = 1,
    min_similarity: Annotated[
        float, typer.Option(help="1 − Levenshtein/max(length) of a misspelt name, above 0 to 1.")
    ] = 0.9,
    max_links: Annotated[int, typer.Option(min=1, help="Pages of one article at most.")] = 5,
    decisions: Annotated[
        Path | None,
        typer.Option("--overrides", help="CSV with item_id and page (id, title or none): wins over the linker."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """Link items to Wikipedia pages, or abstain and say why, on Spark: a stage of a run; or of any --catalogue."""
    settings = settings_from(config, overrides)
    if catalogue is None:
        if given := given_options(ctx):
            raise ConfigError(f"{', '.join(given)}: only with --catalogue; a stage takes --set link.key=value")
        run_stage("link", settings, Path(out))
        return
    if wiki is None or not given_options(ctx, "out"):
        raise ConfigError("--catalogue needs --wiki (the folder of  kellm wiki) and --out (the folder to write)")
    from kellm_features.cli.catalogue import read_catalogue
    from kellm_features.usage import measure
    from kellm_spark.linking import LinkOptions
    from kellm_spark.linking.job import LinkJob, run_link_job
    from kellm_spark.session import get_session, stop_session, submitted

    options = LinkOptions(
        domain=domain,
        method=method,
        year_tolerance=year_tolerance,
        min_similarity=min_similarity,
        max_links=max_links,
    )
    try:
        with measure() as usage:
            session = get_session(settings.spark)
            job = LinkJob(catalogue, wiki, out, options, decisions, overwrite)
            manifest = run_link_job(session, read_catalogue(session, catalogue), job)
    finally:
        stop_session()
    stdout.print(_summary(manifest, usage, embedded=not submitted()))
    stdout.print(f"links: {out}", soft_wrap=True)


def _summary(manifest: dict[str, Any], usage: Usage, *, embedded: bool) -> Table:
    from kellm_features.cli.show import add_usage, plain_table

    table = plain_table(f"Links of {manifest['domain']}, by {manifest['method']}", ("what", "left"), ("count", "right"))
    table.add_row("items", f"{manifest['items']:,}")
    table.add_row(f"linked ({100 * manifest['coverage']:.1f} %)", f"{manifest['linked']:,}")
    for method, count in manifest["methods"].items():
        table.add_row(f"  {method}", f"{count:,}")
    table.add_row("not linked", f"{manifest['items'] - manifest['linked']:,}")
    for reason, count in manifest["reasons"].items():
        table.add_row(f"  {reason}", f"{count:,}")
    add_usage(table, usage, embedded=embedded)
    return table
