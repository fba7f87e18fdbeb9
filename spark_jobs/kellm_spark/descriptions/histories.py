"""The events that profiles may see, by the one rule of `data.history`, computed in Spark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pyarrow as pa

from kellm_features.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

ROWS_PER_PART = 250_000
"""Rows of one call of `assign_roles`, beyond which a part takes no further user: about 40 MB of pandas."""


def histories(interactions: DataFrame, settings: Settings, rows_per_part: int = ROWS_PER_PART) -> DataFrame:
    """The rows that `assign_roles` calls history when it is given the whole table.

    The rule orders a user's equal timestamps by draws that belong to the rows' places among all rows. Parts therefore
    hold users who are neighbours in order of id, and a part's draws begin where those of the part before end.

    Args:
        interactions: the columns of `schemas.INTERACTIONS`.
        settings: of the run: its seed, split and history.
        rows_per_part: see `ROWS_PER_PART`.

    Returns:
        user_id, position (ascends in time), item_id, rating, liked.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    # A window over all users is one task. It sorts pairs of id and count: ten million are seconds.
    earlier = Window.orderBy("user_id").rowsBetween(Window.unboundedPreceding, -1)
    first = sf.coalesce(sf.sum("count").over(earlier), sf.lit(0))
    places = interactions.groupBy("user_id").count().select("user_id", first.alias("first"))
    parts = interactions.join(places, "user_id").withColumn("part", sf.floor(sf.col("first") / rows_per_part))
    types = dict(interactions.dtypes)
    ddl = f"user_id {types['user_id']}, position bigint, item_id {types['item_id']}, rating float, liked boolean"
    return parts.groupBy("part").applyInArrow(_history_of_part(settings), ddl)


def _history_of_part(settings: Settings) -> Callable[[pa.Table], pa.Table]:
    split, seed = settings.data.split, settings.run.seed
    max_events, ties = settings.history.max_events, settings.history.ties

    def history(part: pa.Table) -> pa.Table:
        import numpy as np

        from kellm_features.data.history import assign_roles

        frame = part.drop_columns(["part", "first"]).to_pandas()
        bits = np.random.PCG64(seed)  # what default_rng(seed) draws from
        bits.advance(min(part["first"].to_pylist()))
        draws = np.random.Generator(bits)
        roles = assign_roles(frame, split=split, max_history=max_events, ties=ties, seed=draws)
        known = roles.loc[roles["role"].eq("history"), ["user_id", "position", "item_id", "rating", "liked"]]
        return pa.Table.from_pandas(known, preserve_index=False)

    return history
