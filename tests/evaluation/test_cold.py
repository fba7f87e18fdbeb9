"""Cold retrieval: truths and metrics against hand-worked and brute-force values, and what may be seen by whom."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kellm_features.errors import DataError
from kellm_features.evaluation.cold import (
    TRUTHS,
    ColdRetrieval,
    ColdSplit,
    Truth,
    cold_retrieval,
    cosine,
    judge,
    knn_transfer,
    ridge_transfer,
    same_for_all,
    standardized,
    tune,
    with_degree,
)
from kellm_features.evaluation.cold_training import (
    RetrievalTraining,
    item_facts,
    noise,
    random_pairs,
    shuffled_rows,
    train_retrieval,
)

N_ITEMS, N_USERS, TASTES, K = 120, 150, 4, 5
N_TRAIN = 130
"""Users below train; the others' likes are held out."""
SMALL = RetrievalTraining(hidden=32, dim=8, dropout=0.1, steps=40)


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likes of users and items of four tastes, and encodings that tell an item's taste with noise."""
    draw = np.random.default_rng(seed)
    taste_of_item, taste_of_user = np.arange(N_ITEMS) % TASTES, np.arange(N_USERS) % TASTES
    liked = np.where(taste_of_user[:, None] == taste_of_item[None], 0.5, 0.03) > draw.random((N_USERS, N_ITEMS))
    encodings = np.eye(16)[taste_of_item] * 2 + 0.5 * draw.standard_normal((N_ITEMS, 16)) + 3
    return *np.nonzero(liked), encodings.astype(np.float32)


@pytest.fixture(scope="module")
def setup() -> tuple[ColdRetrieval, np.ndarray]:
    user, item, encodings = world(0)
    return cold_retrieval(user, item, user < N_TRAIN, split(), k=K), encodings


def split() -> ColdSplit:
    """36 items are cold, half of them for validation."""
    drawn = np.random.default_rng(1).permutation(N_ITEMS)
    return ColdSplit(np.sort(drawn[:18]), np.sort(drawn[18:36]), N_ITEMS)


def by_definition(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """SWING of the yang preset, as the sum over pairs of users that it is."""
    of = {int(u): set(item[user == u].tolist()) for u in np.unique(user)}
    scores = np.zeros((N_ITEMS, N_ITEMS))
    for u, v in itertools.combinations(of, 2):
        common = of[u] & of[v]
        for i, j in itertools.permutations(common, 2):
            scores[i, j] += len(of[u]) ** -0.5 * len(of[v]) ** -0.5 / (1 + len(common))
    return scores


def by_hand() -> ColdRetrieval:
    """Six items: 4 is cold for validation, 5 for test, 0 is never anybody's neighbour; k = 3."""
    truth = {
        "raw": Truth(
            np.array([[-1] * 3, [2, -1, -1], [1, -1, -1], [1, -1, -1], [1, 2, -1], [3, 1, 2]]),
            np.array([0, 1, 1, 1, 2, 3]),
        ),
        "normalized": Truth(
            np.array([[-1] * 3, [2, -1, -1], [1, -1, -1], [1, -1, -1], [3, 2, -1], [4, -1, -1]]),
            np.array([0, 1, 1, 1, 2, 1]),
        ),
    }
    swing = np.zeros((6, 6), np.float32)
    swing[1, 2] = swing[2, 1] = 3
    swing[1, 3] = swing[3, 1] = 1
    split = ColdSplit(np.array([4]), np.array([5]), 6)
    return ColdRetrieval(split, swing, np.array([1, 9, 5, 2, 0, 0]), np.array([0, 2, 1, 1, 0, 0]), truth, 3)


def test_recall_and_ndcg_by_hand() -> None:
    # Item 5 names 1, 0, 3 (itself, the best score of all, is no candidate); its raw neighbours are 3, 1, 2.
    scores = np.array([[0.8, 0.9, 0.1, 0.7, 0.2, 1.0]])
    found = judge(by_hand(), np.array([5]), scores)
    assert found.recall["raw"] == pytest.approx([2 / 3])
    assert found.ndcg["raw"] == pytest.approx([(1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3) + 1 / np.log2(4))])
    assert found.recall["normalized"] == pytest.approx([0])
    assert found.mean_recall("normalized") == 0


def test_short_lists_are_judged_by_what_they_hold_and_empty_ones_not_at_all() -> None:
    scores = np.array([[0.0, 0.1, 0.2, 0.9, 0.8, 0.3], [1.0] * 6])
    found = judge(by_hand(), np.array([4, 0]), scores)  # item 4 names 3, 5, 2
    assert found.recall["raw"][0] == pytest.approx(1 / 2)
    assert found.recall["normalized"][0] == 1
    assert found.ndcg["normalized"][0] == pytest.approx((1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)))
    assert np.isnan(found.recall["raw"][1])
    assert np.isnan(found.ndcg["raw"][1])
    assert found.mean_recall("raw") == pytest.approx(1 / 2)


def test_truth_and_train_lists_are_the_definition(setup) -> None:
    task, _ = setup
    user, item, _ = world(0)
    everything, warm = by_definition(user, item), task.split.warm
    likes = np.bincount(item, minlength=N_ITEMS)
    kept = warm[item] & (user < N_TRAIN)
    np.testing.assert_allclose(task.swing, by_definition(user[kept], item[kept]), rtol=1e-5)
    for name, scores in (("raw", everything), ("normalized", everything / (likes + 10))):
        wanted = [sorted(range(N_ITEMS), key=lambda j: (-row[j], j))[:K] for row in scores.round(9)]
        assert task.truth[name].neighbors.tolist() == wanted
        assert (task.truth[name].sizes == K).all()
    named = [j for i in np.flatnonzero(warm) for j in np.argsort(-task.swing[i], kind="stable")[:K]]
    assert task.in_degree.tolist() == np.bincount(named, minlength=N_ITEMS).tolist()
    assert task.degree.tolist() == np.bincount(item[kept], minlength=N_ITEMS).tolist()


def test_what_trains_knows_nothing_of_cold_items_and_held_out_users(setup) -> None:
    task, encodings = setup
    cold = ~task.split.warm
    assert not task.swing[cold].any()
    assert not task.swing[:, cold].any()
    assert not task.degree[cold].any()
    assert not task.in_degree[cold].any()
    # Other likes of cold items, or of users who are held out, change neither what trains nor the adapter: the truth.
    user, item, _ = world(0)
    for seen in (task.split.warm[item], user < N_TRAIN):
        kept = seen | (np.arange(len(item)) % 3 > 0)
        other = cold_retrieval(user[kept], item[kept], user[kept] < N_TRAIN, task.split, k=K)
        assert (other.truth["raw"].neighbors != task.truth["raw"].neighbors).any()
        for name in ("swing", "degree", "in_degree"):
            np.testing.assert_array_equal(getattr(other, name), getattr(task, name))
    changed = encodings.copy()
    changed[cold] += 100
    a, b = (train_retrieval(task, x, SMALL, seed=3).state_dict() for x in (encodings, changed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_perfect_scorer_gives_one_and_noise_chance(setup) -> None:
    task, _ = setup
    user, item, _ = world(0)
    test = task.split.test
    scores = by_definition(user, item)
    best = judge(task, test, scores[test])
    assert best.recall["raw"].tolist() == best.ndcg["raw"].tolist() == [1] * len(test)
    likes = np.bincount(item, minlength=N_ITEMS)
    assert judge(task, test, scores[test] / (likes + 10)).recall["normalized"].tolist() == [1] * len(test)
    everyone = np.arange(N_ITEMS)
    chance = judge(task, everyone, np.random.default_rng(5).random((N_ITEMS, N_ITEMS)))
    # 600 draws, each true with probability K / (N − 1): a standard error of 0.008.
    assert chance.mean_recall("raw") == pytest.approx(K / (N_ITEMS - 1), abs=0.03)


def test_the_weight_is_chosen_without_the_test_items(setup) -> None:
    task, encodings = setup
    asked = []

    def scorer(items: np.ndarray) -> np.ndarray:
        asked.append(items)
        return cosine(encodings, items)

    tuned = tune(task, scorer, task.log_in_degree)
    np.testing.assert_array_equal(np.concatenate(asked), task.split.valid)
    neighbors = {name: truth.neighbors.copy() for name, truth in task.truth.items()}
    for name in neighbors:
        neighbors[name][task.split.test] = 0
    spoiled = replace(task, truth={name: Truth(neighbors[name], task.truth[name].sizes) for name in TRUTHS})
    assert tune(spoiled, scorer, task.log_in_degree) == tuned


def test_popularity_names_the_most_liked_for_everyone(setup) -> None:
    task, _ = setup
    test = task.split.test
    found = judge(task, test, same_for_all(test, task.degree)).recall["raw"]
    liked = set(np.argsort(-task.degree, kind="stable")[:K].tolist())
    assert found.tolist() == [len(liked & set(task.truth["raw"].neighbors[i].tolist())) / K for i in test]


def test_tune_takes_the_best_weight_of_those_tried() -> None:
    task = by_hand()
    # Item 4's raw neighbours are 1 and 2, its normalised ones 3 and 2.
    scores = np.array([[0.9, 0.0, 0.1, 0.5, 0.0, 0.3]])
    degree = np.array([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])

    def recall(weight: float) -> tuple[float, float]:
        found = judge(task, np.array([4]), with_degree(scores, degree, weight))
        return found.recall["raw"][0], found.recall["normalized"][0]

    assert [recall(w) for w in (0.0, 0.35, 1.0)] == [(0, 0.5), (0.5, 1), (1, 0.5)]
    weights = (0.0, 0.35, 1.0)
    assert tune(task, lambda _: scores, degree, truths=["raw"], weights=weights) == 1
    assert tune(task, lambda _: scores, degree, truths=["normalized"], weights=weights) == 0.35
    # For both, 0.35 gives 0.5 / 1 + 1 / 1, and 1.0 gives 1 / 1 + 0.5 / 1: the first of equals.
    assert tune(task, lambda _: scores, degree, weights=weights) == 0.35


def test_knn_transfer_by_hand() -> None:
    task = by_hand()
    vectors = np.array([[-1, 0], [1, 0], [0.6, 0.8], [0, 1], [0, -1], [2, 0]])
    # Nearest of item 5 are 1 (cosine 1; its row's shares 3/4 on 2, 1/4 on 3) and 2 (cosine 0.6; all on 1).
    found = knn_transfer(task, vectors, np.array([5]), k=2)
    np.testing.assert_allclose(found, [[0, 0.6, 0.75, 0.25, 0, 0]], atol=1e-12)


def test_ridge_transfer_is_the_regression(setup) -> None:
    from sklearn.kernel_ridge import KernelRidge

    task, encodings = setup
    known = np.flatnonzero(task.swing.any(axis=1))
    unit = encodings.astype(np.float64) / np.linalg.norm(encodings.astype(np.float64), axis=1, keepdims=True)
    roots = np.sqrt(task.swing[known] / task.swing[known].sum(axis=1, keepdims=True))
    # exp(γ(cos − 1)) is a Gaussian of width γ/2, as |a − b|² = 2 − 2·cos.
    peer = KernelRidge(alpha=0.5, kernel="rbf", gamma=1.5).fit(unit[known], roots - roots.mean(0))
    wanted = 2 * np.log(np.maximum(peer.predict(unit[task.split.test]) + roots.mean(0), 1e-4))
    np.testing.assert_allclose(
        ridge_transfer(task, encodings, task.split.test, sharpness=3.0, ridge=0.5), wanted, atol=1e-4
    )


def test_standardized_by_warm_items_alone(setup) -> None:
    task, encodings = setup
    encodings = np.concatenate([encodings, np.full((N_ITEMS, 1), 7, np.float32)], axis=1)
    encodings[task.split.test] += 100
    found = standardized(task, encodings)
    warm = found[task.split.warm]
    np.testing.assert_allclose(warm.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(warm[:, :-1].std(axis=0), 1)
    assert (warm[:, -1] == 0).all()
    assert (found[task.split.test] > 10).all()


def test_training_finds_what_the_text_tells_and_controls_do_not(setup) -> None:
    task, encodings = setup
    cold = np.flatnonzero(~task.split.warm)

    def recall(x: np.ndarray, **more: np.ndarray) -> float:
        adapter = train_retrieval(task, x, SMALL, seed=0, **more)
        with torch.inference_mode():
            vectors = adapter(torch.from_numpy(x)).numpy()
        assert vectors.shape == (N_ITEMS, 8)
        return judge(task, cold, cosine(vectors, cold)).mean_recall("normalized")

    trained = recall(encodings)
    # A taste has 30 items: whoever knows the taste and no more names 5 of 29; whoever knows nothing, 5 of 119.
    assert trained > 0.12
    for control in (noise(encodings, seed=1), shuffled_rows(encodings, seed=1)):
        assert recall(control) < 0.6 * trained
    assert recall(encodings, targets=random_pairs(task, seed=1)) < 0.8 * trained


def test_training_repeats(setup) -> None:
    task, encodings = setup
    a, b, c = (train_retrieval(task, encodings, SMALL, seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["output.weight"], c["output.weight"])


def test_random_pairs_keep_each_row_s_scores_among_warm_items(setup) -> None:
    task, _ = setup
    drawn = random_pairs(task, seed=2)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.sort(task.swing, axis=1))
    assert not drawn[:, ~task.split.warm].any()
    assert not np.diag(drawn).any()
    assert (drawn != task.swing).any()


def test_facts_tell_near_years_and_genres() -> None:
    facts = item_facts([1995, 1996, 1930, None], [["Drama"], ["Comedy", "Drama"], [], ["Comedy"]])
    assert facts.shape == (4, 14 + 2)
    assert facts[:, -2:].tolist() == [[0, 1], [1, 1], [0, 0], [1, 0]]
    assert facts[0, 9] == 1  # 1995 is one of the centers
    near, far = facts[0, :14] @ facts[1, :14], facts[0, :14] @ facts[2, :14]
    assert near > 10 * far
    assert not facts[3, :14].any()


def test_refused(setup) -> None:
    task, encodings = setup
    with pytest.raises(DataError, match="in validation and in test"):
        cold_retrieval([0], [0], [True], ColdSplit(np.array([1]), np.array([1]), 3))
    with pytest.raises(DataError, match=r"shape \(1, 3\); accepted: \(1, 120\)"):
        judge(task, np.array([0]), np.zeros((1, 3)))
    with pytest.raises(DataError, match="1 rows of scores hold NaN"):
        judge(task, np.array([0]), np.full((1, N_ITEMS), np.nan))
    with pytest.raises(DataError, match="7 encodings are given for 120 items"):
        train_retrieval(task, encodings[:7], SMALL, seed=0)
    empty = replace(task, swing=np.zeros_like(task.swing))
    with pytest.raises(DataError, match="to train on"):
        train_retrieval(empty, encodings, SMALL, seed=0)
    with pytest.raises(DataError, match="to transfer"):
        ridge_transfer(empty, encodings, task.split.test)
    nobody = {name: replace(truth, sizes=np.zeros_like(truth.sizes)) for name, truth in task.truth.items()}
    with pytest.raises(DataError, match="no validation item"):
        tune(replace(task, truth=nobody), lambda items: cosine(encodings, items), task.log_degree)
