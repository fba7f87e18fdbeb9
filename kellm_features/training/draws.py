"""What a training draws at random, each by (seed, epoch, purpose): a resumed one draws as one that went through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

_POSITIVES, _MODEL = 3, 4  # purposes beside the loader's order and noise; the model's own is counted up by rank


@dataclass(frozen=True)
class Draws:
    """Of one rank of a training; epoch 0 is the warm-up."""

    seed: int
    rank: int
    device: torch.device
    """The model's."""

    def positives(self, epoch: int) -> torch.Generator:
        """For anchors and their positives, on the CPU, at the same state on all ranks."""
        return self._generator(epoch, _POSITIVES)

    @contextmanager
    def of_model(self, epoch: int) -> Iterator[None]:
        """What the model draws by itself, as dropout does, is seeded too, and leaves the process's own draws alone."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._generator(epoch, _MODEL + self.rank).initial_seed())
            yield

    def _generator(self, epoch: int, purpose: int) -> torch.Generator:
        words = np.random.SeedSequence([self.seed, epoch, purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> 1))
