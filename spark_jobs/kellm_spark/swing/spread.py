"""What both ways to spread the work share: what they return, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from kellm_features.errors import ConfigError, DataError
from kellm_spark.swing.interactions import Checked
from kellm_spark.swing.parameters import MAX_EXACT_WITNESSES, SwingOptions

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from kellm_spark.swing.kernel import Neighbors


@dataclass
class Counts:
    """What the filters dropped, by reason, and what they left."""

    dropped: dict[str, int] = field(default_factory=dict)
    targets: int = 0
    capped: int = 0
    """Targets with more witnesses than the cap."""


@dataclass(frozen=True)
class Spread:
    """Pairs that a number of tasks will compute."""

    pairs: DataFrame
    counts: Counts
    tasks: int


def pairs_schema(id_type: str) -> str:
    """The columns of `schemas.PAIRS`, in Spark's words."""
    return f"anchor_id {id_type}, neighbor_id {id_type}, score double, common int, rank int"


def pairs_batch(ids: pa.Array, best: Neighbors) -> pa.RecordBatch:
    """`schemas.PAIRS` from column indices."""
    return pa.record_batch(
        {
            "anchor_id": ids.take(pa.array(best.targets)),
            "neighbor_id": ids.take(pa.array(best.neighbors)),
            "score": best.scores,
            "common": best.common,
            "rank": best.ranks,
        }
    )


def nothing_left(checked: Checked, counts: Counts) -> DataError:
    """The error for filters that left nobody, with what each of them took."""
    dropped = {"not before the cut": checked.later, **counts.dropped}
    took = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
    return DataError(
        f"interactions: nothing is left to pair: {checked.rows:,} rows"
        + (f", of which {took}" if took else "")
        + "; give more rows or widen min_user_items, max_user_items or max_item_users"
    )


def too_large(options: SwingOptions, target: object, witnesses: int) -> ConfigError:
    """The error for a target whose exact scores need more memory than a task should take."""
    who = "users" if options.side == "item" else "items"
    other = "" if options.side == "item" else ", or max_item_users, which leaves the most popular items out"
    return ConfigError(
        f"swing: {options.side} {target!r} has {witnesses:,} {who}; exact scores keep a matrix of their pairs, "
        f"{witnesses**2 * 8 / 2**30:,.1f} GiB, in one task, and 1 GiB ({MAX_EXACT_WITNESSES:,} {who}) is the most; "
        f"set max_witnesses (--max-witnesses), e.g. 1000{other}"
    )
