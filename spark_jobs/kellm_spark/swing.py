"""SWING similarity of items or users from who interacted with what (Yang et al. 2020; KELLMRec Eq. 1-2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kellm_features.errors import ConfigError, DataError, SchemaError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

Side = Literal["item", "user"]


@dataclass(frozen=True)
class SwingParameters:
    """s(i,j) = Σ_{u<v} w_u·w_v / (alpha + |I_u ∩ I_v|), w_u = (alpha1 + |I_u|)^(-beta)."""

    alpha: float
    alpha1: float
    beta: float


PRESETS: dict[str, SwingParameters] = {
    # The paper's equations, repaired: as printed, the similarity falls with the overlap.
    "kellmrec": SwingParameters(alpha=1, alpha1=0, beta=0),
    # Yang et al. 2020 (arXiv 2010.05525); their double sum counts both orders of a pair, twice this.
    "yang": SwingParameters(alpha=1, alpha1=0, beta=0.5),
    # Flink ML, `Swing`.
    "flink": SwingParameters(alpha=0, alpha1=15, beta=0.3),
    # Alink and PAI as published: the sign makes heavy users count for more. For parity only.
    "alink": SwingParameters(alpha=1, alpha1=5, beta=-0.35),
    # PAI-Rec's production default.
    "pai-rec": SwingParameters(alpha=1, alpha1=5, beta=0.3),
}

BLOCKS_PER_CORE = 8
"""Blocks are equal in estimated cost only: with several a core, none is waited for."""
MIN_BLOCK_PAIRS = 20_000
"""A block of fewer interactions takes a tenth of a second, less than what a task costs to start."""
MAX_BLOCK_REACH = 50_000_000
"""Upper bound of the row entries that one block loads (8 bytes each), before rows are shared: 400 MB."""


def swing_parameters(
    preset: str = "pai-rec",
    alpha: float | None = None,
    alpha1: float | None = None,
    beta: float | None = None,
) -> SwingParameters:
    """A preset with single values overridden.

    Raises:
        ConfigError: no such preset, or a value that is negative, NaN or infinite (beta may be negative).
    """
    if preset not in PRESETS:
        raise ConfigError(f"swing preset is {preset!r}; known: {', '.join(PRESETS)}")
    base = PRESETS[preset]
    chosen = SwingParameters(
        alpha=base.alpha if alpha is None else alpha,
        alpha1=base.alpha1 if alpha1 is None else alpha1,
        beta=base.beta if beta is None else beta,
    )
    for name in ("alpha", "alpha1", "beta"):
        value = getattr(chosen, name)
        if not math.isfinite(value) or (name != "beta" and value < 0):
            accepted = "a finite number" if name == "beta" else "a finite number >= 0"
            raise ConfigError(f"swing {name} is {value}; accepted: {accepted}")
    return chosen


def swing_pairs(
    interactions: DataFrame,
    *,
    side: Side,
    preset: str = "pai-rec",
    alpha: float | None = None,
    alpha1: float | None = None,
    beta: float | None = None,
    top_k: int = 100,
    min_user_items: int = 1,
    max_user_items: int | None = None,
) -> DataFrame:
    """The most similar items of every item, or users of every user, with exact scores.

    For items, s(i,j) = Σ over unordered pairs u < v of users who have both i and j of
    w_u·w_v / (alpha + |I_u ∩ I_v|), with w_u = (alpha1 + |I_u|)^(-beta). For users, items and users swap places.
    Every row counts once however often it is repeated, and all counts are taken after duplicates are dropped and
    users are filtered. The rows given are the rows used: pass train interactions only.

    Each anchor's scores need only the whole rows of its own witnesses (the users who have the item). Anchors are
    packed into blocks of equal cost, a block gets each witness row once, and scores and top-k are computed where
    the rows are: no score is shuffled. It uses the DataFrame API alone, so it also runs under Spark Connect.

    Args:
        interactions: columns user_id and item_id (integers or strings, no nulls); others are ignored.
        side: whether items or users are paired.
        preset: a row of `PRESETS`; `alpha`, `alpha1` and `beta` override its values.
        alpha: alpha >= 0 of the denominator.
        alpha1: alpha1 >= 0 of the weights.
        beta: exponent of the weights; 0 weighs all alike.
        top_k: neighbours kept of each anchor.
        min_user_items: users with fewer distinct items are left out.
        max_user_items: users with more distinct items are left out; None keeps all.

    Returns:
        `schemas.PAIRS`: anchor_id, neighbor_id (ids as given, integers as int64), score (float64 > 0, 12 significant
        digits), common (int32, witnesses in common, >= 2), rank (int32; 1 is best; equal scores by neighbor_id).
        In no particular order.

    Raises:
        SchemaError: a column is missing or is neither integer nor string.
        DataError: an id is null, or nothing is left after the filters.
        ConfigError: a parameter is out of range.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    parameters = swing_parameters(preset, alpha, alpha1, beta)
    _check_counts(side, top_k, min_user_items, max_user_items)
    witness, anchor = ("user_id", "item_id") if side == "item" else ("item_id", "user_id")
    pairs, n_blocks = _prepare(interactions, witness, min_user_items, max_user_items)
    rows = (
        pairs.select(sf.col(witness).alias("witness"), sf.col(anchor).alias("anchor"))
        .groupBy("witness")
        .agg(sf.collect_set("anchor").alias("row"))
    )
    edges = rows.select("witness", sf.size("row").cast("bigint").alias("degree"), sf.explode("row").alias("anchor"))
    # An upper bound of the work on one anchor: each of its witnesses meets each entry of their rows.
    costs = edges.groupBy("anchor").agg((sf.count("*") * sf.sum("degree")).alias("cost"))
    # One task sorts all anchors by cost (two numbers each); dealing them out back and forth keeps blocks level.
    turn = (sf.row_number().over(Window.orderBy(sf.desc("cost"), "anchor")) - 1) % (2 * n_blocks)
    blocks = costs.select("anchor", sf.least(turn, 2 * n_blocks - 1 - turn).alias("block"))
    needed = edges.join(blocks, "anchor").groupBy("witness", "block").agg(sf.collect_list("anchor").alias("anchors"))
    work = needed.join(rows, "witness").select("block", "witness", "row", "anchors")
    id_type = dict(pairs.dtypes)[anchor]
    return (
        # More partitions than blocks, so that few get two.
        work.repartition(4 * n_blocks if n_blocks > 1 else 1, "block")
        .groupBy("block")
        .applyInArrow(
            _block_function(parameters, top_k),
            f"anchor_id {id_type}, neighbor_id {id_type}, score double, common int, rank int",
        )
    )


def _check_counts(side: str, top_k: int, min_user_items: int, max_user_items: int | None) -> None:
    if side not in ("item", "user"):
        raise ConfigError(f"swing side is {side!r}; accepted: 'item', 'user'")
    if top_k < 1:
        raise ConfigError(f"swing top_k is {top_k}; accepted: 1 or more")
    if min_user_items < 1:
        raise ConfigError(f"swing min_user_items is {min_user_items}; accepted: 1 or more")
    if max_user_items is not None and max_user_items < min_user_items:
        raise ConfigError(f"swing max_user_items is {max_user_items}; accepted: {min_user_items} (the minimum) or more")


def _prepare(
    interactions: DataFrame, witness: str, min_user_items: int, max_user_items: int | None
) -> tuple[DataFrame, int]:
    """The checked rows of the users kept, with ids as int64 or string, and how many blocks to make of them."""
    from pyspark.sql import functions as sf

    seen = {field.name: field.dataType.simpleString() for field in interactions.schema.fields}
    columns: list[Column] = []
    for name in ("user_id", "item_id"):
        if name not in seen:
            raise SchemaError(
                f"interactions: column '{name}' is missing; seen: {', '.join(seen) or 'no columns'}; "
                "needed: user_id, item_id"
            )
        if seen[name] not in ("tinyint", "smallint", "int", "bigint", "string"):
            raise SchemaError(f"interactions: column '{name}' has type {seen[name]}; accepted: integers or strings")
        columns.append(sf.col(name) if seen[name] == "string" else sf.col(name).cast("bigint").alias(name))
    pairs = interactions.select(*columns)
    users = pairs.groupBy("user_id").agg(
        sf.count("*").alias("rows"),
        sf.count_distinct("item_id").alias("n"),
        sf.count_if(sf.col("item_id").isNull()).alias("no_item"),
    )
    kept = sf.col("n") >= min_user_items
    if max_user_items is not None:
        kept = kept & (sf.col("n") <= max_user_items)
    counts = users.agg(
        sf.sum("rows").alias("rows"),
        sf.sum(sf.when(sf.col("user_id").isNull(), sf.col("rows"))).alias("user_id"),
        sf.sum("no_item").alias("item_id"),
        sf.sum("n").alias("pairs"),
        sf.count("*").alias("users"),
        sf.count_if(kept).alias("kept"),
        sf.sum(sf.col("n") * sf.col("n")).alias("reach"),
    )
    if witness == "item_id":
        degrees = pairs.groupBy("item_id").agg(sf.count_distinct("user_id").alias("d"))
        reach = degrees.agg(sf.sum(sf.col("d") * sf.col("d")).alias("reach"))
        counts = counts.drop("reach").crossJoin(reach)
    told = counts.first()
    assert told is not None
    for name in ("user_id", "item_id"):
        if told[name]:
            raise DataError(
                f"interactions: column '{name}' is null in {told[name]:,} of {told['rows']:,} rows; "
                "drop or fill these rows first"
            )
    if not told["kept"]:
        raise DataError(
            f"interactions: nothing is left to pair: {told['rows'] or 0:,} rows, {told['pairs'] or 0:,} "
            f"distinct, of {told['users']:,} users, all of whom have fewer than min_user_items={min_user_items}"
            + (f" or more than max_user_items={max_user_items}" if max_user_items is not None else "")
            + " items; give more rows or widen the limits"
        )
    if told["kept"] < told["users"]:
        pairs = pairs.join(users.where(kept).select("user_id"), "user_id", "left_semi")
    return pairs, _block_count(interactions, told["pairs"], told["reach"])


def _block_count(frame: DataFrame, pairs: int, reach: int) -> int:
    """Blocks to make: several a core, more where one would load too many row entries, fewer for few pairs.

    Args:
        pairs: distinct interactions.
        reach: Σ over anchors of the entries in their witnesses' rows, which is Σ degree² over witnesses.
    """
    session = frame.sparkSession
    # Spark Connect has no defaultParallelism; the shuffle partitions say how wide the operator runs things.
    connect = type(frame).__module__.startswith("pyspark.sql.connect")
    width = int(session.conf.get("spark.sql.shuffle.partitions") or "8")
    cores = min(width, 64) if connect else session.sparkContext.defaultParallelism
    busy = min(BLOCKS_PER_CORE * cores, math.ceil(pairs / MIN_BLOCK_PAIRS))
    return max(busy, math.ceil(reach / MAX_BLOCK_REACH))


def _block_function(parameters: SwingParameters, top_k: int) -> Callable[[pa.Table], pa.Table]:
    """The function that scores one block, for `applyInArrow`."""

    def score(table: pa.Table) -> pa.Table:
        from kellm_spark.kernel import Block, swing_block

        # Summation follows the order of ids, so that results do not depend on how rows arrived.
        table = table.sort_by("witness").combine_chunks()
        row, mine = (_chunk(table, name) for name in ("row", "anchors"))
        ids = pc.unique(row.flatten())
        ids = ids.take(pc.sort_indices(ids))
        lengths, columns = _csr(row, ids)
        anchor_lengths, anchor_columns = _csr(mine, ids)
        anchor_rows = np.repeat(np.arange(len(mine)), anchor_lengths)
        order = np.argsort(anchor_columns, kind="stable")  # by anchor, rows ascending
        anchors, starts = np.unique(anchor_columns[order], return_index=True)
        block = Block(
            indptr=np.concatenate([[0], np.cumsum(lengths)]),
            columns=columns,
            weights=(parameters.alpha1 + lengths.astype(np.float64)) ** -parameters.beta,
            n_columns=len(ids),
            anchors=anchors,
            anchor_indptr=np.append(starts, len(order)),
            anchor_rows=anchor_rows[order],
        )
        best = swing_block(block, alpha=parameters.alpha, top_k=top_k)
        return pa.table(
            {
                "anchor_id": ids.take(pa.array(best.anchors)),
                "neighbor_id": ids.take(pa.array(best.neighbors)),
                "score": best.scores,
                "common": best.common.astype(np.int32),
                "rank": best.ranks.astype(np.int32),
            }
        )

    return score


def _chunk(table: pa.Table, name: str) -> pa.ListArray:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _csr(lists: pa.ListArray, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Length of each list, and its entries as places in `ids`, ascending within a list."""
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    places = pc.index_in(lists.flatten(), value_set=ids).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    return lengths, places[np.lexsort((places, row))]
