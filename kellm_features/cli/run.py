"""`kellm run`, `kellm quickstart` and one command per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kellm_features.artifacts import require_artifact
from kellm_features.cli.app import INCOMPLETE, app, stderr, stdout
from kellm_features.pipeline import StageOutcome, run_stages, stages_between, why_stale
from kellm_features.settings import Settings, load_settings
from kellm_features.stages import STAGES

DEFAULT_CONFIG = Path("kellm.toml")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Settings file. Default: ./kellm.toml where there is one.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")]
OutOption = Annotated[Path, typer.Option("--out", help="Directory of the run's artefacts.")]


def settings_from(config: Path | None, overrides: list[str] | None) -> Settings:
    """The settings of a command line: the named file, else ./kellm.toml, else the defaults."""
    if config is None and DEFAULT_CONFIG.exists():
        config = DEFAULT_CONFIG
    return load_settings(config, overrides or ())


def given_options(ctx: typer.Context, *names: str) -> list[str]:
    """The options of a command that its caller gave, as written on the command line.

    Args:
        ctx: of the command.
        names: parameters to look at; none: all but those that every stage has.
    """
    told = []
    for option in ctx.command.params:
        name = option.name or ""
        source = ctx.get_parameter_source(name)
        wanted = name in names if names else name not in ("out", "config", "overrides")
        if wanted and source is not None and source.name != "DEFAULT":
            told.append(option.opts[0])
    return told


@app.command()
def run(
    out: OutOption = Path("runs/default"),
    config: ConfigOption = None,
    overrides: SetOption = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage; earlier ones must be fresh.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Last stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and why.")] = False,
) -> None:
    """Run the stages that are stale, in order."""
    settings = settings_from(config, overrides)
    if dry_run:
        from kellm_features.cli.show import plan_table

        stdout.print(plan_table([(spec.name, why_stale(spec, settings, out)) for spec in stages_between(first, last)]))
        return
    outcomes = run_stages(settings, out, first=first, last=last, listener=announce)
    _close(outcomes, settings, out)


@app.command()
def quickstart(
    out: OutOption = Path("runs/quickstart"),
    overrides: SetOption = None,
) -> None:
    """MovieLens-100K, the sample Wikipedia and the embedded models, end to end on this machine."""
    settings = load_settings(None, overrides or ())
    outcomes = run_stages(settings, out, listener=announce)
    _close(outcomes, settings, out)


@app.command()
def report(out: OutOption = Path("runs/default"), config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Write report.html of a run, finished or not."""
    from kellm_features.report.html import write_report

    require_artifact(out, STAGES[0].name, needed_by="report")
    stdout.print(f"report: {write_report(out, settings_from(config, overrides))}", soft_wrap=True)


def announce(stage: str, event: str, outcome: StageOutcome | None) -> None:
    """Tell on stderr what a stage of a run is doing."""
    if event == "start":
        stderr.print(f"[cyan]…[/] {stage}")
        return
    assert outcome is not None
    manifest = outcome.artifact.manifest
    if event == "fresh":
        stderr.print(f"[dim]=[/] {stage:<9} unchanged, skipped [dim](made {manifest.created:%Y-%m-%d %H:%M} UTC)[/]")
    else:
        stderr.print(f"[green]✓[/] {stage:<9} {manifest.rows_out:>9,} rows in {manifest.seconds:.1f} s")


def _close(outcomes: list[StageOutcome], settings: Settings, out: Path) -> None:
    from kellm_features.cli import show

    stdout.print(show.stage_table(outcomes))
    if outcomes[-1].name != STAGES[-1].name:
        tell_what_is_left(outcomes)
        return
    from kellm_features.report.html import write_report

    stdout.print(show.neighbour_table(out))
    stdout.print(show.fetched_vector(settings, out))
    stdout.print(f"\nreport: {write_report(out, settings)}", soft_wrap=True)
    tell_what_is_left(outcomes)


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        out: OutOption = Path("runs/default"), config: ConfigOption = None, overrides: SetOption = None
    ) -> None:
        run_stage(name, settings_from(config, overrides), out)

    return command


def run_stage(name: str, settings: Settings, out: Path, *, anew: bool = False) -> StageOutcome:
    """One stage of a run, if it is stale or wanted anew."""
    from kellm_features.cli import show

    outcomes = run_stages(settings, out, first=name, last=name, anew=anew, listener=announce)
    stdout.print(show.stage_table(outcomes))
    return outcomes[0]


def tell_what_is_left(outcomes: Sequence[StageOutcome]) -> None:
    """Say which texts failed or wait; of failed ones the exit code tells too.

    Raises:
        typer.Exit: with code 3, where a request failed for good.
    """
    for outcome in outcomes:
        notes = outcome.artifact.manifest.notes
        if waiting := notes.get("waiting"):
            stderr.print(f"[yellow]{waiting:,} texts wait[/]: the token budget ended; the next run goes on with them")
        if letters := notes.get("dead_letters"):
            table = outcome.artifact.path / "dead_letters.parquet"
            stderr.print(
                f"[bold red]{letters:,} requests failed[/]: their items have a text from the page or the catalogue; "
                f"reasons stand in {table}; the next run asks again",
                soft_wrap=True,
            )
            raise typer.Exit(INCOMPLETE)


# The other stages have options of their own, in modules of their own (publish: rollout.py).
STAGE_HELP = {
    "ingest": "Read interactions, catalogue and users; label; split.",
    "encode": "Encode descriptions and profiles with a sentence encoder.",
    "export": "Adapt all encodings into a new embedding version.",
}
for _name, _help in STAGE_HELP.items():
    app.command(_name, help=_help)(_stage_command(_name))
