from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from kellm_features.data.history import assign_roles


def frame(rows: list[tuple[int, int, int, str]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "second", "split"])
    return table.assign(event_timestamp=pd.to_datetime(table["second"], unit="s", utc=True), liked=True, rating=4.0)


def roles(table: pd.DataFrame, **options: Any) -> dict[int, str]:
    marked = assign_roles(table, **{"split": "user", "max_history": 30, **options})
    return dict(zip(marked["item_id"], marked["role"], strict=True))


def test_first_half_rounded_up_is_history() -> None:
    table = frame([(1, item, item, "train") for item in (1, 2, 3, 4, 5)])
    assert roles(table) == {1: "history", 2: "history", 3: "history", 4: "target", 5: "target"}
    assert roles(table, max_history=1) == {1: "history", 2: "target", 3: "target", 4: "target", 5: "target"}


def test_ties_with_the_cut_are_not_targets() -> None:
    table = frame([(1, 1, 10, "train"), (1, 2, 20, "train"), (1, 3, 20, "train"), (1, 4, 30, "train")])
    kept = roles(table)
    assert kept[1] == "history"
    assert kept[4] == "target"
    assert sorted(kept.values()) == ["history", "history", "target"]  # the second event at 20 is neither
    assert len(roles(table, ties="shuffle")) == 4


def test_time_split_history_is_train_rows_only() -> None:
    table = frame([(1, 1, 1, "train"), (1, 2, 2, "train"), (1, 3, 3, "test"), (2, 9, 3, "test")])
    assert roles(table, split="time") == {1: "history", 2: "target", 3: "target", 9: "target"}


@pytest.mark.parametrize("ties", ["strict", "shuffle"])
def test_order_of_rows_does_not_matter_and_history_comes_first(ties: Literal["strict", "shuffle"]) -> None:
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(9)), item, int(rng.integers(6)), "train") for item in range(200)]
    table = frame(rows)
    marked = assign_roles(table, split="user", max_history=4, ties=ties)
    again = assign_roles(table.sample(frac=1, random_state=1), split="user", max_history=4, ties=ties)
    pd.testing.assert_frame_equal(marked, again)
    for _, user in marked.groupby("user_id"):
        history, targets = (user[user["role"] == role]["event_timestamp"] for role in ("history", "target"))
        assert len(history) <= 4
        if len(targets):
            assert history.max() < targets.min() if ties == "strict" else history.max() <= targets.min()
