"""CTR examples: a user's targets, described by the item, the user's attributes and the user's history.

User ids are never features: under the user split those of valid and test users have no train rows, and under the time
split leaving them out keeps one model for both. The history stands for the user.

Item ids without train rows share row 0, *unknown*. It is trained by replacing the target's id with it in a share of
the train examples (`ID_DROPOUT`), so a cold item is scored from genres, year, text and the user's side. In a history
such items are left out of the means of ids; their genres and their like flag still count.
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
from torch.nn import functional

from kellm_features.data.history import assign_roles
from kellm_features.errors import DataError
from kellm_features.training.encodings import Ids, id_array, positions
from kellm_features.training.features import DISLIKED, LIKED, Bag, Features

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
    "year": "year",
    "gender": "gender",
    "age": "age",
    "occupation": "occupation",
    "history_liked": "item",
    "history_disliked": "item",
    "history_flags": "flag",
    "history_liked_genres": "genre",
    "history_disliked_genres": "genre",
}
"""Field -> the table that it looks up. `history_flags` carries the shares of likes and dislikes, which the means of
items and of genres do not. A target's year, and the genres of a history, which let a model without text know a taste as
its items alone do not, are what any catalogue tells: without them text would be credited with it."""
HISTORY_GENRES = 64
"""Genres that the fields of a history's genres tell apart, most frequent first: each costs one number an example.
MovieLens has 18; a catalogue of free tags has thousands, nearly all of them rare."""
_SCATTER_UP_TO = 2
"""Finding the distinct among n places by a table of all is the cheaper way while there are at most 2 n (n = 63,488, one
core: 0.20 ms against 0.70 ms by sorting at 4,000 places, 0.9 against 0.9 at 128,000, 3.2 against 0.7 at 2 million)."""


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
    """(N,) float64: smoothed share of likes in train rows: the baseline."""
    item_count: Tensor
    """(N,) int64: train rows of each item, histories and targets; 0: a cold item."""
    train_likes: dict[str, npt.NDArray[np.int64]]
    """Side (`item`, `user`) -> (N,) likes in train rows: the degrees in the graph that SWING's pairs come from."""
    history_length: Tensor
    """(U,) int64: events of each user that are history, whether the model sees all of them or the last few."""
    events: Tensor = field(repr=False)
    """(U, L) int32: places (catalogue index + 1) of the history that the model sees, oldest first; 0 behind it."""
    flags: Tensor = field(repr=False)
    """(U, L) int8: `LIKED`, `DISLIKED`, 0 where there is no event."""
    # Tables by *place*: 0 for no item, i + 1 for the item at catalogue index i.
    _item: Tensor = field(repr=False)
    _genres: Bag = field(repr=False)
    _genre_shares: Tensor = field(repr=False)
    _genre_rows: Tensor = field(repr=False)
    _year: Tensor = field(repr=False)
    _attributes: Tensor = field(repr=False)

    @property
    def table_rows(self) -> dict[str, int]:
        """Table -> its number of rows, unknown included."""
        return {name: len(values) + 1 for name, values in self.vocabularies.items()}

    def features(
        self, user: Tensor, item: Tensor, generator: torch.Generator | None = None, part: slice = slice(None)
    ) -> Features:
        """What a backbone sees of a batch, on the CPU.

        Args:
            user: (B,) int64 indices.
            item: (B,) int64 indices.
            generator: for training: hides item ids and history events at random (`ID_DROPOUT`, `HISTORY_DROPOUT`).
            part: the rows wanted. What is hidden is drawn for the whole batch, so the parts of several ranks are
                together what one process sees.
        """
        mine = user[part]
        flags = self.flags.index_select(0, mine)
        events, visible = self.events.index_select(0, mine), flags
        places = shown = item[part] + 1
        if generator is not None:
            hidden = torch.rand(len(user), generator=generator)[part] < ID_DROPOUT
            kept = torch.rand((len(user), flags.shape[1]), generator=generator)[part] >= HISTORY_DROPOUT
            shown, events, visible = places.masked_fill(hidden, 0), events * kept, flags * kept
        past = self._item.index_select(0, events.flatten()).view(events.shape)
        liked, disliked, known = visible == LIKED, visible == DISLIKED, past > 0
        one = torch.ones(len(mine), 1)
        fields = {
            "item": Bag(self._item[shown, None], one),
            "genres": Bag(self._genres.ids[places], self._genres.weights[places]),
            "year": Bag(self._year[places, None], one),
        }
        for column, name in enumerate(ATTRIBUTES):
            fields[name] = Bag(self._attributes[mine, column, None], one)
        fields["history_liked"] = Bag(past, _shares((liked & known).float()))
        fields["history_disliked"] = Bag(past, _shares((disliked & known).float()))
        told = torch.stack([(flags == LIKED).sum(1), (flags == DISLIKED).sum(1)], dim=1)
        fields["history_flags"] = Bag(torch.tensor([[LIKED, DISLIKED]]).expand(len(mine), 2), _shares(told))
        for name, marks in (("history_liked_genres", liked), ("history_disliked_genres", disliked)):
            genres = functional.embedding_bag(events, self._genre_shares, per_sample_weights=marks.float(), mode="sum")
            fields[name] = Bag(self._genre_rows.expand(len(mine), -1), _shares(genres))
        items, target, history = self._distinct(places, shown, events)
        return Features(fields, items, target, history, visible.long(), events.long())

    def _distinct(self, places: Tensor, shown: Tensor, events: Tensor) -> tuple[dict[str, Bag], Tensor, Tensor]:
        """The distinct items of targets and visible events, and the rows of targets (B,) and events (B, L) in them.

        A target whose id is hidden has a row of its own behind the others: its genres, and an unknown id.
        """
        distinct, row = distinct_places(torch.cat([shown, events.flatten()]), len(self._item))
        target, history = row[: len(shown)], row[len(shown) :].view(events.shape)
        hidden = shown == 0
        twins = places[hidden]
        target[hidden] = len(distinct) + torch.arange(len(twins))
        described = torch.cat([distinct, twins])
        rows = torch.cat([self._item[distinct], torch.zeros_like(twins)])
        items = {
            "item": Bag(rows[:, None], torch.ones(len(rows), 1)),
            "genres": Bag(self._genres.ids[described], self._genres.weights[described]),
        }
        return items, target, history


def build_ctr_data(
    interactions: pa.Table,
    items: pa.Table,
    users: pa.Table,
    *,
    split: Literal["user", "time"],
    max_history: int,
    ties: Literal["strict", "shuffle"],
    seed: int,
    seen_history: int | None = None,
    valid_part: Literal["valid", "test"] = "valid",
) -> CtrData:
    """Assign roles, index ids and precompute per-item and per-user features.

    Vocabularies come from train rows, so nothing that only valid or test holds shapes the model.

    Args:
        interactions: `INTERACTIONS`.
        items: `ITEMS`.
        users: `USERS`.
        split: how the column `split` was made.
        max_history: events of history per user at most: decides which events are history, which are targets.
        ties: see `assign_roles`.
        seed: of the order among ties.
        seen_history: the model sees this many of a user's history events, the last ones; None: all of them. Models
            that see histories of different lengths are so compared on the same targets.
        valid_part: the part that selects a model. `test` is for replicating protocols that stop on it.

    Raises:
        DataError: an id that the catalogue lacks; a part without targets, or without both likes and dislikes in
            train or valid.
        ValueError: `seen_history` is below 1 or above `max_history`.
    """
    seen = max_history if seen_history is None else seen_history
    if not 1 <= seen <= max_history:
        raise ValueError(f"seen_history={seen_history} is not within 1 and max_history={max_history}")
    item_ids, user_ids = id_array(items.column("item_id")), id_array(users.column("user_id"))
    names = ["user_id", "item_id", "liked", "event_timestamp", "split"]
    frame = interactions.select(names).to_pandas()
    roles = assign_roles(frame, split=split, max_history=max_history, ties=ties, seed=seed)
    roles = roles.assign(
        user=positions(user_ids, roles["user_id"].to_numpy(), "user_id", "interactions"),
        item=positions(item_ids, roles["item_id"].to_numpy(), "item_id", "interactions"),
    )
    train = roles["split"].eq("train")
    likes = frame[frame["split"].eq("train") & frame["liked"]]
    item_in_train, user_in_train = (
        np.isin(np.arange(len(ids)), roles.loc[train, name].unique())
        for ids, name in ((item_ids, "item"), (user_ids, "user"))
    )
    item_rows, item_vocabulary = _vocabulary(pd.Series(item_ids), item_in_train)
    genres, genre_vocabulary = _genres(items, item_in_train)
    years, year_vocabulary = _vocabulary(items.column("year").cast(pa.string()).to_pandas(), item_in_train)
    genre_shares, genre_rows = _genre_shares(genres, len(genre_vocabulary))
    attributes, vocabularies = _attributes(users, user_in_train)
    past = roles[roles["role"] == "history"]
    events, flags = _history(past, len(user_ids), seen)
    return CtrData(
        item_ids=item_ids,
        user_ids=user_ids,
        item_in_train=item_in_train,
        user_in_train=user_in_train,
        vocabularies={
            "item": item_vocabulary,
            "genre": genre_vocabulary,
            "year": year_vocabulary,
            **vocabularies,
            "flag": ["liked", "disliked"],
        },
        examples={part: _examples(roles, valid_part if part == "valid" else part) for part in SPLITS},
        item_mean=_item_mean(roles[train], len(item_ids)),
        item_count=torch.from_numpy(np.bincount(roles.loc[train, "item"], minlength=len(item_ids))),
        train_likes={
            side: np.bincount(
                positions(ids, likes[f"{side}_id"].to_numpy(), f"{side}_id", "interactions"), minlength=len(ids)
            )
            for side, ids in (("item", item_ids), ("user", user_ids))
        },
        history_length=torch.from_numpy(np.bincount(past["user"], minlength=len(user_ids))),
        _item=functional.pad(torch.from_numpy(item_rows), (1, 0)),
        _genres=genres,
        _genre_shares=genre_shares,
        _genre_rows=genre_rows,
        _year=functional.pad(torch.from_numpy(years), (1, 0)),
        _attributes=attributes,
        events=events,
        flags=flags,
    )


def _vocabulary(values: pd.Series, in_train: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Row of each value (0: unknown or null), and the values of rows 1, 2, …, sorted."""
    known = sorted(values[in_train].dropna().unique())
    rows = pd.Index(known).get_indexer(pd.Index(values)) + 1 if known else np.zeros(len(values), dtype=np.int64)
    return rows.astype(np.int64), [str(value) for value in known]


def _genres(items: pa.Table, in_train: npt.NDArray[np.bool_]) -> tuple[Bag, list[str]]:
    """By place, multi-hot mean: each known genre of an item weighs 1 / their number."""
    lists = [list(dict.fromkeys(genres or [])) for genres in items.column("genres").to_pylist()]
    flat = pd.Series([genre for genres in lists for genre in genres], dtype=object)
    owner = np.repeat(np.arange(len(lists)), [len(genres) for genres in lists])
    rows, vocabulary = _vocabulary(flat, in_train[owner])
    owner, rows = owner[rows > 0], rows[rows > 0]
    ids, filled = _padded(owner + 1, rows, len(lists) + 1)
    return Bag(ids, _shares(filled)), vocabulary


def _attributes(users: pa.Table, in_train: npt.NDArray[np.bool_]) -> tuple[Tensor, dict[str, list[str]]]:
    columns, vocabularies = [], {}
    for name in ATTRIBUTES:
        rows, vocabularies[name] = _vocabulary(users.column(name).to_pandas(), in_train)
        columns.append(torch.from_numpy(rows))
    return torch.stack(columns, dim=1), vocabularies


def _genre_shares(genres: Bag, count: int) -> tuple[Tensor, Tensor]:
    """By place, shares of the most frequent genres, (N + 1, G) float32; and those genres' rows, (1, G) int64."""
    items = torch.bincount(genres.ids[genres.weights > 0], minlength=count + 1)[1:]
    common = items.argsort(descending=True, stable=True)[:HISTORY_GENRES].sort().values + 1
    if not count:  # a catalogue without genres: one column, which stays empty
        common = torch.zeros(1, dtype=torch.int64)
    column = torch.full((count + 1,), len(common)).index_put_((common,), torch.arange(len(common)))
    shares = torch.zeros(len(genres.ids), len(common) + 1).scatter_add_(1, column[genres.ids], genres.weights)
    return shares[:, :-1].contiguous(), common[None]


def _history(events: pd.DataFrame, users: int, seen: int) -> tuple[Tensor, Tensor]:
    """Per user the last `seen` events, oldest first: places of items (U, L) int32, and flags (U, L) int8."""
    events = events.groupby("user", sort=False).tail(seen).sort_values("user", kind="stable")
    owner = events["user"].to_numpy()
    places, _ = _padded(owner, events["item"].to_numpy() + 1, users, seen)
    flags, _ = _padded(owner, np.where(events["liked"], LIKED, DISLIKED), users, seen)
    return places.int(), flags.to(torch.int8)


def distinct_places(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The distinct places above 0, ascending, and the rank of each place among them; 0 for place 0.

    Args:
        places: (n,) int64, below `count`.
        count: of places.
    """
    if count <= _SCATTER_UP_TO * len(places):
        present = torch.zeros(count, dtype=torch.bool)
        present.index_fill_(0, places, True)
        present[0] = False
        rank = present.cumsum(0) - 1
        distinct, row = torch.nonzero(present).squeeze(1), rank.index_select(0, places)
    else:
        distinct, row = torch.unique(places, return_inverse=True)
        if len(distinct) and distinct[0] == 0:
            distinct, row = distinct[1:], row - 1
    return distinct, row.clamp_min_(0)


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
