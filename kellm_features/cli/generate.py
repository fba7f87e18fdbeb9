"""`kellm generate`: the descriptions and profiles of a run, or what they would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kellm_features.artifacts import load_artifact, require_artifact
from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import (
    ConfigOption,
    OutOption,
    SetOption,
    given_options,
    run_stage,
    settings_from,
    tell_what_is_left,
)
from kellm_features.errors import ConfigError
from kellm_features.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from kellm_features.artifacts import Manifest
    from kellm_features.knowledge.estimate import Estimate


@app.command("generate")
def generate(
    ctx: typer.Context,
    out: OutOption = Path("runs/default"),
    config: ConfigOption = None,
    overrides: SetOption = None,
    side: Annotated[
        Literal["item", "user"] | None,
        typer.Option(help="Write this side alone; finished texts of the other stay. Default: both."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="transformers, vllm, openai (any such server), template, or one of your own.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Embedded name, folder, .gguf file, hub id, or a server's.")] = None,
    domain: Annotated[
        str | None, typer.Option(help="movies, books, articles, products, or the path of a TOML file.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Texts by the engine, most popular items and longest histories first. Default with --engine: all.",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Of one answer.")] = None,
    factors: Annotated[
        bool | None, typer.Option("--factors/--no-factors", help="Ask for one text per factor, as JSON.")
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option(min=0, help="Prompt and answer tokens of this run at most; the rest waits.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep finished texts (default), or write all anew.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be asked for, and what it costs.")] = False,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=0, help="For --dry-run: the engine's speed. Default: the last run's.")
    ] = None,
    prompt_price: Annotated[
        float | None, typer.Option(min=0, help="For --dry-run: of a million prompt tokens.")
    ] = None,
    answer_price: Annotated[
        float | None, typer.Option(min=0, help="For --dry-run: of a million answer tokens.")
    ] = None,
) -> None:
    """Write a description per item and a profile per user. Options win over the settings of the same name."""
    told = {
        ("engine", "user_engine"): engine,
        ("limit", "user_limit"): limit,
        ("max_tokens", "user_max_tokens"): max_tokens,
    }
    given: dict[str, object] = {"model": model, "domain": domain, "factors": factors, "budget_tokens": budget_tokens}
    for (of_items, of_users), value in told.items():
        given |= ({} if side == "user" else {of_items: value}) | ({} if side == "item" else {of_users: value})
    if side:
        given["side"] = side
    if not resume:
        given["resume"] = False
    more = [f"generate.{key}={_toml(value)}" for key, value in given.items() if value is not None]
    settings = settings_from(config, [*(overrides or []), *more])
    if engine is not None and "limit" not in settings.generate.model_fields_set:
        # The setting's own default is made for the quickstart's model on a laptop.
        settings = settings.model_copy(update={"generate": settings.generate.model_copy(update={"limit": None})})
    if dry_run:
        stdout.print(_estimates(settings, out, tokens_per_s, prompt_price, answer_price))
        return
    if rates := given_options(ctx, "tokens_per_s", "prompt_price", "answer_price"):
        raise ConfigError(f"{', '.join(rates)}: only with --dry-run")
    outcome = run_stage("generate", settings, out, anew=not resume)
    stdout.print(_summary(outcome.artifact.manifest))
    tell_what_is_left([outcome])


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _estimates(
    settings: Settings, out: Path, tokens_per_s: float | None, prompt_price: float | None, answer_price: float | None
) -> Table:
    from kellm_features.cli.show import plain_table
    from kellm_features.knowledge.estimate import Rates, estimate

    last = load_artifact(out, "generate")
    speed = tokens_per_s or (last.manifest.notes.get("tokens_per_s") if last else None) or None
    estimates = estimate(
        settings,
        lambda stage, name: require_artifact(out, stage, needed_by="generate").file(name),
        out / "work" / "generate",
        last.path if last else None,
        Rates(speed, prompt_price, answer_price),
    )
    columns = ("texts", "to do", "prompt tokens", "answer tokens", "seconds", "money")
    table = plain_table("To be generated", ("side", "left"), ("engine", "left"), *((name, "right") for name in columns))
    for row in estimates:
        table.add_row(row.side, row.engine, *_cells(row))
    if len(estimates) > 1:
        table.add_row("together", "", *_cells(_together(estimates)))
    return table


def _cells(row: Estimate) -> tuple[str, ...]:
    counts = (f"{n:,}" for n in (row.texts, row.to_do, row.prompt_tokens, row.answer_tokens))
    seconds = "-" if row.seconds is None else f"{row.seconds:,.0f}"
    return (*counts, seconds, "-" if row.money is None else f"{row.money:,.4f}")


def _together(rows: list[Estimate]) -> Estimate:
    from kellm_features.knowledge.estimate import Estimate

    return Estimate(
        "",
        "",
        sum(row.texts for row in rows),
        sum(row.to_do for row in rows),
        sum(row.prompt_tokens for row in rows),
        sum(row.answer_tokens for row in rows),
        None if rows[0].seconds is None else sum(row.seconds or 0.0 for row in rows),
        None if rows[0].money is None else sum(row.money or 0.0 for row in rows),
    )


def _summary(manifest: Manifest) -> Table:
    from kellm_features.cli.show import plain_table

    notes = manifest.notes
    table = plain_table(f"Texts about {notes['domain']}", ("what", "left"), ("count", "right"))
    for side in ("items", "users"):
        for source, count in sorted(notes[f"{side}_by_source"].items()):
            table.add_row(f"{side}, {source}", f"{count:,}")
    for source, score in notes["mean_grounding"].items():
        table.add_row(f"mean grounding of items, {source}", f"{score:.3f}")
    told = {
        "generated": "requests answered",
        "cache_hits": "taken from earlier runs",
        "asked_again": "asked a second time",
        "unfit_answers": "answers of no use",
        "ungrounded_answers": "answers below the threshold of grounding",
        "prompt_tokens": "prompt tokens",
        "completion_tokens": "answer tokens",
        "dead_letters": "failed",
        "waiting": "waiting for the next run",
    }
    for key, what in told.items():
        table.add_row(what, f"{notes[key]:,}")
    table.add_row("answer tokens per second", f"{notes['tokens_per_s']:,}")
    return table
