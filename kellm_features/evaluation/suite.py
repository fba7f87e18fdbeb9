"""`kellm evaluate`: the studies of a suite, trained cell by cell, and their rows."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from kellm_features.errors import EvaluationError
from kellm_features.evaluation.arms import (
    BASELINES,
    ID_5,
    ID_30,
    REFERENCE,
    Arm,
    affinity_arm,
    all_texts,
    forms,
    kellmrec_arm,
    ladder,
    printed_arm,
    profile_arm,
)
from kellm_features.evaluation.experiment import LEARNING_RATES, Cell, Outcome, cell_folder, finished, run_cell
from kellm_features.evaluation.results import ResultRow, Suite
from kellm_features.evaluation.retrieval import of_first_seed, score_forms, score_retrieval
from kellm_features.evaluation.score import score_study, with_holm
from kellm_features.evaluation.texts import CLOSED_BOOK, PAGE, TITLE
from kellm_features.evaluation.world import World
from kellm_features.progress import track
from kellm_features.training.meter import TrainingDivergedError

logger = logging.getLogger(__name__)

SuiteName = Literal["ctr", "cold", "all"]


@dataclass(frozen=True)
class Study:
    """Arms that are compared with each other: on the same folds, from the same seeds, with the same budget."""

    suite: Suite
    split: str
    """Family of the folds."""
    backbones: tuple[str, ...]
    arms: tuple[Arm, ...]
    folds: tuple[str, ...]
    references: Mapping[str, tuple[str, ...]]


def studies(world: World, suite: SuiteName) -> list[Study]:
    """What a suite compares, given the folds and the texts that are there."""
    settings = world.settings.evaluate
    variants = list(world.item_vectors)
    rungs = ladder(variants)
    knowledge, profile = all_texts(variants), profile_arm(variants)
    affinity, kellmrec = affinity_arm(variants), kellmrec_arm(variants)
    references: dict[str, tuple[str, ...]]
    references = {arm.key: (REFERENCE,) for arm in (*BASELINES, *rungs) if arm.key != REFERENCE}
    references |= {
        CLOSED_BOOK: (REFERENCE, ID_5.key),
        knowledge.key: (REFERENCE, TITLE, CLOSED_BOOK, PAGE),
        profile.key: (REFERENCE, knowledge.key),
        "printed": (REFERENCE, ID_5.key, CLOSED_BOOK, profile.key),
        affinity.key: (REFERENCE, knowledge.key, "shuffled", "noise"),
        kellmrec.key: (REFERENCE, affinity.key, "random-pairs", CLOSED_BOOK, ID_5.key),
    }
    b, cold, a, c = (_family(world, name) for name in ("B", "cold", "A", "C"))
    backbones, cold_backbones = tuple(settings.backbones), tuple(settings.cold_backbones)
    found = []
    if suite in ("ctr", "all"):
        closed_book = [arm for arm in rungs if arm.key == CLOSED_BOOK]
        short = (ID_5, ID_30, *closed_book, knowledge, profile, printed_arm(variants), affinity, kellmrec)
        found += [
            Study("ctr", "B", backbones, (*BASELINES, *rungs), b, references),
            Study("replication", "A", backbones, short, a, references),
            Study("time", "C", cold_backbones, (*BASELINES, *short), c, references),
        ]
    if suite in ("cold", "all"):
        contrastive = tuple(forms(variants))
        against_none = {
            arm.key: ("none-profile" if arm.profile and arm.key != "none-profile" else "none",)
            for arm in contrastive[1:]
        }
        arms = (*BASELINES, *(arm for arm in rungs if arm.key not in (ID_5.key, "random-pairs")))
        found += [
            Study("cold", "cold", cold_backbones, arms, cold, references),
            Study("contrastive", "cold", cold_backbones, contrastive, cold, against_none),
        ]
    return [study for study in found if study.folds]


@dataclass(frozen=True)
class Progress:
    """What is known after a study: rows, p-values adjusted, and the trainings they rest on."""

    rows: list[ResultRow]
    outcomes: list[Outcome]


def run_suite(world: World, wanted: Sequence[Study]) -> Iterator[Progress]:
    """Train what is not yet trained, and score it, study by study.

    Every arm of a study tries the same learning rates on the last fold from the first seed; the one with the best
    validation AUC is taken to all folds and seeds. While not all ten blocks of users are tested, no fold tests the
    users that the last one validates on. A cell that was finished by an earlier run is not trained again.

    Yields:
        All that is known so far, after each study.

    Raises:
        TrainingDivergedError: a training diverged at every rate that its arm may try, or at the chosen one.
        EvaluationError: a process that trained was killed.
    """
    rows: list[ResultRow] = []
    outcomes: dict[Cell, Outcome] = {}
    for study in wanted:
        cells = _tuned_cells(world, study, outcomes)
        outcomes |= _run(world, [cell for planned in cells.values() for cell in planned], f"train {study.suite}")
        for backbone in study.backbones:
            of_arms = {arm: [outcomes[cell] for cell in cells[backbone, arm]] for arm in study.arms}
            rows += score_study(world, study.suite, study.split, backbone, of_arms, study.references)
            if study.suite == "contrastive":
                embedded = {arm.key: (arm.label, of_first_seed(found)) for arm, found in of_arms.items()}
                rows += score_forms(world, backbone, embedded, study.references)
        yield Progress(with_holm(rows), list(outcomes.values()))
    if any(study.suite == "cold" for study in wanted):
        rows += score_retrieval(world)
        yield Progress(with_holm(rows), list(outcomes.values()))


def _tuned_cells(world: World, study: Study, outcomes: dict[Cell, Outcome]) -> dict[tuple[str, Arm], list[Cell]]:
    """The cells of each backbone and arm, at the rate that did best in its trials; those are added to `outcomes`."""
    settings = world.settings.evaluate
    rates = LEARNING_RATES[: settings.trials]
    trials = {
        (backbone, arm): [_cell(study.folds[-1], backbone, arm, 0, rate) for rate in _rates(arm, rates)]
        for backbone in study.backbones
        for arm in study.arms
    }
    tried = _run(world, [cell for options in trials.values() for cell in options], f"tune {study.suite}", trial=True)
    outcomes |= tried
    cells = {}
    for (backbone, arm), options in trials.items():
        best = max(options, key=lambda cell: tried[cell].valid_auc if cell in tried else -math.inf)
        cells[backbone, arm] = [
            _cell(fold, backbone, arm, seed, best.learning_rate)
            for fold in study.folds
            for seed in range(settings.seeds)
        ]
    return cells


def _run(world: World, cells: Iterable[Cell], what: str, *, trial: bool = False) -> dict[Cell, Outcome]:
    """Outcomes of cells; those that are not on disk are trained, a process each, by fold so that its data are kept.

    A trial that diverges is left out: another rate may do.
    """
    by_folder: dict[Path, list[Cell]] = {}  # arms of two studies may be one model
    for cell in dict.fromkeys(cells):
        by_folder.setdefault(cell_folder(world, cell), []).append(cell)
    found = {cell: outcome for same in by_folder.values() for cell in same if (outcome := finished(world, cell))}
    new = [same[0] for same in by_folder.values() if same[0] not in found]
    left = sorted(new, key=lambda cell: (cell.fold, cell.arm.seen_history or 0))
    if not left:
        return found
    jobs = min(world.settings.evaluate.jobs, len(left))
    logger.info("%s: %d trainings, %d finished before", what, len(left), len(found))
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        track(what, len(left), "trainings") as advance,
        ProcessPoolExecutor(jobs, context, _start, (threads,)) as pool,
    ):
        futures = [pool.submit(run_cell, world, cell) for cell in left]
        try:
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except TrainingDivergedError as error:
                    if not trial:
                        raise
                    logger.warning("a trial is left out: %s", error)
                    advance()
                    continue
                for cell in by_folder[outcome.folder]:
                    found[cell] = replace(outcome, cell=cell)
                advance(1, f"{outcome.cell.backbone} {outcome.cell.arm.key} {outcome.cell.fold}")
        except BrokenProcessPool as error:
            raise EvaluationError(
                f"a process that trained was killed, for want of memory perhaps: lower evaluate.jobs (now {jobs}) and "
                "call again; what was finished is kept"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _start(threads: int) -> None:
    """Settle a worker process: trainings side by side share the cores."""
    torch.set_num_threads(threads)


def _cell(fold: str, backbone: str, arm: Arm, seed: int, rate: float) -> Cell:
    """A closed form has neither backbone nor seed: it is the same cell for all."""
    return Cell(fold, "" if arm.baseline else backbone, arm, 0 if arm.baseline else seed, rate)


def _rates(arm: Arm, rates: Sequence[float]) -> Sequence[float]:
    return rates[:1] if arm.baseline else rates


def _family(world: World, name: str) -> tuple[str, ...]:
    return tuple(fold for fold, files in world.folds.items() if files.family == name)
