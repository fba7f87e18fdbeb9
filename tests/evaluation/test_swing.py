"""SWING lists in memory, against the definition (tests/spark holds them against the Spark job)."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from kellm_features.errors import ConfigError, DataError
from kellm_features.evaluation.swing import swing_lists
from kellm_spark.swing import swing_parameters

N_USERS, N_ITEMS = 70, 25


def likes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Popular items first; item 24 has no rows, and some rows stand twice."""
    draw = random.Random(seed)
    rows = [(u, i) for u in range(N_USERS) for i in range(N_ITEMS - 1) if draw.random() < 2.5 / (1 + 0.2 * i)]
    rows += draw.sample(rows, 20)
    draw.shuffle(rows)
    users, items = np.array(rows).T
    return users * 7 + 3, items  # users have gaps


def by_definition(witness: np.ndarray, target: np.ndarray, n: int, preset: str) -> np.ndarray:
    """s(i, j) = Σ_{u<v} w_u·w_v / (alpha + |I_u ∩ I_v|) as the sum over pairs of witnesses that it is."""
    p = swing_parameters(preset)
    of = {int(u): set(target[witness == u].tolist()) for u in np.unique(witness)}
    scores = np.zeros((n, n))
    for u, v in itertools.combinations(sorted(of), 2):
        common = of[u] & of[v]
        part = (p.alpha1 + len(of[u])) ** -p.beta * (p.alpha1 + len(of[v])) ** -p.beta / (p.alpha + len(common))
        for i, j in itertools.permutations(common, 2):
            scores[i, j] += part
    return scores


@pytest.mark.parametrize("preset", ["yang", "kellmrec", "alink"])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_the_double_sum(preset: str, seed: int) -> None:
    user, item = likes(seed)
    wanted = by_definition(user, item, N_ITEMS, preset)
    anchors, neighbors, scores = swing_lists(user, item, N_ITEMS, preset=preset, top_k=N_ITEMS)
    got = np.zeros_like(wanted)
    got[anchors, neighbors] = scores
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    assert len(anchors) == (wanted > 0).sum()
    # The list's order: by anchor, then score falling, then index.
    assert np.lexsort((neighbors, -scores, anchors)).tolist() == list(range(len(anchors)))


def test_the_first_k_of_the_full_lists() -> None:
    user, item = likes(2)
    full = np.stack(swing_lists(user, item, N_ITEMS, top_k=N_ITEMS), axis=1)
    wanted = np.concatenate([full[full[:, 0] == i][:3] for i in range(N_ITEMS)])
    # N_USERS witnesses are enough for the kernel's search, which full lists never take.
    np.testing.assert_allclose(np.stack(swing_lists(user, item, N_ITEMS, top_k=3), axis=1), wanted, rtol=1e-9)


def test_users_are_paired_by_swapping() -> None:
    user, item = likes(3)
    user = (user - 3) // 7
    wanted = by_definition(item, user, N_USERS, "yang")
    anchors, neighbors, scores = swing_lists(item, user, N_USERS, top_k=N_USERS)
    got = np.zeros_like(wanted)
    got[anchors, neighbors] = scores
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_nothing_shared_gives_no_rows() -> None:
    anchors, neighbors, scores = swing_lists([1, 2, 3], [0, 1, 2], 3)
    assert len(anchors) == len(neighbors) == len(scores) == 0
    assert len(swing_lists([], [], 3)[0]) == 0


@pytest.mark.parametrize(
    ("user", "item", "more", "message"),
    [
        ([1, 2], [0], {}, "2 users and 1 items"),
        ([1, 2], [0, 3], {}, r"item 3 \(1 such rows\): accepted are 0 to 2"),
        ([1, -2], [0, 1], {}, r"user -2"),
        ([0.5, 1.0], [0, 1], {}, "float64"),
        ([1, 2], [0, 1], {"top_k": 0}, "top_k is 0"),
    ],
)
def test_refused(user: list[float], item: list[int], more: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        swing_lists(user, item, 3, **more)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: kellmrec, yang"):
        swing_lists([1], [0], 1, preset="wrong")
