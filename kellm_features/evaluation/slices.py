"""Parts of the test examples that are looked at by themselves: warm and cold items, short and long histories."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kellm_features.errors import DataError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer]

ITEM_BUCKETS: dict[str, tuple[int, int | None]] = {
    "items 0": (0, 0),
    "items 1-9": (1, 9),
    "items 10-99": (10, 99),
    "items 100-999": (100, 999),
    "items 1000+": (1000, None),
}
"""Slice -> least and most train rows of the target's item, both inside; None: no upper end."""
HISTORY_BUCKETS: dict[str, tuple[int, int | None]] = {
    "history 0-9": (0, 9),
    "history 10-19": (10, 19),
    "history 20-29": (20, 29),
    "history 30+": (30, None),
}
"""Slice -> shortest and longest history of the target's user, in events."""
SLICE_NAMES = ("all", "warm", "cold", *ITEM_BUCKETS, *HISTORY_BUCKETS)
"""Every slice, in the order of tables."""


def slices(item_train_count: IntArray, history_length: IntArray) -> dict[str, BoolArray]:
    """Masks over examples by name, in the order of `SLICE_NAMES`; a slice without examples is there, all False.

    `warm` and `cold` part the examples by whether the item has a train row, the item buckets by how many, the history
    buckets by the user's events before the target that the model may see.

    Args:
        item_train_count: (n,) train rows of each example's item, histories and targets alike.
        history_length: (n,) events of history of each example's user.

    Raises:
        DataError: lengths that differ, or a count below 0.
    """
    if item_train_count.shape != history_length.shape:
        raise DataError(
            f"slices got {len(item_train_count)} item counts and {len(history_length)} history lengths: "
            "one of each for every example is accepted"
        )
    for what, values in (("item count", item_train_count), ("history length", history_length)):
        if (values < 0).any():
            raise DataError(f"slices got the {what} {values.min()}: 0 or more is accepted")
    masks = {
        "all": np.ones(len(item_train_count), dtype=np.bool_),
        "warm": item_train_count > 0,
        "cold": item_train_count == 0,
    }
    for buckets, values in ((ITEM_BUCKETS, item_train_count), (HISTORY_BUCKETS, history_length)):
        for name, (least, most) in buckets.items():
            masks[name] = (values >= least) & (np.True_ if most is None else values <= most)
    return masks
