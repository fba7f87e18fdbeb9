"""Which losses a step is for."""

from __future__ import annotations

from typing import Literal

from kellm_features.settings import TrainSettings
from kellm_features.training.knowledge import KnowledgeAugmented, Mode

Schedule = Literal["joint", "pretrain", "alternating"]


def contrasted_sides(model: KnowledgeAugmented) -> tuple[str, ...]:
    """The sides whose contrastive terms count: none of them at weight 0, where computing one would be for nothing."""
    return model.sides if model.weight > 0 else ()


def chosen_sides(settings: TrainSettings) -> tuple[str, ...]:
    """The sides that `train.sides` names."""
    named = {"both": ("user", "item"), "user": ("user",), "item": ("item",), "none": ()}
    return named[settings.sides]


def shown_sides(settings: TrainSettings) -> tuple[str, ...]:
    """The sides whose embeddings the backbone gets."""
    return ("user", "item") if settings.profile or settings.affinity == "profile" else ("item",)


def warmup_steps(settings: TrainSettings, contrasted: tuple[str, ...]) -> int:
    """Contrastive steps before the first epoch."""
    return settings.warmup_steps if settings.schedule == "pretrain" and contrasted else 0


def modes(schedule: Schedule, contrasted: tuple[str, ...]) -> tuple[Mode, ...]:
    """The steps that each batch of examples brings, in order.

    `alternating` gives the contrastive terms a step, and a batch of anchors, of their own after each step of clicks;
    both are steps of one optimizer, so an adapter's moments know both gradients.
    """
    if not contrasted:
        return ("ctr",)
    return ("ctr", "contrastive") if schedule == "alternating" else ("joint",)


def has_partial_steps(settings: TrainSettings, contrasted: tuple[str, ...], shown: tuple[str, ...]) -> bool:
    """Whether some steps leave parameters without a gradient, which DistributedDataParallel has to be told.

    A side that is contrasted and not shown has none in a batch without its positives.
    """
    apart = "contrastive" in modes(settings.schedule, contrasted) or warmup_steps(settings, contrasted) > 0
    return apart or not set(contrasted) <= set(shown)
