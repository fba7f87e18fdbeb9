"""`kellm wiki`: a stage of a run, or the pages of any MediaWiki dump."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, SetOption, given_options, run_stage, settings_from
from kellm_features.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from rich.table import Table

    from kellm_features.usage import Usage


@app.command("wiki")
def wiki(
    ctx: typer.Context,
    out: Annotated[
        str, typer.Option("--out", help="Directory of the run; with --dump, the Parquet folder to write.")
    ] = "runs/default",
    config: ConfigOption = None,
    overrides: SetOption = None,
    dump: Annotated[
        list[str] | None,
        typer.Option(help=".xml or .xml.bz2, a part of either, a folder or pattern of parts, or a URI; repeatable."),
    ] = None,
    lead_only: Annotated[
        bool, typer.Option("--lead-only", help="Leave `sections` empty and strip no more than the lead.")
    ] = False,
    catalogue: Annotated[
        list[str] | None,
        typer.Option(help="Read only the pages that these items could link to, by the multistream index; repeatable."),
    ] = None,
    domain: Annotated[
        Literal["movies", "television", "books", "music", "games"],
        typer.Option(help="What the catalogue's items are; articles mention pages of all names and need them all."),
    ] = "movies",
    index: Annotated[
        str | None, typer.Option(help="Multistream index. Default: the one beside each dump, by Wikimedia's names.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """A MediaWiki dump into a table of pages, on Spark: a stage of a run; or of any dump with --dump."""
    settings = settings_from(config, overrides)
    if not dump:
        if given := given_options(ctx):
            raise ConfigError(f"{', '.join(given)}: only with --dump; a stage takes --set wiki.key=value")
        run_stage("wiki", settings, Path(out))
        return
    if not given_options(ctx, "out"):
        raise ConfigError("--dump needs --out (the folder to write)")
    if not catalogue and (wrong := given_options(ctx, "index", "domain")):
        raise ConfigError(f"{', '.join(wrong)}: only with --catalogue, whose items say which pages to read")
    from kellm_features.usage import measure
    from kellm_spark.dump.job import WikiJob, run_wiki_job
    from kellm_spark.session import stop_session, submitted

    job = WikiJob(tuple(dump), out, lead_only=lead_only, index=index, domain=domain, overwrite=overwrite)
    try:
        with measure() as usage:
            manifest = run_wiki_job(job, settings.spark, _reader(catalogue) if catalogue else None)
    finally:
        stop_session()
    stdout.print(_summary(manifest, usage, embedded=not submitted()))
    stdout.print(f"pages: {out}", soft_wrap=True)


def _reader(catalogue: list[str]) -> Any:
    def read(session: SparkSession) -> DataFrame:
        from kellm_features.cli.catalogue import read_catalogue

        frames = [read_catalogue(session, path) for path in catalogue]
        items = frames[0]
        for frame in frames[1:]:
            items = items.union(frame)
        return items

    return read


def _summary(manifest: dict[str, Any], usage: Usage, *, embedded: bool) -> Table:
    from kellm_features.cli.show import add_usage, plain_table

    name = manifest["wiki"]["dbname"] or manifest["wiki"]["language"] or "a wiki without a name"
    table = plain_table(f"Pages of {name}", ("what", "left"), ("count", "right"))
    table.add_row("pages in the dump" if not manifest["catalogue"] else "pages looked up", f"{manifest['pages']:,}")
    if manifest["other_namespaces"]:
        table.add_row("  of other namespaces", f"−{manifest['other_namespaces']:,}")
    for reason, count in manifest["skipped"].items():
        table.add_row(f"  skipped: {reason}", f"−{count:,}")
    table.add_row("rows", f"{manifest['rows']:,}")
    for what in ("redirects", "disambiguations", "dated"):
        table.add_row(f"  {what}", f"{manifest[what]:,}")
    for kind, count in list(manifest["evidence"].items())[:3]:
        table.add_row(f"  evidence of kind {kind}", f"{count:,}")
    xml_mb = manifest["xml_bytes"] / 1e6
    table.add_row("MB of XML read", f"{xml_mb:,.1f}")
    table.add_row("MB of XML a second, Spark's start included", f"{xml_mb / usage.seconds:,.1f}")
    add_usage(table, usage, embedded=embedded)
    return table
