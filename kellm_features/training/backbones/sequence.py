"""What models of sequences share: what they read of a batch, and how an interest becomes a logit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.backbones.parts import Dice, Tables, check_knowledge, dnn
from kellm_features.training.features import Features

_ITEM_FIELDS = ("item", "genres")
_FLAG_TABLE = "flag"


class Sequence(NamedTuple):
    """Vectors of a batch, V wide where they stand for an item."""

    target: Tensor
    """(B, V)."""
    distinct: Tensor
    """(F·U, V): event vector of flag f on item u at u·F + f, F rows of the table of flags."""
    events: Tensor
    """(B, L) int64: rows of the history in `distinct`, oldest first."""
    mask: Tensor
    """(B, L) bool: False where there is no event."""
    context: Tensor
    """(B, C): mean rows of the other fields."""

    def event_vectors(self) -> Tensor:
        """(B, L, V)."""
        return functional.embedding(self.events, self.distinct)


class SequenceInput(nn.Module):
    """Items as [row of the id, mean row of the genres] (V = 2k), events as items with the row of their flag.

    An event is `P · [item, flag row]`, back to V: a disliked item is another event than a liked one (KAR has the rating
    there). Both are computed for the batch's distinct items, which are far fewer than its events.

    The other fields, the user's and the target's year, stand beside them, except those that look up the table of
    items: those means hold the history, which is read in order here.

    Args:
        fields: field name -> table; `item` and `genres` are needed.
        tables: table name -> rows; `flag` is needed.
        field_dim: k, width of a row.

    Raises:
        ValueError: one of those is missing.
    """

    def __init__(self, fields: Mapping[str, str], tables: Mapping[str, int], field_dim: int) -> None:
        super().__init__()
        missing = [name for name in _ITEM_FIELDS if name not in fields] + [_FLAG_TABLE] * (_FLAG_TABLE not in tables)
        if missing:
            raise ValueError(
                f"a model of sequences needs the fields {list(_ITEM_FIELDS)} and the table {_FLAG_TABLE!r}: "
                f"{missing} is missing of {[*fields]} and {[*tables]}"
            )
        self.item_fields = {field: fields[field] for field in _ITEM_FIELDS}
        self.other_fields = {
            field: table for field, table in fields.items() if field not in _ITEM_FIELDS and table != fields["item"]
        }
        self.flags = tables[_FLAG_TABLE]
        self.width = len(_ITEM_FIELDS) * field_dim
        self.context_width = len(self.other_fields) * field_dim
        used = {*self.item_fields.values(), *self.other_fields.values(), _FLAG_TABLE}
        self.tables = Tables({name: rows for name, rows in tables.items() if name in used}, field_dim)
        self.project = nn.Linear(self.width + field_dim, self.width)

    def forward(self, features: Features) -> Sequence:
        """The vectors of a batch."""
        items = torch.cat([self.tables.mean(table, features.items[f]) for f, table in self.item_fields.items()], dim=1)
        of_items, of_flags = self.project.weight[:, : self.width], self.project.weight[:, self.width :]
        flag_rows = self.tables.rows(_FLAG_TABLE)
        distinct = functional.linear(items, of_items)[:, None] + functional.linear(
            flag_rows, of_flags, self.project.bias
        )
        others = [self.tables.mean(table, features.fields[field]) for field, table in self.other_fields.items()]
        return Sequence(
            target=functional.embedding(features.target, items),
            distinct=distinct.flatten(0, 1),
            events=features.history * self.flags + features.flags,
            mask=features.flags > 0,
            context=torch.cat(others, dim=1) if others else items.new_zeros(len(features.target), 0),
        )


class HeadOptions(TypedDict, total=False):
    """Of the DNN behind an interest."""

    knowledge_dim: int
    """K, total width of the knowledge vectors; 0, as when left out, for none."""
    layers: tuple[int, ...]
    """Widths of the hidden layers; left out: KAR's 200, 80."""
    dropout: float
    """After each hidden layer, and on the knowledge vectors that enter; left out: 0."""


class SequenceRanker(nn.Module, ABC):
    """A click model of an interest: a DNN with Dice over [interest, target, other fields, knowledge], as in KAR.

    The target's item has a bias of its own beside it, as in DeepFM's linear term: a small id embedding would have to
    find it by way of the DNN.

    Args:
        fields: field name -> table it looks up: `item`, `genres`, and others.
        tables: table name -> rows; `flag` among them.
        field_dim: k, width of a row.
        head: of the DNN.
    """

    def __init__(
        self, fields: Mapping[str, str], tables: Mapping[str, int], field_dim: int, **head: Unpack[HeadOptions]
    ) -> None:
        super().__init__()
        dropout = head.get("dropout", 0.0)
        self.input = SequenceInput(fields, tables, field_dim)
        self.linear = Tables({"item": tables[fields["item"]]}, 1, std=0.0)
        self.knowledge_dim = head.get("knowledge_dim", 0)
        width = 2 * self.input.width + self.input.context_width + self.knowledge_dim
        self.deep = dnn(width, head.get("layers", (200, 80)), Dice, dropout)
        self.knowledge_dropout = nn.Dropout(dropout)

    @abstractmethod
    def interest(self, seen: Sequence) -> Tensor:
        """What the events say of the user with the target in view, (B, V); 0 for an empty history."""

    def first_order_parameters(self) -> list[nn.Parameter]:
        """The biases of single ids, which a trainer may give a rate of their own."""
        return [*self.linear.parameters()]

    def forward(self, features: Features, knowledge: Tensor | None = None) -> Tensor:
        """Logits (B,) of a batch.

        Args:
            features: items, targets, histories, and the other fields.
            knowledge: (B, K), or None where the model was built for none.

        Raises:
            ValueError: knowledge of another width.
        """
        check_knowledge(type(self).__name__, knowledge, self.knowledge_dim)
        seen: Sequence = self.input(features)
        parts = [self.interest(seen), seen.target, seen.context]
        if knowledge is not None:
            parts.append(self.knowledge_dropout(knowledge))
        bias = self.linear.mean("item", features.items["item"])
        out: Tensor = self.deep(torch.cat(parts, dim=1)) + functional.embedding(features.target, bias)
        return out.squeeze(1)
