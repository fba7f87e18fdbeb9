"""SWING against its double sum, written out in plain Python and float64, and against what others publish."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_spark.swing import PRESETS, SwingOptions, blocks, csr, kernel, swing_pairs
from kellm_spark.swing.graph import Graph, spark_hash
from kellm_spark.swing.interactions import Checked

from .oracle import assert_same, brute_force, dense_scores, graph, in_order, top

pytestmark = pytest.mark.spark

MODES = ["csr", "block"]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def frame_of(spark, edges: Any):
    return spark.createDataFrame(pd.DataFrame(edges, columns=["user_id", "item_id"]))


def rows(frame) -> list[tuple[Any, ...]]:
    return in_order(frame.collect())


def local_graph(edges: list[tuple[int, int]], side: str, preset: str = "pai-rec") -> Graph:
    """The graph of one side, made without Spark."""
    users, items = zip(*edges, strict=True)
    table = pa.table({"user_id": users, "item_id": items})
    options = SwingOptions(side=side, parameters=PRESETS[preset])
    checked = Checked(pairs=None, rows=len(edges), later=0, id_bytes=0)
    return csr.build_graph(table, checked, options, session=None)[0]


def neighbors(of: Graph, alpha: float, top_k: int) -> list[tuple[Any, ...]]:
    best = kernel.best_neighbors(of, 0, len(of.targets), alpha=alpha, top_k=top_k)
    columns = (best.targets, best.neighbors, best.scores, best.common, best.ranks)
    return in_order(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_equals_the_double_sum(side: str, preset: str) -> None:
    edges = [(u // 7, i // 11 + 1) for u, i in graph(1, 30, 24, 0.35)]
    pairs = set(edges) if side == "item" else {(i, u) for u, i in edges}
    p = PRESETS[preset]
    ids = sorted({target for _, target in pairs})
    wanted = top(brute_force(pairs, p.alpha, p.alpha1, p.beta), 7)
    assert len(wanted) > 100
    got = [
        (ids[i], ids[j], *rest)
        for i, j, *rest in neighbors(local_graph([*edges, *edges[::3]], side, preset), p.alpha, 7)
    ]
    assert_same(got, wanted)


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_search_and_the_walk_find_the_same(side: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the kernel, on a graph dense enough for bits, lists and matrix products of several tiles."""
    draw = random.Random(5)
    edges = [(u, i) for u in range(330) for i in range(260) if draw.random() < 0.9 / (1 + 0.04 * min(u, i)) + 0.01]
    of = local_graph(edges, side, preset)
    alpha = PRESETS[preset].alpha
    searches = []
    search = kernel._search
    monkeypatch.setattr(kernel, "_search", lambda *args: searches.append(found := search(*args)) or found)
    found = neighbors(of, alpha, 9)
    assert len(searches) > 50
    assert min(len(places) for places, _ in searches) < of.n_columns / 2  # the bound spares most of the work
    monkeypatch.setattr(kernel, "SEARCH_MIN_WITNESSES", 10**9)
    walked = neighbors(of, alpha, 9)
    assert_same(found, walked)
    A = np.zeros((330, 260))
    A[tuple(np.transpose(edges))] = 1
    p = PRESETS[preset]
    assert_same(found, top(dense_scores(A if side == "item" else A.T, p.alpha, p.alpha1, p.beta), 9))


@pytest.mark.parametrize("seed", range(5))
def test_no_score_exceeds_its_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(seed)
    edges = np.argwhere(draw.random((150, 90)) < draw.beta(0.6, 1.2, 90))
    of = local_graph([tuple(edge) for edge in edges.tolist()], "item", "alink")
    bounds = {}
    bound = kernel._bounds

    def spy(*args):
        bounds[tuple(args[4])] = found = bound(*args)  # by the rows, which tell the target
        return found.copy()

    monkeypatch.setattr(kernel, "_bounds", spy)
    neighbors(of, 1.0, 3)
    monkeypatch.undo()
    assert len(bounds) > 20
    A = np.zeros((150, 90))
    A[tuple(edges.T)] = 1
    scores = dense_scores(A[:, np.unique(edges[:, 1])], 1, 5, -0.35)
    for t in of.targets:
        members = tuple(of.target_rows[of.target_indptr[t] : of.target_indptr[t + 1]])
        if members in bounds:
            mine = sorted(score for (i, _), (score, _) in scores.items() if i == t)
            # As many bounds as scores, and sorted, each at least its score.
            assert np.all(np.sort(bounds[members])[-len(mine) :] >= mine)


def test_scores_from_flink_ml(spark) -> None:
    """The example of Flink ML's documentation of `Swing`: its input, constants and printed scores."""
    bought = {0: [10, 11, 12], 1: [13, 12], 2: [10, 11, 12], 3: [13, 12]}
    edges = [(u, i) for u, items in bought.items() for i in items]
    got = {(i, j): s for i, j, s, _, _ in rows(swing_pairs(frame_of(spark, edges), side="item", preset="flink"))}
    close, closer = 0.058845768947156235, 0.09134833828228624
    wanted = {frozenset({10, 11}): close, frozenset({10, 12}): close, frozenset({11, 12}): close}
    wanted |= {frozenset({12, 13}): closer}
    assert got == {pair: pytest.approx(wanted[frozenset(pair)], rel=1e-11) for pair in got}
    assert len(got) == 8


@pytest.mark.parametrize("side", ["item", "user"])
def test_agrees_with_recfarm(spark, side: str, tmp_path: Path) -> None:
    """LibRecommender's implementation, in Rust and float32, whose formula is that of our preset yang with α − 1."""
    spec = importlib.util.spec_from_file_location("peers_swing", BENCHMARKS / "peers_swing.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = peers = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(peers)
    edges = graph(12, 60, 35, 0.4)
    pd.DataFrame(edges, columns=["user_id", "item_id"]).to_parquet(tmp_path / "in.parquet")
    theirs = peers.compute_recfarm(tmp_path / "in.parquet", side, cache=10**6, threads=1)
    ours = swing_pairs(frame_of(spark, edges), side=side, preset="yang", top_k=10).toPandas()
    told = peers.agreement(ours, peers.recfarm_pairs(*theirs, top_k=10).to_pandas())
    assert told.shared > 0.99
    assert told.max_rel_diff < 1e-6


@pytest.mark.parametrize(("side", "preset", "mode"), [("item", "pai-rec", "csr"), ("user", "flink", "block")])
def test_equals_the_double_sum(spark, side: str, preset: str, mode: str) -> None:
    edges = graph(1, 30, 24, 0.35)
    p = PRESETS[preset]
    pairs = set(edges) if side == "item" else {(i, u) for u, i in edges}
    got = rows(swing_pairs(frame_of(spark, edges), side=side, preset=preset, top_k=7, mode=mode))
    assert_same(got, top(brute_force(pairs, p.alpha, p.alpha1, p.beta), 7))


@pytest.mark.parametrize("mode", MODES)
def test_duplicates_order_partitions_tasks_and_id_type_change_nothing(
    spark, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = graph(2, 25, 20, 0.4)
    table = pd.DataFrame(edges, columns=["user_id", "item_id"])
    plain = rows(swing_pairs(spark.createDataFrame(table).coalesce(1), side="item", mode=mode))
    monkeypatch.setattr(blocks, "MIN_BLOCK_PAIRS", 5)  # 16 blocks where one would do
    monkeypatch.setattr(csr, "CHUNK_COST", 1000.0)
    doubled = pd.concat([table, table.sample(frac=0.5, random_state=0)]).sample(frac=1, random_state=1)
    shuffled = rows(swing_pairs(spark.createDataFrame(doubled.astype("int32")).repartition(5), side="item", mode=mode))
    assert shuffled == plain
    monkeypatch.undo()
    # Names that sort as the numbers do.
    named = table.assign(user_id="u" + table.user_id.astype(str), item_id=(table.item_id + 1000).map("i{:05d}".format))
    back = [
        (int(r[0][1:]) - 1000, int(r[1][1:]) - 1000, *r[2:])
        for r in rows(swing_pairs(spark.createDataFrame(named), side="item", mode=mode))
    ]
    assert_same(back, plain)


def test_scores_are_symmetric_when_all_neighbours_are_kept(spark) -> None:
    score = {
        (r[0], r[1]): r[2] for r in rows(swing_pairs(frame_of(spark, graph(3, 40, 15, 0.5)), side="user", top_k=1000))
    }
    assert score
    assert all(score[j, i] == pytest.approx(s, rel=1e-11) for (i, j), s in score.items())


@pytest.mark.parametrize("mode", MODES)
def test_filters_come_before_every_count(spark, mode: str) -> None:
    """Items first, then users by what these leave of them."""
    edges = graph(4, 30, 20, 0.4)
    per_item = pd.Series([i for _, i in edges]).value_counts()
    most = int(per_item.quantile(0.8))
    left = [(u, i) for u, i in edges if per_item[i] <= most]
    per_user = pd.Series([u for u, _ in left]).value_counts()
    low, high = int(per_user.quantile(0.2)) + 1, int(per_user.quantile(0.8))
    kept = {(u, i) for u, i in left if low <= per_user[u] <= high}
    assert 0 < len(kept) < len(left) < len(edges)
    p = PRESETS["pai-rec"]
    got = rows(
        swing_pairs(
            frame_of(spark, edges),
            side="user",
            min_user_items=low,
            max_user_items=high,
            max_item_users=most,
            mode=mode,
        )
    )
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
    got = rows(swing_pairs(frame_of(spark, edges), side="item", preset="flink", alpha=2.0, alpha1=3.0, beta=-0.5))
    assert_same(got, top(brute_force(set(edges), 2, 3, -0.5), 100))


@pytest.mark.parametrize("text", [False, True])
def test_a_cap_pairs_the_witnesses_of_the_smallest_hash(spark, text: bool) -> None:
    """Bottom-k by Spark's own hash, whole rows of those drawn, scores scaled up; the same in both modes."""
    from pyspark.sql import functions as sf

    edges = graph(9, 60, 12, 0.4)
    table = pd.DataFrame(edges, columns=["user_id", "item_id"])
    if text:
        table = table.assign(user_id="u" + table.user_id.astype(str), item_id="i" + table.item_id.astype(str))
    frame, cap = spark.createDataFrame(table), 11
    key = (lambda c: sf.xxhash64(c)) if text else sf.col
    hashed = frame.select(
        "*", sf.xxhash64(sf.lit(42).cast("bigint"), key("item_id"), key("user_id")).alias("h")
    ).toPandas()
    drawn = {item: set(group.nsmallest(cap, "h").user_id) for item, group in hashed.groupby("item_id")}
    degree = table.item_id.value_counts()
    assert (degree > cap).sum() > 4
    of_user = table.groupby("user_id").item_id.agg(set)
    wanted = {}
    for i, mine in drawn.items():
        d, m = degree[i], len(mine)
        scale = d * (d - 1) / (m * (m - 1)) if d > m else 1.0
        p = PRESETS["pai-rec"]
        for j in degree.index:
            both = sorted(u for u in mine if j in of_user[u])
            if j == i or len(both) < 2:
                continue
            score = sum(
                (p.alpha1 + len(of_user[u])) ** -p.beta * (p.alpha1 + len(of_user[v])) ** -p.beta
                / (p.alpha + len(of_user[u] & of_user[v]))
                for k, u in enumerate(both) for v in both[k + 1 :]
            )  # fmt: skip
            wanted[i, j] = (score * scale, len(both))
    options = {"side": "item", "max_witnesses": cap, "top_k": 5}
    found = {mode: rows(swing_pairs(frame.repartition(4), mode=mode, **options)) for mode in MODES}
    assert_same(found["csr"], top(wanted, 5))
    assert found["block"] == found["csr"]


def test_our_hash_is_sparks(spark) -> None:
    from pyspark.sql import functions as sf

    values = [0, 1, -1, 42, 2**63 - 1, -(2**63), *(random.Random(1).randrange(-(2**63), 2**63) for _ in range(50))]
    frame = spark.createDataFrame([(v,) for v in values], "v long")
    wanted = [row[0] for row in frame.select(sf.xxhash64(sf.lit(7).cast("bigint"), "v")).collect()]
    assert [spark_hash(v, spark_hash(7, 42)) for v in values] == wanted


@pytest.mark.parametrize("mode", MODES)
def test_a_target_too_large_to_be_exact_is_refused(spark, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (csr, blocks):
        monkeypatch.setattr(module, "MAX_EXACT_WITNESSES", 20)
    frame = frame_of(spark, [(u, i) for u in range(21) for i in range(3) if i or u < 5])
    with pytest.raises(ConfigError, match=r"item [12] has 21 users; .* set max_witnesses \(--max-witnesses\)"):
        swing_pairs(frame, side="item", mode=mode)
    assert rows(swing_pairs(frame, side="item", mode=mode, max_witnesses=20))


@pytest.mark.parametrize("kind", ["long", "timestamp", "timestamp_ntz", "date"])
def test_before_leaves_out_what_came_at_or_after_it(spark, kind: str) -> None:
    edges = graph(10, 20, 12, 0.6)
    day = {edge: 10_000 + k % 5 for k, edge in enumerate(edges)}
    cast = {"long": "day * 86400", "date": "date_from_unix_date(int(day))"}.get(
        kind, f"cast(timestamp_seconds(day * 86400) as {kind})"
    )
    stamped = spark.createDataFrame([(u, i, day[u, i]) for u, i in edges], "user_id long, item_id long, day long")
    frame = stamped.selectExpr("user_id", "item_id", f"{cast} as timestamp")
    cut = 10_003
    wanted = rows(swing_pairs(frame_of(spark, [edge for edge in edges if day[edge] < cut]), side="item"))
    for before in (cut * 86400, "1997-05-22", "1997-05-22T02:00:00+02:00"):
        assert rows(swing_pairs(frame, side="item", before=before)) == wanted


LONGS = "user_id long, item_id long"


@pytest.mark.parametrize(
    ("columns", "change", "error", "says"),
    [
        ("user_id long, thing long", {}, SchemaError, "'item_id' is missing; seen: user_id, thing"),
        ("user_id double, item_id long", {}, SchemaError, "'user_id' has type double"),
        (LONGS, {"alpha": float("nan")}, ConfigError, "alpha is nan"),
        (LONGS, {"alpha1": -1.0}, ConfigError, "alpha1 is -1.0"),
        (LONGS, {"beta": float("inf")}, ConfigError, "beta is inf"),
        (LONGS, {"preset": "swung"}, ConfigError, "known: kellmrec"),
        (LONGS, {"side": "both"}, ConfigError, "accepted: 'item', 'user'"),
        (LONGS, {"mode": "fast"}, ConfigError, "accepted: 'auto', 'csr', 'block'"),
        (LONGS, {"top_k": 0}, ConfigError, "top_k is 0"),
        (LONGS, {"max_witnesses": 1}, ConfigError, "max_witnesses is 1; accepted: 2 or more"),
        (LONGS, {"max_user_items": 0}, ConfigError, "max_user_items is 0"),
        (LONGS, {"min_user_items": 4}, DataError, "3 rows, of which 1 duplicates, 2 of users under min_user_items"),
        (LONGS, {"min_user_items": 4, "mode": "block"}, DataError, "1 duplicates, 2 of users under min_user_items"),
        (LONGS, {"before": 1}, SchemaError, "'event_timestamp' is missing"),
        ("user_id long, timestamp long, item_id long", {"before": "soon"}, ConfigError, "before is 'soon'"),
        ("user_id long, timestamp long, item_id long", {"before": 1}, DataError, "all 3 rows are at or after 1970"),
        ("user_id long, timestamp string, item_id long", {"before": 1}, SchemaError, "has type string"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(spark, columns: str, change: dict[str, Any], error: type, says: str) -> None:
    kinds = [{"double": float, "string": str}.get(word.split()[1], int) for word in columns.split(", ")]
    values = [[1, 1], [1, 2], [1, 2]]
    data = [
        tuple(
            kind(v)
            for kind, v in zip(kinds, (row[0], 7, row[1])[-len(kinds) :] if len(kinds) == 3 else row, strict=True)
        )
        for row in values
    ]
    frame = spark.createDataFrame(data, columns)
    with pytest.raises(error) as caught:
        swing_pairs(frame, **{"side": "item", **change})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nulls_milliseconds_and_no_rows_are_refused(spark) -> None:
    frame = spark.createDataFrame([(1, 1, 5), (None, 2, None)], "user_id long, item_id long, timestamp long")
    with pytest.raises(DataError, match="'user_id' is null in 1 of 2 rows"):
        swing_pairs(frame, side="item")
    known = frame.fillna({"user_id": 3})
    with pytest.raises(DataError, match="'timestamp' is null in 1 of 2 rows"):
        swing_pairs(known, side="item", before=9)
    later = spark.createDataFrame([(1, 1, 5), (1, 2, 5), (2, 1, 5), (2, 2, 5), (None, 2, 9)], frame.schema)
    assert len(rows(swing_pairs(later, side="item", before=9))) == 2  # what comes later may be anything
    with pytest.raises(DataError, match="no epoch second; divide milliseconds"):
        swing_pairs(known.fillna({"timestamp": 1_700_000_000_000}), side="item", before="2020-01-01")
    with pytest.raises(DataError, match="nothing is left to pair: 0 rows"):
        swing_pairs(frame.where("false"), side="item")
