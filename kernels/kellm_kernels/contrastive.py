"""InfoNCE over in-batch negatives: the public function checks its arguments and dispatches."""

from __future__ import annotations

import torch
from torch import Tensor

from kellm_kernels import ops
from kellm_kernels._checks import (
    REDUCTIONS,
    check_choice,
    check_constants,
    check_ids,
    check_margin,
    check_temperature,
    check_vectors,
)
from kellm_kernels._dispatch import choose_impl


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: Tensor | float = 0.03,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    sample_weight: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss of each anchor's positive against the other anchors' positives, and negatives that all share.

    Equals, in eager PyTorch, without ever holding its (B, B + N) tensors::

        columns, column_ids = cat([positive, negatives]), cat([positive_ids, negative_ids])
        similarity = anchor @ columns.T
        own = torch.eye(B, B + N, dtype=torch.bool)
        masked = (
            (anchor_ids[:, None] == cat([anchor_ids, nothing]))  # the same anchor: its positive is one of mine too
            | (positive_ids[:, None] == column_ids)              # my own positive once more
            | (anchor_ids[:, None] == column_ids)                # the anchor itself
            | (similarity > similarity.diagonal()[:, None] + margin)
        ) & ~own
        logits = (similarity / temperature - log_q).masked_fill(masked, -inf)
        rows = F.cross_entropy(logits, torch.arange(B), reduction="none")
        loss = (sample_weight * rows).sum() / sample_weight.sum()

    An option that is not given falls away, and comparisons that need ids that are not given do too. Vectors are taken
    as they are: no normalisation. The own positive is kept out of the streamed sum of the negatives,
    loss_i = log1p(r⁻_i / e_ii), so that losses are never negative and gradients keep their digits where the positive
    outweighs everything else. Accumulation is in float32 (float64 for float64 input), with or without autocast.

    Args:
        anchor: (B, E) floating, any device.
        positive: (B, E), same dtype and device; row i is the positive of anchor i.
        negatives: (N, E), same dtype and device: further columns for every anchor.
        temperature: > 0; similarities are divided by it. A tensor of one number may take a gradient.
        anchor_ids: (B,) integers; all ids are of one space.
        positive_ids: (B,) integers.
        negative_ids: (N,) integers.
        log_q: (B,) or (B + N,) floating, no gradient: logarithm of each column's chance to be drawn (logQ correction);
            (B,) leaves the negatives' logits as they are.
        sample_weight: (B,) floating, ≥ 0, no gradient: multiplies the rows; a mean divides by its sum (and is 0 where
            that is 0).
        margin: mask negatives whose similarity exceeds the own positive's by more than this.
        symmetric: the mean of this loss and of that of the other direction, where a row is a positive and the columns
            are the anchors. There is no `log_q` there (it is of the positives) and no `negatives`.
        reduction: `mean` over rows, `sum` (KELLMRec's Eq. 3 as a sum over the batch) or `none`.
        impl: `triton` (a GPU; E a multiple of 8, 512 at most), `torch` (anything), or `auto`: the first where it can.

    Returns:
        float32 (float64 for float64 input): a scalar, or (B,) for `none`.

    Raises:
        ValueError: shapes, devices, values or an impl that do not fit.
        TypeError: dtypes that do not fit.
    """
    check_vectors("anchor", anchor, "positive", positive, same_rows=True)
    return info_nce_shard(
        anchor,
        positive,
        negatives=negatives,
        temperature=temperature,
        anchor_ids=anchor_ids,
        positive_ids=positive_ids,
        negative_ids=negative_ids,
        log_q=log_q,
        sample_weight=sample_weight,
        margin=margin,
        symmetric=symmetric,
        reduction=reduction,
        impl=impl,
    )


def info_nce_shard(
    anchor: Tensor,
    positive: Tensor,
    *,
    start: int = 0,
    negatives: Tensor | None = None,
    temperature: Tensor | float = 0.03,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    sample_weight: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`info_nce` of some rows of a batch, all of whose P positives are columns: what one of several ranks computes.

    Args:
        anchor: (B, E): rows start to start + B of the batch.
        positive: (P, E), P ≥ start + B.
        start: the own column of the first row.
        negatives: as in `info_nce`; likewise what is not named here.
        temperature: likewise.
        anchor_ids: (P,), of the whole batch.
        positive_ids: (P,), of the whole batch.
        negative_ids: likewise.
        log_q: (P,) or (P + N,).
        sample_weight: (B,), of these rows.
        margin: likewise.
        symmetric: only where P = B.
        reduction: over these rows.
        impl: likewise.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_vectors("anchor", anchor, "positive", positive, same_rows=False)
    rows, columns = len(anchor), len(positive)
    if not 0 <= start <= columns - rows:
        raise ValueError(
            f"start={start}: expected 0 to {columns - rows}, {rows} anchors being among {columns} positives"
        )
    if symmetric and rows != columns:
        raise ValueError(
            f"symmetric=True with {rows} anchors and {columns} positives: the other direction wants all anchors"
        )
    negatives, extras = loss_extras(
        positive, negatives, anchor_ids, positive_ids, negative_ids, log_q, sample_weight, margin, rows=rows
    )
    learned, constant = check_temperature(temperature, anchor)
    chosen = choose_impl(impl, anchor.device, anchor.dtype, anchor.shape[1])
    keep = torch.is_grad_enabled() and any(
        given is not None and given.requires_grad for given in (anchor, positive, negatives, learned)
    )
    loss: Tensor = ops.run_contrast(
        anchor, positive, negatives, learned, *extras, constant, margin, symmetric, start, reduction, chosen, keep
    )[0]
    return loss


def loss_extras(
    positive: Tensor,
    negatives: Tensor | None,
    anchor_ids: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    log_q: Tensor | None,
    sample_weight: Tensor | None,
    margin: float | None,
    *,
    rows: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The loss's options checked against (P, ·) positives: negatives, None where there are none, and `ops`'s extras."""
    columns, further = len(positive), 0
    if negatives is None:
        if negative_ids is not None:
            raise ValueError(f"negative_ids {tuple(negative_ids.shape)} without negatives: pass both or neither")
    elif len(negatives):
        check_vectors("positive", positive, "negatives", negatives, same_rows=False)
        further = len(negatives)
        check_ids("negative_ids", negative_ids, further, positive)
    else:
        negatives = negative_ids = None
    if negative_ids is not None and anchor_ids is None and positive_ids is None:
        raise ValueError("negative_ids have nothing to be compared with: pass anchor_ids, positive_ids or both")
    check_ids("anchor_ids", anchor_ids, columns, positive)
    check_ids("positive_ids", positive_ids, columns, positive)
    check_constants("log_q", log_q, (columns, columns + further), positive)
    check_constants("sample_weight", sample_weight, (rows,), positive)
    check_margin(margin)
    return negatives, [anchor_ids, positive_ids, negative_ids, log_q, sample_weight]
