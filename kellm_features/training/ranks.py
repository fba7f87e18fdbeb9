"""The processes that share a training: who has which part of a batch, and what they agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training; by default it is alone."""

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    """Of tensors that ranks exchange: nccl takes those of its GPU alone. None: the CPU."""

    @classmethod
    def joined(cls, device: torch.device) -> Ranks:
        """Of the default process group, which must be up."""
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all: it saves, scores, reports and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The average over ranks, on all of them."""
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total / self.world

    def told(self, values: list[float]) -> list[float]:
        """What the first rank has here, on all of them: decisions are taken once."""
        if self.world == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(message, src=0)
        heard: list[float] = message.tolist()
        return heard

    def after_first(self) -> None:
        """Wait until the first rank is here too: what it wrote before can then be read."""
        self.told([0.0])


def backend(device: torch.device) -> Literal["nccl", "gloo"]:
    """What ranks on such a device talk through."""
    return "nccl" if device.type == "cuda" else "gloo"
