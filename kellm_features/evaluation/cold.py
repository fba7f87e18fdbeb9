"""Retrieval for cold items: the true SWING neighbours of items that had no interaction when everything was trained.

A share of the items is drawn and all their interactions are hidden, as are those of users who are held out. What is
left trains; the likes of all users then tell which neighbours each cold item really has. Scorers give every cold item
a score for every other item of the catalogue, and are judged by the neighbours among their best k.

SWING scores grow with popularity, so a list of hubs retrieves much by itself. Hence two truths: `raw`, the neighbours
by score, and `normalized`, by score / (likes + 10), where popularity tells little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kellm_features.errors import DataError
from kellm_features.evaluation.swing import Float, Int, swing_lists

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

TRUTHS = ("raw", "normalized")
SMOOTHING = 10.0
"""Likes added to those of a neighbour where scores are divided by them: below, single users rule the lists."""
LAMBDAS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Weights of a degree term that `tune` tries beside cosines: these are at most 1, log degrees of MovieLens-1M 8."""
LOG_WEIGHTS = (-1.0, -0.9, -0.8, -0.7, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0)
"""The same beside log shares: 0 ranks by the raw score, −1 by the normalised one."""
LEAST_ROOT = 1e-4
"""Roots of shares are no smaller: predictions may be negative, and those for cold candidates are 0."""

LEAST_DEVIATION = 1e-6
"""Below, a dimension never varies and says nothing: its scale is left alone."""


@dataclass(frozen=True)
class ColdSplit:
    """Which items are cold. Indices ascend."""

    valid: Int
    """Cold items to choose settings by."""
    test: Int
    """Cold items to report."""
    n_items: int

    @property
    def warm(self) -> Bool:
        """(N,) True where an item keeps its interactions."""
        warm = np.ones(self.n_items, dtype=np.bool_)
        warm[self.valid] = warm[self.test] = False
        return warm


@dataclass(frozen=True)
class Truth:
    """The best neighbours of each item, as two (N, k) arrays."""

    neighbors: Int
    """Best first, −1 where the list has ended."""
    sizes: Int
    """(N,) neighbours of each, k at most."""


@dataclass(frozen=True)
class ColdRetrieval:
    """What scorers may see of the warm items, and what the cold ones are judged by.

    Dense (N, N) float32: 60 MB for MovieLens-1M. Scorers read `swing`, `degree` and `in_degree`, which know of no
    interaction of a cold item or of a user who is held out; `truth` is for `judge`, and of all likes.
    """

    split: ColdSplit
    swing: Float32
    """(N, N) SWING scores among warm items; rows and columns of cold items are 0."""
    degree: Int
    """(N,) train users' likes of warm items, 0 for cold ones."""
    in_degree: Int
    """(N,) times that an item stands in the best k of a warm item's list."""
    truth: Mapping[str, Truth]
    """By the names in `TRUTHS`."""
    k: int

    @property
    def log_degree(self) -> Float:
        """(N,) log(likes + 10)."""
        smoothed: Float = np.log(self.degree + SMOOTHING)
        return smoothed

    @property
    def log_in_degree(self) -> Float:
        """(N,) log(in-degree + 1)."""
        smoothed: Float = np.log1p(self.in_degree.astype(np.float64))
        return smoothed


def cold_retrieval(
    user: npt.ArrayLike,
    item: npt.ArrayLike,
    trains: npt.ArrayLike,
    split: ColdSplit,
    *,
    preset: str = "yang",
    k: int = 20,
) -> ColdRetrieval:
    """Set the task up: the truth from all likes, what trains from train users' likes of warm items.

    Args:
        user: (R,) integers, of each like.
        item: (R,) indices below `split.n_items`.
        trains: (R,) bool, whether the like is of a train user.
        split: which items are cold.
        preset: of SWING, for the truth and for what trains.
        k: neighbours that count as true, and that a scorer may name.

    Raises:
        ConfigError: no such preset.
        DataError: see `swing_lists`; a cold item is out of range or stands in both parts.
        MissingExtraError: Numba is not installed.
    """
    n_items, warm = split.n_items, split.warm
    if int((~warm).sum()) != len(split.valid) + len(split.test):
        raise DataError("an item is cold in validation and in test: each cold item belongs to one of the two")
    users, items = np.asarray(user), np.asarray(item)
    scores = _dense(*swing_lists(users, items, n_items, preset=preset, top_k=n_items), n_items)
    likes = np.bincount(items, minlength=n_items)
    truth = {
        "raw": _best(scores, k),
        "normalized": _best(scores / (likes + SMOOTHING), k),
    }
    kept = warm[items] & np.asarray(trains)
    swing = _dense(*swing_lists(users[kept], items[kept], n_items, preset=preset, top_k=n_items), n_items)
    named = _best(swing, k).neighbors
    return ColdRetrieval(
        split=split,
        swing=swing,
        degree=np.bincount(items[kept], minlength=n_items),
        in_degree=np.bincount(named[named >= 0], minlength=n_items),
        truth=truth,
        k=k,
    )


@dataclass(frozen=True)
class Retrieved:
    """How much of its true neighbours each item found, NaN for an item that has none: (Q,) arrays by truth."""

    recall: Mapping[str, Float]
    """Share of the true neighbours, k at most, that stand in the best k."""
    ndcg: Mapping[str, Float]
    """The same with places discounted by 1/log2(place + 1), over its best value."""

    def mean_recall(self, truth: str) -> float:
        """Over items with neighbours; NaN where no item has any."""
        values = self.recall[truth][~np.isnan(self.recall[truth])]
        return float(values.mean()) if len(values) else float("nan")


def judge(task: ColdRetrieval, items: Int, scores: npt.NDArray[np.floating]) -> Retrieved:
    """Judge what a scorer retrieves for `items` out of all items but each itself; equal scores rank by index.

    Args:
        task: holds the truth.
        items: (Q,) indices of cold items.
        scores: (Q, N), the greater the better.

    Raises:
        DataError: scores of another shape, or NaN among them.
    """
    if scores.shape != (len(items), task.split.n_items):
        raise DataError(f"scores have shape {scores.shape}; accepted: {(len(items), task.split.n_items)}")
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).any(axis=1).sum())} rows of scores hold NaN: numbers are accepted")
    named = _ranked(_without_self(scores, items), task.k)
    discounts = 1 / np.log2(np.arange(2, task.k + 2))
    recall, ndcg = {}, {}
    for name, truth in task.truth.items():
        wanted, sizes = truth.neighbors[items], truth.sizes[items]
        # −1 pads short lists and is never named.
        hits = (named[:, :, None] == wanted[:, None, :]).any(axis=2)
        with np.errstate(invalid="ignore"):
            recall[name] = hits.sum(axis=1) / np.where(sizes, sizes, np.nan)
            best = np.concatenate([[np.nan], np.cumsum(discounts)])[sizes]
            ndcg[name] = (hits * discounts[: hits.shape[1]]).sum(axis=1) / best
    return Retrieved(recall, ndcg)


def same_for_all(items: Int, scores: npt.NDArray[np.generic]) -> Float:
    """A list that does not depend on the item: `task.degree` is popularity, `task.in_degree` the hubs. (Q, N)."""
    return np.repeat(scores.astype(np.float64)[None], len(items), axis=0)


def cosine(vectors: npt.NDArray[np.floating], items: Int) -> Float:
    """Cosines of `items` with all items, (Q, N)."""
    unit = _unit(vectors)
    found: Float = unit[items] @ unit.T
    return found


def with_degree(scores: Float, degree: Float, weight: float) -> Float:
    """Scores plus `weight` times a number of each candidate, as `task.log_in_degree`: what serving can add too."""
    return scores + weight * degree[None]


def knn_transfer(task: ColdRetrieval, vectors: npt.NDArray[np.floating], items: Int, *, k: int = 40) -> Float:
    """The SWING rows of the k nearest warm items, each brought to sum 1, weighted by cosine: untrained. (Q, N).

    Warm items without neighbours count among the k. Rows as they are (without sum 1) retrieve less: the most popular
    of the k then rules.
    """
    near = cosine(vectors, items)
    near[:, ~task.split.warm] = -np.inf
    chosen = _ranked(near, k)
    weights = np.maximum(np.take_along_axis(near, chosen, axis=1), 0)
    found = np.zeros((len(items), task.split.n_items))
    shares = _shares(task.swing)
    for column in range(chosen.shape[1]):
        found += weights[:, column, None] * shares[chosen[:, column]]
    return found


def standardized(task: ColdRetrieval, vectors: npt.NDArray[np.floating]) -> Float:
    """Vectors with mean 0 and deviation 1 in each dimension over the warm items: none is ruled by a common mean."""
    wide = vectors.astype(np.float64)
    warm = wide[task.split.warm]
    deviation = warm.std(axis=0)
    found: Float = (wide - warm.mean(axis=0)) / np.where(deviation > LEAST_DEVIATION, deviation, 1)
    return found


def ridge_transfer(
    task: ColdRetrieval, vectors: npt.NDArray[np.floating], items: Int, *, sharpness: float = 2.0, ridge: float = 2.0
) -> Float:
    """Log shares of SWING rows, predicted by kernel ridge regression from warm items' vectors: (Q, N).

    The kernel is exp(sharpness · (cosine − 1)). What is regressed is the root of a row's shares: squared errors of the
    shares themselves would be ruled by the few neighbours that hold most of a row. Minus log(likes + 10), that is
    `with_degree(…, task.log_degree, -1)`, these are log shares of the normalised scores.

    Args:
        task: of which the warm SWING rows are read.
        vectors: (N, D) embeddings, or encodings, best `standardized`.
        items: (Q,) indices.
        sharpness: of the kernel, > 0.
        ridge: added to the kernel's diagonal, > 0.

    Raises:
        DataError: no warm item has a neighbour.
    """
    known = np.flatnonzero(task.swing.any(axis=1))
    if not len(known):
        raise DataError("no warm item has a neighbour to transfer: more likes are needed")
    rows = np.sqrt(_shares(task.swing[known]))
    mean = rows.mean(axis=0)
    unit = _unit(vectors)

    def kernel(a: Float, b: Float) -> Float:
        similar: Float = np.exp(sharpness * (a @ b.T - 1))
        return similar

    damped = kernel(unit[known], unit[known]) + ridge * np.eye(len(known))
    # Solved for Q right sides, the items; for the rows it would be N.
    weights = np.linalg.solve(damped, kernel(unit[known], unit[items])).T
    roots = mean + weights @ (rows - mean)
    found: Float = 2 * np.log(np.maximum(roots, LEAST_ROOT))
    return found


def tune(
    task: ColdRetrieval,
    scorer: Callable[[Int], Float],
    degree: Float,
    *,
    truths: Sequence[str] = TRUTHS,
    weights: Sequence[float] = LAMBDAS,
) -> float:
    """The weight of a degree term that validation items choose.

    The best mean recall wins, each truth's recall taken relative to the best that any weight gives it, so that the
    smaller numbers of `normalized` weigh as much. One weight for both truths is what one index can serve.

    Args:
        task: the task; its test items are not looked at.
        scorer: items (Q,) -> scores (Q, N).
        degree: (N,) what the weight multiplies.
        truths: which truths count.
        weights: tried in order; among equals the first wins.

    Raises:
        DataError: no validation item has a neighbour.
    """
    items = task.split.valid
    scores = scorer(items)
    tried = []
    for weight in weights:
        found = judge(task, items, with_degree(scores, degree, weight))
        tried.append({name: found.mean_recall(name) for name in task.truth})
    best = {name: max(recall[name] for recall in tried) or 1.0 for name in truths}
    if np.isnan(list(best.values())).any():
        raise DataError("no validation item has a neighbour to be judged by: draw more cold items")
    chosen = max(range(len(tried)), key=lambda at: sum(tried[at][name] / best[name] for name in truths))
    return weights[chosen]


def _dense(anchors: Int, neighbors: Int, scores: Float, n_items: int) -> Float32:
    matrix = np.zeros((n_items, n_items), dtype=np.float32)
    matrix[anchors, neighbors] = scores
    return matrix


def _best(scores: npt.NDArray[Any], k: int) -> Truth:
    """The k best scores above 0 of each row."""
    chosen = _ranked(scores, k)
    sizes = np.minimum((scores > 0).sum(axis=1), chosen.shape[1])
    return Truth(np.where(np.arange(chosen.shape[1]) < sizes[:, None], chosen, -1), sizes)


def _ranked(scores: npt.NDArray[Any], k: int) -> Int:
    """(Q, k) columns of the best scores, best first, equal ones by index."""
    order: Int = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)
    return order


def _without_self(scores: npt.NDArray[np.floating], items: Int) -> npt.NDArray[np.floating]:
    others = scores.astype(np.float64)
    others[np.arange(len(items)), items] = -np.inf
    return others


def _shares(swing: Float32) -> Float:
    """Rows brought to sum 1; rows of zeros stay."""
    wide = swing.astype(np.float64)
    total = wide.sum(axis=1, keepdims=True)
    found: Float = wide / np.where(total > 0, total, 1)
    return found


def _unit(vectors: npt.NDArray[np.floating]) -> Float:
    wide = vectors.astype(np.float64)
    found: Float = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return found
