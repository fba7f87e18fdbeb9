"""The bipartite graph of one side in compressed sparse row form, both ways, and its sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kellm_spark.swing.compiled import njit
from kellm_spark.swing.parameters import SwingParameters

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

SAMPLE_SEED = 42
"""Of the hash that draws the witnesses of a target over the cap."""


@dataclass(frozen=True)
class Graph:
    """Whole rows of witnesses, and for each target the witnesses to pair.

    Indices follow the order of ids, so sums are made in one order however rows arrived.
    """

    indptr: Int
    """Witness u has the targets columns[indptr[u]:indptr[u + 1]], ascending."""
    columns: Int32
    weights: Float
    """w of each witness."""
    targets: Int32
    """Column index of the targets to score, ascending."""
    target_indptr: Int
    """targets[t] is paired over the witnesses target_rows[target_indptr[t]:target_indptr[t + 1]], ascending."""
    target_rows: Int32
    scales: Float
    """What the scores of targets[t] are multiplied with: 1, or what sampling its witnesses took away."""
    n_columns: int

    def __post_init__(self) -> None:
        # Memory-mapped arrays are read-only, and to Numba that is another type: one type, one compilation.
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)


def encode(column: pa.ChunkedArray) -> tuple[pa.Array, Int32]:
    """Distinct values in ascending order, and each row's place among them."""
    encoded = column.dictionary_encode().unify_dictionaries()
    values = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], column.type)
    order = pc.sort_indices(values).to_numpy()
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    codes = [place[chunk.indices.to_numpy()] for chunk in encoded.chunks]
    return values.take(order), np.concatenate(codes) if codes else place


def weights(degrees: Int, parameters: SwingParameters) -> Float:
    """w_u = (alpha1 + |I_u|)^(-beta)."""
    base = parameters.alpha1 + degrees.astype(np.float64)
    # An id that the filters left without rows has no weight, nor a pair that would ask for it.
    return np.power(base, -parameters.beta, out=np.zeros_like(base), where=degrees > 0)


def scale(degree: Any, sampled: Any) -> Any:
    """Witness pairs of a target over those that its sample holds: makes the capped score unbiased."""
    degree, sampled = np.asarray(degree, dtype=np.float64), np.asarray(sampled, dtype=np.float64)
    full = sampled == degree
    pairs = np.where(full, 1.0, sampled * (sampled - 1))
    return np.where(full, 1.0, degree * (degree - 1) / pairs)


@njit()
def sorted_edges(first: Int32, second: Int32, n_first: int, n_second: int) -> tuple[Int32, Int32]:
    """Edges ordered by `first`, then `second`, without duplicates."""
    by_second, mates = _counting_sort(second, first, n_second)
    u, v = _counting_sort(mates, by_second, n_first)
    n = 0
    for e in range(u.shape[0]):
        if e == 0 or u[e] != u[e - 1] or v[e] != v[e - 1]:
            u[n] = u[e]
            v[n] = v[e]
            n += 1
    return u[:n], v[:n]


@njit()
def _counting_sort(keys: Int32, values: Int32, n_keys: int) -> tuple[Int32, Int32]:
    """Keys in 0..n_keys-1 in order, and their values, equal keys in the order they had."""
    start = np.zeros(n_keys + 1, dtype=np.int64)
    for key in keys:
        start[key + 1] += 1
    for key in range(n_keys):
        start[key + 1] += start[key]
    sorted_keys = np.empty_like(keys)
    sorted_values = np.empty_like(values)
    for e in range(keys.shape[0]):
        p = start[keys[e]]
        sorted_keys[p] = keys[e]
        sorted_values[p] = values[e]
        start[keys[e]] = p + 1
    return sorted_keys, sorted_values


@njit()
def sample_rows(indptr: Int, rows: Int32, target_keys: Int, witness_keys: Int, cap: int) -> tuple[Int, Int32]:
    """Of each target's witnesses the `cap` with the smallest hash, ascending: the same on every machine and night."""
    n = indptr.shape[0] - 1
    sampled = np.zeros(n + 1, dtype=np.int64)
    for t in range(n):
        sampled[t + 1] = sampled[t] + min(indptr[t + 1] - indptr[t], cap)
    kept = np.empty(sampled[n], dtype=np.int32)
    for t in range(n):
        mine = rows[indptr[t] : indptr[t + 1]]
        out = kept[sampled[t] : sampled[t + 1]]
        if mine.shape[0] <= cap:
            out[:] = mine
            continue
        key = spark_hash(target_keys[t], spark_hash(SAMPLE_SEED, 42))
        drawn = np.empty(mine.shape[0], dtype=np.int64)
        for i in range(mine.shape[0]):
            drawn[i] = spark_hash(witness_keys[mine[i]], key)
        bar = np.partition(drawn, cap - 1)[cap - 1]
        ties = cap - (drawn < bar).sum()  # equal hashes go to the smaller ids
        m = 0
        for i in range(mine.shape[0]):
            if drawn[i] < bar or (drawn[i] == bar and ties > 0):
                if drawn[i] == bar:
                    ties -= 1
                out[m] = mine[i]
                m += 1
    return sampled, kept


@njit()
def spark_hash(value: int, seed: int) -> int:
    """Spark's `xxhash64` of one bigint (XXH64 of eight bytes), signed; `seed` is the hash of what came before it."""
    prime1 = np.uint64(0x9E3779B185EBCA87)
    prime2 = np.uint64(0xC2B2AE3D27D4EB4F)
    prime3 = np.uint64(0x165667B19E3779F9)
    prime4 = np.uint64(0x85EBCA77C2B2AE63)
    prime5 = np.uint64(0x27D4EB2F165667C5)
    h = np.uint64(seed) + prime5 + np.uint64(8)
    k = np.uint64(value) * prime2
    h ^= ((k << np.uint64(31)) | (k >> np.uint64(33))) * prime1
    h = ((h << np.uint64(27)) | (h >> np.uint64(37))) * prime1 + prime4
    h ^= h >> np.uint64(33)
    h *= prime2
    h ^= h >> np.uint64(29)
    h *= prime3
    h ^= h >> np.uint64(32)
    return int(np.int64(h))
