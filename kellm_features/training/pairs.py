"""Positives from SWING: each anchor's top-k neighbours, drawn in proportion to their scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kellm_features.errors import DataError
from kellm_features.schemas import PAIRS, read_table
from kellm_features.training.encodings import Ids, id_array, positions, shown

PRIOR_LIKES = 10.0
"""Likes added to a neighbour's own before its scores are divided by them: a neighbour with one like is no closer for
having few. The same ten as in the truth that cold retrieval is measured by."""


class PositiveSampler:
    """Draws one positive for an anchor, seeded by the caller's generator.

    P(j | i) = s(i, j) / Σ_{j' ∈ top_k(i)} s(i, j'): normalised within the anchor's list, so that every anchor weighs
    the same whatever the scale of its scores. A single top-1 partner (the paper's choice) collapses onto hubs: on
    MovieLens-100K one user serves 160 of 943.

    Scores are raw, or normalised by `degrees`: s(i, j) / (likes of j + 10), by which lists are ranked before they are
    cut and drawn from. SWING sums over pairs of common users, so a neighbour that many liked stands high in most lists.

    Args:
        anchors: (R,) indices below `count`.
        neighbors: (R,) indices below `count`.
        scores: (R,) finite, above 0.
        count: items or users in the catalogue.
        top_k: neighbours kept for each anchor, by score, ties by index.
        degrees: (count,) train likes of each, at least 0; None: raw scores.
    """

    def __init__(
        self,
        anchors: npt.NDArray[np.int64],
        neighbors: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
        count: int,
        top_k: int,
        degrees: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if degrees is not None:
            scores = scores / (degrees[neighbors] + PRIOR_LIKES)
        order = np.lexsort((neighbors, -scores, anchors))
        anchors, neighbors, scores = anchors[order], neighbors[order], scores[order]
        starts = np.searchsorted(anchors, np.arange(count))
        rank = np.arange(len(anchors)) - starts[anchors]
        kept = rank < top_k
        width = int(rank[kept].max(initial=0)) + 1
        candidates = np.full((count, width), -1, dtype=np.int64)
        weights = np.zeros((count, width))
        candidates[anchors[kept], rank[kept]] = neighbors[kept]
        weights[anchors[kept], rank[kept]] = scores[kept]
        total = weights.sum(axis=1, keepdims=True)
        self.candidates = torch.from_numpy(candidates)
        """(count, k) int64, best first, −1 where the list has ended."""
        self.sizes = (self.candidates >= 0).sum(1)
        """(count,) neighbours of each; 0: no positive."""
        self._cumulative = torch.from_numpy(np.cumsum(weights / np.where(total > 0, total, 1), axis=1))

    def sample(self, anchors: Tensor, generator: torch.Generator) -> Tensor:
        """One positive for each anchor, (B,) int64 on the CPU; −1 for an anchor that has none.

        Args:
            anchors: (B,) int64 on the CPU.
            generator: of the CPU.
        """
        draw = torch.rand(len(anchors), 1, generator=generator, dtype=torch.float64)
        column = (self._cumulative[anchors] <= draw).sum(1)
        last = (self.sizes[anchors] - 1).clamp_min(0)  # a sum that rounds to just below 1 must not run past the list
        return self.candidates[anchors, torch.minimum(column, last)]


def read_pairs(
    path: Path,
    ids: Ids,
    in_train: npt.NDArray[np.bool_],
    what: str,
    top_k: int,
    degrees: npt.NDArray[np.int64] | None = None,
) -> PositiveSampler:
    """Read SWING pairs into a sampler over catalogue indices.

    Args:
        path: `PAIRS`, a Parquet file or folder.
        ids: (N,) the catalogue.
        in_train: (N,) whether the id has train rows: pairs may stem from train rows alone.
        what: `item_id` or `user_id`, for messages.
        top_k: neighbours kept for each anchor.
        degrees: (N,) train likes of each id, to normalise scores by; None: raw scores.

    Raises:
        DataError: empty, ids that the catalogue or the train rows lack, self-pairs, repeated pairs, scores that are
            not above 0.
        SchemaError: a missing column or a wrong type.
    """
    table = read_table(path, PAIRS)
    if not table.num_rows:
        raise DataError(f"{path} holds no pairs: no two {what}s share enough train rows; see [swing] in kellm.toml")
    anchors, neighbors = (
        positions(ids, id_array(table.column(name)), what, str(path)) for name in ("anchor_id", "neighbor_id")
    )
    scores = table.column("score").to_numpy()
    if not (np.isfinite(scores) & (scores > 0)).all():
        bad = scores[~(np.isfinite(scores) & (scores > 0))]
        raise DataError(f"{path}: score {bad[0]} is seen ({len(bad)} such rows); finite scores above 0 are accepted")
    if (anchors == neighbors).any():
        raise DataError(f"{path}: {what} {shown(ids[anchors[anchors == neighbors][0]])} is paired with itself")
    keys = anchors * len(ids) + neighbors
    if len(np.unique(keys)) < len(keys):
        raise DataError(f"{path}: a pair stands more than once: run  kellm run --from swing")
    leaked = np.unique(np.concatenate([anchors, neighbors]))
    leaked = leaked[~in_train[leaked]]
    if len(leaked):
        raise DataError(
            f"{path}: {what} {shown(ids[leaked[0]])} has no train rows ({len(leaked)} such ids): the pairs were "
            "made from another split; run  kellm run --from swing"
        )
    return PositiveSampler(anchors, neighbors, scores, len(ids), top_k, degrees)
