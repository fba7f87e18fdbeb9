"""Confidence intervals that know that examples of one user are alike: the paired, clustered bootstrap.

Whole clusters (users; items for questions about cold items) are drawn with replacement, as often as there are
clusters, and every metric of every arm is computed on the same draws. Examples of a user share his taste and his
history, so to draw single examples understates the spread: threefold on MovieLens-100K, where the standard error of
an AUC over 95 users is 0.0165 by cluster and 0.005 by example. The same draws for two arms cancel what they share
(0.0028 for their difference there).

What is drawn is who was tested. Trainings are not drawn again: with several seeds an interval is of the mean over
just these seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kellm_features.errors import ConfigError, DataError
from kellm_features.training.metrics import auc_by_group, cross_entropy, equal_mass_bins, negatives_below

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]

_SQUARED_CLUSTERS_PER_EXAMPLE = 32
"""AUC by pairs of clusters costs C² multiplications a draw, 0.055 ns each on one core; by examples, 3.3 ns each. The
table of pairs takes 2 ns an example and draw to build, at 1,000 draws and some 1,000 clusters."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric of one arm: on the examples as they are, and on every draw of clusters."""

    value: float
    """On the examples as they are; NaN where the metric is not defined."""
    samples: Floats
    """(samples,) the metric on each draw, NaN where it is not defined (a draw without a class)."""
    draws: str
    """Names the draws: estimates of equal draws are paired."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval over the draws on which the metric is defined; (NaN, NaN) where there are none.

        Raises:
            ConfigError: a level that is not between 0 and 1.
        """
        return _percentiles(self.samples, level)


@dataclass(frozen=True)
class Difference:
    """One arm minus another, on the same draws."""

    delta: float
    """On the examples as they are."""
    low: float
    high: float
    p: float
    """Two-sided p-value of "no difference", 2 / (samples + 1) at the least."""


def paired(arm: Estimate, reference: Estimate, level: float = 0.95) -> Difference:
    """`arm` minus `reference`, draw by draw.

    The p-value is twice the share of draws on the far side of zero, the smaller of the two sides, each counted with
    one draw more (Davison & Hinkley 1997, §4.2: a p-value from draws is never 0). It falls below 1 − level about when
    the interval leaves zero out. Identical arms have delta 0 and p = 1. All NaN where either is not defined.

    Raises:
        DataError: the two were made on different draws.
        ConfigError: a level that is not between 0 and 1.
    """
    if arm.draws != reference.draws:
        raise DataError(
            "two estimates of different draws cannot be paired: make both by ClusterBootstrap over the same clusters, "
            "with the same samples and seed"
        )
    samples = arm.samples - reference.samples
    low, high = _percentiles(samples, level)
    defined = samples[~np.isnan(samples)]
    p = float("nan")
    if len(defined):
        side = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
        p = min(1.0, 2 * (side + 1) / (len(defined) + 1))
    return Difference(arm.value - reference.value, low, high, p)


def figures_of(arm: Estimate, reference: Estimate | None = None) -> dict[str, float | None]:
    """`value`, `low` and `high` of an arm; with a reference also `delta`, `delta_low`, `delta_high` and `p`.

    None where a figure is not defined. Raises as `paired` does.
    """
    low, high = arm.interval()
    figures = {"value": arm.value, "low": low, "high": high}
    if reference is not None:
        found = paired(arm, reference)
        figures |= {"delta": found.delta, "delta_low": found.low, "delta_high": found.high, "p": found.p}
    return {name: None if np.isnan(figure) else float(figure) for name, figure in figures.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: compare with the level that all claims share.

    The k-th smallest of m p-values is multiplied by m − k + 1, and never falls below the one before it. NaN stays NaN
    and does not count among the m.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())]
    adjusted = np.full(len(values), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * factors))
    return [float(value) for value in adjusted]


class ClusterBootstrap:
    """Draws of clusters, made once and applied to any metric of any arm over the same examples.

    With several folds or seeds, concatenate their examples and name the training of each in `groups`: scores of
    different trainings have no common scale, so AUC and ECE are computed within each group and averaged by the
    group's examples in the draw. A group that lacks a class in a draw is left out of that draw's AUC.

    `where` picks a slice of the examples. Clusters are drawn among all, so every slice is paired with every other.

    Args:
        clusters: (n,) integers or strings, the cluster of each example.
        samples: draws; 2,000 give a 95 % interval whose ends rest on 50 draws each.
        seed: of the draws; equal clusters, samples and seed give equal draws.
        groups: (n,) integers or strings, the training that scored each example; None: one.

    Raises:
        ConfigError: fewer than 1 sample.
        DataError: fewer than 2 clusters, or lengths that differ.
    """

    def __init__(
        self,
        clusters: npt.NDArray[np.generic],
        samples: int = 2000,
        seed: int = 7,
        groups: npt.NDArray[np.generic] | None = None,
    ) -> None:
        if samples < 1:
            raise ConfigError(f"the bootstrap got samples = {samples}: 1 or more are accepted")
        names, cluster = np.unique(clusters, return_inverse=True)
        if len(names) < 2:
            raise DataError(f"the bootstrap got {len(names)} clusters: 2 or more are needed to tell how they vary")
        if groups is not None and len(groups) != len(clusters):
            raise DataError(f"the bootstrap got {len(clusters)} clusters and {len(groups)} groups: one of each is due")
        self._cluster = cluster
        self._counts = _draw(len(names), samples, seed)
        self._draws = hashlib.sha256(f"{names.tolist()} {samples} {seed}".encode()).hexdigest()
        group = np.zeros(len(clusters), dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
        order = np.argsort(group, kind="stable")
        self._groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)

    def auc(self, labels: BoolArray, scores: FloatArray, where: BoolArray | None = None) -> Estimate:
        """Area under the ROC curve, ties counting one half.

        Args:
            labels: (n,) bool.
            scores: (n,) finite, any monotone scale.
            where: (n,) bool, the examples that count; None: all.

        Raises:
            DataError: lengths that differ, or scores that are not finite. The other metrics raise it alike, and where
                a probability is not in [0, 1].
        """
        values, masses = [], []
        for rows, cluster, counts in self._parts(scores, where, labels):
            values.append(_resampled_auc(labels[rows], scores[rows], cluster, counts))
            masses.append(counts @ np.bincount(cluster))
        return self._average(values, masses)

    def gauc(self, labels: BoolArray, scores: FloatArray, where: BoolArray | None = None) -> Estimate:
        """AUC within each cluster (and group), averaged by examples: GAUC, where the clusters are users.

        Clusters with one class are left out, as in `metrics.gauc`.
        """
        values, masses = [], []
        for rows, cluster, counts in self._parts(scores, where, labels):
            each, examples = auc_by_group(labels[rows], scores[rows], cluster)
            examples = np.where(np.isnan(each), 0, examples)
            masses.append(counts @ examples)
            values.append(_ratio(counts @ (np.nan_to_num(each) * examples), masses[-1]))
        return self._average(values, masses)

    def log_loss(self, labels: BoolArray, probabilities: FloatArray, where: BoolArray | None = None) -> Estimate:
        """Mean binary cross-entropy in nats."""
        self._check_probabilities(labels, probabilities)
        return self.mean(cross_entropy(labels, probabilities), where)

    def mean(self, values: FloatArray, where: BoolArray | None = None) -> Estimate:
        """Mean of a number that each example has: a loss, or the recall of each item where the clusters are items.

        Args:
            values: (n,) finite where they count.
            where: as in `auc`.
        """
        averages, masses = [], []
        for rows, cluster, counts in self._parts(values, where):
            masses.append(counts @ np.bincount(cluster))
            averages.append(_ratio(counts @ np.bincount(cluster, weights=values[rows]), masses[-1]))
        return self._average(averages, masses)

    def ece(
        self, labels: BoolArray, probabilities: FloatArray, where: BoolArray | None = None, bins: int = 15
    ) -> Estimate:
        """Expected calibration error over bins of equal mass; the bins are those of the examples as they are.

        Absolute gaps grow with noise, and a draw has more of it than the sample: draws lie above the value, and an
        interval may leave it out. The difference of two arms (`paired`) suffers less.
        """
        self._check_probabilities(labels, probabilities)
        values, masses = [], []
        for rows, cluster, counts in self._parts(probabilities, where, labels):
            cells = counts.shape[1] * bins
            cell = cluster * bins + equal_mass_bins(probabilities[rows], bins)
            gaps = np.bincount(cell, weights=probabilities[rows].astype(np.float64) - labels[rows], minlength=cells)
            masses.append(counts @ np.bincount(cluster))
            values.append(_ratio(np.abs(counts @ gaps.reshape(-1, bins)).sum(axis=1), masses[-1]))
        return self._average(values, masses)

    def _parts(
        self, values: FloatArray, where: BoolArray | None, labels: BoolArray | None = None
    ) -> Iterator[tuple[Codes, Codes, Floats]]:
        """By group: its rows, their clusters numbered within the group, and the draws (1 + samples, C) of those."""
        self._check_lengths(values=values, labels=labels, where=where)
        for group in self._groups:
            rows = group if where is None else group[where[group]]
            if not len(rows):
                continue
            if not np.isfinite(values[rows]).all():
                raise DataError(
                    f"{int((~np.isfinite(values[rows])).sum())} of {len(rows)} values are not finite: leave such "
                    "examples out by `where`, or look whether a training has diverged"
                )
            present, cluster = np.unique(self._cluster[rows], return_inverse=True)
            yield rows, cluster, self._counts[:, present].astype(np.float64)

    def _check_probabilities(self, labels: BoolArray, probabilities: FloatArray) -> None:
        self._check_lengths(labels=labels, probabilities=probabilities)
        outside = probabilities[(probabilities < 0) | (probabilities > 1)]
        if len(outside):
            raise DataError(
                f"the probability {outside[0]} is seen ({len(outside)} such values): 0 to 1 is accepted; "
                "logits need a sigmoid"
            )

    def _check_lengths(self, **given: npt.NDArray[np.generic] | None) -> None:
        for name, values in given.items():
            if values is not None and len(values) != len(self._cluster):
                raise DataError(
                    f"the bootstrap has {len(self._cluster)} examples and `{name}` has {len(values)}: one for each "
                    "example is accepted"
                )

    def _average(self, values: list[Floats], masses: list[Floats]) -> Estimate:
        """Average the groups by mass; one that is not defined on a draw is left out there."""
        total, mass = np.zeros(len(self._counts)), np.zeros(len(self._counts))
        for value, weight in zip(values, masses, strict=True):
            defined = ~np.isnan(value)
            total[defined] += (value * weight)[defined]
            mass[defined] += weight[defined]
        means = _ratio(total, mass)
        return Estimate(float(means[0]), means[1:], self._draws)


def _draw(clusters: int, samples: int, seed: int) -> npt.NDArray[np.uint16]:
    """How often each draw holds each cluster, (1 + samples, C); row 0 is the sample itself: each once."""
    rng = np.random.default_rng(seed)
    counts = np.ones((1 + samples, clusters), dtype=np.uint16)
    for row in counts[1:]:
        row[:] = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)
    return counts


def _resampled_auc(labels: BoolArray, scores: FloatArray, cluster: Codes, counts: Floats) -> Floats:
    """AUC on each draw, NaN where a class is missing.

    Both ways sum whole numbers below 2⁵³ and agree to the last bit.
    """
    order = np.argsort(scores, kind="stable")
    labels, scores, cluster = labels[order], scores[order], cluster[order]
    clusters = counts.shape[1]
    positives, negatives = (np.bincount(cluster[side], minlength=clusters) for side in (labels, ~labels))
    pairs = (counts @ positives) * (counts @ negatives)
    by_clusters = clusters**2 <= _SQUARED_CLUSTERS_PER_EXAMPLE * len(labels)
    twice = _wins_by_clusters if by_clusters else _wins_by_examples
    return _ratio(twice(labels, scores, cluster, counts), 2 * pairs)


def _wins_by_clusters(labels: BoolArray, scores: FloatArray, cluster: Codes, counts: Floats) -> Floats:
    """Twice the pairs that each draw ranks rightly, from a table of wins between clusters: Σ_cd k_c k_d wins_cd.

    Args:
        labels: (n,) by rising score.
        scores: (n,) rising.
        cluster: (n,) below C.
        counts: (S, C) draws.
    """
    ties = np.cumsum(np.append(0, np.diff(scores) != 0))
    # A negative is met twice, before and after the positives of its score: those see it as half beaten.
    negative, positive = np.flatnonzero(~labels), np.flatnonzero(labels)
    rows = np.concatenate([negative, positive, negative])
    rows = rows[np.argsort(ties[rows], kind="stable")]
    beaten, wins = np.zeros(counts.shape[1]), np.zeros((counts.shape[1], counts.shape[1]))
    for place, wins_here in zip(cluster[rows].tolist(), labels[rows].tolist(), strict=True):
        if wins_here:
            wins[place] += beaten
        else:
            beaten[place] += 1
    summed: Floats = np.einsum("sc,sc->s", counts @ wins, counts)
    return summed


def _wins_by_examples(labels: BoolArray, scores: FloatArray, cluster: Codes, counts: Floats) -> Floats:
    """As `_wins_by_clusters`, by one pass over the examples for each draw: for many clusters with few examples each."""
    below, up_to = negatives_below(labels, scores)
    positive, negative = cluster[labels], cluster[~labels]
    summed = np.zeros(len(negative) + 1)
    wins: Floats = np.empty(len(counts))
    for sample, count in enumerate(counts):
        np.cumsum(count[negative], out=summed[1:])
        wins[sample] = count[positive] @ (summed[below] + summed[up_to])
    return wins


def _ratio(above: Floats, below: Floats) -> Floats:
    """Elementwise; NaN where the divisor is 0."""
    ratio: Floats = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return ratio


def _percentiles(samples: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ConfigError(f"an interval got the level {level}: a number between 0 and 1 is accepted, such as 0.95")
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
