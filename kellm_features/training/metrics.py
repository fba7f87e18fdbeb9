"""AUC, LogLoss and GAUC of click predictions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]

_CLIP = 1e-7  # scores of exactly 0 or 1 would cost an infinite loss


def auc(labels: BoolArray, scores: FloatArray) -> float:
    """Probability that a positive outscores a negative, ties counting one half (Mann-Whitney U); NaN with one class.

    Args:
        labels: (N,) bool.
        scores: (N,) floating, any monotone scale.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(_mid_ranks(scores)[labels].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def log_loss(labels: BoolArray, probabilities: FloatArray) -> float:
    """Mean binary cross-entropy in nats; NaN without examples."""
    if not len(labels):
        return float("nan")
    p = np.clip(probabilities.astype(np.float64), _CLIP, 1 - _CLIP)
    return float(-np.where(labels, np.log(p), np.log1p(-p)).mean())


def gauc(labels: BoolArray, scores: FloatArray, groups: IntArray) -> float:
    """AUC within each group (user), averaged by the group's examples (Zhu et al. 2017, Eq. 6).

    Groups with one class have no AUC and are left out; NaN where that leaves none.

    Args:
        labels: (N,) bool.
        scores: (N,) floating.
        groups: (N,) integers.
    """
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    total = weight = 0.0
    for rows in np.split(order, bounds):
        value = auc(labels[rows], scores[rows])
        if not np.isnan(value):
            total += value * len(rows)
            weight += len(rows)
    return total / weight if weight else float("nan")


def _mid_ranks(scores: FloatArray) -> FloatArray:
    """Ranks from 1; equal scores share the mean of theirs."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: FloatArray = (last - (counts - 1) / 2)[inverse]
    return ranks
