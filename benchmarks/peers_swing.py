"""One implementation of SWING in a process of its own, which `bench_swing.py` starts and measures from outside.

python benchmarks/peers_swing.py --impl sql --interactions A.parquet --tiny B.parquet --out DIR --report FILE

Runs the tiny table first, so that the session is up and code is loaded, then the other one, whose CPU seconds and wall
clock go into the report as those of the work alone. DIR takes the top k as Parquet: anchor_id, neighbor_id, score.

All compute Σ w_u·w_v/(α + |I_u∩I_v|) with w_u = n_u^(-1/2), α = 1, the preset `yang`, unless `--preset` names another
one for ours. recfarm 0.2.1 has these weights, float32 sums and α + |I_u∩I_v| − 1: it is given α = 2.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import resource
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kellm_features.usage import measure

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import DataFrame

OURS = ("ours_csr", "ours_block", "ours_auto")
IMPLS = ("ours_csr", "ours_block", "recfarm", "sql")
"""Run where none is named. `sql_lists` and `recfarm_uncached` are to be named."""
MORE_IMPLS = ("sql_lists", "recfarm_uncached")
ALPHA = 1.0
TOLERANCE = 1e-9
RECFARM_TOLERANCE = 5e-3
"""It sums up to millions of terms in float32: on all of MovieLens-1M it is off by 2.2e-3."""
RECFARM_CACHES = {"recfarm": 100_000_000, "recfarm_uncached": 0}
"""Pairs of users whose common items it keeps, else finds anew for every item. The first is LibRecommender's default."""
RU_MAXRSS_PER_MIB = 1024 * (1024 if sys.platform == "darwin" else 1)


def missing(impl: str) -> str | None:
    """The command that installs what `impl` needs and this environment lacks."""
    package, remedy = (
        ("recfarm", "recfarm==0.2.1") if impl in RECFARM_CACHES else ("pyspark", "'kellm-features[spark]'")
    )
    return None if importlib.util.find_spec(package) else f"pip install {remedy}"


def main() -> None:
    """Run one implementation and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=sorted({*OURS, *IMPLS, *MORE_IMPLS}), required=True)
    parser.add_argument("--interactions", type=Path, required=True, help="distinct rows of user_id and item_id")
    parser.add_argument("--tiny", type=Path, required=True, help="the same, of a few rows, to warm up on")
    parser.add_argument("--side", choices=("item", "user"), default="item")
    parser.add_argument("--preset", default="yang")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--max-witnesses", type=int)
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--driver-memory", default="2g")
    parser.add_argument("--threads", type=int, default=1, help="of recfarm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    run = run_recfarm if options.impl in RECFARM_CACHES else run_spark
    options.report.write_text(json.dumps(run(options)))


def run_spark(options: argparse.Namespace) -> dict[str, float]:
    """Ours or the joins, in an embedded session, tiny table first."""
    from kellm_features.settings import SparkSettings
    from kellm_spark.session import get_session, stop_session

    session = get_session(SparkSettings(master=options.master, driver_memory=options.driver_memory))
    pairs = our_pairs if options.impl in OURS else sql_pairs

    def work(source: Path, out: Path) -> None:
        pairs(session.read.parquet(str(source)), options).write.parquet(str(out))

    with tempfile.TemporaryDirectory() as scratch:
        work(options.tiny, Path(scratch) / "tiny")
    before = shuffled_bytes(session)
    with measure() as usage:
        work(options.interactions, options.out)
    shuffled = shuffled_bytes(session) - before
    stop_session()
    return {"work_cpu_s": usage.cpu_seconds, "work_wall_s": usage.seconds, "shuffle_mib": shuffled / 2**20}


def shuffled_bytes(session: Any) -> int:
    """Written by all tasks so far, compressed, as Spark's own pages tell it."""
    executors = session._jsparkSession.sparkContext().statusStore().executorList(False)
    return sum(executors.apply(k).totalShuffleWrite() for k in range(executors.size()))


def our_pairs(interactions: DataFrame, options: argparse.Namespace) -> DataFrame:
    """This project's, in the mode that the implementation's name ends in."""
    from kellm_spark.swing import swing_pairs

    return swing_pairs(
        interactions,
        side=options.side,
        preset=options.preset,
        top_k=options.top_k,
        max_witnesses=options.max_witnesses,
        mode=options.impl.removeprefix("ours_"),
    )


def sql_pairs(interactions: DataFrame, options: argparse.Namespace) -> DataFrame:
    """What one would write in SQL: joins to user pairs and their counts, back to item pairs, sum, top k.

    Each unordered pair of items is summed once and turned round afterwards, which halves the largest join. With
    `sql_lists`, user pairs keep their items as lists, exploded twice, which takes the place of the joins back.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    witness, anchor = ("user_id", "item_id") if options.side == "item" else ("item_id", "user_id")
    edges = interactions.select(sf.col(witness).alias("w"), sf.col(anchor).alias("a")).distinct()
    weighted = edges.join(edges.groupBy("w").agg(sf.pow(sf.count("*"), sf.lit(-0.5)).alias("weight")), "w")
    u = weighted.select("a", sf.col("w").alias("u"), sf.col("weight").alias("weight_u"))
    v = weighted.select("a", sf.col("w").alias("v"), sf.col("weight").alias("weight_v"))
    shared = u.join(v, "a").where("u < v")
    term = (sf.first("weight_u") * sf.first("weight_v") / (sf.lit(ALPHA) + sf.count("*"))).alias("term")
    if options.impl == "sql_lists":
        listed = shared.groupBy("u", "v").agg(term, sf.collect_list("a").alias("common"))
        once = listed.select("term", "common", sf.explode("common").alias("i"))
        item_pairs = once.select("term", "i", sf.explode("common").alias("j"))
    else:
        terms = shared.groupBy("u", "v").agg(term)
        i = shared.select("u", "v", sf.col("a").alias("i")).join(terms, ["u", "v"])
        item_pairs = i.join(shared.select("u", "v", sf.col("a").alias("j")), ["u", "v"])
    half = item_pairs.where("i < j").groupBy("i", "j").agg(sf.sum("term").alias("score"))
    both = half.select(sf.col("i").alias("anchor_id"), sf.col("j").alias("neighbor_id"), "score").unionByName(
        half.select(sf.col("j").alias("anchor_id"), sf.col("i").alias("neighbor_id"), "score")
    )
    best = Window.partitionBy("anchor_id").orderBy(sf.desc("score"), "neighbor_id")
    return both.withColumn("rank", sf.row_number().over(best)).where(sf.col("rank") <= options.top_k)


@dataclass
class RecfarmMatrix:
    """The attributes in which recfarm takes a matrix in compressed sparse row form."""

    sparse_indices: list[int]
    sparse_indptr: list[int]
    sparse_data: list[float]


def run_recfarm(options: argparse.Namespace) -> dict[str, float]:
    """recfarm, tiny table first; its scores leave it only through a file, which counts for nothing in the report."""
    cache = RECFARM_CACHES[options.impl]
    compute_recfarm(options.tiny, options.side, cache, options.threads)
    with measure() as usage:
        model, ids = compute_recfarm(options.interactions, options.side, cache, options.threads)
    # No child process, and start-up included: these are those of the tree.
    cpu_s, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = time.time()
    options.out.mkdir()
    pq.write_table(recfarm_pairs(model, ids, options.top_k), options.out / "pairs.parquet")
    return {
        "work_cpu_s": usage.cpu_seconds,
        "work_wall_s": usage.seconds,
        "cpu_s": cpu_s,
        "peak_mib": peak / RU_MAXRSS_PER_MIB,
        "ended": ended,
    }


def compute_recfarm(source: Path, side: str, cache: int, threads: int) -> tuple[Any, npt.NDArray[Any]]:
    """A model with all scores, sorted, and the ids of its columns. The user side is the item side of the transpose."""
    import recfarm

    witness, anchor = ("user_id", "item_id") if side == "item" else ("item_id", "user_id")
    table = pq.read_table(source, columns=["user_id", "item_id"])
    witnesses, rows = np.unique(table[witness].to_numpy(), return_inverse=True)
    ids, columns = np.unique(table[anchor].to_numpy(), return_inverse=True)
    model = recfarm.Swing(
        1,  # neighbours that recommending would take: all are computed
        ALPHA + 1,
        cache,
        len(witnesses),
        len(ids),
        recfarm_matrix(rows, columns, len(witnesses)),
        recfarm_matrix(columns, rows, len(ids)),
        {},  # what each user has consumed, which recommending alone reads
        0.0,
    )
    model.compute_swing(threads)
    return model, ids


def recfarm_matrix(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], n_rows: int) -> RecfarmMatrix:
    """Rows of ones, columns ascending."""
    order = np.lexsort((columns, rows))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))])
    return RecfarmMatrix(columns[order].tolist(), indptr.tolist(), [1.0] * len(order))


def recfarm_pairs(model: Any, ids: npt.NDArray[Any], top_k: int) -> pa.Table:
    """The first `top_k` of each list of a saved model: bincode, little-endian, fields in the order of its struct."""
    import recfarm

    with tempfile.TemporaryDirectory() as folder:
        recfarm.save_swing(model, folder, "model")
        content = gzip.decompress((Path(folder) / "model.gz").read_bytes())
    entry = np.dtype([("neighbor", "<i4"), ("score", "<f4")])
    header = struct.Struct("<QfQQQQ")  # top_k, alpha, max_cache_num, n_users, n_items; then the length of the map
    *_, n_lists = header.unpack_from(content)
    at = header.size
    anchors, parts = [], []
    for _ in range(n_lists):
        anchor, length = struct.unpack_from("<iQ", content, at)
        at += 12
        part = np.frombuffer(content, entry, min(length, top_k), at)
        at += length * entry.itemsize
        anchors.append(np.full(len(part), anchor))
        parts.append(part)
    best = np.concatenate(parts) if parts else np.zeros(0, entry)
    return pa.table(
        {
            "anchor_id": ids[np.concatenate(anchors)] if anchors else ids[:0],
            "neighbor_id": ids[best["neighbor"]],
            "score": best["score"].astype(np.float64),
        }
    )


@dataclass(frozen=True)
class Agreement:
    """Of two tables of pairs: the largest relative difference of scores, and the share of pairs in both."""

    max_rel_diff: float
    shared: float


def agreement(ours: pd.DataFrame, theirs: pd.DataFrame) -> Agreement:
    """Compare an anchor's scores by rank, which ties cannot disturb, and those of each pair that both tables have.

    Raises:
        ValueError: an anchor has more neighbours in one table.
    """
    mine, other = (
        table.sort_values(["anchor_id", "score"], ascending=[True, False], kind="stable") for table in (ours, theirs)
    )
    if not np.array_equal(mine["anchor_id"].to_numpy(), other["anchor_id"].to_numpy()):
        raise ValueError(f"other numbers of neighbours: {len(mine):,} pairs of ours, {len(other):,} of theirs")
    both = ours.merge(theirs, on=["anchor_id", "neighbor_id"], suffixes=("", "_theirs"))
    worst = max(
        relative(mine["score"].to_numpy(), other["score"].to_numpy()),
        relative(both["score"].to_numpy(), both["score_theirs"].to_numpy()),
    )
    return Agreement(worst, len(both) / max(len(ours), 1))


def relative(true: npt.NDArray[np.float64], seen: npt.NDArray[np.float64]) -> float:
    """The largest |seen/true − 1|."""
    return float(np.abs(seen / true - 1).max()) if len(true) else 0.0


if __name__ == "__main__":
    main()
