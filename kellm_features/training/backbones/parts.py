"""Parts that the backbones share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.features import Bag

ROW_STD = 0.01
"""Of an id's initial row. Small, as ids that are seldom seen keep about what they started with."""


class Tables(nn.ModuleDict):
    """Name -> `nn.Embedding`, all of one width.

    Args:
        rows: name -> rows.
        width: of a row.
        std: of initial weights.
    """

    def __init__(self, rows: Mapping[str, int], width: int, std: float = ROW_STD) -> None:
        super().__init__()
        for name, count in rows.items():
            table = nn.Embedding(count, width)
            nn.init.normal_(table.weight, std=std)
            self[name] = table

    def rows(self, name: str) -> Tensor:
        """The weights of one table, (rows, width)."""
        table = self[name]
        assert isinstance(table, nn.Embedding)
        return table.weight

    def mean(self, name: str, bag: Bag) -> Tensor:
        """(B, width): per example, the sum of its ids' rows by their weights; the mean where these add up to 1."""
        rows = self.rows(name)
        weights = bag.weights.to(rows.dtype)
        if bag.ids.shape[1] == 1:
            return functional.embedding(bag.ids[:, 0], rows) * weights
        # Half the time of a product with looked-up rows, forward and backward (2,048 × 30 rows of 16 on a CPU).
        return functional.embedding_bag(bag.ids, rows, per_sample_weights=weights, mode="sum")


def dnn(
    width: int, layers: Sequence[int], activation: Callable[[int], nn.Module], dropout: float, *, bias: bool = True
) -> nn.Sequential:
    """(B, width) -> (B, 1): hidden layers of Linear, activation and dropout, and a linear output.

    Args:
        width: of the input.
        layers: widths of the hidden layers.
        activation: makes the activation of a layer, given its width.
        dropout: after each activation.
        bias: of the output.
    """
    blocks: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise((width, *layers)):
        blocks += [nn.Linear(width_in, width_out), activation(width_out), nn.Dropout(dropout)]
    return nn.Sequential(*blocks, nn.Linear((width, *layers)[-1], 1, bias=bias))


def check_knowledge(model: str, knowledge: Tensor | None, width: int) -> None:
    """Raise ValueError unless `knowledge` is (B, width), or None where the width is 0."""
    seen = 0 if knowledge is None else knowledge.shape[1]
    if seen != width or (knowledge is None) != (width == 0):
        raise ValueError(
            f"knowledge is {None if knowledge is None else tuple(knowledge.shape)}, and this {model} was built for "
            f"{f'{width} columns of it' if width else 'none'}"
        )


class Dice(nn.Module):
    """Dice (Zhou et al. 2018, §5.3): `p·s + (1 − p)·α·s`, `p = σ((s − E[s]) / √(Var[s] + ε))`, α learned by column.

    E and Var are those of the batch in training, where they count the rows of a mask only, and running averages of them
    in eval mode: with a mask, padding changes nothing. They are taken in float32 at least. Processes that train
    together each take those of their own part of the batch, as batch normalisation does.

    State dict: `alpha`, and the buffers `mean` and `var`, each (C,).

    Args:
        width: C, columns.
        eps: ε; the paper's.
        momentum: weight of a batch in the running averages; `nn.BatchNorm1d`'s.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, *, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, s: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., C).

        Args:
            s: what enters the activation.
            mask: (...) bool, True for the rows that count; None: all.
        """
        mean, var = self._batch(s, mask) if self.training else (self.mean, self.var)
        p = torch.sigmoid((s - mean) * torch.rsqrt(var + self.eps))
        return s * (self.alpha + (1 - self.alpha) * p).to(s.dtype)

    def _batch(self, s: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(s.device.type, enabled=False):
            wide = s.to(torch.promote_types(s.dtype, torch.float32)).flatten(0, -2)
            counted = wide.new_ones(len(wide)) if mask is None else mask.flatten().to(wide.dtype)
            rows = counted.sum()
            share = counted / rows.clamp(min=1)
            # Products with a vector read `wide` once each; a masked sum writes a copy of it first.
            mean = share @ wide
            var = share @ (wide - mean).square()
        with torch.no_grad():
            momentum = self.momentum * (rows > 0).to(self.mean.dtype)  # without rows nothing is learned
            self.mean.lerp_(mean.to(self.mean.dtype), momentum)
            self.var.lerp_(var.to(self.var.dtype), momentum)
        return mean, var
