"""How well cosine neighbours agree with SWING neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kellm_features.training.pairs import PositiveSampler

_BLOCK = 1024


def neighbor_recall(vectors: Tensor, truth: PositiveSampler, k: int = 10) -> float:
    """Mean recall@k of each anchor's k best SWING neighbours among its k cosine neighbours.

    Anchors without neighbours are left out; an anchor with fewer than k is judged by those it has. The pool is all N
    ids, the anchor itself excepted. On pairs that were trained on, this says how well they were learned, and nothing of
    unseen ones.

    Args:
        vectors: (N, E) floating, any scale, on the CPU.
        truth: neighbours over the same N ids.
        k: at most N − 1 neighbours are compared.

    Returns:
        A share from 0 to 1; NaN where no anchor has a neighbour.
    """
    unit = functional.normalize(vectors.float(), dim=1)
    anchors = torch.nonzero(truth.sizes > 0).squeeze(1)
    k = min(k, len(vectors) - 1)
    total = 0.0
    for block in torch.split(anchors, _BLOCK):
        cosine = unit[block] @ unit.T
        cosine[torch.arange(len(block)), block] = -torch.inf
        found = cosine.topk(k, dim=1).indices
        wanted = truth.candidates[block, :k]
        hits = ((wanted[:, :, None] == found[:, None, :]).any(2) & (wanted >= 0)).sum(1)
        total += float((hits / (wanted >= 0).sum(1)).sum())
    return total / len(anchors) if len(anchors) else float("nan")
