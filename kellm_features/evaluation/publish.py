"""What an evaluation leaves behind: results.csv, tables, the page and its pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psutil
import torch

from kellm_features import __version__
from kellm_features.artifacts import require_artifact
from kellm_features.errors import DataError
from kellm_features.evaluation.about import ArmFacts, EvaluationFacts, History, Planned
from kellm_features.evaluation.arms import BASELINES, forms, ladder
from kellm_features.evaluation.experiment import LEARNING_RATES, Outcome
from kellm_features.evaluation.grid import rich_table
from kellm_features.evaluation.page import PAGE, write_page
from kellm_features.evaluation.pictures import write_pictures
from kellm_features.evaluation.results import SUITES, ResultRow, read_results, write_results
from kellm_features.evaluation.suite import Study
from kellm_features.evaluation.tables import all_tables, write_tables
from kellm_features.evaluation.texts import VARIANTS
from kellm_features.evaluation.world import World
from kellm_features.schemas import INTERACTIONS, read_table
from kellm_features.store.layout import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = "results.csv"
BASIS = "basis.json"
"""What all rows of a folder rest on: rows of other data, settings or versions are not kept beside new ones."""


def publish(
    world: World, planned: Sequence[Study], rows: Iterable[ResultRow], outcomes: Sequence[Outcome]
) -> list[Table]:
    """Write everything under the evaluation's folder; rows of suites and backbones that were not run this time stay.

    They go where data, texts, settings or versions are other ones. A call that is killed within leaves either the old
    rows or none, never rows of two settings in one file.

    Returns:
        The tables, for a terminal.
    """
    new = list(rows)
    path = world.root / RESULTS
    told = {(row.suite, row.backbone) for row in new}
    basis = json.dumps(_basis(world), indent=1, sort_keys=True) + "\n"
    known = world.root / BASIS
    if not known.exists() or known.read_text(encoding="utf-8") != basis:
        path.unlink(missing_ok=True)  # before the basis is written: a kill in between must not lend it the old rows
    kept = [row for row in read_results(path) if (row.suite, row.backbone) not in told] if path.exists() else []
    everything = [row for suite in SUITES for row in (*kept, *new) if row.suite == suite]  # an order of its own
    write_atomic(known, basis)
    write_results(everything, path)
    write_tables(everything, world.root / "tables")
    facts = _facts(world, planned, outcomes, {row.arm for row in everything})
    write_page(everything, world.root / PAGE, facts, _histories(planned, outcomes))
    with suppress(DataError):  # neither ladder nor retrieval was run
        write_pictures(everything, world.root / "pictures")
    return [rich_table(grid) for grid in all_tables(everything)]


def _basis(world: World) -> dict[str, Any]:
    """Data, texts, settings and versions, by content; how many folds and seeds may differ, and stands in each row."""
    settings = world.settings
    return {
        "data": require_artifact(world.run_dir, "ingest", needed_by="evaluate").manifest.output_hash,
        "texts": dict(world.item_vectors),
        "settings": settings.hash_of(("run", "history", "swing", "train")),
        "budget": settings.evaluate.model_dump(
            include={"trials", "epochs", "patience", "batch_size", "hidden", "cold_share", "samples"}
        ),
        "versions": {"kellm-features": __version__, "torch": torch.__version__},
    }


def _facts(
    world: World, planned: Sequence[Study], outcomes: Sequence[Outcome], told: Collection[str]
) -> EvaluationFacts:
    """Of this call, and of the arms `told` by rows of earlier ones."""
    settings = world.settings
    evaluate = settings.evaluate
    table = read_table(world.run_dir / "ingest" / "interactions.parquet", INTERACTIONS)
    items, users = (len(table.column(name).unique()) for name in ("item_id", "user_id"))
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES[: evaluate.trials])
    stop = f"ended after {evaluate.patience} without a better one, " if evaluate.patience else ""
    wanted = {arm.key for study in planned for arm in study.arms} | set(told)
    arms = (*BASELINES, *ladder(world.item_vectors), *forms(world.item_vectors))
    models = {outcome.folder: outcome for outcome in outcomes if not outcome.cell.arm.baseline}  # some arms share one
    return EvaluationFacts(
        name="What knowledge is worth",
        data=(
            f"{settings.data.format}: {table.num_rows:,} interactions of {users:,} users with {items:,} items; texts: "
            + ", ".join(f"{VARIANTS[name]} {share:.0%}" for name, share in world.coverage.items())
        ),
        arms=tuple(ArmFacts(key=arm.key, label=arm.label, description=arm.told()) for arm in arms if arm.key in wanted),
        budget=(
            f"each arm: learning rates {rates} on the last fold's validation part, {evaluate.epochs} epochs, {stop}of "
            "which the best by validation AUC is taken; on split A the test takes the place of the validation part, as "
            "in KAR's code"
        ),
        version=f"{__version__}, torch {torch.__version__}",
        machine=f"{platform.machine()}, {psutil.cpu_count()} cores",
        split_hashes={name: files.split_hash for name, files in world.folds.items()},
        finished=datetime.now(UTC).replace(microsecond=0),
        seconds=sum(outcome.facts["seconds"] for outcome in models.values()),
        trainings=len(models),
        planned=tuple(
            Planned(
                suite=study.suite,
                split=study.split,
                backbone=backbone,
                arm=arm.key,
                folds=len(study.folds),
            )
            for study in planned
            for backbone in study.backbones
            for arm in study.arms
        ),
    )


def _histories(planned: Sequence[Study], outcomes: Sequence[Outcome]) -> list[History]:
    found = []
    for study in planned:
        labels = {arm.key: arm.label for arm in study.arms}
        for outcome in outcomes:
            cell = outcome.cell
            if cell.arm in study.arms and cell.fold in study.folds and cell.backbone in study.backbones:
                found.append(
                    History(
                        suite=study.suite,
                        split=study.split,
                        backbone=cell.backbone,
                        arm=cell.arm.key,
                        label=f"{labels[cell.arm.key]}, rate {cell.learning_rate:g}",
                        fold=cell.fold,
                        seed=cell.seed,
                        epochs=outcome.facts["history"],
                    )
                )
    return found
