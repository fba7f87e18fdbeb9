"""CTR examples: a user's targets, described by the item, the user's attributes and the user's history.

User ids are never features: under the user split those of valid and test users have no train rows, and under the time
split leaving them out keeps one model for both. The history stands for the user.

Item ids without train rows share row 0, *unknown*. It is trained by replacing the target's id with it in a share of
the train examples (`ID_DROPOUT`), so a cold item is scored from genres, text and the user's side. In a history such
items are left out of the means; their like flag still counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from kellm_features.data.history import assign_roles
from kellm_features.errors import DataError
from kellm_features.training.backbones import Bag
from kellm_features.training.encodings import Ids, id_array, positions

SPLITS = ("train", "valid", "test")
ID_DROPOUT = 0.05
"""Share of train examples whose item id is hidden: 3,000 of MovieLens-100K's 61,000, enough to fit one row."""
HISTORY_DROPOUT = 0.5
"""Share of history items hidden in a train example, the shares of likes and dislikes excepted: a history is the same in
all of a user's examples, and a model that sees it whole learns users by heart (MovieLens-100K: validation AUC 0.7427 →
0.7452, one seed; with the shares hidden too it falls)."""
ATTRIBUTES = ("gender", "age", "occupation")
FIELDS = {
    "item": "item",
    "genres": "genre",
    "gender": "gender",
    "age": "age",
    "occupation": "occupation",
    "history_liked": "item",
    "history_disliked": "item",
    "history_flags": "flag",
}
"""Field -> the table that it looks up. `history_flags` carries the shares of likes and dislikes, which the two means
of items do not."""


@dataclass(frozen=True)
class Examples:
    """Targets of one part of the split, as indices into the catalogue."""

    user: Tensor
    """(n,) int64."""
    item: Tensor
    """(n,) int64."""
    label: Tensor
    """(n,) float32: 1 liked, 0 not."""

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class CtrData:
    """Examples, and what it takes to turn (user, item) into features."""

    item_ids: Ids
    user_ids: Ids
    item_in_train: npt.NDArray[np.bool_]
    user_in_train: npt.NDArray[np.bool_]
    vocabularies: dict[str, list[str]]
    """Table -> what its rows 1, 2, … stand for; row 0 is unknown. The table `item` has item ids."""
    examples: dict[str, Examples]
    item_mean: Tensor
    """(N,) smoothed share of likes in train rows: the baseline."""
    _item: Tensor = field(repr=False)
    _genres: Bag = field(repr=False)
    _attributes: Tensor = field(repr=False)
    _history: Tensor = field(repr=False)
    _liked: Tensor = field(repr=False)
    _disliked: Tensor = field(repr=False)

    @property
    def table_rows(self) -> dict[str, int]:
        """Table -> its number of rows, unknown included."""
        return {name: len(values) + 1 for name, values in self.vocabularies.items()}

    def features(self, user: Tensor, item: Tensor, generator: torch.Generator | None = None) -> dict[str, Bag]:
        """The bags of `FIELDS` for a batch, on the CPU.

        Args:
            user: (B,) indices.
            item: (B,) indices.
            generator: for training: hides item ids and history events at random (`ID_DROPOUT`, `HISTORY_DROPOUT`).
        """
        rows, history = self._item[item], self._history[user]
        liked, disliked = self._liked[user], self._disliked[user]
        if generator is not None:
            rows = rows.masked_fill(torch.rand(len(rows), generator=generator) < ID_DROPOUT, 0)
            kept = torch.rand(history.shape, generator=generator) >= HISTORY_DROPOUT
        else:
            kept = torch.ones(history.shape, dtype=torch.bool)
        flags = torch.stack([liked.sum(1), disliked.sum(1)], dim=1)
        known = (kept & (history > 0)).float()
        one = torch.ones(len(user), 1)
        bags = {
            "item": Bag(rows[:, None], one),
            "genres": Bag(self._genres.ids[item], self._genres.weights[item]),
        }
        for column, name in enumerate(ATTRIBUTES):
            bags[name] = Bag(self._attributes[user, column, None], one)
        bags["history_liked"] = Bag(history, _shares(liked * known))
        bags["history_disliked"] = Bag(history, _shares(disliked * known))
        bags["history_flags"] = Bag(torch.tensor([[1, 2]]).expand(len(user), 2), _shares(flags))
        return bags


def build_ctr_data(
    interactions: pa.Table,
    items: pa.Table,
    users: pa.Table,
    *,
    split: Literal["user", "time"],
    max_history: int,
    ties: Literal["strict", "shuffle"],
    seed: int,
) -> CtrData:
    """Assign roles, index ids and precompute per-item and per-user features.

    Vocabularies come from train rows, so nothing that only valid or test holds shapes the model.

    Args:
        interactions: `INTERACTIONS`.
        items: `ITEMS`.
        users: `USERS`.
        split: how the column `split` was made.
        max_history: events of history per user at most.
        ties: see `assign_roles`.
        seed: of the order among ties.

    Raises:
        DataError: an id that the catalogue lacks; a part without targets, or without both likes and dislikes in
            train or valid.
    """
    item_ids, user_ids = id_array(items.column("item_id")), id_array(users.column("user_id"))
    names = ["user_id", "item_id", "liked", "event_timestamp", "split"]
    frame = interactions.select(names).to_pandas()
    roles = assign_roles(frame, split=split, max_history=max_history, ties=ties, seed=seed)
    roles = roles.assign(
        user=positions(user_ids, roles["user_id"].to_numpy(), "user_id", "interactions"),
        item=positions(item_ids, roles["item_id"].to_numpy(), "item_id", "interactions"),
    )
    train = roles["split"].eq("train")
    item_in_train, user_in_train = (
        np.isin(np.arange(len(ids)), roles.loc[train, name].unique())
        for ids, name in ((item_ids, "item"), (user_ids, "user"))
    )
    item_rows, item_vocabulary = _vocabulary(pd.Series(item_ids), item_in_train)
    genres, genre_vocabulary = _genres(items, item_in_train)
    attributes, vocabularies = _attributes(users, user_in_train)
    history, liked, disliked = _history(roles, item_rows, len(user_ids), max_history)
    return CtrData(
        item_ids=item_ids,
        user_ids=user_ids,
        item_in_train=item_in_train,
        user_in_train=user_in_train,
        vocabularies={
            "item": item_vocabulary,
            "genre": genre_vocabulary,
            **vocabularies,
            "flag": ["liked", "disliked"],
        },
        examples={part: _examples(roles, part) for part in SPLITS},
        item_mean=_item_mean(roles[train], len(item_ids)),
        _item=torch.from_numpy(item_rows),
        _genres=genres,
        _attributes=attributes,
        _history=history,
        _liked=liked,
        _disliked=disliked,
    )


def _vocabulary(values: pd.Series, in_train: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Row of each value (0: unknown or null), and the values of rows 1, 2, …, sorted."""
    known = sorted(values[in_train].dropna().unique())
    rows = pd.Index(known).get_indexer(pd.Index(values)) + 1 if known else np.zeros(len(values), dtype=np.int64)
    return rows.astype(np.int64), [str(value) for value in known]


def _genres(items: pa.Table, in_train: npt.NDArray[np.bool_]) -> tuple[Bag, list[str]]:
    """Multi-hot mean: each known genre of an item weighs 1 / their number."""
    lists = [list(dict.fromkeys(genres or [])) for genres in items.column("genres").to_pylist()]
    flat = pd.Series([genre for genres in lists for genre in genres], dtype=object)
    owner = np.repeat(np.arange(len(lists)), [len(genres) for genres in lists])
    rows, vocabulary = _vocabulary(flat, in_train[owner])
    owner, rows = owner[rows > 0], rows[rows > 0]
    ids, filled = _padded(owner, rows, len(lists))
    return Bag(ids, _shares(filled)), vocabulary


def _attributes(users: pa.Table, in_train: npt.NDArray[np.bool_]) -> tuple[Tensor, dict[str, list[str]]]:
    columns, vocabularies = [], {}
    for name in ATTRIBUTES:
        rows, vocabularies[name] = _vocabulary(users.column(name).to_pandas(), in_train)
        columns.append(torch.from_numpy(rows))
    return torch.stack(columns, dim=1), vocabularies


def _history(
    roles: pd.DataFrame, item_rows: npt.NDArray[np.int64], users: int, max_history: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per user: item rows (U, L), 1.0 where an event is a like (U, L), and where it is a dislike (U, L)."""
    events = roles[roles["role"] == "history"]
    owner = events["user"].to_numpy()
    order = np.argsort(owner, kind="stable")
    ids, filled = _padded(owner[order], item_rows[events["item"].to_numpy()][order], users, max_history)
    liked, _ = _padded(owner[order], events["liked"].to_numpy().astype(np.int64)[order], users, max_history)
    return ids, liked * filled, (1 - liked) * filled


def _shares(weights: Tensor) -> Tensor:
    """Rows scaled to sum to 1; an empty row stays 0."""
    total = weights.sum(1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def _padded(
    owner: npt.NDArray[np.int64], values: npt.NDArray[np.int64], owners: int, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Values grouped by owner (sorted) as (owners, L) with zeros behind, and 1.0 where a value stands."""
    column = np.arange(len(owner)) - np.searchsorted(owner, owner)
    wide = max(1, width or int(column.max(initial=0)) + 1)
    table, filled = np.zeros((owners, wide), dtype=np.int64), np.zeros((owners, wide), dtype=np.float32)
    table[owner, column], filled[owner, column] = values, 1
    return torch.from_numpy(table), torch.from_numpy(filled)


def _examples(roles: pd.DataFrame, part: str) -> Examples:
    rows = roles[(roles["role"] == "target") & (roles["split"] == part)]
    label = rows["liked"].to_numpy().astype(np.float32)
    seen = np.unique(label)
    if len(seen) < 2 and (part != "test" or not len(seen)):
        what = "no targets" if not len(seen) else f"{len(label)} targets, all {'liked' if seen[0] else 'not liked'}"
        raise DataError(
            f"the part '{part}' of the split has {what}: likes and dislikes are needed after each user's history; "
            "give more interactions, or change data.like_above, history.ties or the fractions of the split"
        )
    return Examples(
        torch.from_numpy(rows["user"].to_numpy()),
        torch.from_numpy(rows["item"].to_numpy()),
        torch.from_numpy(label),
    )


def _item_mean(train: pd.DataFrame, items: int, prior_events: float = 10.0) -> Tensor:
    """Share of likes among an item's train rows, shrunk to the overall share by `prior_events` events of it."""
    item = train["item"].to_numpy()
    likes = np.bincount(item, weights=train["liked"].to_numpy().astype(np.float64), minlength=items)
    count = np.bincount(item, minlength=items)
    overall = float(train["liked"].mean())
    return torch.from_numpy((likes + prior_events * overall) / (count + prior_events))
