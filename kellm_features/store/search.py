"""Exact nearest-neighbour search over the vectors of one version, for Feast's document retrieval.

Every distance is computed, in float64: right for catalogues up to some hundred thousand items, and something to hold
an approximate index against. A version never changes, so that its index is built once and holds as long as it is
served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kellm_features.errors import StoreError

_ROWS = 4096
"""Rows turned to float64 at a time: 12 MB of 384-d vectors."""

Block = NDArray[np.float64]


def _cosine(rows: Block, query: Block) -> Block:
    with np.errstate(divide="ignore", invalid="ignore"):  # a vector of zeros has no direction: NaN
        similarity: Block = rows @ query / (np.linalg.norm(rows, axis=1) * np.linalg.norm(query))
    return 1.0 - similarity


def _euclidean(rows: Block, query: Block) -> Block:
    distances: Block = np.linalg.norm(rows - query, axis=1)
    return distances


def _negative_inner_product(rows: Block, query: Block) -> Block:
    products: Block = rows @ query
    return -products


METRICS: dict[str, Callable[[Block, Block], Block]] = {
    "cosine": _cosine,
    "L2": _euclidean,
    "inner_product": _negative_inner_product,
}
"""Feast's name of a metric -> distances (N,) of rows (N, E) from a query (E,), small is near, as in Feast's Postgres
store: 1 - cosine, the Euclidean distance (not squared), and the inner product with a minus."""


@dataclass(frozen=True)
class VectorIndex:
    """The vectors of one view in one version."""

    keys: Sequence[bytes]
    """N serialized entity keys."""
    vectors: NDArray[np.float32]
    """(N, E)."""

    def nearest(self, query: Sequence[float] | NDArray[Any], top_k: int, metric: str) -> tuple[list[int], Block]:
        """The rows nearest to a query, nearest first; of equally near ones the earlier row first.

        Args:
            query: E numbers.
            top_k: rows wanted; fewer come where there are fewer. Rows without a distance (a vector of zeros has no
                cosine) never come.
            metric: "cosine", "L2" or "inner_product".

        Returns:
            Places in `keys`, and their distances in float64.

        Raises:
            StoreError: the query is of another length, not finite, or all zeros under "cosine"; `top_k` is below 1;
                the metric is unknown.
        """
        measure = METRICS.get(metric)
        if measure is None:
            raise StoreError(f"distance_metric is {metric!r}; accepted: {', '.join(METRICS)}")
        if top_k < 1:
            raise StoreError(f"top_k is {top_k}; accepted: 1 or more")
        point = np.asarray(query, dtype=np.float64)
        dim = self.vectors.shape[1]
        if point.shape != (dim,):
            raise StoreError(f"the query is of shape {point.shape} and the vectors are of length {dim}: embed it alike")
        if not np.isfinite(point).all() or (metric == "cosine" and not point.any()):
            raise StoreError(f"the query holds {'NaN or infinity' if point.any() else 'zeros alone'}: embed it anew")
        blocks = (self.vectors[at : at + _ROWS].astype(np.float64) for at in range(0, len(self.vectors), _ROWS))
        distances = np.concatenate([measure(block, point) for block in blocks] or [np.zeros(0)])
        order = np.argsort(distances, kind="stable")[:top_k]  # NaN comes last
        order = order[~np.isnan(distances[order])]
        return order.tolist(), distances[order]
