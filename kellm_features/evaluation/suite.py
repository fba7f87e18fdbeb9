"""`kellm evaluate`: the studies of a suite, trained cell by cell, and their rows."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

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
)
from kellm_features.evaluation.experiment import LEARNING_RATES, Cell, Outcome, cell_folder, finished, run_cell
from kellm_features.evaluation.results import ResultRow, Suite
from kellm_features.evaluation.retrieval import of_first_seed, score_forms, score_retrieval
from kellm_features.evaluation.score import score_study, with_holm
from kellm_features.evaluation.texts import CLOSED_BOOK, PAGE, TITLE
from kellm_features.evaluation.world import World
from kellm_features.progress import track

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
    knowledge, affinity, kellmrec = all_texts(variants), affinity_arm(variants), kellmrec_arm(variants)
    references: dict[str, tuple[str, ...]]
    references = {arm.key: (REFERENCE,) for arm in (*BASELINES, *rungs) if arm.key != REFERENCE}
    references |= {
        CLOSED_BOOK: (REFERENCE, ID_5.key),
        knowledge.key: (REFERENCE, TITLE, CLOSED_BOOK, PAGE),
        "printed": (REFERENCE, ID_5.key, CLOSED_BOOK, knowledge.key),
        affinity.key: (REFERENCE, knowledge.key, "shuffled", "noise"),
        kellmrec.key: (REFERENCE, affinity.key, "random-pairs", CLOSED_BOOK, ID_5.key),
    }
    b, cold, a, c = (_family(world, name) for name in ("B", "cold", "A", "C"))
    backbones, cold_backbones = tuple(settings.backbones), tuple(settings.cold_backbones)
    found = []
    if suite in ("ctr", "all"):
        closed_book = [arm for arm in rungs if arm.key == CLOSED_BOOK]
        short = (ID_5, ID_30, *closed_book, knowledge, printed_arm(variants), affinity, kellmrec)
        found += [
            Study("ctr", "B", backbones, (*BASELINES, *rungs), b, references),
            Study("replication", "A", backbones, short, a, references),
            Study("time", "C", cold_backbones, (*BASELINES, *short), c, references),
        ]
    if suite in ("cold", "all"):
        contrastive = tuple(forms(variants))
        against_none = {arm.key: (contrastive[0].key,) for arm in contrastive[1:]}
        arms = (*BASELINES, *(arm for arm in rungs if arm.key not in (ID_5.key, "random-pairs")))
        found += [
            Study("cold", "cold", cold_backbones, arms, cold, references),
            Study("contrastive", "cold", cold_backbones, contrastive, cold, against_none),
        ]
    return [study for study in found if study.folds]


def run_suite(world: World, suite: SuiteName) -> tuple[list[ResultRow], list[Outcome]]:
    """Train what is not yet trained, and score everything.

    Every arm of a study tries the same learning rates on the last fold from the first seed; the one with the best
    validation AUC is taken to all folds and seeds. While not all ten blocks of users are tested, no fold tests the
    users that the last one validates on. A cell that was finished by an earlier run is not trained again.

    Returns:
        The rows, p-values adjusted; and every training that they rest on.
    """
    wanted = studies(world, suite)
    settings = world.settings.evaluate
    rates = LEARNING_RATES[: settings.trials]
    trials = {
        (place, backbone, arm): [_cell(study.folds[-1], backbone, arm, 0, rate) for rate in _rates(arm, rates)]
        for place, study in enumerate(wanted)
        for backbone in study.backbones
        for arm in study.arms
    }
    tried = _run(world, [cell for cells in trials.values() for cell in cells], "tune")
    cells: dict[tuple[int, str, Arm], list[Cell]] = {}
    for key, options in trials.items():
        place, backbone, arm = key
        best = max(options, key=lambda cell: tried[cell].valid_auc)
        cells[key] = [
            _cell(fold, backbone, arm, seed, best.learning_rate)
            for fold in wanted[place].folds
            for seed in range(settings.seeds)
        ]
    done = tried | _run(world, [cell for planned in cells.values() for cell in planned], "train")
    rows: list[ResultRow] = []
    with track("score", sum(len(study.backbones) for study in wanted), "studies") as advance:
        for place, study in enumerate(wanted):
            for backbone in study.backbones:
                outcomes = {arm: [done[cell] for cell in cells[place, backbone, arm]] for arm in study.arms}
                rows += score_study(world, study.suite, study.split, backbone, outcomes, study.references)
                if study.suite == "contrastive":
                    embedded = {arm.key: (arm.label, of_first_seed(found)) for arm, found in outcomes.items()}
                    rows += score_forms(world, backbone, embedded)
                advance()
    if suite in ("cold", "all"):
        rows += score_retrieval(world)
    return with_holm(_once(rows)), list(done.values())


def _run(world: World, cells: Iterable[Cell], what: str) -> dict[Cell, Outcome]:
    """Outcomes of cells; those that are not on disk are trained, a process each, by fold so that its data are kept."""
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
                outcome = future.result()
                for cell in by_folder[outcome.folder]:
                    found[cell] = replace(outcome, cell=cell)
                advance(1, f"{outcome.cell.backbone} {outcome.cell.arm.key} {outcome.cell.fold}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
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


def _once(rows: Iterable[ResultRow]) -> Iterator[ResultRow]:
    """Closed forms stand in the study of every backbone: keep the first of equal keys."""
    seen = set()
    for row in rows:
        if row.key not in seen:
            seen.add(row.key)
            yield row
