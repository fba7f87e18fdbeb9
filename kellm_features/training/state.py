"""Checkpoints: one file for each finished epoch, whole or absent, and checked before it is believed."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kellm_features.errors import ArtifactError, first_line

logger = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d{4,})\.pt")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass
class History:
    """What a training went through."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    """One row an epoch: epoch, loss, ctr, uu, ii, valid_auc, valid_log_loss; a term that is not trained has no key."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """Sampled steps: step, epoch, loss, ctr, uu, ii."""
    warm: bool = False
    """The warm-up is done."""
    best_epoch: int = 0
    """The epoch whose weights were kept, from 1."""


@dataclass
class TrainingState:
    """All that the next epoch depends on, besides settings and inputs."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    best: dict[str, Tensor]
    """Weights of the best epoch so far; empty where that is this one, or none was scored yet."""
    best_auc: float
    history: History


class DamagedCheckpointError(ArtifactError):
    """A checkpoint's file is there, and is not as it was written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is not a readable checkpoint ({why}): delete it, or name an earlier epoch")
        self.path = path
        self.why = why

    def __reduce__(self) -> tuple[type[DamagedCheckpointError], tuple[Path, str]]:
        return type(self), (self.path, self.why)  # from a worker process as it was raised there


class CheckpointFolder:
    """A folder of `epoch-0003.pt`; epoch 0 is the state after the warm-up.

    A file is written under another name, flushed to the disk and renamed: a kill at any moment leaves whole files
    alone. It ends in the SHA-256 of what stands before, since `torch.load` does not notice a flipped bit in a tensor;
    `torch.load` reads the file all the same.

    Args:
        path: made where it is missing.
        keep: newest epochs to keep, and the best one beside them; None keeps all.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        self.keep = keep

    def file(self, epoch: int) -> Path:
        """Where an epoch is, or would be."""
        return self.path / f"epoch-{epoch:04d}.pt"

    def epochs(self) -> list[int]:
        """Epochs that are kept, oldest first."""
        if not self.path.is_dir():
            return []
        found = (_NAME.fullmatch(file.name) for file in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, state: TrainingState) -> None:
        """Write the file of the state's last epoch, then drop those that are not to be kept.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        epoch = len(state.history.epochs)
        buffer = io.BytesIO()
        torch.save({**vars(state), "history": asdict(state.history)}, buffer)
        target = self.file(epoch)
        temporary = target.with_suffix(".tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(buffer.getbuffer())
                handle.write(hashlib.sha256(buffer.getbuffer()).digest())
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(target)
            self._sync()
        except OSError as error:
            raise ArtifactError(
                f"{target} cannot be written ({error.strerror}): free space or choose another --out, and train again; "
                "earlier epochs are kept"
            ) from error
        if self.keep is not None:
            done = [kept for kept in self.epochs() if kept <= epoch]  # later ones are of a longer training
            for old in done[: -self.keep]:
                if old != state.history.best_epoch:
                    self.file(old).unlink(missing_ok=True)

    def load(self, epoch: int) -> TrainingState:
        """The state after an epoch, on the CPU; `load_state_dict` takes tensors to where they belong.

        Raises:
            ArtifactError: the epoch is not kept, or its file is whole and could not be read or loaded all the same.
            DamagedCheckpointError: its file is not as it was written.
        """
        path = self.file(epoch)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            kept = ", ".join(map(str, self.epochs())) or "none"
            raise ArtifactError(
                f"epoch {epoch} has no checkpoint in {self.path} (kept: {kept}): name one of these, raise "
                "train.keep_checkpoints for the next training, or train from the start"
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"{path} could not be read ({error.strerror or first_line(error)}): make it readable and train again, "
                "or name an earlier epoch; nothing was deleted"
            ) from error
        payload = memoryview(content)[:-_DIGEST_BYTES]
        if hashlib.sha256(payload).digest() != content[-_DIGEST_BYTES:]:
            raise DamagedCheckpointError(path, f"{len(content):,} bytes, not those that were written")
        try:
            raw = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            return TrainingState(**{**raw, "history": History(**raw["history"])})
        except Exception as error:  # too little memory, or another version's: none of it is the file's fault
            raise ArtifactError(
                f"{path} is whole, but could not be loaded ({type(error).__name__}: {first_line(error)}): free memory, "
                "or go back to the versions that wrote it, and train again; nothing was deleted"
            ) from error

    def newest(self, up_to: int) -> TrainingState | None:
        """The last state that is undamaged; a damaged one is passed over with a warning, as its epoch can be redone.

        Args:
            up_to: the last epoch that is looked at: a longer training may have left later ones.

        Raises:
            ArtifactError: it is whole and could not be read or loaded.
        """
        for epoch in reversed(self.epochs()):
            if epoch > up_to:
                continue
            try:
                return self.load(epoch)
            except DamagedCheckpointError as error:
                logger.warning(
                    "%s is not a readable checkpoint (%s): going on from the checkpoint before it, and doing its epoch "
                    "again",
                    error.path,
                    error.why,
                )
        return None

    def drop_after(self, epoch: int, up_to: int | None = None) -> None:
        """Delete the checkpoints of later epochs.

        Args:
            epoch: the last one that stays; -1: none does.
            up_to: those after this one stay too; None: none.
        """
        for kept in self.epochs():
            if kept > epoch and (up_to is None or kept <= up_to):
                self.file(kept).unlink(missing_ok=True)
        if self.path.is_dir():
            for leftover in self.path.glob("epoch-*.tmp"):  # of a training that was killed while it wrote
                leftover.unlink(missing_ok=True)

    def _sync(self) -> None:
        """A rename is on the disk when its folder is."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
