"""Deep Interest Network, from its paper's equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.backbones.parts import Dice
from kellm_features.training.backbones.sequence import HeadOptions, Sequence, SequenceRanker


class ActivationUnit(nn.Module):
    """DIN's weight of an event for a target: an MLP over [event, target, event − target, event ∘ target] (Fig. 2).

    KAR's 32-16-1 with Dice. The first layer is taken apart by its four inputs, of which two are of the event alone and
    of the target alone: the same numbers for half of the products.

    Args:
        width: V, of events and targets.
        layers: widths of the two hidden layers.
    """

    def __init__(self, width: int, layers: tuple[int, int] = (32, 16)) -> None:
        super().__init__()
        self.first = nn.Linear(4 * width, layers[0])
        self.first_dice = Dice(layers[0])
        self.second = nn.Linear(*layers)
        self.second_dice = Dice(layers[1])
        self.output = nn.Linear(layers[1], 1)

    def forward(self, events: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Weights (B, L), 0 where the mask is False.

        Args:
            events: (B, L, V).
            target: (B, V).
            mask: (B, L) bool.
        """
        of_event, of_target, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        hidden = functional.linear(events, of_event + of_difference)
        hidden = hidden + functional.linear(events * target[:, None], of_product)
        hidden = hidden + functional.linear(target, of_target - of_difference, self.first.bias)[:, None]
        hidden = self.second_dice(self.second(self.first_dice(hidden, mask)), mask)
        weights: Tensor = self.output(hidden).squeeze(2) * mask
        return weights


class DIN(SequenceRanker):
    """DIN (Zhou et al. 2018): a user's interest is the sum of the events, each weighted by the target (Eq. 3).

    `interest = Σ_j a(e_j, v) · e_j`, the weights not normalised, as in the paper; what `e_j` and `v` are is told by
    `SequenceInput`, and the rest of the model by `SequenceRanker`. Beside the item's bias one thing differs from the
    paper: there is no mini-batch aware regularisation, since tables of thousands of rows need none.

    Built as `SequenceRanker` is.
    """

    def __init__(
        self, fields: Mapping[str, str], tables: Mapping[str, int], field_dim: int, **head: Unpack[HeadOptions]
    ) -> None:
        super().__init__(fields, tables, field_dim, **head)
        self.unit = ActivationUnit(self.input.width)

    def interest(self, seen: Sequence) -> Tensor:
        """Σ_j a(e_j, v) · e_j, (B, V)."""
        events = seen.event_vectors()
        return torch.einsum("bl,blv->bv", self.unit(events, seen.target, seen.mask), events)
