"""SWING against its double sum, written out in plain Python and float64."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_spark import swing
from kellm_spark.swing import PRESETS, swing_pairs

pytestmark = pytest.mark.spark


def brute_force(
    pairs: set[tuple[Any, Any]], alpha: float, alpha1: float, beta: float
) -> dict[tuple[Any, Any], tuple[float, int]]:
    """(i, j) -> (score, witnesses in common) of (witness, target) pairs, from the definition."""
    of_witness: dict[Any, set[Any]] = defaultdict(set)
    of_target: dict[Any, set[Any]] = defaultdict(set)
    for witness, target in pairs:
        of_witness[witness].add(target)
        of_target[target].add(witness)
    w = {u: (alpha1 + len(items)) ** -beta for u, items in of_witness.items()}
    found = {}
    for i, j in itertools.permutations(of_target, 2):
        both = sorted(of_target[i] & of_target[j])
        score = sum(
            w[u] * w[v] / (alpha + len(of_witness[u] & of_witness[v])) for u, v in itertools.combinations(both, 2)
        )
        if score > 0:
            found[i, j] = (score, len(both))
    return found


def top(scores: dict[tuple[Any, Any], tuple[float, int]], k: int) -> list[tuple[Any, ...]]:
    """Rows (anchor, neighbor, score, common, rank), sorted by anchor and rank."""
    by_anchor: dict[Any, list[tuple[float, Any, int]]] = defaultdict(list)
    for (i, j), (score, common) in scores.items():
        by_anchor[i].append((-float(f"{score:.11e}"), j, common))
    return [
        (i, j, -negative, common, rank)
        for i in sorted(by_anchor)
        for rank, (negative, j, common) in enumerate(sorted(by_anchor[i])[:k], 1)
    ]


def rows(frame) -> list[tuple[Any, ...]]:
    return sorted((tuple(r) for r in frame.collect()), key=lambda r: (r[0], r[4]))


def assert_same(got: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> None:
    assert [(g[0], g[1], g[3], g[4]) for g in got] == [(w[0], w[1], w[3], w[4]) for w in wanted]
    assert [g[2] for g in got] == pytest.approx([w[2] for w in wanted], rel=1e-9)


def graph(seed: int, users: int, items: int, share: float) -> list[tuple[int, int]]:
    """A random bipartite graph, ids with gaps, popular items first."""
    draw = random.Random(seed)
    return [
        (u * 7 + 3, i * 11 - 5)
        for u in range(users)
        for i in range(items)
        if draw.random() < share * 2 / (1 + 4 * i / items)
    ]


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_equals_the_double_sum(side: str, preset: str) -> None:
    """The arithmetic of one block that holds the whole graph, without Spark around it."""
    edges = graph(1, 30, 24, 0.35)
    pairs = set(edges) if side == "item" else {(i, u) for u, i in edges}
    row: dict[int, list[int]] = defaultdict(list)
    for witness, target in sorted(pairs, key=lambda p: (p[1] * 7919 % 31, p[0])):
        row[witness].append(target)
    lists = pa.array(row.values(), pa.list_(pa.int64()))
    block = pa.table({"witness": list(row), "row": lists, "anchors": lists})
    p = PRESETS[preset]
    found = swing._block_function(p, top_k=7)(block)
    got = sorted(zip(*found.to_pydict().values(), strict=True), key=lambda r: (r[0], r[4]))
    wanted = top(brute_force(pairs, p.alpha, p.alpha1, p.beta), 7)
    assert len(wanted) > 100
    assert_same(got, wanted)


@pytest.mark.parametrize(("side", "preset"), [("item", "pai-rec"), ("user", "flink")])
def test_equals_the_double_sum(spark, side: str, preset: str) -> None:
    edges = graph(1, 30, 24, 0.35)
    frame = spark.createDataFrame(pd.DataFrame(edges, columns=["user_id", "item_id"]))
    p = PRESETS[preset]
    pairs = set(edges) if side == "item" else {(i, u) for u, i in edges}
    got = rows(swing_pairs(frame, side=side, preset=preset, top_k=7))
    assert_same(got, top(brute_force(pairs, p.alpha, p.alpha1, p.beta), 7))


def test_wide_anchors_take_the_dense_path(spark) -> None:
    """Anchors with hundreds of witnesses go through BLAS in more than one tile; the tail beside them does not."""
    draw = random.Random(5)
    edges = [(u, i) for u in range(330) for i in range(12) if draw.random() < (0.9 if i < 6 else 0.05)]
    frame = spark.createDataFrame(pd.DataFrame(edges, columns=["user_id", "item_id"]))
    wanted = top(brute_force(set(edges), 1, 5, 0.3), 20)
    assert_same(rows(swing_pairs(frame, side="item", preset="pai-rec", top_k=20)), wanted)


def test_duplicates_order_partitions_blocks_and_id_type_change_nothing(spark, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = graph(2, 25, 20, 0.4)
    table = pd.DataFrame(edges, columns=["user_id", "item_id"])
    plain = rows(swing_pairs(spark.createDataFrame(table).coalesce(1), side="item"))
    monkeypatch.setattr(swing, "MIN_BLOCK_PAIRS", 5)  # 16 blocks where one would do
    doubled = pd.concat([table, table.sample(frac=0.5, random_state=0)]).sample(frac=1, random_state=1)
    shuffled = rows(swing_pairs(spark.createDataFrame(doubled.astype("int32")).repartition(5), side="item"))
    assert shuffled == plain
    monkeypatch.undo()
    # Names that sort as the numbers do.
    named = table.assign(user_id="u" + table.user_id.astype(str), item_id=(table.item_id + 1000).map("i{:05d}".format))
    back = [
        (int(r[0][1:]) - 1000, int(r[1][1:]) - 1000, *r[2:])
        for r in rows(swing_pairs(spark.createDataFrame(named), side="item"))
    ]
    assert_same(back, plain)


def test_scores_are_symmetric_when_all_neighbours_are_kept(spark) -> None:
    edges = graph(3, 40, 15, 0.5)
    frame = spark.createDataFrame(pd.DataFrame(edges, columns=["user_id", "item_id"]))
    score = {(r[0], r[1]): r[2] for r in rows(swing_pairs(frame, side="user", top_k=1000))}
    assert score
    assert all(score[j, i] == pytest.approx(s, rel=1e-11) for (i, j), s in score.items())


def test_filters_come_before_every_count(spark) -> None:
    edges = graph(4, 30, 20, 0.4)
    per_user = pd.Series([u for u, _ in edges]).value_counts()
    low, high = int(per_user.quantile(0.2)) + 1, int(per_user.quantile(0.8))
    kept = {(u, i) for u, i in edges if low <= per_user[u] <= high}
    assert 0 < len(kept) < len(edges)
    frame = spark.createDataFrame(pd.DataFrame(edges, columns=["user_id", "item_id"]))
    p = PRESETS["pai-rec"]
    got = rows(swing_pairs(frame, side="user", min_user_items=low, max_user_items=high))
    assert_same(got, top(brute_force({(i, u) for u, i in kept}, p.alpha, p.alpha1, p.beta), 100))


def test_hand_worked(spark) -> None:
    """Users 1, 2 share items a, b, c and user 3 has a, b: with kellmrec, s(a,b) = 1/(1+3) + 2/(1+2) = 11/12."""
    edges = [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "b"), (2, "c"), (3, "a"), (3, "b")]
    frame = spark.createDataFrame(edges, "user_id long, item_id string")
    got = rows(swing_pairs(frame, side="item", preset="kellmrec"))
    assert got[0] == ("a", "b", pytest.approx(11 / 12), 3, 1)
    assert got[1] == ("a", "c", pytest.approx(1 / 4), 2, 2)
    # c is as close to a as to b: the smaller id comes first.
    assert [r[:2] + r[3:] for r in got if r[0] == "c"] == [("c", "a", 2, 1), ("c", "b", 2, 2)]


def test_overrides_win_over_the_preset(spark) -> None:
    edges = graph(6, 15, 10, 0.5)
    frame = spark.createDataFrame(pd.DataFrame(edges, columns=["user_id", "item_id"]))
    got = rows(swing_pairs(frame, side="item", preset="flink", alpha=2.0, alpha1=3.0, beta=-0.5))
    assert_same(got, top(brute_force(set(edges), 2, 3, -0.5), 100))


@pytest.mark.parametrize(
    ("columns", "change", "error", "says"),
    [
        ("user_id long, thing long", {}, SchemaError, "'item_id' is missing; seen: user_id, thing"),
        ("user_id double, item_id long", {}, SchemaError, "'user_id' has type double"),
        ("user_id long, item_id long", {"alpha": float("nan")}, ConfigError, "alpha is nan"),
        ("user_id long, item_id long", {"alpha1": -1.0}, ConfigError, "alpha1 is -1.0"),
        ("user_id long, item_id long", {"beta": float("inf")}, ConfigError, "beta is inf"),
        ("user_id long, item_id long", {"preset": "swung"}, ConfigError, "known: kellmrec"),
        ("user_id long, item_id long", {"side": "both"}, ConfigError, "accepted: 'item', 'user'"),
        ("user_id long, item_id long", {"top_k": 0}, ConfigError, "top_k is 0"),
        ("user_id long, item_id long", {"max_user_items": 0}, ConfigError, "max_user_items is 0"),
        ("user_id long, item_id long", {"min_user_items": 4}, DataError, "3 rows, 2 distinct, of 1 users"),
    ],
)
def test_bad_input_is_refused_in_one_line(spark, columns: str, change: dict[str, Any], error: type, says: str) -> None:
    kind = float if "double" in columns else int
    frame = spark.createDataFrame([(kind(1), 1), (kind(1), 2), (kind(1), 2)], columns)
    with pytest.raises(error) as caught:
        swing_pairs(frame, **{"side": "item", **change})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nulls_and_no_rows_are_refused(spark) -> None:
    frame = spark.createDataFrame([(1, 1), (None, 2)], "user_id long, item_id long")
    with pytest.raises(DataError, match="'user_id' is null in 1 of 2 rows"):
        swing_pairs(frame, side="item")
    with pytest.raises(DataError, match="0 rows, 0 distinct, of 0 users"):
        swing_pairs(frame.where("false"), side="item")
