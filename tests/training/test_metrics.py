"""Metrics against scikit-learn, loops, and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kellm_features.training.metrics import (
    auc,
    auc_by_group,
    cross_entropy,
    ece,
    equal_mass_bins,
    gauc,
    log_loss,
)


def draw(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with ties, and groups of very different sizes."""
    rng = np.random.default_rng(seed)
    return rng.random(n) < 0.4, np.round(rng.random(n), 1), (rng.pareto(1, n) * 3).astype(int) % 40


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
def test_auc_is_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    found = auc(labels, scores / 4)
    if labels.all() or not labels.any():
        assert np.isnan(found)
        return
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_by_group_is_auc_of_each_group() -> None:
    labels, scores, groups = draw(3)
    values, examples = auc_by_group(labels, scores, groups)
    total = weight = 0.0
    for group in range(len(values)):
        own = groups == group
        assert examples[group] == own.sum()
        if len(set(labels[own])) < 2:
            assert np.isnan(values[group])
            continue
        assert values[group] == pytest.approx(roc_auc_score(labels[own], scores[own]), abs=1e-12)
        total, weight = total + values[group] * own.sum(), weight + own.sum()
    assert 0 < weight < len(labels)
    assert gauc(labels, scores, groups * 1000 + 5) == pytest.approx(total / weight, abs=1e-12)


def test_ece_by_hand() -> None:
    """Two bins of three: mean probability 0.2 against 1 of 3 liked, and 0.8 against 3 of 3."""
    labels = np.array([False, True, False, True, True, True])
    probabilities = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    assert ece(labels, probabilities, bins=2) == pytest.approx((1 / 3 - 0.2 + 0.2) / 2)
    assert ece(labels, probabilities, bins=1) == pytest.approx(4 / 6 - 0.5)
    assert np.isnan(ece(labels[:0], probabilities[:0]))


def test_ece_of_calibrated_and_of_shifted_probabilities() -> None:
    rng = np.random.default_rng(4)
    n = 100_000
    truth = rng.beta(2, 3, n)
    labels = rng.random(n) < truth
    assert ece(labels, truth) < 0.4 * (15 / n) ** 0.5 * 1.5
    assert ece(labels, np.minimum(truth + 0.05, 1)) == pytest.approx(0.05, abs=0.005)


def test_bins_hold_equal_mass_and_never_part_equal_values() -> None:
    values = np.random.default_rng(5).random(1503)
    assert set(np.bincount(equal_mass_bins(values, 15))) <= {100, 101}
    assert (np.diff(equal_mass_bins(np.sort(values), 15)) >= 0).all()
    tied = np.array([0.5] * 7 + [0.1, 0.9, 0.9])
    assert equal_mass_bins(tied, 5).tolist() == [2] * 7 + [0, 4, 4]
    order = np.random.default_rng(6).permutation(10)
    assert equal_mass_bins(tied[order], 5).tolist() == equal_mass_bins(tied, 5)[order].tolist()


def test_cross_entropy() -> None:
    labels, scores, _ = draw(7)
    assert cross_entropy(np.array([True, False]), np.array([0.25, 0.25])) == pytest.approx([np.log(4), np.log(4 / 3)])
    assert log_loss(labels, scores) == pytest.approx(cross_entropy(labels, scores).mean())
    assert np.isnan(log_loss(labels[:0], scores[:0]))
