"""A training as TensorBoard shows it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from kellm_features.errors import ConfigError, MissingExtraError, first_line


class Monitor(Protocol):
    """Is told how a training goes."""

    def step(self, row: Mapping[str, float]) -> None:
        """A sampled step: step, epoch, loss and its terms. Steps of the warm-up are below 0."""

    def epoch(self, row: Mapping[str, float], step: int, rates: Mapping[str, float]) -> None:
        """A finished epoch.

        Args:
            row: as in `History.epochs`.
            step: of the epoch's end.
            rates: `learning_rate` and `examples_per_s`.
        """


class Silent:
    """Writes nothing."""

    def step(self, row: Mapping[str, float]) -> None:
        """Nothing."""

    def epoch(self, row: Mapping[str, float], step: int, rates: Mapping[str, float]) -> None:
        """Nothing."""


class TensorBoard(AbstractContextManager["TensorBoard"]):
    """Writes scalars to event files: `train/loss`, `train/ctr`, `train/uu`, `train/ii`, `valid/auc`, `valid/log_loss`,
    `rate/learning_rate`, `rate/examples_per_s`; those of the warm-up under `warmup/`. Its first step is step 0.

    Args:
        folder: made where it is missing.
        resumed_at: the step that a resumed training starts at: what was written from there on, before, is hidden.
        warmup_steps: how many there are; they count below 0 for whoever calls.

    Raises:
        ConfigError: the folder cannot be written to.
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None, warmup_steps: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "train.tensorboard") from error
        purge = None if resumed_at is None else resumed_at + warmup_steps
        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge)
        except OSError as error:
            why = error.strerror or first_line(error)
            raise ConfigError(
                f"train.tensorboard = {str(folder)!r} cannot be written to ({why}): name a folder, which is made where "
                "it is missing"
            ) from error
        self._warmup_steps = warmup_steps

    def step(self, row: Mapping[str, float]) -> None:
        """See `Monitor`."""
        group = "train" if row["step"] >= 0 else "warmup"
        values = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        self._write(group, values, int(row["step"]))

    def epoch(self, row: Mapping[str, float], step: int, rates: Mapping[str, float]) -> None:
        """See `Monitor`."""
        valid = {name.removeprefix("valid_"): value for name, value in row.items() if name.startswith("valid_")}
        self._write("valid", valid, step)
        self._write("rate", rates, step)
        self._writer.flush()

    def __exit__(self, *_: object) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step + self._warmup_steps)
