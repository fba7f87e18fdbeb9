"""The bootstrap against a loop that repeats rows, its intervals against truth, Holm by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from kellm_features.errors import ConfigError, DataError
from kellm_features.evaluation import bootstrap
from kellm_features.evaluation.bootstrap import ClusterBootstrap, Estimate, holm, paired
from kellm_features.training.metrics import equal_mass_bins

SAMPLES = 12


def examples(seed: int, n: int, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cluster names, labels, and probabilities with ties."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, clusters, n) * 7 + 3
    labels = rng.random(n) < 0.4
    return cluster, labels, np.clip(np.round(0.2 * labels + 0.7 * rng.random(n), 2), 0.01, 0.99)


def repeats(cluster: np.ndarray, samples: int, seed: int) -> list[np.ndarray]:
    """Rows of each draw, by the definition: as many clusters as there are, with replacement, each with all its rows."""
    names = np.unique(cluster)
    rng = np.random.default_rng(seed)
    rows = {name: np.flatnonzero(cluster == name) for name in names}
    return [
        np.concatenate([rows[name] for name in names[rng.integers(0, len(names), len(names))]]) for _ in range(samples)
    ]


def by_group(metric: Callable[[np.ndarray], float], group: np.ndarray, draws: list[np.ndarray]) -> list[float]:
    """The metric within each group of each draw, averaged by examples."""
    values = []
    for rows in draws:
        kept = [rows[group[rows] == name] for name in np.unique(group)]
        pairs = [(metric(own), len(own)) for own in kept if len(own)]
        pairs = [(value, size) for value, size in pairs if not np.isnan(value)]
        values.append(sum(v * s for v, s in pairs) / sum(s for _, s in pairs) if pairs else float("nan"))
    return values


def sk_auc(labels: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> float:
    return roc_auc_score(labels[rows], scores[rows]) if len(set(labels[rows])) == 2 else float("nan")


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("n", "clusters"), [(400, 12), (90, 60)])
def test_every_metric_is_that_of_repeated_rows(n: int, clusters: int, groups: int) -> None:
    cluster, labels, scores = examples(1, n, clusters)
    group = np.random.default_rng(2).integers(0, groups, n)
    where = np.random.default_rng(3).random(n) < 0.7
    draws = [np.arange(n), *repeats(cluster, SAMPLES, seed=5)]
    boot = ClusterBootstrap(cluster, SAMPLES, seed=5, groups=group)
    bins = np.zeros(n, dtype=int)

    def gauc(rows: np.ndarray) -> float:
        """Users of different trainings are different groups, each as heavy as its examples in the draw."""
        total = weight = 0.0
        for name, training in itertools.product(np.unique(cluster), range(groups)):
            once = np.flatnonzero((cluster == name) & (group == training) & mask)
            value, times = sk_auc(labels, scores, once), (cluster[rows] == name) & (group[rows] == training)
            if not np.isnan(value):
                total, weight = total + value * times.sum(), weight + times.sum()
        return total / weight

    def ece(rows: np.ndarray) -> float:
        gaps = [np.sum(scores[own] - labels[own]) for own in (rows[bins[rows] == b] for b in range(4))]
        return float(np.abs(gaps).sum()) / len(rows)

    def loss(rows: np.ndarray) -> float:
        return float(-np.log(np.where(labels, scores, 1 - scores))[rows].mean())

    for mask, given in ((np.ones(n, dtype=bool), None), (where, where)):
        for name in range(groups):
            own = (group == name) & mask
            bins[own] = equal_mass_bins(scores[own], 4)
        kept = [rows[mask[rows]] for rows in draws]
        for found, metric in (
            (boot.auc(labels, scores, given), lambda rows: sk_auc(labels, scores, rows)),
            (boot.log_loss(labels, scores, given), loss),
            (boot.ece(labels, scores, given, bins=4), ece),
            (boot.mean(scores, given), lambda rows: float(scores[rows].mean())),
        ):
            expected = by_group(metric, group, kept)
            np.testing.assert_allclose([found.value, *found.samples], expected, rtol=1e-10)
            assert np.unique(found.samples).size > SAMPLES // 2
        found = boot.gauc(labels, scores, given)
        np.testing.assert_allclose([found.value, *found.samples], [gauc(rows) for rows in kept], rtol=1e-10)


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_both_ways_to_the_auc_agree_to_the_last_bit(decimals: int) -> None:
    rng = np.random.default_rng(0)
    scores = np.sort(np.round(rng.random(500), decimals))
    labels, cluster = rng.random(500) < 0.3, rng.integers(0, 40, 500)
    counts = rng.integers(0, 4, (50, 40)).astype(np.float64)
    ways = [way(labels, scores, cluster, counts) for way in (bootstrap._wins_by_clusters, bootstrap._wins_by_examples)]
    np.testing.assert_array_equal(*ways)
    assert (ways[0] > 0).all()


def test_equal_arms_differ_by_nothing() -> None:
    cluster, labels, scores = examples(4, 300, 30)
    boot = ClusterBootstrap(cluster, 200)
    difference = paired(boot.auc(labels, scores), boot.auc(labels, scores.copy()))
    assert (difference.delta, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_paired_by_hand() -> None:
    """Differences −1, 0, 1, …, 17: two are at or below zero, so p = 2 · (2 + 1) / (19 + 1)."""
    reference = Estimate(0.25, np.zeros(20), "same")
    arm = Estimate(0.75, np.append(np.arange(-1.0, 18.0), np.nan), "same")
    difference = paired(arm, reference, level=0.9)
    assert difference.delta == 0.5
    assert difference.p == pytest.approx(0.3)
    assert paired(reference, arm).p == pytest.approx(0.3)
    assert (difference.low, difference.high) == pytest.approx((-1 + 0.05 * 18, -1 + 0.95 * 18))
    assert arm.interval(0.9) == (difference.low, difference.high)
    certain = paired(Estimate(1.0, np.ones(19), "same"), Estimate(0.0, np.zeros(19), "same"))
    assert certain.p == pytest.approx(2 / 20)


def test_pairing_is_tighter_than_two_intervals_and_only_of_the_same_draws() -> None:
    cluster, labels, scores = examples(5, 2000, 50)
    close = scores + 0.02 * np.random.default_rng(1).random(2000)
    boot, again = ClusterBootstrap(cluster, 300), ClusterBootstrap(cluster[::-1], 300)
    one, two = boot.auc(labels, scores), boot.auc(labels, close)
    difference = paired(two, one)
    assert difference.delta == two.value - one.value
    width = np.diff(one.interval())[0]
    assert difference.high - difference.low < width / 4
    # Another order of the rows is the same draws of the same users; another seed, or other users, are not.
    assert paired(again.auc(labels[::-1], close[::-1]), one) == difference
    for other in (ClusterBootstrap(cluster, 300, seed=8), ClusterBootstrap(cluster + 1, 300)):
        with pytest.raises(DataError, match="different draws"):
            paired(other.auc(labels, close), one)


def test_slices_without_examples_or_without_a_class() -> None:
    cluster, labels, scores = examples(6, 200, 20)
    boot = ClusterBootstrap(cluster, 10)
    nothing = np.zeros(200, dtype=bool)
    for estimate in (boot.auc(labels, scores, nothing), boot.log_loss(labels, scores, nothing)):
        assert np.isnan([estimate.value, *estimate.samples, *estimate.interval()]).all()
    assert np.isnan(boot.auc(labels, scores, labels).value)
    assert not np.isnan(boot.log_loss(labels, scores, labels).value)
    none = paired(boot.auc(labels, scores), boot.auc(labels, scores, nothing))
    assert np.isnan([none.delta, none.low, none.high, none.p]).all()


def coverage(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]], truth: float, auc: bool
) -> np.ndarray:
    """Shares of 200 simulated samples whose 95 % interval holds the truth: by cluster, and by example."""
    rng, hits = np.random.default_rng(11), np.zeros(2)
    for _ in range(200):
        cluster, labels, scores = draw(rng)
        for place, by in enumerate((cluster, np.arange(len(cluster)))):
            boot = ClusterBootstrap(by, 200, seed=int(rng.integers(1 << 30)))
            low, high = (boot.auc(labels, scores) if auc else boot.mean(labels.astype(float))).interval()
            hits[place] += low <= truth <= high
    return hits / 200


def test_intervals_cover_when_drawn_by_cluster_and_not_by_example() -> None:
    """40 users of 12 examples whose taste, uniform on [0, 1], is the chance of each of their likes: a mean of 1/2.

    200 samples tell a coverage of 0.95 to ±0.03; percentile intervals over 40 clusters fall short by 0.01 or 0.02.
    """

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cluster = np.repeat(np.arange(40), 12)
        labels = rng.random(480) < rng.random(40)[cluster]
        return cluster, labels, np.zeros(480)

    clustered, by_example = coverage(draw, 0.5, auc=False)
    assert 0.91 <= clustered <= 0.98
    assert by_example < 0.8


def test_intervals_of_the_auc_cover_too() -> None:
    """A user's mood u ~ N(0, 1) is in his scores, Φ(u) is the chance of his likes; truth: the AUC of 100,000 users."""

    def draw(rng: np.random.Generator, users: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mood = np.repeat(rng.normal(size=users), 12)
        cluster = np.repeat(np.arange(users), 12)
        return cluster, rng.normal(size=len(mood)) < mood, mood + rng.normal(size=len(mood))

    _, labels, scores = draw(np.random.default_rng(0), users=100_000)
    truth = roc_auc_score(labels, scores)
    clustered, by_example = coverage(draw, truth, auc=True)
    assert 0.90 <= clustered <= 0.98
    assert by_example < 0.8


def test_holm_by_hand() -> None:
    """0.01·4, 0.02·3 = 0.06, 0.03·2 = 0.06, 0.04·1 lifted to 0.06; NaN is no test."""
    assert holm([0.04, 0.01, float("nan"), 0.03, 0.02]) == pytest.approx([0.06, 0.04, np.nan, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.7]) == [1, 1]
    assert holm([]) == []


def test_messages_say_what_is_accepted() -> None:
    cluster, labels, scores = examples(7, 50, 5)
    boot = ClusterBootstrap(cluster, 10)
    with pytest.raises(DataError, match="1 clusters: 2 or more"):
        ClusterBootstrap(np.zeros(5))
    with pytest.raises(ConfigError, match="samples = 0"):
        ClusterBootstrap(cluster, 0)
    with pytest.raises(DataError, match="50 clusters and 3 groups"):
        ClusterBootstrap(cluster, 10, groups=np.zeros(3))
    with pytest.raises(DataError, match="50 examples and `labels` has 49"):
        boot.log_loss(labels[1:], scores)
    with pytest.raises(DataError, match=r"the probability 3\.0 is seen \(1 such values\)"):
        boot.ece(labels, np.where(np.arange(50) == 4, 3.0, scores))
    broken = np.where(np.arange(50) == 4, np.nan, scores)
    with pytest.raises(DataError, match="1 of 50 values are not finite"):
        boot.auc(labels, broken)
    assert boot.auc(labels, broken, where=~np.isnan(broken)).value > 0
    with pytest.raises(ConfigError, match=r"level 95"):
        boot.auc(labels, scores).interval(95)
