"""The sampler's distribution, metrics against scikit-learn, neighbour recall by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.metrics import roc_auc_score

from kellm_features.schemas import PAIRS, write_table
from kellm_features.training.metrics import auc, gauc, log_loss
from kellm_features.training.neighbors import neighbor_recall
from kellm_features.training.pairs import PositiveSampler, read_pairs


def sampler(top_k: int) -> PositiveSampler:
    anchors, neighbors = np.array([0, 0, 0, 2, 0]), np.array([1, 2, 3, 0, 4])
    return PositiveSampler(anchors, neighbors, np.array([3.0, 6.0, 1.0, 0.2, 0.5]), 5, top_k)


def test_positives_follow_the_scores_of_the_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 200_000
    drawn = sampler(3).sample(torch.zeros(draws, dtype=torch.int64), generator)
    share = torch.bincount(drawn, minlength=5) / draws
    # 0.5 is the fourth score and falls out; the rest is normalised: 3, 6 and 1 of 10.
    assert share[[0, 4]].tolist() == [0, 0]
    for item, expected in ((1, 0.3), (2, 0.6), (3, 0.1)):
        assert abs(share[item].item() - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5


def test_order_sizes_and_lone_anchors() -> None:
    found = sampler(2)
    assert found.candidates.tolist() == [[2, 1], [-1, -1], [0, -1], [-1, -1], [-1, -1]]
    assert found.sizes.tolist() == [2, 0, 1, 0, 0]
    drawn = found.sample(torch.tensor([1, 2]), torch.Generator().manual_seed(1))
    assert drawn.tolist() == [-1, 0]


def test_normalised_scores_rank_before_the_cut() -> None:
    """Anchor 0: scores 3, 6, 1, 0.5 over 10 + likes 0, 90, 0, 15: 0.3, 0.06, 0.1 and 0.02."""
    anchors, neighbors = np.array([0, 0, 0, 2, 0]), np.array([1, 2, 3, 0, 4])
    degrees = np.array([7, 0, 90, 0, 15])
    found = PositiveSampler(anchors, neighbors, np.array([3.0, 6.0, 1.0, 0.2, 0.5]), 5, 2, degrees)
    assert found.candidates.tolist() == [[1, 3], [-1, -1], [0, -1], [-1, -1], [-1, -1]]
    draws = 100_000
    drawn = found.sample(torch.zeros(draws, dtype=torch.int64), torch.Generator().manual_seed(0))
    share = (drawn == 1).float().mean().item()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / draws) ** 0.5  # 0.3 of 0.3 + 0.1


def test_pairs_are_read_with_and_without_degrees(tmp_path: Path) -> None:
    pairs = pa.table(
        {
            "anchor_id": [10, 10, 20],
            "neighbor_id": [20, 30, 30],
            "score": [2.0, 1.0, 1.0],
            "common": pa.array([2, 1, 1], pa.int32()),
            "rank": pa.array([1, 2, 1], pa.int32()),
        }
    )
    write_table(pairs, tmp_path / "pairs.parquet", PAIRS)
    ids, in_train = np.array([30, 20, 10]), np.ones(3, dtype=bool)
    raw = read_pairs(tmp_path / "pairs.parquet", ids, in_train, "item_id", 5)
    assert raw.candidates.tolist() == [[-1, -1], [0, -1], [1, 0]]
    tamed = read_pairs(tmp_path / "pairs.parquet", ids, in_train, "item_id", 5, degrees=np.array([0, 40, 0]))
    assert tamed.candidates.tolist() == [[-1, -1], [0, -1], [0, 1]]  # 1 / 10 before 2 / 50


def test_same_generator_same_positives() -> None:
    anchors = torch.zeros(100, dtype=torch.int64)
    first, second = (sampler(4).sample(anchors, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_auc_and_log_loss_equal_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(500) < 0.4
    scores = np.round(rng.random(500), 1)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    inner = np.clip(scores, 0.01, 0.99)
    assert log_loss(labels, inner) == pytest.approx(sk_log_loss(labels, inner), abs=1e-12)
    assert np.isfinite(log_loss(np.array([True]), np.array([0.0])))


def test_gauc_by_hand() -> None:
    """User 1: 1 of 2 pairs right, 3 rows. User 2: all right, 2 rows. User 3 has one class and is left out."""
    labels = np.array([True, False, False, False, True, True])
    scores = np.array([0.5, 0.4, 0.6, 0.1, 0.9, 0.3])
    users = np.array([1, 1, 1, 2, 2, 3])
    assert gauc(labels, scores, users) == pytest.approx((0.5 * 3 + 1.0 * 2) / 5)
    assert np.isnan(auc(np.array([True]), np.array([0.3])))
    assert np.isnan(gauc(labels[:1], scores[:1], users[:1]))


def test_neighbor_recall_by_hand() -> None:
    """On a circle, with anchors 0 and 2: item 0's neighbours by angle are 1 and 4, item 2's are 1 and 3."""
    angle = torch.tensor([0.0, 0.3, 0.9, 1.3, -0.5])
    vectors = 7 * torch.stack([angle.cos(), angle.sin()], dim=1)
    # Truth: 0 -> [2, 1], of which 1 is found; 2 -> [0], which is not among its two nearest.
    assert neighbor_recall(vectors, sampler(2), k=2) == pytest.approx((0.5 + 0.0) / 2)
