"""What models of sequences read of a batch: targets, events in order, and the rest of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.backbones.parts import Tables
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
    """(B, C): mean rows of the user's fields."""

    def event_vectors(self) -> Tensor:
        """(B, L, V)."""
        return functional.embedding(self.events, self.distinct)


class SequenceInput(nn.Module):
    """Items as [row of the id, mean row of the genres] (V = 2k), events as items with the row of their flag.

    An event is `P · [item, flag row]`, back to V: a disliked item is another event than a liked one (KAR has the rating
    there). Both are computed for the batch's distinct items, which are far fewer than its events.

    The user's fields are all but the target's and those that look up the table of items: those means hold the history,
    which is read in order here.

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
        self.user_fields = {
            field: table for field, table in fields.items() if field not in _ITEM_FIELDS and table != fields["item"]
        }
        self.flags = tables[_FLAG_TABLE]
        self.width = len(_ITEM_FIELDS) * field_dim
        self.context_width = len(self.user_fields) * field_dim
        used = {*self.item_fields.values(), *self.user_fields.values(), _FLAG_TABLE}
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
        user = [self.tables.mean(table, features.fields[field]) for field, table in self.user_fields.items()]
        return Sequence(
            target=functional.embedding(features.target, items),
            distinct=distinct.flatten(0, 1),
            events=features.history * self.flags + features.flags,
            mask=features.flags > 0,
            context=torch.cat(user, dim=1) if user else items.new_zeros(len(features.target), 0),
        )
