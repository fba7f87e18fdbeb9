"""Stage `generate`: one description per item and one profile per user."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kellm_features.artifacts import Artifact
from kellm_features.errors import SchemaError
from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.domain import domain_path
from kellm_features.knowledge.inputs import Inputs
from kellm_features.knowledge.modelfiles import model_files
from kellm_features.knowledge.requests import DeadLetter, Description, descriptions_table
from kellm_features.knowledge.writer import Writer
from kellm_features.schemas import (
    DEAD_LETTERS,
    ITEM_DESCRIPTIONS,
    USER_DESCRIPTIONS,
    id_type_of,
    read_table,
    write_table,
)
from kellm_features.settings import GenerateSettings, Settings
from kellm_features.stages import StageContext, StageReport

logger = logging.getLogger(__name__)

COMPLETIONS = "completions"
LETTERS = "dead_letters.parquet"
TABLES = {
    "item": ("item_descriptions.parquet", ITEM_DESCRIPTIONS),
    "user": ("user_descriptions.parquet", USER_DESCRIPTIONS),
}
LOCAL_ENGINES = {"transformers", "vllm"}


def input_files(settings: Settings) -> dict[str, Path]:
    """The domain's TOML and the model's files where the settings name some by path."""
    generate = settings.generate
    files: dict[str, Path] = {}
    if domain := domain_path(generate.domain):
        files["domain"] = domain
    model = Path(generate.model).expanduser()
    if LOCAL_ENGINES & {generate.engine, generate.fallback_engine, generate.user_engine} and model.exists():
        files |= {"model": model} if model.is_file() else {f"model/{n}": p for n, p in model_files(model).items()}
    return files


def why_unfinished(settings: Settings, artifact: Artifact) -> str | None:
    """What the stage's last run left to do although its inputs are unchanged: failed requests, or an ended budget."""
    left = {"failed": artifact.manifest.notes.get("dead_letters"), "waiting": artifact.manifest.notes.get("waiting")}
    told = [f"{count} {what}" for what, count in left.items() if count]
    return f"{' and '.join(told)} requests are left" if told else None


def run(ctx: StageContext) -> StageReport:
    """Describe every item, then every user.

    The `limit` items most popular among the train rows go to `engine`, the `user_limit` users with the longest history
    to `user_engine`, all others to `fallback_engine`. Profiles see the rows that `assign_roles` calls history, and no
    others. Requests that fail for good stand in `dead_letters.parquet`, and their rows have another engine's text.

    Raises:
        ConfigError: an unknown domain, or one with a faulty template.
        EngineError: an unknown engine, or one that failed for good; what it had finished is kept for the next run.
        SchemaError: an input lacks a column.
    """
    inputs = Inputs(ctx.settings, ctx.input)
    settings = ctx.settings.generate
    stores = {side: open_store(ctx.work, side, settings) for side in TABLES}
    with stores["item"], stores["user"], closing(Writer(settings, inputs.domain, stores["item"])) as writer:
        described = _describe_items(ctx, inputs, writer)
        profiles = _describe_users(ctx, inputs, writer.on(stores["user"]), described)
    sides = {"item": described, "user": profiles}
    for side, rows in sides.items():
        name, schema = TABLES[side]
        source = inputs.items if side == "item" else inputs.users
        write_table(descriptions_table(rows, schema, id_type_of(source.schema, f"{side}_id")), ctx.out / name, schema)
    letters = _dead_letters(sides)
    write_table(letters, ctx.out / LETTERS, DEAD_LETTERS)

    grounded = sum(any(page.has_text for page in of_item) for of_item in inputs.pages.values())
    waiting = {side: _waiting(ctx, side, rows) for side, rows in sides.items()}
    notes = {
        "domain": inputs.domain.name,
        "items_by_source": dict(Counter(row.source for row in described.values())),
        "users_by_source": dict(Counter(row.source for row in profiles.values())),
        "items_grounded": grounded,
        "items_without_page": len(described) - grounded,
        "mean_grounding": _mean_grounding(described),
        "dead_letters": letters.num_rows,
        "waiting": sum(waiting.values()),
        "waiting_by_side": waiting,
        **writer.usage.notes(),
    }
    logger.info("descriptions: items %s, users %s", notes["items_by_source"], notes["users_by_source"])
    return StageReport(
        rows_in=inputs.items.num_rows + inputs.users.num_rows,
        rows_out=len(described) + len(profiles),
        models=dict(sorted({**_models_before(ctx, sides), **writer.usage.models}.items())),
        notes=notes,
    )


def open_store(work: Path, side: str, settings: GenerateSettings) -> CompletionStore:
    """The finished answers of one side; begun anew where the settings say so and the side is written."""
    return CompletionStore(work / COMPLETIONS / side, forget=not settings.resume and settings.side in ("both", side))


def items_by_engine(inputs: Inputs) -> dict[str, list[Any]]:
    """Engine -> the items that it describes, the most popular first."""
    settings, order = inputs.settings.generate, inputs.item_order
    count = len(order) if settings.limit is None else settings.limit
    return _merged([(settings.engine, order[:count]), (settings.fallback_engine, order[count:])])


def users_by_engine(inputs: Inputs) -> dict[str, list[Any]]:
    """Engine -> the users that it profiles, the longest history first."""
    settings, order = inputs.settings.generate, inputs.user_order
    fit = [user_id for user_id in order if inputs.history_length(user_id) >= settings.min_history]
    count = len(fit) if settings.user_limit is None else settings.user_limit
    chosen = set(fit[:count])
    return _merged(
        [(settings.user_engine, fit[:count]), (settings.fallback_engine, [u for u in order if u not in chosen])]
    )


def _merged(parts: Sequence[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    merged: dict[str, list[Any]] = {}
    for name, ids in parts:
        merged.setdefault(name, []).extend(ids)
    return {name: ids for name, ids in merged.items() if ids}


def _describe_items(ctx: StageContext, inputs: Inputs, writer: Writer) -> dict[Any, Description]:
    most, label = ctx.settings.generate.max_tokens, f"describe {inputs.domain.plural}"

    def write(engine: str, ids: list[Any]) -> list[Description]:
        return writer.write(engine, inputs.item_requests(ids), label, most)

    return _describe(ctx, "item", inputs.item_order, items_by_engine(inputs), write)


def _describe_users(
    ctx: StageContext, inputs: Inputs, writer: Writer, described: Mapping[Any, Description]
) -> dict[Any, Description]:
    descriptions = {item_id: row.text for item_id, row in described.items()}
    most = ctx.settings.generate.user_max_tokens or ctx.settings.generate.max_tokens

    def write(engine: str, ids: list[Any]) -> list[Description]:
        return writer.write(engine, inputs.user_requests(ids, descriptions), "profile users", most)

    return _describe(ctx, "user", inputs.user_order, users_by_engine(inputs), write)


def _describe(
    ctx: StageContext,
    side: str,
    ids: Sequence[Any],
    by_engine: Mapping[str, list[Any]],
    write: Callable[[str, list[Any]], list[Description]],
) -> dict[Any, Description]:
    """The rows of one side; where it is left alone, those that are there, and templates for ids that have none."""
    kept = _finished(ctx, side, ids)
    if kept is not None:
        by_engine = {ctx.settings.generate.fallback_engine: [key for key in ids if key not in kept]}
    rows = dict(kept or {})
    for engine, of_engine in by_engine.items():
        rows.update(zip(of_engine, write(engine, of_engine), strict=True))
    return rows


def _finished(ctx: StageContext, side: str, ids: Sequence[Any]) -> dict[Any, Description] | None:
    """The texts of a side that `generate.side` leaves alone, as the stage's last run wrote them; None of the other.

    They are taken over where they come from the same split and the same rule for history: a profile of another one may
    know what is a label here.
    """
    if ctx.settings.generate.side in ("both", side):
        return None
    previous = ctx.previous
    name, schema = TABLES[side]
    if previous is None or previous.manifest.split_hash != ctx.split_hash:
        return {}
    if _cut(previous.manifest.config) != _cut(ctx.settings.model_dump(mode="json")):
        return {}
    known = set(ids)
    try:
        table = read_table(previous.file(name), schema)
    except SchemaError as error:
        logger.warning("the %s texts of the last run are of another version and not taken over: %s", side, error)
        return {}
    failed = {}
    for row in read_table(previous.file(LETTERS), DEAD_LETTERS).to_pylist():
        if row["side"] == side:
            failed[row["id"]] = DeadLetter(row["prompt_hash"], row["model_id"], row["reason"])
    rows = {row.pop(f"{side}_id"): _description(row) for row in table.to_pylist() if row[f"{side}_id"] in known}
    return {key: dataclasses.replace(row, failed=failed.get(str(key))) for key, row in rows.items()}


def _cut(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which events are history, of the settings in a manifest."""
    return config.get("history"), config.get("run")


def _models_before(ctx: StageContext, sides: Mapping[str, Mapping[Any, Description]]) -> dict[str, str]:
    """Models of the texts that were taken over."""
    if ctx.previous is None or ctx.settings.generate.side == "both":
        return {}
    used = {row.model_id for rows in sides.values() for row in rows.values()}
    return {model: revision for model, revision in ctx.previous.manifest.models.items() if model in used}


def _waiting(ctx: StageContext, side: str, rows: Mapping[Any, Description]) -> int:
    """Texts that a budget ended before, those of a side that was left alone included."""
    if ctx.settings.generate.side in ("both", side) or ctx.previous is None:
        return sum(row.waiting for row in rows.values())
    return int(ctx.previous.manifest.notes.get("waiting_by_side", {}).get(side, 0))


def _description(row: dict[str, Any]) -> Description:
    factors = None if row["factors"] is None else dict(row["factors"])
    return Description(
        row["description"],
        row["description_source"],
        row["prompt_hash"],
        row["model_id"],
        row["grounding"],
        row["prompt_tokens"],
        row["completion_tokens"],
        factors,
    )


def _dead_letters(sides: Mapping[str, Mapping[Any, Description]]) -> pa.Table:
    """Requests that failed for good, with what was seen."""
    rows = [
        {"side": side, "id": str(key), **dataclasses.asdict(row.failed)}
        for side, of_side in sides.items()
        for key, row in sorted(of_side.items())
        if row.failed is not None
    ]
    return pa.Table.from_pylist(rows, schema=DEAD_LETTERS.arrow())


def _mean_grounding(rows: Mapping[Any, Description]) -> dict[str, float]:
    """Source -> mean score of its texts that have one."""
    scores: dict[str, list[float]] = {}
    for row in rows.values():
        if row.grounding is not None:
            scores.setdefault(row.source, []).append(row.grounding)
    return {source: round(float(np.mean(of_source)), 4) for source, of_source in sorted(scores.items())}
