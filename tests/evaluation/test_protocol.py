"""Folds by hand, what they promise on random tables, and that no label of a held-out part gets out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kellm_features.data.history import assign_roles
from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_features.evaluation.protocol import Fold, cold_fold, kar_fold, time_fold, user_folds
from kellm_features.evaluation.world import prepare_fold
from kellm_features.schemas import INTERACTIONS
from kellm_features.settings import Settings

DAY = 86_400
FOLDS: dict[str, Callable[[pa.Table], Fold]] = {
    "B": lambda table: user_folds(table, folds=10, seed=3)[4],
    "A": kar_fold,
    "C": lambda table: time_fold(table, train=0.7, valid=0.15),
    "cold": lambda table: cold_fold(table, share=0.3, fold=2, seed=3),
}


def interactions(rows: list[tuple[Any, Any, int, bool]]) -> pa.Table:
    """`INTERACTIONS` from (user, item, second, liked), without a split."""
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "event_timestamp", "liked"])
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], unit="s", utc=True)
    frame["rating"] = np.where(frame["liked"], 5, 2).astype(np.float32)
    frame["split"] = "test"
    key = pa.string() if isinstance(rows[0][0], str) else pa.int64()
    return pa.Table.from_pandas(frame[INTERACTIONS.names], schema=INTERACTIONS.arrow(key), preserve_index=False)


def world(seed: int = 0, users: int = 40, items: int = 30) -> pa.Table:
    """Each user with 4 to 12 items on a coarse clock of many ties; a third of the items are met once or twice."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / (1 + np.arange(items)) ** 1.2
    rows = []
    for user in range(users):
        for item in rng.choice(items, rng.integers(4, 13), replace=False, p=popularity / popularity.sum()):
            rows.append((user + 100, int(item) + 1, int(rng.integers(40)) * DAY // 4, bool(rng.random() < 0.6)))
    return interactions(rows)


def frame(fold: Fold) -> pd.DataFrame:
    return fold.interactions.to_pandas()


def parts_by_user(fold: Fold) -> dict[Any, str]:
    by_user = frame(fold).groupby("user_id")["split"].unique()
    assert (by_user.map(len) == 1).all()
    return {user: parts[0] for user, parts in by_user.items()}


def with_other_labels(table: pa.Table, fold: Fold, parts: tuple[str, ...]) -> pa.Table:
    """The table with the labels of the fold's `parts`, and of rows that it removed, turned round."""
    data = table.to_pandas()
    keys = ["user_id", "item_id"]
    split = data[keys].merge(frame(fold)[[*keys, "split"]], how="left", on=keys)["split"]
    turned = (~split.isin({"train", "valid", "test"} - set(parts))).to_numpy()
    assert turned.any()
    data["liked"] = np.where(turned, ~data["liked"], data["liked"])
    data["rating"] = np.where(data["liked"], 5, 2).astype(np.float32)
    return pa.Table.from_pandas(data, schema=table.schema, preserve_index=False)


def pairs(root: Path, fold: Fold, table: pa.Table) -> dict[str, dict[str, list[float]]]:
    """All arrays of pairs that an evaluation keeps of a fold, by file; `table` tells the catalogue and the users."""
    known = [sorted(set(table.column(name).to_pylist())) for name in ("item_id", "user_id")]
    folder = prepare_fold(root, fold, Settings(), *known, "content")
    found = {}
    for path in sorted(folder.glob("*_pairs*.npz")):
        with np.load(path) as file:
            found[path.name] = {name: file[name].tolist() for name in ("anchor", "neighbor", "score")}
    return found


def with_rows(fold: Fold, rows: pa.Table) -> Fold:
    return Fold(fold.name, rows, fold.split, fold.select_on, fold.cold_valid, fold.cold_test)


def test_three_users_go_round() -> None:
    table = interactions([(user, item, item, True) for user in (1, 2, 3) for item in (7, 8)])
    folds = user_folds(table, folds=3)
    assert [fold.name for fold in folds] == ["B0", "B1", "B2"]
    rounds = [{part: user for user, part in parts_by_user(fold).items()} for fold in folds]
    assert {r["test"] for r in rounds} == {1, 2, 3}
    for this, following in zip(rounds, rounds[1:] + rounds[:1], strict=True):
        assert this["valid"] == following["test"]
        assert this["train"] == following["valid"]


@pytest.mark.parametrize("users", [40, 43])
def test_every_user_is_tested_once_and_nothing_is_lost(users: int) -> None:
    table = world(users=users)
    folds = user_folds(table)
    parts = [parts_by_user(fold) for fold in folds]
    for part, times in (("test", 1), ("valid", 1), ("train", 8)):
        shown = Counter(user for by_user in parts for user in by_user if by_user[user] == part)
        assert shown == Counter(dict.fromkeys(range(100, 100 + users), times))
    for fold, by_user in zip(folds, parts, strict=True):
        assert Counter(by_user.values())["test"] in (users // 10, users // 10 + 1)
        assert fold.interactions.drop_columns(["split"]) == table.drop_columns(["split"])
        assert (fold.split, fold.select_on, fold.cold_valid, fold.cold_test) == ("user", "valid", set(), set())
    assert len({fold.split_hash for fold in folds}) == 10


def test_string_ids_and_a_table_without_a_split() -> None:
    table = interactions([(f"u{user}", f"i{item}", item, True) for user in range(6) for item in range(4)])
    for fold in user_folds(table.drop_columns(["split"]), folds=3):
        assert Counter(parts_by_user(fold).values()) == {"test": 2, "valid": 2, "train": 2}
        INTERACTIONS.check(fold.interactions.schema, "here")


def test_kar_has_no_validation_and_a_clock_of_days() -> None:
    table = world()
    fold = kar_fold(table)
    assert Counter(parts_by_user(fold).values()) == {"train": 36, "test": 4}
    assert fold.select_on == "test"
    seconds = (frame(fold)["event_timestamp"] - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    before = (table.to_pandas()["event_timestamp"] - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    np.testing.assert_array_equal(seconds, before // DAY * DAY)
    assert (before % DAY != 0).any()


def test_time_cuts_by_hand() -> None:
    """Seconds 0 to 9: the row at 80 % is second 7, at 90 % second 8. Two users share each second: none is torn."""
    table = interactions([(user, second, second, True) for user in (1, 2) for second in range(10)])
    data = frame(time_fold(table))
    expected = ["train"] * 7 + ["valid"] + ["test"] * 2
    assert data["split"].tolist() == expected * 2
    assert time_fold(table).split == "time"


@pytest.mark.parametrize("fold", [0, 3, 9])
@pytest.mark.parametrize("seed", range(4))
def test_cold_items_are_shown_by_one_part_alone(fold: int, seed: int) -> None:
    table = world(seed)
    found = cold_fold(table, share=0.3, fold=fold, seed=seed)
    data, plain = frame(found), frame(user_folds(table, seed=seed)[fold])
    shown = data.groupby("split")["item_id"].agg(set)
    assert found.name == f"cold{fold}"
    assert not found.cold_valid & found.cold_test
    assert not shown["train"] & (found.cold_valid | found.cold_test)
    assert not shown["valid"] & found.cold_test
    assert not shown["test"] & found.cold_valid
    # Without a train row is the same as withheld: items that no train user had met were dealt as well.
    assert shown["test"] - shown["train"] == shown["test"] & found.cold_test
    assert shown["valid"] - shown["train"] == shown["valid"] & found.cold_valid
    # Users keep their parts, and of the others' rows none is touched.
    cold = found.cold_valid | found.cold_test
    warm = plain[~plain["item_id"].isin(cold)]
    pd.testing.assert_frame_equal(data[~data["item_id"].isin(cold)].reset_index(drop=True), warm.reset_index(drop=True))
    kept = (plain["item_id"].isin(found.cold_valid) & (plain["split"] == "valid")) | (
        plain["item_id"].isin(found.cold_test) & (plain["split"] == "test")
    )
    assert len(data) == len(warm) + kept.sum()


def test_cold_share_is_drawn_by_fold_and_a_quarter_of_it_validates() -> None:
    """Every user meets all 20 items, so none is cold by nature: 40 % are 8 items, 2 to select on."""
    table = interactions([(user, item, item, True) for user in range(20) for item in range(20)])
    found = [cold_fold(table, share=0.4, fold=fold) for fold in range(10)]
    assert {(len(fold.cold_valid), len(fold.cold_test)) for fold in found} == {(2, 6)}
    assert len({fold.cold_valid | fold.cold_test for fold in found}) == 10
    rows = frame(found[0]).groupby("split").size()
    assert rows.to_dict() == {"train": 16 * 12, "valid": 2 * 14, "test": 2 * 18}


@pytest.mark.parametrize("kind", FOLDS)
def test_row_order_and_repetition_change_nothing(kind: str) -> None:
    table = world()
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    first, again, other = FOLDS[kind](table), FOLDS[kind](table), FOLDS[kind](shuffled)
    assert first.interactions == again.interactions
    assert first.split_hash == again.split_hash == other.split_hash
    assert (first.cold_valid, first.cold_test) == (other.cold_valid, other.cold_test)


@pytest.mark.parametrize("parts", [("test",), ("valid", "test")])
@pytest.mark.parametrize("kind", FOLDS)
def test_held_out_labels_change_nothing_but_themselves(kind: str, parts: tuple[str, ...]) -> None:
    table = world()
    fold = FOLDS[kind](table)
    other = FOLDS[kind](with_other_labels(table, fold, parts))
    assert other.split_hash == fold.split_hash
    assert (other.cold_valid, other.cold_test) == (fold.cold_valid, fold.cold_test)
    unlabelled = ["user_id", "item_id", "event_timestamp", "split"]
    assert other.interactions.select(unlabelled) == fold.interactions.select(unlabelled)
    before, after = frame(fold), frame(other)
    held_out = before["split"].isin(parts)
    assert (before["liked"] == after["liked"])[~held_out].all()
    assert (before["liked"] != after["liked"])[held_out].all()


@pytest.mark.parametrize("kind", FOLDS)
def test_positives_come_from_train_likes_alone(kind: str, tmp_path: Path) -> None:
    table = world()
    fold = FOLDS[kind](table)
    found = pairs(tmp_path / "own", fold, table)
    assert {name.partition("_")[0] for name in found} == {"item", "user"}
    assert all(arrays["anchor"] for arrays in found.values())
    other = FOLDS[kind](with_other_labels(table, fold, ("valid", "test")))
    assert other.split_hash == fold.split_hash
    assert pairs(tmp_path / "turned", other, table) == found
    untested = with_rows(fold, fold.interactions.filter(pa.array(frame(fold)["split"] != "test")))
    assert pairs(tmp_path / "untested", untested, table) == found
    # Were all rows train rows, the pairs would tell the turned labels: the comparisons above can fail.
    place = fold.interactions.schema.get_field_index("split")
    everything = [
        with_rows(one, one.interactions.set_column(place, "split", pa.repeat("train", one.interactions.num_rows)))
        for one in (fold, other)
    ]
    first, second = (pairs(tmp_path / f"all {number}", one, table) for number, one in enumerate(everything))
    assert all(first[name] != second[name] for name in found)


@pytest.mark.parametrize("ties", ["strict", "shuffle"])
@pytest.mark.parametrize("kind", FOLDS)
def test_history_comes_before_targets(kind: str, ties: Literal["strict", "shuffle"]) -> None:
    fold = FOLDS[kind](world())
    roles = assign_roles(frame(fold), split=fold.split, max_history=3, ties=ties)
    history, targets = roles[roles["role"] == "history"], roles[roles["role"] == "target"]
    last = targets["user_id"].map(history.groupby("user_id")["event_timestamp"].max())
    known = last.notna()
    assert known.any()
    late = last[known] >= targets["event_timestamp"][known]
    tied = last[known] == targets["event_timestamp"][known]
    if ties == "strict":
        assert not late.any()
    else:
        assert tied.any()
        assert (late == tied).all()
    position = targets["user_id"].map(history.groupby("user_id")["position"].max())
    assert (position[known] < targets["position"][known]).all()
    if fold.split == "time":
        assert set(history["split"]) == {"train"}
        cut = frame(fold).query("split != 'train'")["event_timestamp"].min()
        assert history["event_timestamp"].max() < cut


def test_messages_say_what_is_accepted() -> None:
    table = world(users=12)
    with pytest.raises(ConfigError, match=r"folds = 2: 3 or more"):
        user_folds(table, folds=2)
    with pytest.raises(DataError, match="12 users do not fill 13 blocks"):
        user_folds(table, folds=13)
    with pytest.raises(ConfigError, match=r"train = 0\.8 and valid = 0\.2"):
        time_fold(table, train=0.8, valid=0.2)
    with pytest.raises(ConfigError, match=r"share = 1\.0"):
        cold_fold(table, share=1.0)
    with pytest.raises(ConfigError, match="fold = 10: 0 to 9"):
        cold_fold(table, fold=10)
    with pytest.raises(DataError, match=r"draws \d of \d+ items"):
        cold_fold(table, share=0.05)
    with pytest.raises(DataError, match="fold C leaves train and valid without a row"):
        time_fold(interactions([(user, 1, 5, True) for user in range(4)]))
    with pytest.raises(SchemaError, match="fold B0"):
        user_folds(table.set_column(1, "item_id", table.column("item_id").cast(pa.int32())))
