"""Losses on the way: added up where they are computed, and read seldom, as each reading waits for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kellm_features.errors import KellmError
from kellm_features.settings import TrainSettings
from kellm_features.training.ranks import Ranks


class TrainingDivergedError(KellmError):
    """The loss is no number any more."""


def remedy(settings: TrainSettings, *, warm_up: bool, adapted: bool, contrasted: bool) -> str:
    """What to do about a loss that is no number, with the values in use, for the end of a message.

    Args:
        settings: rates, weight and temperature.
        warm_up: the steps were contrastive ones of the adapters alone, in which the weight cancels in AdamW.
        adapted: the model has adapters.
        contrasted: it learns from contrastive terms.
    """
    used = {
        "learning_rate": not warm_up,
        "adapter_learning_rate": adapted,
        "weight": contrasted and not warm_up,
    }
    lower = [f"train.{name} (now {getattr(settings, name):g})" for name, counts in used.items() if counts]
    raised = f", or raise train.temperature (now {settings.temperature:g})" if contrasted else ""
    return f"lower {' or '.join(lower)}{raised}"


class Meter:
    """Losses of an epoch's steps.

    Args:
        epoch: for messages; 0 is the warm-up.
        device: of the losses.
        ranks: whose average is read, on all of them at the same steps.
        remedy: for messages, what to do about a loss that is no number.
    """

    def __init__(self, epoch: int, device: torch.device, ranks: Ranks, remedy: str) -> None:
        self.epoch = epoch
        self.device = device
        self.ranks = ranks
        self.remedy = remedy
        self._names: tuple[str, ...] = ()
        self._last = torch.empty(0, device=device)
        self._sums = torch.empty(0, device=device)
        self._rows = 0

    def add(self, losses: Mapping[str, Tensor], rows: int) -> None:
        """One step's losses, scalars with the same names in all steps, and its examples."""
        last = torch.stack(list(losses.values())).double()
        if not self._names:
            self._names = tuple(losses)
            self._sums = torch.zeros_like(last)
        self._last = last
        self._sums += last * rows
        self._rows += rows

    def read(self, step: int) -> dict[str, float]:
        """The last step's losses.

        Raises:
            TrainingDivergedError: a loss of this step or an earlier one was NaN or infinite.
        """
        last, sums = self.ranks.mean(torch.stack([self._last, self._sums])).tolist()
        values = dict(zip(self._names, last, strict=True))
        # A sum remembers: whatever was no number leaves it so.
        if not all(map(math.isfinite, sums)):
            self._diverged(step, values)
        return values

    def means(self, step: int) -> dict[str, float]:
        """The averages over the examples so far.

        Raises:
            TrainingDivergedError: as `read`.
        """
        self.read(step)
        sums = self.ranks.mean(self._sums).tolist()
        return {name: total / self._rows for name, total in zip(self._names, sums, strict=True)}

    def _diverged(self, step: int, values: Mapping[str, float]) -> None:
        parts = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        raise TrainingDivergedError(
            f"training diverged at epoch {self.epoch}, step {step} or shortly before: {parts}; {self.remedy}"
        )
