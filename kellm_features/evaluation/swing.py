"""SWING lists of interactions that are held in memory: the compiled kernel of the Spark job, without Spark."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kellm_features.errors import DataError, MissingExtraError

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


def swing_lists(
    user: npt.ArrayLike, item: npt.ArrayLike, n_items: int, *, preset: str = "yang", top_k: int = 100
) -> tuple[Int, Int, Float]:
    """The best SWING neighbours of each item, exactly: no caps, no filters, no sampling.

    For neighbours of users, swap the two: `swing_lists(item, user, n_users)`. The scores are those of the Spark job
    under the same preset. Repeated interactions count once.

    Args:
        user: (R,) integers >= 0, any range.
        item: (R,) indices below `n_items`.
        n_items: items in the catalogue; those without rows have no neighbours.
        preset: a name in `kellm_spark.swing.PRESETS`: constants of the formula.
        top_k: neighbours kept of each item; `n_items` for all with a score above 0.

    Returns:
        anchors, neighbours (int64) and scores (float64, above 0), sorted by anchor, then rank; equal scores rank by
        index. Empty where no two items share two users.

    Raises:
        ConfigError: no such preset.
        DataError: arrays of different lengths or not of one dimension, an index out of range, `top_k` below 1.
        MissingExtraError: Numba is not installed.
    """
    from kellm_spark.swing.parameters import swing_parameters

    parameters = swing_parameters(preset)
    witnesses, targets = _indices(user, "user", None), _indices(item, "item", n_items)
    if len(witnesses) != len(targets):
        raise DataError(f"SWING got {len(witnesses)} users and {len(targets)} items: one of each a row is accepted")
    if top_k < 1:
        raise DataError(f"SWING top_k is {top_k}; accepted: 1 or more")
    try:
        from kellm_spark.swing.graph import Graph, sorted_edges, weights
        from kellm_spark.swing.kernel import best_neighbors
    except ModuleNotFoundError as error:
        raise MissingExtraError("spark", error.name or "numba", "SWING") from error

    distinct, codes = np.unique(witnesses, return_inverse=True)
    n_users = len(distinct)
    u, t = sorted_edges(codes.astype(np.int32), targets.astype(np.int32), n_users, n_items)
    rows = sorted_edges(t, u, n_items, n_users)[1]
    degrees, target_degrees = np.bincount(u, minlength=n_users), np.bincount(t, minlength=n_items)
    graph = Graph(
        indptr=np.concatenate([[0], np.cumsum(degrees)]),
        columns=t,
        weights=weights(degrees, parameters),
        targets=np.arange(n_items, dtype=np.int32),
        target_indptr=np.concatenate([[0], np.cumsum(target_degrees)]),
        target_rows=rows,
        scales=np.ones(n_items),
        n_columns=n_items,
    )
    found = best_neighbors(graph, 0, n_items, alpha=parameters.alpha, top_k=top_k)
    return found.targets.astype(np.int64), found.neighbors.astype(np.int64), found.scores


def _indices(values: npt.ArrayLike, what: str, below: int | None) -> Int:
    """Integers >= 0 in one dimension."""
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(f"SWING got {what}s of shape {array.shape}, {array.dtype}: a row of integers is accepted")
    array = array.astype(np.int64)
    wrong = array[(array < 0) | (array >= below)] if below is not None else array[array < 0]
    if len(wrong):
        accepted = "0 or more" if below is None else f"0 to {below - 1}"
        raise DataError(f"SWING got {what} {wrong[0]} ({len(wrong)} such rows): accepted are {accepted}")
    return array
