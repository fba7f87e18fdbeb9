"""Who trains, who selects, who tests: the splits of an evaluation, as tables.

Every split is decided by ids, by timestamps and by a seed, never by a label. Which events of a user are history and
which are targets is `kellm_features.data.history.assign_roles`' business, and each fold's table is ready for it: what
a part must not see is gone before roles are assigned, so a history never points at a removed event.

Positives for the contrastive terms come from the train rows of the same fold. They are made anew for every fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kellm_features.data.split import split_by_time, split_hash
from kellm_features.errors import ConfigError, DataError
from kellm_features.schemas import INTERACTIONS

Parts = npt.NDArray[np.object_]
Codes = npt.NDArray[np.int64]

_COLD_TEST_PER_VALID = 3
"""Cold items: a quarter for validation, three quarters for the test, which the claims rest on."""


@dataclass(frozen=True, eq=False)
class Fold:
    """One split of the interactions: what trains, what selects and what tests a model."""

    name: str
    """`B0`, `B1`, …; `A`; `C`; `cold0`, `cold1`, …"""
    interactions: pa.Table
    """`INTERACTIONS`, with `split` set for this fold; rows that no part may see are gone."""
    split: Literal["user", "time"]
    """How `split` was made, as `assign_roles` needs it."""
    select_on: Literal["valid", "test"]
    """The part that early stopping and tuning look at. `test` is KAR's way, for replication alone."""
    cold_valid: frozenset[Any]
    """Item ids that were withheld from train and test: validation alone shows them."""
    cold_test: frozenset[Any]
    """Item ids that were withheld from train and validation: the test alone shows them."""

    @cached_property
    def split_hash(self) -> str:
        """Ties whatever is made from this fold to it. Computed when first asked for: a second for a million rows."""
        return split_hash(self.interactions.select(INTERACTIONS.names).to_pandas())


def user_folds(interactions: pa.Table, *, folds: int = 10, seed: int = 7) -> list[Fold]:
    """Protocol B, KELLMRec's 8:1:1 over users, turned round until each user was tested once.

    Users are dealt into `folds` blocks of equal size (by one at most). Fold k tests block k, validates on block k + 1
    (the last fold: block 0) and trains on the rest. A test user's earlier events are his history, known when he is
    scored; no label of his takes part in training or in selection.

    Args:
        interactions: `INTERACTIONS`; a `split` that is there is replaced.
        folds: blocks and folds, 3 or more; 10 gives 8:1:1.
        seed: of the deal.

    Raises:
        ConfigError: fewer than 3 folds.
        DataError: fewer users than folds.
    """
    user, block = _user_blocks(interactions, folds, seed)
    return [_fold(f"B{fold}", interactions, _turned(block, fold, folds)[user], split="user") for fold in range(folds)]


def kar_fold(interactions: pa.Table, *, seed: int = 1234) -> Fold:
    """Protocol A, as KAR's published code splits: 9:1 over users, a clock of whole days, the test stops the training.

    It has no validation part, and selection looks at the test (`select_on`): its figures are a replication of how
    earlier figures came about, and too good. Two differences remain. Users are dealt by NumPy's generator, not
    Python's. KAR leaves the events of a day in the order of its file, which can put a target before its history;
    here they are ties, so pair it with `ties="shuffle"`: the strict rule would drop every target of the day that a
    user's history ends on.

    Raises:
        DataError: fewer than 10 users.
    """
    user, block = _user_blocks(interactions, 10, seed)
    days = pc.floor_temporal(interactions.column("event_timestamp"), unit="day")
    place = interactions.schema.get_field_index("event_timestamp")
    interactions = interactions.set_column(place, interactions.schema.field(place), days)
    parts = np.where(block == 0, "test", "train").astype(object)
    return _fold("A", interactions, parts[user], split="user", select_on="test")


def time_fold(interactions: pa.Table, *, train: float = 0.8, valid: float = 0.1) -> Fold:
    """Protocol C, two cuts in time for all users: train < T1 <= valid < T2 <= test.

    The nearest to serving: a model knows what was known at T1. Items that first appear after T1 are cold by nature,
    so none is withheld, and validation and test may show the same new item. `slices` tells warm from cold by train
    counts.

    Args:
        interactions: `INTERACTIONS`; a `split` that is there is replaced.
        train: share of the rows before T1, about: equal timestamps stay on one side.
        valid: share of the rows between T1 and T2.

    Raises:
        ConfigError: shares that leave no room for one of the parts.
        DataError: a part is empty.
    """
    if not (0 < train < 1 and 0 < valid < 1 - train):
        raise ConfigError(
            f"the time split got train = {train} and valid = {valid}: shares above 0 with a sum below 1 are accepted"
        )
    parts = split_by_time(interactions.column("event_timestamp").to_pandas(), train, valid)
    return _fold("C", interactions, parts, split="time")


def cold_fold(interactions: pa.Table, *, share: float = 0.2, fold: int = 0, folds: int = 10, seed: int = 7) -> Fold:
    """Fold `fold` of `user_folds`, with `share` of the items withheld from training altogether.

    The items are drawn among all that have an interaction, anew for each fold. Their rows in train users are removed.
    A quarter are cold for validation: their rows in test users are removed too. The rest are cold for the test, and
    gone from valid users. So no history and no target of a train user shows a cold item, a model is selected on
    cold items that the test never shows, and tested on ones that selection never saw.

    Items of valid and test users that no train user has met are cold by nature. They are dealt into the two sets the
    same way, so an item of the test without train rows is in `cold_test`, and nowhere else.

    Args:
        interactions: `INTERACTIONS`; a `split` that is there is replaced.
        share: of the items, above 0 and below 1; at least 4 items must come of it.
        fold: 0 … folds − 1.
        folds: as in `user_folds`.
        seed: of the deal of users (the same for all folds) and, with `fold`, of the draw of items.

    Raises:
        ConfigError: fewer than 3 folds, no such fold, or a share out of range.
        DataError: fewer users than folds, fewer than 4 cold items, or a part that is left empty.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the cold split got share = {share}: a share of the items above 0 and below 1 is accepted")
    if not 0 <= fold < folds:
        raise ConfigError(f"the cold split got fold = {fold}: 0 to {folds - 1} are accepted, as folds = {folds}")
    user, block = _user_blocks(interactions, folds, seed)
    parts = _turned(block, fold, folds)[user]
    item, ids = _factorize(interactions, "item_id")
    drawn = round(share * len(ids))
    if drawn < _COLD_TEST_PER_VALID + 1:
        raise DataError(
            f"the cold split draws {drawn} of {len(ids)} items (share = {share}): 4 or more are needed, 1 to select on "
            "and 3 to test on; give more data or a larger share"
        )
    order = np.random.default_rng([seed, fold]).permutation(len(ids))
    unmet = ~np.isin(order, item[parts == "train"])
    unmet[:drawn] = False
    cold = np.concatenate([order[:drawn], order[unmet]])
    shown_in = np.full(len(ids), "", dtype=object)
    shown_in[cold] = "test"
    shown_in[cold[:: _COLD_TEST_PER_VALID + 1]] = "valid"
    where = shown_in[item]
    kept = (where == "") | (where == parts)
    return _fold(
        f"cold{fold}",
        interactions.filter(pa.array(kept)),
        parts[kept],
        split="user",
        cold_valid=frozenset(ids[shown_in == "valid"].tolist()),
        cold_test=frozenset(ids[shown_in == "test"].tolist()),
    )


def _fold(
    name: str,
    interactions: pa.Table,
    parts: Parts,
    *,
    split: Literal["user", "time"],
    select_on: Literal["valid", "test"] = "valid",
    cold_valid: frozenset[Any] = frozenset(),
    cold_test: frozenset[Any] = frozenset(),
) -> Fold:
    wanted = ("train", "valid", "test") if select_on == "valid" else ("train", "test")
    counts = {part: int((parts == part).sum()) for part in wanted}
    if not all(counts.values()):
        empty = " and ".join(part for part, count in counts.items() if not count)
        raise DataError(f"fold {name} leaves {empty} without a row (rows: {counts}): give more data, or other shares")
    if "split" in interactions.column_names:
        interactions = interactions.drop_columns(["split"])
    table = interactions.append_column("split", pa.array(parts, pa.string())).select(INTERACTIONS.names)
    INTERACTIONS.check(table.schema, f"fold {name}")
    return Fold(name, table, split, select_on, cold_valid, cold_test)


def _user_blocks(interactions: pa.Table, folds: int, seed: int) -> tuple[Codes, Codes]:
    """User of each row as a code, and the block of each user."""
    if folds < 3:
        raise ConfigError(f"a split by user got folds = {folds}: 3 or more are needed to train, to select and to test")
    user, ids = _factorize(interactions, "user_id")
    if len(ids) < folds:
        raise DataError(f"{len(ids)} users do not fill {folds} blocks: give more data, or fewer folds")
    block = np.empty(len(ids), dtype=np.int64)
    block[np.random.default_rng(seed).permutation(len(ids))] = np.arange(len(ids)) % folds
    return user, block


def _turned(block: Codes, fold: int, folds: int) -> Parts:
    """Part of each user in a fold: his block's distance from the one that is tested decides."""
    by_distance = np.array(["test", "valid"] + ["train"] * (folds - 2), dtype=object)
    parts: Parts = by_distance[(block - fold) % folds]
    return parts


def _factorize(interactions: pa.Table, column: str) -> tuple[Codes, npt.NDArray[Any]]:
    """Codes by row, and the sorted ids that they stand for: the order of the rows decides nothing."""
    codes, ids = pd.factorize(interactions.column(column).to_numpy(), sort=True)
    return codes.astype(np.int64), ids
