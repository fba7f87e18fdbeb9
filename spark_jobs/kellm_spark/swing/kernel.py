"""The arithmetic of SWING: the best neighbours of one target from the rows of its witnesses.

With A_U the 0/1 rows of the witnesses U of target i and C = A_U·A_Uᵀ,

    G = w·wᵀ / (α + C), its diagonal 0,      s(i,j) = ½·x_jᵀ·G·x_j,  x_j the column of j in A_U,

which is the sum over unordered pairs u < v. Two ways to it, both in float64:

- `_walk`: a row of C, then of G, then its part of every score, by walking the columns' short lists. No state but a row.
- `_search`: all of G, then scores in the order of an upper bound, until the next bound is below the k-th score. With
  g = G·1/√(1ᵀG1), the best guess of rank one, and E = G − g·gᵀ,

      2·s(i,j) = x_jᵀ·G·x_j <= (gᵀx_j)² + Σ_{u: x_uj = 1} (Σ_{v≠u} max(E_uv, 0) − g_u²),

  which takes one walk over the rows for all j. A few hundred of thousands of neighbours are left to score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kellm_spark.swing.compiled import njit, popcount
from kellm_spark.swing.graph import Float, Graph, Int, Int32

SEARCH_MIN_WITNESSES = 64
"""Below, the walk ends before the search has set up."""
SEARCH_DENSITY = 8.0
"""The search pays where Σ_j c_j² exceeds this many times |U|², c_j the witnesses that i and j share."""
BIT_SHARE = 0.02
"""Columns that this share of the witnesses has are counted as bits, 64 a word, the rest along their lists."""
MATRIX_SHARE = 0.2
"""Columns that this share has are scored by matrix product, the rest along their lists."""
TILE_ROWS = 96
"""Rows of G in one product: fewer make slow products, more multiply more of the half of G that is zero."""
SIGNIFICANT_DIGITS = 12
"""Scores are rounded so that sums that are equal but were added in another order tie, and rank by id."""
SLACK = 1e-9
"""Bounds are widened by this part, far above their rounding errors and far below what would cost time."""


@dataclass(frozen=True)
class Neighbors:
    """The best neighbours of some targets, by target and rank."""

    targets: Int32
    neighbors: Int32
    scores: Float
    common: Int32
    ranks: Int32


def best_neighbors(graph: Graph, first: int, last: int, *, alpha: float, top_k: int) -> Neighbors:
    """The `top_k` neighbours with score > 0 of graph.targets[first:last].

    Args:
        graph: rows, weights and witnesses.
        first: place of the first target.
        last: place behind the last.
        alpha: α >= 0 of the denominator.
        top_k: neighbours kept a target; equal scores are ordered by column index.

    Returns:
        Column indices, scores (12 significant digits), witnesses in common, ranks from 1.
    """
    parts = list(_each(graph, first, last, alpha, top_k))
    if not parts:
        none = np.zeros(0, dtype=np.int32)
        return Neighbors(none, none, np.zeros(0), none, none)
    return Neighbors(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def warm_up() -> None:
    """Compile all of the above, or load it from Numba's cache, with a graph that goes both ways."""
    rows, columns = 2 * SEARCH_MIN_WITNESSES, 4 * int(SEARCH_DENSITY)
    everyone = np.arange(rows, dtype=np.int32)
    graph = Graph(
        indptr=np.arange(0, rows * columns + 1, columns),
        columns=np.tile(np.arange(columns, dtype=np.int32), rows),
        weights=np.ones(rows),
        targets=np.array([0, 1], dtype=np.int32),
        target_indptr=np.array([0, rows, rows + 2]),
        target_rows=np.concatenate([everyone, everyone[:2]]),
        scales=np.ones(2),
        n_columns=columns,
    )
    best_neighbors(graph, 0, 2, alpha=1.0, top_k=1)


def _each(
    graph: Graph, first: int, last: int, alpha: float, top_k: int
) -> Iterator[tuple[Int32, Int32, Float, Int32, Int32]]:
    slot = np.full(graph.n_columns, -1, dtype=np.int32)  # column -> its place among this target's neighbours
    for t in range(first, last):
        rows = graph.target_rows[graph.target_indptr[t] : graph.target_indptr[t + 1]]
        if len(rows) < 2:
            continue
        target = graph.targets[t]
        seen, counts, squares = _neighborhood(graph.indptr, graph.columns, rows, target, slot)
        if not len(seen):
            continue
        d = len(rows)
        if d >= SEARCH_MIN_WITNESSES and len(seen) > top_k and squares > SEARCH_DENSITY * d * d:
            found, score = _search(graph, rows, seen, counts, slot, alpha, top_k)
        else:
            found = np.arange(len(seen))
            score = _walk(graph.indptr, graph.columns, graph.weights, rows, slot, counts, alpha)
        places, rounded = _top(score * graph.scales[t], seen[found], top_k)
        slot[seen] = -1
        n = len(places)
        best = found[places]
        yield np.full(n, target), seen[best], rounded, counts[best], np.arange(1, n + 1, dtype=np.int32)


def _search(
    graph: Graph, rows: Int32, seen: Int32, counts: Int32, slot: Int32, alpha: float, top_k: int
) -> tuple[Int, Float]:
    """Places in `seen` of all that may be among the best `top_k`, and their scores."""
    d, n = len(rows), len(seen)
    light = counts < BIT_SHARE * d
    n_bits = n - int(light.sum())
    place = np.empty(n, dtype=np.int32)  # bit columns first
    place[np.argsort(light, kind="stable")] = np.arange(n, dtype=np.int32)
    bits, list_indptr, list_rows, row_indptr, row_places = _layout(
        graph.indptr, graph.columns, rows, slot, place, counts, n_bits
    )
    G, sums = _pair_weights(bits, list_indptr, list_rows, row_indptr, row_places, graph.weights[rows], alpha)
    bound = _bounds(G, sums, graph.indptr, graph.columns, rows, slot, n)

    def score(places: Int) -> Float:
        dense = counts[places] >= MATRIX_SHARE * d
        matrix = np.zeros((d, int(dense.sum())))
        scores = _list_scores(G, bits, n_bits, list_indptr, list_rows, place[places], dense, matrix)
        for top in range(0, d if dense.any() else 0, TILE_ROWS):
            end = min(top + TILE_ROWS, d)
            scores[dense] += np.einsum("ij,ij->j", matrix[top:end], G[top:end, top:] @ matrix[top:])
        return scores

    guess = np.argpartition(bound, n - top_k)[n - top_k :]
    scores = score(guess)
    bar = scores.min() * (1 - SLACK)
    bound[guess] = -1.0
    rest = np.flatnonzero(bound >= bar)
    return np.concatenate([guess, rest]), np.concatenate([scores, score(rest)])


@njit()
def _neighborhood(indptr: Int, columns: Int32, rows: Int32, target: int, slot: Int32) -> tuple[Int32, Int32, float]:
    """Columns that two or more of these rows have, the target left out; how many have each; the sum of squares."""
    total = 0
    for u in rows:
        total += indptr[u + 1] - indptr[u]
    room = min(total, slot.shape[0])
    seen = np.empty(room, dtype=np.int32)
    count = np.empty(room, dtype=np.int32)
    n = 0
    for u in rows:
        for p in range(indptr[u], indptr[u + 1]):
            j = columns[p]
            s = slot[j]
            if s < 0:
                s = n
                slot[j] = n
                seen[n] = j
                count[n] = 0
                n += 1
            count[s] += 1
    squares = 0.0
    m = 0
    for s in range(n):
        j = seen[s]
        if count[s] >= 2 and j != target:
            seen[m] = j
            count[m] = count[s]
            slot[j] = m
            squares += float(count[s]) * count[s]
            m += 1
        else:
            slot[j] = -1
    return seen[:m].copy(), count[:m].copy(), squares


@njit(reorder_sums=True)
def _walk(indptr: Int, columns: Int32, weights: Float, rows: Int32, slot: Int32, counts: Int32, alpha: float) -> Float:
    """Scores of all neighbours along their lists of rows."""
    n = counts.shape[0]
    d = rows.shape[0]
    end = np.zeros(n + 1, dtype=np.int64)
    for s in range(n):
        end[s + 1] = end[s] + counts[s]
    lists = np.empty(end[n], dtype=np.int32)
    cursor = end[:-1].copy()
    for a in range(d):
        for p in range(indptr[rows[a]], indptr[rows[a] + 1]):
            s = slot[columns[p]]
            if s >= 0:
                lists[cursor[s]] = a
                cursor[s] += 1
    cursor[:] = end[:-1]
    score = np.zeros(n)
    mine = np.empty(n, dtype=np.int32)
    common = np.empty(d, dtype=np.int64)
    g = np.empty(d)
    w = weights[rows]
    for a in range(d):
        common[a:] = 0
        m = 0
        for p in range(indptr[rows[a]], indptr[rows[a] + 1]):
            s = slot[columns[p]]
            if s >= 0:
                mine[m] = s
                m += 1
                cursor[s] += 1  # past this row: only pairs u < v are met
                for q in range(cursor[s], end[s + 1]):
                    common[lists[q]] += 1
        _weigh_row(w[a], alpha, w[a + 1 :], common[a + 1 :], g[a + 1 :])
        for k in range(m):
            s = mine[k]
            total = 0.0
            for q in range(cursor[s], end[s + 1]):
                total += g[lists[q]]
            score[s] += total
    return score


@njit()
def _layout(
    indptr: Int, columns: Int32, rows: Int32, slot: Int32, place: Int32, counts: Int32, n_bits: int
) -> tuple[Int, Int, Int32, Int, Int32]:
    """The first `n_bits` places as bits (words, rows); the others as lists of rows, and as rows of places."""
    n = counts.shape[0]
    d = rows.shape[0]
    bits = np.zeros(((n_bits + 63) // 64, d), dtype=np.int64)
    list_indptr = np.zeros(n - n_bits + 1, dtype=np.int64)
    for k in range(n):
        if place[k] >= n_bits:
            list_indptr[place[k] - n_bits + 1] = counts[k]
    for s in range(n - n_bits):
        list_indptr[s + 1] += list_indptr[s]
    list_rows = np.empty(list_indptr[-1], dtype=np.int32)
    row_indptr = np.zeros(d + 1, dtype=np.int64)
    row_places = np.empty(list_indptr[-1], dtype=np.int32)
    cursor = list_indptr[:-1].copy()
    total = 0
    for a in range(d):
        for p in range(indptr[rows[a]], indptr[rows[a] + 1]):
            k = slot[columns[p]]
            if k < 0:
                continue
            s = place[k]
            if s < n_bits:
                bits[s >> 6, a] |= np.int64(1) << np.int64(s & 63)
            else:
                s -= n_bits
                list_rows[cursor[s]] = a
                cursor[s] += 1
                row_places[total] = s
                total += 1
        row_indptr[a + 1] = total
    return bits, list_indptr, list_rows, row_indptr, row_places


@njit()
def _pair_weights(
    bits: Int, list_indptr: Int, list_rows: Int32, row_indptr: Int, row_places: Int32, weights: Float, alpha: float
) -> tuple[Float, Float]:
    """G above the diagonal and 0 elsewhere, and the row sums of the whole of it."""
    d = weights.shape[0]
    words = bits.shape[0]
    G = np.zeros((d, d))
    sums = np.zeros(d)
    common = np.empty(d, dtype=np.int64)
    cursor = list_indptr[:-1].copy()
    for u in range(d):
        common[u:] = 0
        k = 0
        while k + 4 <= words:
            b0, b1, b2, b3 = bits[k], bits[k + 1], bits[k + 2], bits[k + 3]
            after = slice(u + 1, d)
            _count_4(b0[u], b1[u], b2[u], b3[u], b0[after], b1[after], b2[after], b3[after], common[after])
            k += 4
        while k < words:
            _count_1(bits[k, u], bits[k, u + 1 :], common[u + 1 :])
            k += 1
        for p in range(row_indptr[u], row_indptr[u + 1]):
            s = row_places[p]
            cursor[s] += 1
            for q in range(cursor[s], list_indptr[s + 1]):
                common[list_rows[q]] += 1
        _weigh_row(weights[u], alpha, weights[u + 1 :], common[u + 1 :], G[u, u + 1 :])
        sums[u] += _add_row(G[u, u + 1 :], sums[u + 1 :])
    return G, sums


# The loops below are functions of their own because only as such does LLVM make vector code of them.


@njit()
def _count_4(w0: int, w1: int, w2: int, w3: int, b0: Int, b1: Int, b2: Int, b3: Int, common: Int) -> None:
    for v in range(common.shape[0]):
        common[v] += popcount(w0 & b0[v]) + popcount(w1 & b1[v]) + popcount(w2 & b2[v]) + popcount(w3 & b3[v])


@njit()
def _count_1(word: int, bits: Int, common: Int) -> None:
    for v in range(common.shape[0]):
        common[v] += popcount(word & bits[v])


@njit()
def _weigh_row(w: float, alpha: float, weights: Float, common: Int, row: Float) -> None:
    for v in range(row.shape[0]):
        # Both have the target, which the counts leave out: hence the 1.
        row[v] = w * weights[v] / (alpha + 1.0 + common[v])


@njit(reorder_sums=True)
def _add_row(row: Float, sums: Float) -> float:
    total = 0.0
    for v in range(row.shape[0]):
        sums[v] += row[v]
        total += row[v]
    return total


@njit(reorder_sums=True)
def _excess(gu: float, g: Float, row: Float, above: Float) -> float:
    total = 0.0
    for v in range(row.shape[0]):
        e = max(row[v] - gu * g[v], 0.0)
        above[v] += e
        total += e
    return total


@njit()
def _bounds(G: Float, sums: Float, indptr: Int, columns: Int32, rows: Int32, slot: Int32, n: int) -> Float:
    """An upper bound of every neighbour's score (the module's docstring has the formula)."""
    d = sums.shape[0]
    g = sums / np.sqrt(sums.sum())
    above = np.zeros(d)  # Σ_v max(E_uv, 0)
    for u in range(d):
        above[u] += _excess(g[u], g[u + 1 :], G[u, u + 1 :], above[u + 1 :])
    linear = np.zeros(n)
    rest = np.zeros(n)
    for a in range(d):
        x = g[a]
        y = above[a] - x * x
        for p in range(indptr[rows[a]], indptr[rows[a] + 1]):
            s = slot[columns[p]]
            if s >= 0:
                linear[s] += x
                rest[s] += y
    return 0.5 * (linear * linear + rest) * (1.0 + SLACK)


@njit(reorder_sums=True)
def _gather(row: Float, places: Int32) -> float:
    total = 0.0
    for q in range(places.shape[0]):
        total += row[places[q]]
    return total


@njit()
def _list_scores(
    G: Float,
    bits: Int,
    n_bits: int,
    list_indptr: Int,
    list_rows: Int32,
    places: Int32,
    dense: npt.NDArray[np.bool_],
    matrix: Float,
) -> Float:
    """Scores of the columns that are not dense; those that are go into the matrix, for products with G."""
    d = G.shape[0]
    score = np.zeros(places.shape[0])
    members = np.empty(d, dtype=np.int32)
    m = 0
    for i in range(places.shape[0]):
        s = places[i]
        c = 0
        if s < n_bits:
            mask = np.int64(1) << np.int64(s & 63)
            word = bits[s >> 6]
            for v in range(d):
                if word[v] & mask:
                    members[c] = v
                    c += 1
        else:
            for q in range(list_indptr[s - n_bits], list_indptr[s - n_bits + 1]):
                members[c] = list_rows[q]
                c += 1
        if dense[i]:
            for q in range(c):
                matrix[members[q], m] = 1.0
            m += 1
        else:
            total = 0.0
            for q in range(c - 1):
                total += _gather(G[members[q]], members[q + 1 : c])
            score[i] = total
    return score


def _top(score: Float, columns: Int32, top_k: int) -> tuple[Int, Float]:
    """Places of the `top_k` best positive scores, best first, ties by column, and these scores, rounded."""
    places = np.flatnonzero(score > 0)
    if len(places) > 2 * top_k:
        # A hair lower than the k-th best, so that all that will tie with it after rounding is kept.
        bar = np.partition(score[places], len(places) - top_k)[len(places) - top_k]
        places = places[score[places] >= bar * (1 - SLACK)]
    if not len(places):
        return places, score[places]
    raw = score[places]
    factor = 10.0 ** (SIGNIFICANT_DIGITS - 1 - np.floor(np.log10(raw)))
    rounded = np.round(raw * factor) / factor
    ranked = np.lexsort((columns[places], -rounded))[:top_k]
    return places[ranked], rounded[ranked]
