"""`kellm swing`: a stage of a run, or the SWING pairs of any table of interactions."""

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


@app.command("swing")
def swing(
    ctx: typer.Context,
    out: Annotated[
        str, typer.Option("--out", help="Directory of the run; with --interactions, the Parquet folder to write.")
    ] = "runs/default",
    config: ConfigOption = None,
    overrides: SetOption = None,
    interactions: Annotated[
        str | None,
        typer.Option(help="Parquet or CSV with user_id and item_id (integers or strings), wherever Spark can read."),
    ] = None,
    side: Annotated[Literal["item", "user"] | None, typer.Option(help="Whom to pair.")] = None,
    preset: Annotated[
        Literal["kellmrec", "yang", "flink", "alink", "pai-rec"],
        typer.Option(help="Constants of the formula."),
    ] = "pai-rec",
    alpha: Annotated[float | None, typer.Option(help="α of α + |I_u ∩ I_v|, instead of the preset's.")] = None,
    alpha1: Annotated[
        float | None, typer.Option(help="α₁ of w_u = (α₁ + |I_u|)^(−β), instead of the preset's.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="β, instead of the preset's.")] = None,
    top_k: Annotated[int, typer.Option(help="Neighbours kept of each.")] = 100,
    max_witnesses: Annotated[
        int | None, typer.Option(help="Most witnesses (of an item: users) paired for one; the rest is sampled away.")
    ] = None,
    min_user_items: Annotated[int, typer.Option(help="Leave out users with fewer items.")] = 1,
    max_user_items: Annotated[int | None, typer.Option(help="Leave out users with more items.")] = None,
    max_item_users: Annotated[int | None, typer.Option(help="Leave out items with more users.")] = None,
    before: Annotated[
        str | None, typer.Option(help="Leave out rows at or after this moment: ISO 8601 (UTC), or epoch seconds.")
    ] = None,
    time_column: Annotated[
        str | None, typer.Option(help="What --before is about. Default: event_timestamp, else timestamp.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help='Part of a table with a column "split", or "all". Default: train.')
    ] = None,
    mode: Annotated[
        Literal["auto", "csr", "block"],
        typer.Option(help="csr: the graph whole on every host; block: shuffled. The pairs are the same."),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """SWING pairs, on Spark: of both sides from train rows, a stage of a run; or of any table with --interactions."""
    settings = settings_from(config, overrides)
    if interactions is None:
        if given := given_options(ctx):
            raise ConfigError(f"{', '.join(given)}: only with --interactions; a stage takes --set swing.key=value")
        run_stage("swing", settings, Path(out))
        return
    if side is None or not given_options(ctx, "out"):
        raise ConfigError("--interactions needs --side (item or user) and --out (the folder to write)")
    from kellm_features.usage import measure
    from kellm_spark.session import stop_session, submitted
    from kellm_spark.swing import SwingOptions, swing_parameters
    from kellm_spark.swing.job import SwingJob, run_swing_job

    options = SwingOptions(
        side=side,
        parameters=swing_parameters(preset, alpha, alpha1, beta),
        top_k=top_k,
        max_witnesses=max_witnesses,
        min_user_items=min_user_items,
        max_user_items=max_user_items,
        max_item_users=max_item_users,
        mode=mode,
    )
    job = SwingJob(interactions, out, options, before, time_column, split, overwrite)
    try:
        with measure() as usage:
            manifest = run_swing_job(job, settings.spark)
    finally:
        stop_session()
    stdout.print(_summary(manifest, usage, embedded=not submitted()))
    stdout.print(f"pairs: {out}", soft_wrap=True)


def _summary(manifest: dict[str, Any], usage: Usage, *, embedded: bool) -> Table:
    from kellm_features.cli.show import add_usage, plain_table

    hubs = manifest["hubness"]
    side = manifest["side"]
    table = plain_table(f"SWING, {side} side", ("what", "left"), ("count", "right"))
    table.add_row("interactions", f"{manifest['rows_in']:,}")
    for reason, count in manifest["dropped"].items():
        table.add_row(f"  {reason}", f"−{count:,}")
    table.add_row(f"{side}s", f"{manifest['targets']:,}")
    if manifest["max_witnesses"]:
        table.add_row(f"  sampled to {manifest['max_witnesses']:,} witnesses", f"{manifest['capped_targets']:,}")
    table.add_row(f"  with a neighbour, of {manifest['top_k']:,} at most", f"{hubs['anchors']:,}")
    table.add_row("pairs", f"{manifest['pairs']:,}")
    table.add_row("different neighbours at rank 1", f"{hubs['distinct_top1']:,}")
    table.add_row(f"  most often {hubs['hub']}", f"{hubs['max_top1']:,}")
    add_usage(table, usage, embedded=embedded, seconds=f"seconds (mode {manifest['mode']})")
    return table
