"""`impl="torch"`: the operators of `ops` on top of the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kellm_kernels import reference
from kellm_kernels.problem import AdapterWeights, Contrast, Rows, Vectors, WeightGrads, wide, wide_dtype


def contrast(vectors: Vectors, problem: Contrast, *, keep: bool, hidden: int = 0) -> tuple[Tensor, Rows]:
    """The loss, () or (B,), and what `contrast_backward` needs; the same whatever `keep` and `hidden` say."""
    with torch.autocast(vectors.anchor.device.type, enabled=False):
        own, log_rest = reference.contrast_forward(*vectors, problem)
        over = log_rest - reference.own_logits(own, problem)
        loss = torch.logaddexp(torch.zeros_like(over), over).mean(0)
        inverse = own.new_ones(())
        if problem.reduction == "mean":
            total = own.new_full((), len(own))
            if problem.sample_weight is not None:
                total = problem.sample_weight.to(own.dtype).sum()
            inverse = torch.where(total == 0, 0, total.reciprocal())
        if problem.sample_weight is not None:
            loss = loss * problem.sample_weight.to(loss.dtype)
        if problem.reduction != "none":
            loss = loss.sum() * inverse
        return loss, _rows(own, log_rest, inverse)


def empty_rows(vectors: Vectors, *, symmetric: bool, keep: bool, hidden: int = 0) -> Rows:
    """`Rows` of the right shapes, unfilled."""
    count = vectors.anchor.shape[0]
    own = vectors.anchor.new_empty(count, dtype=wide_dtype(vectors.anchor.dtype))
    return _rows(own, own.new_empty(2 if symmetric else 1, count), own.new_empty(()))


def empty_half(z: Tensor, count: int, *, wanted: bool) -> Tensor:
    """None: nothing here is computed in float16."""
    return z.new_empty(0, dtype=torch.float16)


def contrast_backward(
    grad: Tensor, vectors: Vectors, problem: Contrast, rows: Rows, *, want_temperature: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of anchors, positives, negatives and, where wanted, temperature, in their dtypes."""
    dtype = vectors.anchor.dtype
    with torch.autocast(vectors.anchor.device.type, enabled=False):
        d_anchor, d_positive, d_negatives, d_temperature = _loss_grads(grad, vectors, problem, rows)
        return (
            d_anchor.to(dtype),
            d_positive.to(dtype),
            None if d_negatives is None else d_negatives.to(dtype),
            d_temperature if want_temperature else None,
        )


def adapt(
    towers: Sequence[Tensor], weights: AdapterWeights, *, keep: bool, halve: bool = False
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Embeddings of each tower; lengths before normalisation (ΣR,); if kept, the hidden layer (ΣR, H); nothing (0,)."""
    rows = sum(len(x) for x in towers)
    with torch.autocast(towers[0].device.type, enabled=False):
        hidden = towers[0].new_empty((rows if keep else 0, len(weights.w1)), dtype=weights.dtype)
        norm = towers[0].new_empty(rows, dtype=wide_dtype(weights.dtype))
        embeddings, start = [], 0
        for x in towers:
            mine = slice(start, start + len(x))
            z, norm[mine] = reference.adapter_forward(x, weights, hidden[mine] if keep else None)
            embeddings.append(z)
            start = mine.stop
        return embeddings, norm, hidden, empty_half(hidden, rows, wanted=halve)


def adapt_backward(
    grad_z: Tensor, x: Tensor, z: Tensor, norm: Tensor, hidden: Tensor, weights: AdapterWeights, *, want_x: bool
) -> tuple[Tensor | None, WeightGrads]:
    """Gradients of x, where wanted, and of w1, b1, w2, b2, in their dtypes."""
    (d_x,), d_weights = _towers_backward([wide(grad_z)], [x], [z], norm, hidden, weights, [want_x])
    return d_x, d_weights


def adapt_contrast_backward(
    grad: Tensor | None,
    grad_z: Tensor | None,
    grad_z_pos: Tensor | None,
    towers: Sequence[Tensor],
    vectors: Vectors,
    norm: Tensor,
    hidden: Tensor,
    half: Tensor,
    weights: AdapterWeights,
    problem: Contrast,
    rows: Rows,
    *,
    want_x: Sequence[bool],
    want_temperature: bool,
) -> tuple[list[Tensor | None], WeightGrads, Tensor | None]:
    """As `adapt_backward` for all towers, upstream being what reached the loss and what reached the embeddings."""
    embeddings = [z for z in vectors if z is not None]
    with torch.autocast(vectors.anchor.device.type, enabled=False):
        if grad is None:
            totals, d_temperature = [torch.zeros_like(wide(z)) for z in embeddings], rows.own.new_zeros(())
        else:
            *d_vectors, d_temperature = _loss_grads(grad, vectors, problem, rows)
            totals = [d_z for d_z in d_vectors if d_z is not None]
        for total, upstream in zip(totals, (grad_z, grad_z_pos), strict=False):
            if upstream is not None:
                total += upstream
    d_towers, d_weights = _towers_backward(totals, towers, embeddings, norm, hidden, weights, want_x)
    return d_towers, d_weights, d_temperature if want_temperature else None


def _loss_grads(
    grad: Tensor, vectors: Vectors, problem: Contrast, rows: Rows
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    grad_rows = (grad * rows.inverse_weight).to(rows.own.dtype).expand(len(rows.own))
    if problem.sample_weight is not None:
        grad_rows = grad_rows * problem.sample_weight
    return reference.contrast_backward(grad_rows, *vectors, rows.own, rows.log_rest, problem)


def _towers_backward(
    grads: Sequence[Tensor],
    towers: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    norm: Tensor,
    hidden: Tensor,
    weights: AdapterWeights,
    want_x: Sequence[bool],
) -> tuple[list[Tensor | None], WeightGrads]:
    with torch.autocast(norm.device.type, enabled=False):
        d_towers, start = [], 0
        totals = [torch.zeros_like(wide(weight)) for weight in weights[:4]]
        for grad, x, z, want in zip(grads, towers, embeddings, want_x, strict=True):
            mine = slice(start, start + len(x))
            saved = (z, norm[mine], hidden[mine])
            d_towers.append(reference.adapter_backward(grad, x, *saved, weights, totals, want_x=want))
            start = mine.stop
        w1, b1, w2, b2 = (total.to(weight.dtype) for total, weight in zip(totals, weights[:4], strict=True))
        return d_towers, (w1, b1, w2, b2)


def _rows(own: Tensor, log_rest: Tensor, inverse_weight: Tensor) -> Rows:
    pull, log_factor, largest, means, parts = (own.new_empty(0) for _ in range(5))
    return Rows(own, log_rest, pull, log_factor, largest, inverse_weight, means, parts)
