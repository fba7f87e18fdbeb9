"""Slices by hand, and that buckets leave no example out."""

from __future__ import annotations

import numpy as np
import pytest

from kellm_features.errors import DataError
from kellm_features.evaluation.slices import HISTORY_BUCKETS, ITEM_BUCKETS, SLICE_NAMES, slices


def test_edges_of_the_buckets() -> None:
    counts = np.array([0, 1, 9, 10, 99, 100, 999, 1000, 70_000])
    history = np.array([0, 9, 10, 19, 20, 29, 30, 31, 500])
    masks = slices(counts, history)
    assert tuple(masks) == SLICE_NAMES
    shown = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}
    assert shown == {
        "all": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "warm": [1, 2, 3, 4, 5, 6, 7, 8],
        "cold": [0],
        "items 0": [0],
        "items 1-9": [1, 2],
        "items 10-99": [3, 4],
        "items 100-999": [5, 6],
        "items 1000+": [7, 8],
        "history 0-9": [0, 1],
        "history 10-19": [2, 3],
        "history 20-29": [4, 5],
        "history 30+": [6, 7, 8],
    }


@pytest.mark.parametrize("names", [("warm", "cold"), tuple(ITEM_BUCKETS), tuple(HISTORY_BUCKETS)])
def test_each_example_is_in_one_bucket_of_a_kind(names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    masks = slices(10 ** rng.integers(0, 5, 500) - 1, rng.integers(0, 31, 500).astype(np.int8))
    assert (sum(masks[name].astype(int) for name in names) == 1).all()


def test_empty_and_wrong_input() -> None:
    assert all(mask.dtype == bool and not len(mask) for mask in slices(np.array([], int), np.array([], int)).values())
    with pytest.raises(DataError, match="2 item counts and 1 history lengths"):
        slices(np.array([1, 2]), np.array([1]))
    with pytest.raises(DataError, match="history length -1"):
        slices(np.array([1]), np.array([-1]))
