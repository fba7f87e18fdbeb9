"""The local arithmetic of SWING: one block of anchors against the rows of all their witnesses.

With A_U the 0/1 rows of the witnesses U of anchor i and C = A_U·A_Uᵀ,

    G = w·wᵀ / (α + C), the part above the diagonal,      s(i, ·) = colsum(A_U ∘ (G·A_U))

which is the sum over unordered pairs u < v. Rows of G are made in tiles, so memory grows with |U| and not with
|U|². Neighbours shared by many of U go through BLAS; the long tail is walked along its short column lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

Float = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

TILE_ROWS = 256
"""Rows of G at a time: 256 x 20,000 witnesses are 40 MB."""
DENSE_SHARE = 0.2
"""A neighbour is dense when this share of the witnesses has it: where a multiply-add in BLAS beats a list step."""
DENSE_MIN_WITNESSES = 64
"""Below, the two matrix products cost more to call than they save."""
SIGNIFICANT_DIGITS = 12
"""Scores are rounded so that sums that are equal but were added in another order tie, and rank by id."""


@dataclass(frozen=True)
class Block:
    """Anchors and the whole rows of all their witnesses, in compressed sparse row form."""

    indptr: Int
    """Row u holds columns[indptr[u]:indptr[u + 1]]."""
    columns: Int
    """Neighbour index, ascending within a row."""
    weights: Float
    """w of each row."""
    n_columns: int
    anchors: Int
    """Column index of each anchor."""
    anchor_indptr: Int
    anchor_rows: Int
    """Anchor a has witnesses anchor_rows[anchor_indptr[a]:anchor_indptr[a + 1]], ascending."""


@dataclass(frozen=True)
class Neighbors:
    """The best neighbours of every anchor, by anchor and rank."""

    anchors: Int
    neighbors: Int
    scores: Float
    common: Int
    ranks: Int


def swing_block(block: Block, *, alpha: float, top_k: int) -> Neighbors:
    """The `top_k` neighbours of each anchor of a block, with score > 0.

    Args:
        block: anchors and witness rows; its order fixes the order of summation.
        alpha: α >= 0 of the denominator.
        top_k: neighbours kept an anchor; equal scores are ordered by column index.

    Returns:
        Column indices, scores in float64 (12 significant digits), witnesses in common, ranks from 1.
    """
    parts: list[tuple[Int, Int, Float, Int, Int]] = []
    slot = np.full(block.n_columns, -1, dtype=np.int64)  # column -> its place among this anchor's neighbours
    for a, anchor in enumerate(block.anchors):
        rows = block.anchor_rows[block.anchor_indptr[a] : block.anchor_indptr[a + 1]]
        if len(rows) < 2:
            continue
        seen, counts = _neighborhood(block.indptr, block.columns, rows, anchor, slot)
        score = _scores(block, rows, anchor, seen, counts, slot, alpha)
        slot[seen] = -1
        best, kept = _top(score, seen, top_k)
        size = len(best)
        parts.append((np.full(size, anchor), seen[best], kept, counts[best], np.arange(1, size + 1, dtype=np.int64)))
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Neighbors(none, none, np.zeros(0), none, none)
    return Neighbors(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _scores(block: Block, rows: Int, anchor: np.int64, seen: Int, counts: Int, slot: Int, alpha: float) -> Float:
    """s(anchor, ·) for the columns in `seen`."""
    d, n = len(rows), len(seen)
    dense = counts >= max(DENSE_SHARE * d, 2) if d >= DENSE_MIN_WITNESSES else np.zeros(n, dtype=np.bool_)
    n_dense = int(dense.sum())
    # Dense columns first: place < n_dense means "a column of the matrix", the rest have lists.
    order = np.argsort(~dense, kind="stable")
    slot[seen[order]] = np.arange(n)
    matrix = np.zeros((d, n_dense), dtype=np.float32)
    listed, list_indptr, list_rows = _split(
        block.indptr, block.columns, rows, anchor, slot, counts[order], n_dense, matrix
    )
    matrix64 = matrix.astype(np.float64)
    weights = block.weights[rows]
    score = np.zeros(n)
    cursor = list_indptr[:-1].copy()
    for first in range(0, d, TILE_ROWS):
        last = min(first + TILE_ROWS, d)
        # Counts below 2^24 are exact in float32.
        common = (
            matrix[first:last] @ matrix[first:].T if n_dense else np.zeros((last - first, d - first), dtype=np.float32)
        )
        G = np.empty(common.shape)
        _tile(
            listed[0],
            listed[1],
            list_rows,
            list_indptr,
            cursor,
            first,
            last,
            common,
            weights,
            alpha,
            G,
            score,
            n_dense,
        )
        if n_dense:
            score[:n_dense] += np.einsum("ij,ij->j", matrix64[first:last], G @ matrix64[first:])
    back = np.empty(n)
    back[order] = score
    return back


def _top(score: Float, columns: Int, top_k: int) -> tuple[Int, Float]:
    """Places of the `top_k` best positive scores, best first, ties by column, and these scores, rounded."""
    places = np.flatnonzero(score > 0)
    if len(places) > 2 * top_k:
        # A hair lower than the k-th best, so that all that will tie with it after rounding is kept.
        bar = np.partition(score[places], len(places) - top_k)[len(places) - top_k]
        places = places[score[places] >= bar * (1 - 1e-9)]
    if not len(places):
        return places, score[places]
    raw = score[places]
    factor = 10.0 ** (SIGNIFICANT_DIGITS - 1 - np.floor(np.log10(raw)))
    rounded = np.round(raw * factor) / factor
    ranked = np.lexsort((columns[places], -rounded))[:top_k]
    return places[ranked], rounded[ranked]


@njit(cache=True)
def _neighborhood(indptr: Int, columns: Int, rows: Int, anchor: np.int64, slot: Int) -> tuple[Int, Int]:
    """The columns of these rows but the anchor, ascending, and how many rows have each."""
    total = 0
    for u in rows:
        total += indptr[u + 1] - indptr[u]
    found = np.empty(total, dtype=np.int64)
    count = np.empty(total, dtype=np.int64)
    n = 0
    for u in rows:
        for p in range(indptr[u], indptr[u + 1]):
            j = columns[p]
            if j == anchor:
                continue
            if slot[j] < 0:
                slot[j] = n
                found[n] = j
                count[n] = 0
                n += 1
            count[slot[j]] += 1
    order = np.argsort(found[:n])
    return found[:n][order], count[:n][order]


@njit(cache=True)
def _split(
    indptr: Int,
    columns: Int,
    rows: Int,
    anchor: np.int64,
    slot: Int,
    counts: Int,
    n_dense: int,
    matrix: Float32,
) -> tuple[tuple[Int, Int], Int, Int32]:
    """Fill the dense matrix; return the tail as rows (indptr, slots) and as columns (indptr, local rows)."""
    n = counts.shape[0]
    list_indptr = np.zeros(n - n_dense + 1, dtype=np.int64)
    for s in range(n_dense, n):
        list_indptr[s - n_dense + 1] = list_indptr[s - n_dense] + counts[s]
    list_rows = np.empty(list_indptr[-1], dtype=np.int32)
    row_indptr = np.zeros(rows.shape[0] + 1, dtype=np.int64)
    row_slots = np.empty(list_indptr[-1], dtype=np.int64)
    fill = list_indptr[:-1].copy()
    total = 0
    for local in range(rows.shape[0]):
        u = rows[local]
        for p in range(indptr[u], indptr[u + 1]):
            j = columns[p]
            if j == anchor:
                continue
            s = slot[j]
            if s < n_dense:
                matrix[local, s] = 1.0
            else:
                list_rows[fill[s - n_dense]] = local
                fill[s - n_dense] += 1
                row_slots[total] = s - n_dense
                total += 1
        row_indptr[local + 1] = total
    return (row_indptr, row_slots), list_indptr, list_rows


@njit(cache=True)
def _tile(
    row_indptr: Int,
    row_slots: Int,
    list_rows: Int32,
    list_indptr: Int,
    cursor: Int,
    first: int,
    last: int,
    common: Float32,
    weights: Float,
    alpha: float,
    G: Float,
    score: Float,
    n_dense: int,
) -> None:
    """Finish C for rows first..last, turn it into G above the diagonal, add the tail's scores.

    `cursor` points behind the last row that was walked in each column list, so only pairs u < v are met.
    """
    start = cursor.copy()
    for u in range(first, last):
        for p in range(row_indptr[u], row_indptr[u + 1]):
            s = row_slots[p]
            start[s] += 1
            for q in range(start[s], list_indptr[s + 1]):
                common[u - first, list_rows[q] - first] += 1.0
    for u in range(first, last):
        w = weights[u]
        for v in range(first, u + 1):
            G[u - first, v - first] = 0.0
        for v in range(u + 1, weights.shape[0]):
            # Both have the anchor, which the rows here leave out: hence the 1.
            G[u - first, v - first] = w * weights[v] / (alpha + 1.0 + common[u - first, v - first])
    for u in range(first, last):
        for p in range(row_indptr[u], row_indptr[u + 1]):
            s = row_slots[p]
            cursor[s] += 1
            total = 0.0
            for q in range(cursor[s], list_indptr[s + 1]):
                total += G[u - first, list_rows[q] - first]
            score[n_dense + s] += total
