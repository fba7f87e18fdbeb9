"""From predictions on disk to rows: metrics, intervals and paired differences of the arms of one study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kellm_features.errors import ArtifactError
from kellm_features.evaluation.arms import REFERENCE, Arm
from kellm_features.evaluation.bootstrap import ClusterBootstrap, Estimate, figures_of, holm
from kellm_features.evaluation.experiment import Outcome
from kellm_features.evaluation.results import ALL, COLD, WARM, ResultRow, Suite
from kellm_features.evaluation.retrieval import POPULARITY
from kellm_features.evaluation.slices import slices
from kellm_features.evaluation.world import World, load_fold

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

LEAST_EXAMPLES = 200
"""A slice with fewer test examples gets no row: its intervals would span everything."""
GROUNDS = (REFERENCE, POPULARITY, "none")
"""What whole ladders stand on: of clicks, of retrieval, and of the contrastive forms."""
CALIBRATED_SLICES = (ALL, WARM, COLD)
"""Slices of which LogLoss, GAUC and ECE are told; AUC is told of all."""
BY_ITEM = (COLD, "items 0", "items 1-9")
"""Slices of few items with many users each: what they vary by is the item."""


@dataclass(frozen=True)
class Targets:
    """The test targets of all folds and seeds of a study, one after another."""

    user: IntArray
    item: IntArray
    label: BoolArray
    group: IntArray
    """Which training scored the target: scores of different trainings are not compared."""
    masks: Mapping[str, BoolArray]
    folds: int
    seeds: int


def score_study(
    world: World,
    suite: Suite,
    split: str,
    backbone: str,
    outcomes: Mapping[Arm, Sequence[Outcome]],
    references: Mapping[str, Sequence[str]],
) -> list[ResultRow]:
    """Rows of the arms of one backbone.

    Intervals come from draws of users, those of cold items from draws of items. An arm with several references has a
    row for each, one without a row without a difference.

    Args:
        world: the evaluation.
        suite: what the study belongs to.
        split: family of its folds.
        backbone: closed forms are told beside each: what they are set against is its.
        outcomes: arm -> its trainings, of the same folds and seeds in the same order.
        references: key of an arm -> keys of the arms that it is set against.

    Raises:
        ArtifactError: arms were tested on different targets.
    """
    arms = list(outcomes)
    targets, scores = _gather(world, outcomes)
    samples, seed = world.settings.evaluate.samples, world.settings.run.seed
    by_user = ClusterBootstrap(targets.user, samples, seed, targets.group)
    by_item = ClusterBootstrap(targets.item, samples, seed, targets.group)
    epochs = world.settings.evaluate.epochs
    capped = {
        arm.key: None if arm.baseline else sum(outcome.facts["epoch"] == epochs for outcome in trainings)
        for arm, trainings in outcomes.items()
    }
    rows: list[ResultRow] = []
    for name, mask in targets.masks.items():
        if mask.sum() < LEAST_EXAMPLES * targets.seeds or targets.label[mask].all() or not targets.label[mask].any():
            continue
        cluster = "item" if name in BY_ITEM else "user"
        draws = by_item if cluster == "item" else by_user
        clusters = len(np.unique((targets.item if cluster == "item" else targets.user)[mask]))
        for metric, measure in _metrics(draws, by_user, name, targets.label, mask).items():
            estimates = {arm.key: measure(scores[arm.key]) for arm in arms}
            for arm in arms:
                known = [key for key in references.get(arm.key, ()) if key in estimates]
                for reference in known or [""]:
                    rows.append(
                        _row(
                            estimates,
                            reference,
                            suite=suite,
                            split=split,
                            backbone=backbone,
                            arm=arm.key,
                            label=arm.label,
                            metric=metric,
                            slice=name,
                            examples=int(mask.sum()) // targets.seeds,
                            clusters=clusters,
                            cluster=cluster,
                            folds=targets.folds,
                            seeds=targets.seeds,
                            capped=capped[arm.key],
                        )
                    )
    return rows


def with_holm(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Rows with p adjusted over the claims of a family.

    Of one suite, split, backbone, metric and slice, the claims against each of `GROUNDS` are a family, and all other
    claims together are one: what the steps add, each to the one before it or to its null.
    """
    found = list(rows)
    families: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(found):
        if row.p is not None:
            ground = row.reference if row.reference in GROUNDS else ""
            family = (row.suite, row.split, row.backbone, row.metric, row.slice, ground)
            families.setdefault(family, []).append(place)
    for places in families.values():
        adjusted = holm([found[place].p or 0.0 for place in places])
        for place, p in zip(places, adjusted, strict=True):
            found[place] = found[place].model_copy(update={"p_holm": p})
    return found


def _metrics(
    draws: ClusterBootstrap, by_user: ClusterBootstrap, name: str, label: BoolArray, mask: BoolArray
) -> dict[str, Callable[[Any], Estimate]]:
    metrics: dict[str, Callable[[Any], Estimate]] = {"auc": lambda score: draws.auc(label, score, mask)}
    if name in CALIBRATED_SLICES:
        metrics["log_loss"] = lambda score: draws.log_loss(label, score, mask)
        metrics["ece"] = lambda score: draws.ece(label, score, mask)
        if draws is by_user:  # GAUC groups by what is drawn, and its groups are users
            metrics["gauc"] = lambda score: draws.gauc(label, score, mask)
    return metrics


def _row(estimates: Mapping[str, Estimate], reference: str, **facts: Any) -> ResultRow:
    figures = figures_of(estimates[facts["arm"]], estimates[reference] if reference else None)
    return ResultRow.model_validate({"reference": reference, **figures, **facts})


def _gather(
    world: World, outcomes: Mapping[Arm, Sequence[Outcome]]
) -> tuple[Targets, dict[str, npt.NDArray[np.float64]]]:
    first = next(iter(outcomes.values()))
    shared = [outcome.predictions() for outcome in first]
    scores = {}
    for arm, trainings in outcomes.items():
        parts = [outcome.predictions() for outcome in trainings]
        for one, other, outcome in zip(shared, parts, trainings, strict=True):
            if any(not np.array_equal(one[name], other[name]) for name in ("user", "item", "label")):
                raise ArtifactError(f"{outcome.folder} was tested on other targets than its peers: delete it")
        scores[arm.key] = np.concatenate([part["score"] for part in parts])
    masks = []
    for part, outcome in zip(shared, first, strict=True):
        data = load_fold(world, world.folds[outcome.cell.fold], None)
        masks.append(slices(data.item_count.numpy()[part["item"]], data.history_length.numpy()[part["user"]]))
    cells = [outcome.cell for outcome in first]
    folds = len({cell.fold for cell in cells})
    targets = Targets(
        user=np.concatenate([part["user"] for part in shared]),
        item=np.concatenate([part["item"] for part in shared]),
        label=np.concatenate([part["label"] for part in shared]).astype(np.bool_),
        group=np.repeat(np.arange(len(shared)), [len(part["user"]) for part in shared]),
        masks={name: np.concatenate([mask[name] for mask in masks]) for name in masks[0]},
        folds=folds,
        seeds=len(cells) // folds,
    )
    return targets, scores
