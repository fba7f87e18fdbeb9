"""Deep Interest Network, from its paper's equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.backbones.parts import Dice, Tables, check_knowledge, dnn
from kellm_features.training.backbones.sequence import SequenceInput
from kellm_features.training.features import Features


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


class DIN(nn.Module):
    """DIN (Zhou et al. 2018): a user's interest is the sum of the events, each weighted by the target (Eq. 3).

    `interest = Σ_j a(e_j, v) · e_j`, the weights not normalised, as in the paper; what `e_j` and `v` are is told by
    `SequenceInput`. The logit is a DNN with Dice over [interest, target, the user's fields, knowledge], as in KAR.
    Two things differ from the paper: the target's item has a bias of its own, as in DeepFM's linear term, which a small
    id embedding would have to find by way of the DNN; and there is no mini-batch aware regularisation, since tables of
    thousands of rows need none.

    Args:
        fields: field name -> table it looks up: `item`, `genres`, and those of the user.
        tables: table name -> rows; `flag` among them.
        field_dim: k, width of a row.
        knowledge_dim: K, total width of the knowledge vectors; 0 for none.
        layers: widths of the DNN (KAR: 200, 80).
        dropout: in the DNN, after each hidden layer and on the knowledge vectors that enter it.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        tables: Mapping[str, int],
        field_dim: int,
        *,
        knowledge_dim: int = 0,
        layers: tuple[int, ...] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input = SequenceInput(fields, tables, field_dim)
        self.unit = ActivationUnit(self.input.width)
        self.linear = Tables({"item": tables[fields["item"]]}, 1, std=0.0)
        self.knowledge_dim = knowledge_dim
        width = 2 * self.input.width + self.input.context_width + knowledge_dim
        self.deep = dnn(width, layers, Dice, dropout)
        self.knowledge_dropout = nn.Dropout(dropout)

    def first_order_parameters(self) -> list[nn.Parameter]:
        """The biases of single ids, which a trainer may give a rate of their own."""
        return [*self.linear.parameters()]

    def forward(self, features: Features, knowledge: Tensor | None = None) -> Tensor:
        """Logits (B,) of a batch.

        Args:
            features: items, targets, histories, and the user's fields.
            knowledge: (B, K), or None where the model was built for none.

        Raises:
            ValueError: knowledge of another width.
        """
        check_knowledge("DIN", knowledge, self.knowledge_dim)
        seen = self.input(features)
        events = seen.event_vectors()
        weights = self.unit(events, seen.target, seen.mask)
        interest = torch.einsum("bl,blv->bv", weights, events)
        parts = [interest, seen.target, seen.context]
        if knowledge is not None:
            parts.append(self.knowledge_dropout(knowledge))
        bias = self.linear.mean("item", features.items["item"])
        out: Tensor = self.deep(torch.cat(parts, dim=1)) + functional.embedding(features.target, bias)
        return out.squeeze(1)
