"""CTR backbones, from their papers' equations.

A backbone is any module called as `backbone(features, knowledge) -> logits (B,)`: `features` is what the trainer's
data yields, `knowledge` the adapted vectors of the example, (B, K), or None for a model without text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Bag:
    """One field of a batch: weighted ids. A plain category is one id of weight 1; padding has weight 0."""

    ids: Tensor
    """(B, L) int64."""
    weights: Tensor
    """(B, L) float32."""


Features = Mapping[str, Bag]


class DeepFM(nn.Module):
    """DeepFM (Guo et al. 2017, Eq. 1-4): logit = linear + FM second order + DNN over the same field embeddings.

    A field's embedding is the weighted mean of its ids' rows, and the second order runs over fields, not over the ids
    inside one (as KAR does: pairs within a history say nothing of the target). Knowledge vectors are dense: they enter
    the linear term and the DNN and not the FM (KAR).

    Args:
        fields: field name -> table it looks up; fields may share a table.
        tables: table name -> rows.
        field_dim: width of a row.
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
        self.fields = dict(fields)
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, field_dim) for name, rows in tables.items()})
        self.linear = nn.ModuleDict({field: nn.Embedding(tables[table], 1) for field, table in fields.items()})
        self.knowledge_linear = nn.Linear(knowledge_dim, 1, bias=False) if knowledge_dim else None
        widths = (len(fields) * field_dim + knowledge_dim, *layers)
        blocks: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            blocks += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
        self.deep = nn.Sequential(*blocks, nn.Linear(widths[-1], 1, bias=False))
        self.knowledge_dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(()))
        for module in self.tables.values():
            assert isinstance(module, nn.Embedding)
            nn.init.normal_(module.weight, std=0.01)
        for module in self.linear.values():
            assert isinstance(module, nn.Embedding)
            nn.init.zeros_(module.weight)

    def first_order_parameters(self) -> list[nn.Parameter]:
        """The weights of single ids and the bias, which a trainer may give a rate of their own."""
        return [*self.linear.parameters(), self.bias]

    def forward(self, features: Features, knowledge: Tensor | None = None) -> Tensor:
        """Logits (B,) of a batch.

        Args:
            features: a `Bag` for each of `fields`.
            knowledge: (B, K), or None where the model was built for none.
        """
        bags = {field: features[field] for field in self.fields}
        fields_BFk = torch.stack(
            [_mean(self.tables[table], bags[field]) for field, table in self.fields.items()], dim=1
        )
        logits = self.bias + second_order(fields_BFk)
        for field, bag in bags.items():
            logits = logits + _mean(self.linear[field], bag).squeeze(1)
        deep_in = fields_BFk.flatten(1)
        if (knowledge is None) != (self.knowledge_linear is None):
            raise ValueError(
                f"knowledge is {None if knowledge is None else tuple(knowledge.shape)}, and this DeepFM was built for "
                f"{'none' if self.knowledge_linear is None else self.knowledge_linear.in_features} columns of it"
            )
        if knowledge is not None and self.knowledge_linear is not None:
            logits = logits + self.knowledge_linear(knowledge).squeeze(1)
            deep_in = torch.cat([deep_in, self.knowledge_dropout(knowledge)], dim=1)
        out: Tensor = logits + self.deep(deep_in).squeeze(1)
        return out


def second_order(fields_BFk: Tensor) -> Tensor:
    """Σ_{f<g} ⟨v_f, v_g⟩ in O(F·k): ½ Σ_k [(Σ_f v_fk)² − Σ_f v_fk²] (Rendle 2010, Lemma 3.1); (B, F, k) -> (B,)."""
    return 0.5 * (fields_BFk.sum(1).square() - fields_BFk.square().sum(1)).sum(1)


def _mean(table: nn.Module, bag: Bag) -> Tensor:
    if bag.ids.shape[1] == 1:
        rows: Tensor = table(bag.ids[:, 0])
        return rows * bag.weights
    return torch.einsum("bl,blk->bk", bag.weights, table(bag.ids))
