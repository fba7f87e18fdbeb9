"""SWING's double sum, written out in plain Python and float64, and the random graphs it is tried on."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Row = tuple[Any, Any, float, int, int]
"""anchor, neighbor, score, common, rank"""


def brute_force(
    pairs: set[tuple[Any, Any]], alpha: float, alpha1: float, beta: float
) -> dict[tuple[Any, Any], tuple[float, int]]:
    """(i, j) -> (score, witnesses in common) of (witness, target) pairs, from the definition."""
    of_witness: dict[Any, set[Any]] = defaultdict(set)
    of_target: dict[Any, set[Any]] = defaultdict(set)
    for witness, target in pairs:
        of_witness[witness].add(target)
        of_target[target].add(witness)
    w = {u: (alpha1 + len(items)) ** -beta for u, items in of_witness.items()}
    found = {}
    for i, j in itertools.permutations(of_target, 2):
        both = sorted(of_target[i] & of_target[j])
        score = sum(
            w[u] * w[v] / (alpha + len(of_witness[u] & of_witness[v])) for u, v in itertools.combinations(both, 2)
        )
        if score > 0:
            found[i, j] = (score, len(both))
    return found


def top(scores: dict[tuple[Any, Any], tuple[float, int]], k: int) -> list[Row]:
    """The best k of each anchor, sorted by anchor and rank; equal to 12 digits is equal."""
    by_anchor: dict[Any, list[tuple[float, Any, int]]] = defaultdict(list)
    for (i, j), (score, common) in scores.items():
        by_anchor[i].append((-float(f"{score:.11e}"), j, common))
    return [
        (i, j, -negative, common, rank)
        for i in sorted(by_anchor)
        for rank, (negative, j, common) in enumerate(sorted(by_anchor[i])[:k], 1)
    ]


def in_order(found: Iterable[Any]) -> list[Row]:
    """Rows as tuples, sorted by anchor and rank."""
    return sorted((tuple(row) for row in found), key=lambda row: (row[0], row[4]))


def assert_same(got: list[Row], wanted: list[Row]) -> None:
    assert [(g[0], g[1], g[3], g[4]) for g in got] == [(w[0], w[1], w[3], w[4]) for w in wanted]
    assert [g[2] for g in got] == pytest.approx([w[2] for w in wanted], rel=1e-9)


def graph(seed: int, users: int, items: int, share: float) -> list[tuple[int, int]]:
    """A random bipartite graph, ids with gaps, popular items first."""
    draw = random.Random(seed)
    return [
        (u * 7 + 3, i * 11 - 5)
        for u in range(users)
        for i in range(items)
        if draw.random() < share * 2 / (1 + 4 * i / items)
    ]


def dense_scores(
    A: npt.NDArray[np.float64],
    alpha: float,
    alpha1: float,
    beta: float,
    targets: Iterable[int] | None = None,
) -> dict[tuple[int, int], tuple[float, int]]:
    """As `brute_force` from a 0/1 matrix of witnesses and targets, by products of matrices: for wider graphs."""
    w = (alpha1 + A.sum(axis=1)) ** -beta
    G = np.outer(w, w) / (alpha + A @ A.T)
    np.fill_diagonal(G, 0)
    found = {}
    for i in range(A.shape[1]) if targets is None else targets:
        mine = A[:, i] > 0
        common = A[mine].sum(axis=0)
        scores = 0.5 * (A[mine] * (G[np.ix_(mine, mine)] @ A[mine])).sum(axis=0)
        found |= {(i, int(j)): (scores[j], int(common[j])) for j in np.flatnonzero(common > 1) if j != i}
    return found
