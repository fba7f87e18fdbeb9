"""AUC, GAUC, LogLoss and calibration error of click predictions."""

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
    below, up_to = negatives_below(labels, scores)
    pairs = len(below) * (len(labels) - len(below))
    return int((below + up_to).sum()) / (2 * pairs) if pairs else float("nan")


def negatives_below(labels: BoolArray, scores: FloatArray) -> tuple[IntArray, IntArray]:
    """For each positive, in the order of the rows: negatives that score less, and negatives that score no more."""
    negatives = np.sort(scores[~labels])
    positives = scores[labels]
    return np.searchsorted(negatives, positives, "left"), np.searchsorted(negatives, positives, "right")


def gauc(labels: BoolArray, scores: FloatArray, groups: IntArray) -> float:
    """AUC within each group (user), averaged by the group's examples (Zhu et al. 2017, Eq. 6).

    Groups with one class have no AUC and are left out; NaN where that leaves none.

    Args:
        labels: (N,) bool.
        scores: (N,) floating.
        groups: (N,) integers.
    """
    _, codes = np.unique(groups, return_inverse=True)
    values, examples = auc_by_group(labels, scores, codes)
    defined = ~np.isnan(values)
    weight = int(examples[defined].sum())
    return float(values[defined] @ examples[defined]) / weight if weight else float("nan")


def auc_by_group(labels: BoolArray, scores: FloatArray, groups: IntArray) -> tuple[FloatArray, IntArray]:
    """AUC of each group by itself, and its examples, without a loop over groups.

    Args:
        labels: (N,) bool.
        scores: (N,) floating.
        groups: (N,) integers from 0; G is the largest plus 1.

    Returns:
        (G,) AUC, NaN for a group with one class or none; (G,) int64 examples.
    """
    order = np.lexsort((scores, groups))
    label, score, group = labels[order], scores[order], groups[order]
    examples = np.bincount(groups)
    starts_tie = np.ones(len(order), dtype=np.bool_)
    starts_tie[1:] = (score[1:] != score[:-1]) | (group[1:] != group[:-1])
    bounds = np.append(np.flatnonzero(starts_tie), len(order))
    # Equal scores share the mean of their ranks, which count from 1 within the group.
    rank_in_all = ((bounds[:-1] + 1 + bounds[1:]) / 2)[np.cumsum(starts_tie) - 1]
    rank = rank_in_all - (np.cumsum(examples) - examples)[group]
    positives = np.bincount(group[label], minlength=len(examples))
    rank_sum = np.bincount(group[label], weights=rank[label], minlength=len(examples))
    pairs = positives * (examples - positives)
    above = rank_sum - positives * (positives + 1) / 2
    return np.divide(above, pairs, out=np.full(len(examples), np.nan), where=pairs > 0), examples


def log_loss(labels: BoolArray, probabilities: FloatArray) -> float:
    """Mean binary cross-entropy in nats; NaN without examples."""
    losses = cross_entropy(labels, probabilities)
    return float(losses.mean()) if len(losses) else float("nan")


def cross_entropy(labels: BoolArray, probabilities: FloatArray) -> FloatArray:
    """Each example's binary cross-entropy in nats, (N,) float64; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(probabilities.astype(np.float64), _CLIP, 1 - _CLIP)
    losses: FloatArray = -np.where(labels, np.log(p), np.log1p(-p))
    return losses


def ece(labels: BoolArray, probabilities: FloatArray, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: mean of |mean probability − share of positives|, by examples.

    Bins hold equally many examples, not equal stretches of [0, 1] as in Guo et al. (2017): predicted probabilities
    crowd, and bins of equal width leave the outer ones nearly empty. 15 bins as there. It is above 0 for a
    perfectly calibrated model too, by up to 0.4·√(bins / N): compare arms on the same examples only.

    Args:
        labels: (N,) bool.
        probabilities: (N,) in [0, 1].
        bins: 1 or more.

    Returns:
        0 to 1; NaN without examples.
    """
    if not len(labels):
        return float("nan")
    gap = np.bincount(equal_mass_bins(probabilities, bins), weights=probabilities.astype(np.float64) - labels)
    return float(np.abs(gap).sum()) / len(labels)


def equal_mass_bins(values: FloatArray, bins: int) -> IntArray:
    """Bin of each value, 0 to bins − 1, by its rank. Equal values share a bin, whatever the order of the rows."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    found: IntArray = (middle * bins / len(values)).astype(np.int64)[inverse]
    return found
