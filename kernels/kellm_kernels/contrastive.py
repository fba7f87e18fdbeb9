"""InfoNCE over in-batch negatives: the public function checks its arguments and dispatches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kellm_kernels._dispatch import check_impl
from kellm_kernels.reference import info_nce_rows

REDUCTIONS = ("mean", "sum", "none")


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    *,
    temperature: float = 0.03,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss of each anchor's positive against the other anchors' positives.

    Equals, in eager PyTorch, without ever holding its (B, B) tensors::

        logits = anchor @ positive.T / temperature
        own = torch.eye(B, dtype=torch.bool)
        masked = (
            (anchor_ids[:, None] == anchor_ids)        # the same anchor: its positive is one of mine too
            | (positive_ids[:, None] == positive_ids)  # my own positive once more
            | (anchor_ids[:, None] == positive_ids)    # the anchor itself
        ) & ~own
        logits = logits.masked_fill(masked, -inf)
        loss = F.cross_entropy(logits, torch.arange(B), reduction=reduction)

    Without `anchor_ids` or `positive_ids` the comparisons that need them fall away. Vectors are taken as they are: no
    normalisation. The own positive is kept out of the streamed sum of the negatives,
    loss_i = log1p(r⁻_i / e_ii), so that losses are never negative and gradients keep their digits where the positive
    outweighs everything else. Accumulation is in float32 (float64 for float64 input).

    Args:
        anchor: (B, E) floating, any device.
        positive: (B, E), same dtype and device; row i is the positive of anchor i.
        temperature: > 0; similarities are divided by it.
        anchor_ids: (B,) integers, in one id space with `positive_ids`.
        positive_ids: (B,) integers.
        reduction: `mean` over rows, `sum` (KELLMRec's Eq. 3 as a sum over the batch) or `none`.
        impl: `auto` or `torch`.

    Returns:
        float32 (float64 for float64 input): a scalar, or (B,) for `none`.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
    """
    check_impl(impl)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; accepted: {', '.join(map(repr, REDUCTIONS))}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: expected a finite number above 0")
    _check_vectors(anchor, positive)
    for name, ids in (("anchor_ids", anchor_ids), ("positive_ids", positive_ids)):
        _check_ids(name, ids, anchor)
    rows = info_nce_rows(anchor, positive, temperature, anchor_ids, positive_ids)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.mean()


def _check_vectors(anchor: Tensor, positive: Tensor) -> None:
    if anchor.dim() != 2 or anchor.shape != positive.shape or anchor.shape[0] == 0:
        raise ValueError(
            f"anchor {tuple(anchor.shape)} and positive {tuple(positive.shape)}: expected the same (B, E), B at least 1"
        )
    if not anchor.is_floating_point() or anchor.dtype != positive.dtype:
        raise TypeError(f"anchor is {anchor.dtype} and positive {positive.dtype}: expected one floating dtype")
    if anchor.device != positive.device:
        raise ValueError(f"anchor is on {anchor.device} and positive on {positive.device}: expected one device")


def _check_ids(name: str, ids: Tensor | None, anchor: Tensor) -> None:
    if ids is None:
        return
    if ids.shape != anchor.shape[:1]:
        raise ValueError(f"{name} {tuple(ids.shape)}: expected ({anchor.shape[0]},), one id for each row")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} is {ids.dtype}: expected an integer dtype")
    if ids.device != anchor.device:
        raise ValueError(f"{name} is on {ids.device} and anchor on {anchor.device}: expected one device")
