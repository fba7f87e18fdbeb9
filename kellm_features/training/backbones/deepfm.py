"""DeepFM, from its paper's equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kellm_features.training.backbones.parts import Tables, check_knowledge, dnn
from kellm_features.training.features import Features


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
        self.tables = Tables(tables, field_dim)
        self.linear = Tables({field: tables[table] for field, table in fields.items()}, 1, std=0.0)
        self.knowledge_dim = knowledge_dim
        self.knowledge_linear = nn.Linear(knowledge_dim, 1, bias=False) if knowledge_dim else None
        width = len(fields) * field_dim + knowledge_dim
        self.deep = dnn(width, layers, lambda _: nn.ReLU(), dropout, bias=False)
        self.knowledge_dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(()))

    def first_order_parameters(self) -> list[nn.Parameter]:
        """The weights of single ids and the bias, which a trainer may give a rate of their own."""
        return [*self.linear.parameters(), self.bias]

    def forward(self, features: Features, knowledge: Tensor | None = None) -> Tensor:
        """Logits (B,) of a batch.

        Args:
            features: its `fields` are read: a `Bag` for each of this model's.
            knowledge: (B, K), or None where the model was built for none.

        Raises:
            ValueError: knowledge of another width.
        """
        check_knowledge("DeepFM", knowledge, self.knowledge_dim)
        bags = {field: features.fields[field] for field in self.fields}
        fields_BFk = torch.stack([self.tables.mean(table, bags[field]) for field, table in self.fields.items()], dim=1)
        logits = self.bias + second_order(fields_BFk)
        for field, bag in bags.items():
            logits = logits + self.linear.mean(field, bag).squeeze(1)
        deep_in = fields_BFk.flatten(1)
        if knowledge is not None and self.knowledge_linear is not None:
            logits = logits + self.knowledge_linear(knowledge).squeeze(1)
            deep_in = torch.cat([deep_in, self.knowledge_dropout(knowledge)], dim=1)
        out: Tensor = logits + self.deep(deep_in).squeeze(1)
        return out


def second_order(fields_BFk: Tensor) -> Tensor:
    """Σ_{f<g} ⟨v_f, v_g⟩ in O(F·k): ½ Σ_k [(Σ_f v_fk)² − Σ_f v_fk²] (Rendle 2010, Lemma 3.1); (B, F, k) -> (B,)."""
    return 0.5 * (fields_BFk.sum(1).square() - fields_BFk.square().sum(1)).sum(1)
