"""Which of a user's events are history and which are targets: one rule for profiles and for training.

A user's known events are ordered by time. The first `min((n + 1) // 2, max_history)` are *history*: profiles and
model inputs see these and nothing else. All later ones are *targets*, the labels of the CTR task. Under the time
split only train rows are known, and every valid and test row is a target. (KAR preprocessing; KELLMRec §4.1.)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd


def assign_roles(
    interactions: pd.DataFrame,
    *,
    split: Literal["user", "time"],
    max_history: int,
    ties: Literal["strict", "shuffle"] = "strict",
    seed: int | np.random.Generator = 7,
) -> pd.DataFrame:
    """Mark each event as history or target.

    Args:
        interactions: the columns of `schemas.INTERACTIONS`.
        split: how `interactions["split"]` was made.
        max_history: events of history per user at most.
        ties: `strict` drops targets that carry the timestamp of the user's last history event (neither came first);
            `shuffle` keeps them, in a seeded order: for clocks too coarse to tell.
        seed: of the order among equal timestamps; or what draws it, one number per row.

    Returns:
        The rows kept, with `role` and `position` (0 = the user's earliest), sorted by user_id, position.
    """
    order = np.random.default_rng(seed).random(len(interactions))
    # Draw the tie-breaker in an order of the rows that their place in the file does not decide.
    rows = interactions.sort_values(["user_id", "item_id", "event_timestamp"], kind="stable").assign(_tie=order)
    rows = rows.sort_values(["user_id", "event_timestamp", "_tie"], kind="stable").drop(columns="_tie")
    known = rows["split"].eq("train") if split == "time" else pd.Series(True, index=rows.index)
    position = rows.groupby("user_id", sort=False).cumcount()
    known_count = known.groupby(rows["user_id"], sort=False).transform("sum")
    cut = np.minimum((known_count + 1) // 2, max_history)
    known_position = known.groupby(rows["user_id"], sort=False).cumsum() - 1
    is_history = known & (known_position < cut)
    rows = rows.assign(role=np.where(is_history, "history", "target"), position=position)
    if ties == "strict":
        last = rows["event_timestamp"].where(is_history).groupby(rows["user_id"], sort=False).transform("max")
        rows = rows[is_history | ~(rows["event_timestamp"] <= last)]
    return rows.reset_index(drop=True)
