"""What was evaluated and how, as the page tells it beside the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from kellm_features.evaluation.results import ResultRow, Suite


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArmFacts(_Frozen):
    """One of the things compared."""

    key: str
    label: str
    description: str = ""
    """What it is given and how it is trained."""


class Planned(_Frozen):
    """One arm of one backbone in one suite, and the folds it was to be trained on."""

    suite: Suite
    split: str
    backbone: str
    arm: str
    folds: Annotated[int, Field(ge=1)] = 1


class EvaluationFacts(_Frozen):
    """The facts of an evaluation: what it ran on, at what cost, and what it was to do."""

    name: str
    data: str
    """The data in one line: its name, interactions, users and items."""
    arms: tuple[ArmFacts, ...] = ()
    budget: str = ""
    """What each arm may spend on tuning, in one line."""
    version: str = ""
    machine: str = ""
    split_hashes: dict[str, str] = {}
    """Fold -> hash of its split."""
    finished: datetime | None = None
    seconds: float | None = None
    """That the trainings took, those that an earlier call had finished too."""
    trainings: int | None = None
    """Models that the last call asked for."""
    planned: tuple[Planned, ...] = ()
    """What a complete run holds: the page says what of it is missing."""


class Epoch(BaseModel):
    """One epoch of a training; a history may hold more than is drawn."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    epoch: int
    loss: FiniteFloat | None = None
    valid_auc: FiniteFloat | None = None


class History(_Frozen):
    """The epochs of one training."""

    suite: Suite
    split: str
    backbone: str
    arm: str
    label: str
    fold: str
    seed: int
    epochs: tuple[Epoch, ...]

    @property
    def run(self) -> str:
        """What tells this training from others of its arm."""
        return f"fold {self.fold}, seed {self.seed}"


def missing(rows: Iterable[ResultRow], facts: EvaluationFacts) -> list[str]:
    """What was planned and is not in the rows, one line for each suite, split and backbone.

    An arm of which some folds are there is told with their number.
    """
    found: dict[tuple[str, str, str, str], int | None] = {}
    for row in rows:
        place = (row.suite, row.split, row.backbone, row.arm)
        known = found.get(place, 0)
        found[place] = None if row.folds is None or known is None else max(known, row.folds)
    labels = {arm.key: arm.label for arm in facts.arms}
    gaps: dict[tuple[str, str, str], list[str]] = {}
    for plan in facts.planned:
        folds = found.get((plan.suite, plan.split, plan.backbone, plan.arm), 0)
        if folds is None or folds >= plan.folds:
            continue
        label = labels.get(plan.arm, plan.arm)
        told = f"{label} ({folds} of {plan.folds} folds)" if folds else label
        gaps.setdefault((plan.suite, plan.split, plan.backbone), []).append(told)
    return [_line(place, arms) for place, arms in gaps.items()]


def _line(place: Sequence[str], arms: Sequence[str]) -> str:
    suite, split, backbone = place
    where = ", ".join(filter(None, (f"suite {suite}", f"split {split}", backbone)))
    return f"{where}: {', '.join(arms)}"
