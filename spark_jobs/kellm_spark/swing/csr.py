"""The work on whole graphs that fit one machine: the graph goes to every host once, targets are dealt to tasks."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kellm_spark.session import arrow_batches, scratch_folder
from kellm_spark.swing.interactions import Checked
from kellm_spark.swing.parameters import MAX_EXACT_WITNESSES, SwingOptions
from kellm_spark.swing.spread import Counts, Spread, nothing_left, pairs_batch, pairs_schema, too_large

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from kellm_spark.swing.graph import Graph, Int, Int32

logger = logging.getLogger(__name__)

CHUNK_COST = 400_000_000.0
"""Units of `_costs` in one task, about a second: short enough to share out evenly, long enough to be worth starting."""
MAX_CHUNK_TARGETS = 20_000
"""A task's pairs are one Arrow batch: with the top 100, 60 MB at most."""
MAX_CHUNKS = 10_000
"""Beyond, Spark spends more on tasks than they save."""
ARROW_ROWS = 1_000_000
"""Rows of one Arrow batch on the way to the driver: 16 MB of integer ids."""


def csr_pairs(checked: Checked, options: SwingOptions) -> Spread:
    """SWING pairs by way of a graph held by the driver.

    The driver collects the ids (8 bytes each, or a string), builds the graph (4 bytes an interaction, both ways),
    writes it to files and hands these to Spark, which brings them to every host once. Python workers map them into
    memory, so all tasks of a host share one copy.
    """
    from kellm_spark.swing.kernel import warm_up

    session = checked.pairs.sparkSession
    with arrow_batches(session, ARROW_ROWS):
        table = checked.pairs.select(options.witness, options.target).toArrow()
    graph, ids, counts = build_graph(table, checked, options, session)
    del table
    # Compiles, where the cache is cold, once instead of in every worker, and fails here if it cannot.
    warm_up()
    bounds = _chunks(_costs(graph))
    name = f"kellm-swing-{uuid.uuid4().hex}"
    _ship(session, name, graph, ids, bounds)
    n_chunks = len(bounds) - 1
    logger.info(
        "swing %s: %d targets over %d witnesses, %d interactions, %d tasks",
        options.side, len(graph.targets), len(graph.indptr) - 1, len(graph.columns), n_chunks,
    )  # fmt: skip
    id_type = "string" if pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type) else "bigint"
    chunks = session.range(0, n_chunks, 1, n_chunks)
    return Spread(chunks.mapInArrow(_task(name, options), pairs_schema(id_type)), counts, n_chunks)


def build_graph(
    table: pa.Table, checked: Checked, options: SwingOptions, session: SparkSession
) -> tuple[Graph, pa.Array, Counts]:
    """Filter, sample and index the rows: the graph, the ids of its targets, and what was dropped."""
    from kellm_spark.swing.graph import Graph, encode, sample_rows, scale, sorted_edges, weights

    witness_ids, u = encode(table[options.witness])
    target_ids, t = encode(table[options.target])
    u, t = sorted_edges(u, t, len(witness_ids), len(target_ids))
    counts = Counts({"duplicates": checked.used - len(u)})

    def degrees(column: str) -> tuple[Int32, Int]:
        codes, ids = (u, witness_ids) if column == options.witness else (t, target_ids)
        return codes, np.bincount(codes, minlength=len(ids))

    def keep(column: str, least: int | None, most: int | None, reason: str) -> None:
        nonlocal u, t
        codes, degree = degrees(column)
        mask = ((degree >= (least or 0)) & (degree <= (most or len(u))))[codes]
        counts.dropped[reason] = int(len(u) - mask.sum())
        if counts.dropped[reason]:
            u, t = u[mask], t[mask]

    keep("item_id", None, options.max_item_users, "of items over max_item_users")
    keep("user_id", options.min_user_items, None, "of users under min_user_items")
    keep("user_id", None, options.max_user_items, "of users over max_user_items")
    if not len(u):
        raise nothing_left(checked, counts)

    of_witness, of_target = degrees(options.witness)[1], degrees(options.target)[1]
    rows = sorted_edges(t, u, len(target_ids), len(witness_ids))[1]
    indptr, target_indptr = (np.concatenate([[0], np.cumsum(n)]) for n in (of_witness, of_target))
    cap = options.max_witnesses
    most = int(of_target.argmax())
    if cap is None and of_target[most] > MAX_EXACT_WITNESSES:
        raise too_large(options, target_ids[most].as_py(), int(of_target[most]))
    if cap is not None and of_target[most] > cap:
        target_keys, witness_keys = (_keys(session, ids) for ids in (target_ids, witness_ids))
        target_indptr, rows = sample_rows(target_indptr, rows, target_keys, witness_keys, cap)
    counts.targets = int((of_target > 0).sum())
    counts.capped = 0 if cap is None else int((of_target > cap).sum())
    graph = Graph(
        indptr=indptr,
        columns=t,
        weights=weights(of_witness, options.parameters),
        targets=np.arange(len(target_ids), dtype=np.int32),
        target_indptr=target_indptr,
        target_rows=rows,
        scales=scale(of_target, np.diff(target_indptr)),
        n_columns=len(target_ids),
    )
    return graph, target_ids, counts


def _keys(session: SparkSession, ids: pa.Array) -> Int:
    """What is hashed of an id: itself, or of a string its `xxhash64`, which Spark computes."""
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.to_numpy(), dtype=np.int64)
    from pyspark.sql import functions as sf

    frame = session.createDataFrame(pa.table({"place": np.arange(len(ids)), "id": ids}))
    hashed = frame.select("place", sf.xxhash64("id").alias("key")).toArrow()
    keys = np.empty(len(ids), dtype=np.int64)
    keys[hashed["place"].to_numpy()] = hashed["key"].to_numpy()
    return keys


def _costs(graph: Graph) -> Any:
    """Estimated work of each target: the entries of its witnesses' rows, and a share of its witness pairs."""
    reach = np.concatenate([[0], np.cumsum(np.diff(graph.indptr)[graph.target_rows])])
    d = np.diff(graph.target_indptr)
    return 5.0 * np.diff(reach[graph.target_indptr]) + 8.0 * d.astype(np.float64) ** 2


def _chunks(costs: Any) -> Int:
    """Bounds of runs of targets with about equal cost."""
    total = np.cumsum(costs)
    n = max(math.ceil(total[-1] / CHUNK_COST), math.ceil(len(costs) / MAX_CHUNK_TARGETS))
    n = min(max(n, 1), MAX_CHUNKS, len(costs))
    ends = np.searchsorted(total, np.arange(1, n) * (total[-1] / n))
    return np.unique(np.concatenate([[0], ends, [len(costs)]])).astype(np.int64)


def _ship(session: SparkSession, name: str, graph: Graph, ids: pa.Array, bounds: Int) -> None:
    """Give the graph to Spark as files, one an array, which stay: an executor may start and ask for them any time."""
    folder = scratch_folder() / name
    folder.mkdir()
    for key, array in {**vars(graph), "bounds": bounds}.items():
        np.save(folder / f"{name}-{key}.npy", array)
    batch = pa.record_batch({"id": ids})
    with pa.OSFile(str(folder / f"{name}-ids.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    session.addArtifacts(*map(str, sorted(folder.iterdir())), file=True)


def _task(name: str, options: SwingOptions) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function that scores some chunks, for `mapInArrow`."""

    def score(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import SparkFiles

        from kellm_spark.swing.graph import Graph
        from kellm_spark.swing.kernel import best_neighbors

        def read(key: str) -> Any:
            # A plain view of the map: Numba knows no memmap.
            return np.asarray(np.load(Path(SparkFiles.getRootDirectory()) / f"{name}-{key}.npy", mmap_mode="r"))

        numbers = [k for batch in batches for k in batch["id"].to_pylist()]
        graph = Graph(
            **{key: read(key) for key in Graph.__dataclass_fields__ if key != "n_columns"},
            n_columns=int(read("n_columns")),
        )
        with pa.memory_map(str(Path(SparkFiles.getRootDirectory()) / f"{name}-ids.arrow")) as source:
            ids = pa.ipc.open_file(source).get_batch(0)["id"]
        bounds = read("bounds")
        for k in numbers:
            best = best_neighbors(
                graph, int(bounds[k]), int(bounds[k + 1]), alpha=options.parameters.alpha, top_k=options.top_k
            )
            yield pairs_batch(ids, best)

    return score
