"""The work on graphs of any size: blocks of targets, each with the whole rows of its witnesses, by shuffle alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kellm_spark.swing.interactions import Checked
from kellm_spark.swing.parameters import MAX_EXACT_WITNESSES, SwingOptions
from kellm_spark.swing.spread import Counts, Spread, nothing_left, pairs_batch, pairs_schema, too_large

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from kellm_spark.swing.graph import Int

MIN_BLOCKS = 16
"""Or as many as there are shuffle partitions. Targets are dealt to blocks by hash, so blocks are equal on average only:
with several a core, none is waited for."""
MIN_BLOCK_PAIRS = 20_000
"""A block of fewer interactions takes a tenth of a second, less than what a task costs to start."""
MAX_BLOCK_REACH = 50_000_000
"""Upper bound of the row entries that one block loads (8 bytes each), before rows are shared: 400 MB."""


def block_pairs(checked: Checked, options: SwingOptions) -> Spread:
    """SWING pairs by shuffle.

    Targets are dealt to blocks by hash; a block gets the whole row of each of its witnesses once, and scores and
    top-k are computed where the rows are: no score is shuffled. Of a target over the cap, only the witnesses drawn
    are asked for their rows.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    witness, target, cap = options.witness, options.target, options.max_witnesses
    pairs, counts, n_blocks = _prepare(checked, options)
    id_type = dict(pairs.dtypes)[target]
    pairs = pairs.select(sf.col(witness).alias("witness"), sf.col(target).alias("target"))
    # Sorted, because Spark will not recompute what a lost executor held if it might come out in another order.
    rows = pairs.groupBy("witness").agg(sf.sort_array(sf.collect_list("target")).alias("row"))
    edges = pairs.withColumn("degree", sf.lit(0).cast("bigint"))
    if cap is not None:
        degrees = pairs.groupBy("target").agg(sf.count("*").alias("degree"))
        drawn = Window.partitionBy("target").orderBy("drawn", "witness")
        edges = (
            pairs.withColumn("drawn", _sample_hash(id_type, dict(pairs.dtypes)["witness"]))
            .withColumn("place", sf.row_number().over(drawn))
            .where(sf.col("place") <= cap)
            .join(degrees, "target")
            .repartition("witness")
        )
    needed = (
        edges.groupBy("witness", sf.pmod(sf.xxhash64("target"), sf.lit(n_blocks)).alias("block"))
        .agg(sf.sort_array(sf.collect_list(sf.struct("target", "degree"))).alias("targets"))
        .select(
            "witness", "block", sf.col("targets.target").alias("targets"), sf.col("targets.degree").alias("degrees")
        )
    )
    work = needed.join(rows, "witness").select("block", "witness", "row", "targets", "degrees")
    # More tasks than blocks, so that few get two, until blocks are so many that it evens out.
    tasks = 1 if n_blocks == 1 else max(n_blocks, min(4 * n_blocks, 1000))
    blocks = work.repartition(tasks, "block").groupBy("block")
    return Spread(blocks.applyInArrow(_block_function(options), pairs_schema(id_type)), counts, tasks)


def _sample_hash(target_type: str, witness_type: str) -> Column:
    from pyspark.sql import functions as sf

    from kellm_spark.swing.graph import SAMPLE_SEED

    target, witness = (
        sf.xxhash64(name) if kind == "string" else sf.col(name)
        for name, kind in (("target", target_type), ("witness", witness_type))
    )
    return sf.xxhash64(sf.lit(SAMPLE_SEED).cast("bigint"), target, witness)


def _prepare(checked: Checked, options: SwingOptions) -> tuple[DataFrame, Counts, int]:
    """Distinct pairs that pass the filters, what was dropped, and how many blocks to make of the rest."""
    from pyspark.sql import functions as sf

    # Once by witness: rows, and without a cap all that is asked of them, are then made without another shuffle.
    pairs = checked.pairs.repartition(options.witness).distinct()
    counts = Counts()
    n: int | None = None

    def keep(name: str, condition: Column, reason: str) -> None:
        nonlocal pairs, n
        sizes = pairs.groupBy(name).agg(sf.count("*").alias("n"))
        told = sizes.agg(sf.sum("n").alias("n"), sf.sum(sf.when(condition, sf.col("n"))).alias("kept")).first()
        assert told is not None
        if n is None:
            counts.dropped["duplicates"] = checked.used - (told["n"] or 0)
        n = told["kept"] or 0
        counts.dropped[reason] = (told["n"] or 0) - n
        if counts.dropped[reason]:
            pairs = pairs.join(sizes.where(condition).select(name), name, "left_semi")

    if options.max_item_users is not None:
        keep("item_id", sf.col("n") <= options.max_item_users, "of items over max_item_users")
    if options.min_user_items > 1:
        keep("user_id", sf.col("n") >= options.min_user_items, "of users under min_user_items")
    if options.max_user_items is not None:
        keep("user_id", sf.col("n") <= options.max_user_items, "of users over max_user_items")
    rows = pairs.groupBy(options.witness).agg(sf.count("*").alias("n"))
    entries = rows.agg(sf.sum("n").alias("n"), sf.sum(sf.col("n") * sf.col("n")).alias("squares")).first()
    assert entries is not None
    if n is None:
        counts.dropped["duplicates"] = checked.used - (entries["n"] or 0)
    n = entries["n"]
    if not n:
        raise nothing_left(checked, counts)
    cap = options.max_witnesses
    sizes = pairs.groupBy(options.target).agg(sf.count("*").alias("n"))
    over = sf.col("n") > (MAX_EXACT_WITNESSES if cap is None else cap)
    told = sizes.agg(
        sf.count("*").alias("targets"),
        sf.max("n").alias("most"),
        sf.max_by(options.target, "n").alias("id"),
        sf.count_if(over).alias("over"),
        sf.sum("n" if cap is None else sf.least("n", sf.lit(cap))).alias("paired"),
    ).first()
    assert told is not None
    if cap is None and told["most"] > MAX_EXACT_WITNESSES:
        raise too_large(options, told["id"], told["most"])
    counts.targets = told["targets"]
    counts.capped = 0 if cap is None else told["over"]
    width = max(MIN_BLOCKS, int(pairs.sparkSession.conf.get("spark.sql.shuffle.partitions") or 0))
    busy = min(width, math.ceil(n / MIN_BLOCK_PAIRS))
    # Each pair that is not sampled away asks for its witness's row.
    return pairs, counts, max(busy, math.ceil(entries["squares"] * (told["paired"] / n) / MAX_BLOCK_REACH))


def _block_function(options: SwingOptions) -> Callable[[pa.Table], pa.Table]:
    """The function that scores one block, for `applyInArrow`."""

    def score(table: pa.Table) -> pa.Table:
        from kellm_spark.swing.graph import Graph, encode, scale, weights
        from kellm_spark.swing.kernel import best_neighbors

        table = table.sort_by("witness").combine_chunks()  # sums follow the order of ids
        lists = [table[name].combine_chunks() for name in ("row", "targets", "degrees")]
        row, targets, degrees = (part.chunk(0) if isinstance(part, pa.ChunkedArray) else part for part in lists)
        ids, columns = encode(pa.chunked_array([row.flatten()]))
        lengths = _lengths(row)
        mine = pc.index_in(targets.flatten(), value_set=ids).to_numpy(zero_copy_only=False).astype(np.int32)
        witness = np.repeat(np.arange(len(row), dtype=np.int32), _lengths(targets))
        order = np.argsort(mine, kind="stable")  # by target, witnesses ascending
        places, starts = np.unique(mine[order], return_index=True)
        sampled = np.diff(np.append(starts, len(order)))
        degree = degrees.flatten().to_numpy()[order][starts] if options.max_witnesses is not None else sampled
        graph = Graph(
            indptr=np.concatenate([[0], np.cumsum(lengths)]),
            columns=columns,
            weights=weights(lengths, options.parameters),
            targets=places,
            target_indptr=np.append(starts, len(order)).astype(np.int64),
            target_rows=witness[order],
            scales=scale(degree, sampled),
            n_columns=len(ids),
        )
        best = best_neighbors(graph, 0, len(places), alpha=options.parameters.alpha, top_k=options.top_k)
        return pa.Table.from_batches([pairs_batch(ids, best)])

    return score


def _lengths(lists: pa.ListArray) -> Int:
    lengths: Int = np.diff(lists.offsets.to_numpy().astype(np.int64))
    return lengths
