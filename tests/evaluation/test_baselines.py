"""Clicks from counts: by hand, and without the target's own label."""

from __future__ import annotations

import numpy as np
import pytest

from kellm_features.evaluation.baselines import _statistics, baseline_scores
from kellm_features.training.data import CtrData, build_ctr_data

from .world import catalogue, interactions, people


def data(first_label: int = 1) -> CtrData:
    """Users 1 and 2 train; two events of each are history, two are targets."""
    rows = [
        *((1, item, liked, "train") for item, liked in ((1, 1), (2, 0), (3, first_label), (4, 0))),
        *((2, item, liked, "train") for item, liked in ((1, 1), (2, 1), (3, 1), (4, 0))),
        *((3, item, liked, "valid") for item, liked in ((1, 1), (2, 0), (3, 1), (4, 0))),
        *((4, item, liked, "test") for item, liked in ((2, 1), (1, 1), (3, 1), (5, 0))),
    ]
    options = {"split": "user", "max_history": 2, "ties": "strict", "seed": 7}
    return build_ctr_data(interactions(rows), catalogue(5), people(4), **options)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_item_mean_by_hand() -> None:
    # Train rows: 5 of 8 liked; item 3 was liked twice of two, item 5 never met. Ten events of the overall share shrink.
    assert baseline_scores("item-mean", data(), "test") == pytest.approx([(2 + 6.25) / 12, 0.625])


def test_statistics_by_hand() -> None:
    found = _statistics(data(), "test")
    overall = 0.5  # of train targets: 3 and 3 liked, 4 and 4 not
    taste = (2 + 10 * overall) / (2 + 10)
    mean_1, mean_2 = (2 + 6.25) / 12, (1 + 6.25) / 12
    leniency = (2 - mean_1 - mean_2) / (2 + 10)
    user = [logit(taste), np.log1p(2), leniency]
    assert found[0] == pytest.approx([logit((2 + 6.25) / 12), np.log1p(2), 0, *user], abs=1e-6)
    assert found[1] == pytest.approx([logit(0.625), 0, 1, *user], abs=1e-6)


def test_a_train_target_does_not_see_its_own_label() -> None:
    """User 1's label of item 3 moves, in that very example, the overall share alone."""
    liked, not_liked = (_statistics(data(label), "train") for label in (1, 0))
    own = [logit((2 + 6.25 - 1) / 11), logit((1 + 5.0) / 11)]  # the overall share alone differs: 5 or 4 of 8
    assert [liked[0, 0], not_liked[0, 0]] == pytest.approx(own)
    assert liked[0, 1] == not_liked[0, 1] == pytest.approx(np.log1p(1))


def test_logistic_regression_gives_probabilities() -> None:
    p = baseline_scores("rating-statistics", data(), "test")
    assert p.shape == (2,)
    assert ((p > 0) & (p < 1)).all()
    assert p[0] > p[1]  # item 3, liked by all, against one that nobody has met
