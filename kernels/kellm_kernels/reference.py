"""The adapter and InfoNCE in PyTorch: the reference for every other implementation, on any device and in float64 too.

Rows are anchors q_i, columns are the positives k_j followed by the shared negatives, s_ij = q_i·k_j / τ (− log q_j),
and e_ij = exp(s_ij) where the column is not masked, else 0. For row i, whose own column is i:

    r⁻_i   = Σ_{j≠i} e_ij                                  streamed; kept as its logarithm
    loss_i = log1p(r⁻_i / e_ii) = log(1 + exp(log r⁻_i − s_ii))
    p_ij   = e_ij / (r⁻_i + e_ii),   1 − p_ii = r⁻_i / (r⁻_i + e_ii)
    dq_i   = g_i/τ [ Σ_{j≠i} p_ij k_j − (1 − p_ii) k_i ]
    dk_j   = 1/τ [ Σ_{i≠j} g_i p_ij q_i − g_j (1 − p_jj) q_j ]
    dτ     = −1/τ Σ_i q_i·dq_i

The usual form Σ_j p_ij k_j − k_i subtracts two nearly equal vectors once p_ii is near 1; here the own positive never
enters the sum, so nothing cancels. s_ii comes from a row dot of its own. The symmetric loss has a second softmax over
the same similarities, down each column; its weights are added to the first's before either product.

Similarities live in blocks of rows and are computed again in backward. Beside inputs and outputs stay: the gradients in
float32, a few numbers a row, three blocks, and the adapter's hidden layer before its activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kellm_kernels.problem import MIN_NORM, AdapterWeights, Contrast, wide, wide_dtype

# Similarities at a time. On a CPU 2 MiB of float32: near a core's L2, and small beside 16·B·E bytes from B = 16,384 on.
# Elsewhere 16 MiB, so that launches are worth their while.
_BLOCK_ELEMENTS_CPU = 1 << 19
_BLOCK_ELEMENTS = 1 << 22
_MIN_BLOCK_ROWS = 16  # a matrix product of fewer rows reads the columns for too little work

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}


def contrast_forward(
    anchor: Tensor, positive: Tensor, negatives: Tensor | None, contrast: Contrast, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Own similarity q_i·k_i (B,) and log r⁻ (directions, B), float32 or float64; one direction, or two if symmetric.

    Args:
        anchor: (B, E).
        positive: (P, E).
        negatives: (N, E).
        contrast: the rest.
        block_rows: rows computed at once; None takes what a block holds.
    """
    q, own = wide(anchor), own_similarity(anchor, positive, contrast.start)
    segments = _segments(positive, negatives, contrast)
    log_rest = own.new_full((2 if contrast.symmetric else 1, len(q)), -torch.inf)
    for rows in _row_blocks(q, segments, block_rows):
        for segment in segments:
            logits = _similarities(q, rows, segment, contrast)
            if contrast.symmetric and segment.own is not None:
                second = _within_margin(logits, own, contrast)
                log_rest[1] = torch.logaddexp(log_rest[1], torch.logsumexp(second, dim=0))
            logits = _within_margin(logits, own[rows, None], contrast)
            if segment.log_q is not None:
                logits -= segment.log_q
            log_rest[0, rows] = torch.logaddexp(log_rest[0, rows], torch.logsumexp(logits, dim=1))
    return own, log_rest


def contrast_backward(
    grad_rows: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    own: Tensor,
    log_rest: Tensor,
    contrast: Contrast,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of anchors (B, E), positives (P, E), negatives (N, E) and temperature (), float32 or float64.

    Args:
        grad_rows: (B,) upstream gradient of each row's loss.
        anchor: (B, E).
        positive: (P, E).
        negatives: (N, E).
        own: (B,), from `contrast_forward`.
        log_rest: (directions, B), from `contrast_forward`.
        contrast: as in `contrast_forward`.
        block_rows: as in `contrast_forward`.
    """
    q = wide(anchor)
    segments = _segments(positive, negatives, contrast)
    # A symmetric row's loss is the mean of its two directions.
    scale = grad_rows.to(q.dtype) / contrast.temperature / len(log_rest)
    log_all = torch.logaddexp(own_logits(own, contrast), log_rest)
    pull = (scale * torch.exp(log_rest - log_all)).sum(0)[:, None]
    mine = slice(contrast.start, contrast.start + len(q))
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # whatever layout the vectors have
    grad_q.copy_(segments[0].columns[mine]).mul_(-pull)
    grads = [torch.zeros_like(segment.columns) for segment in segments]
    grads[0][mine] = -pull * q
    for rows in _row_blocks(q, segments, block_rows):
        for segment, grad in zip(segments, grads, strict=True):
            weights = _weights(q, own, log_all, scale, rows, segment, contrast)
            grad_q[rows].addmm_(weights, segment.columns)
            grad.addmm_(weights.T, q[rows])
            del weights  # before the next block is made
    grad_temperature = -torch.dot(q.reshape(-1), grad_q.view(-1)) / contrast.temperature
    return grad_q, grads[0], grads[1] if negatives is not None else None, grad_temperature


def _weights(
    q: Tensor, own: Tensor, log_all: Tensor, scale: Tensor, rows: slice, segment: _Segment, contrast: Contrast
) -> Tensor:
    """Gradient of some rows' similarities with a segment's columns, the own one left out, (rows, M)."""
    logits = _similarities(q, rows, segment, contrast)
    second = None
    if contrast.symmetric and segment.own is not None:
        second = (_within_margin(logits, own, contrast) - log_all[1]).exp_().mul_(scale)
    logits = _within_margin(logits, own[rows, None], contrast)
    if segment.log_q is not None:
        logits -= segment.log_q
    weights = logits.sub_(log_all[0, rows, None]).exp_().mul_(scale[rows, None])
    return weights if second is None else weights.add_(second)


def own_similarity(anchor: Tensor, positive: Tensor, start: int) -> Tensor:
    """q_i·k_i, (B,), float32 or float64."""
    mine = wide(positive[start : start + len(anchor)])
    own: Tensor = torch.linalg.vecdot(wide(anchor), mine)
    return own


def own_logits(own: Tensor, contrast: Contrast) -> Tensor:
    """Each row's own logit, (directions, B): log q is of the columns' items, so the second direction has none."""
    logits = own / contrast.temperature
    first = logits
    if contrast.log_q is not None:
        first = logits - contrast.log_q[contrast.start : contrast.start + len(own)].to(own.dtype)
    return torch.stack([first, logits]) if contrast.symmetric else first[None]


def adapter_forward(x: Tensor, weights: AdapterWeights, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings (R, E) in the products' dtype, and their lengths before normalisation, (R,) float32 or float64.

    Args:
        x: (R, D).
        weights: the adapter.
        hidden: (R, H) to be filled with W1·x + b1, for backward.
    """
    w1, b1, w2, b2 = (weight.to(weights.dtype) for weight in weights[:4])
    z = x.new_empty(len(x), len(w2), dtype=weights.dtype)
    norm = x.new_empty(len(x), dtype=wide_dtype(weights.dtype))
    for rows in _chunks(x, len(w1)):
        before = functional.linear(x[rows].to(weights.dtype), w1, b1)
        if hidden is not None:
            hidden[rows] = before
        y = wide(functional.linear(ACTIVATIONS[weights.activation](before), w2, b2))
        norm[rows] = torch.linalg.vector_norm(y, dim=1).clamp_min_(MIN_NORM)
        z[rows] = y / norm[rows, None] if weights.normalize else y
    return z, norm


def adapter_backward(
    grad_z: Tensor,
    x: Tensor,
    z: Tensor,
    norm: Tensor,
    hidden: Tensor,
    weights: AdapterWeights,
    totals: Sequence[Tensor],
    *,
    want_x: bool,
) -> Tensor | None:
    """Add the gradients of w1, b1, w2 and b2 to `totals`; the gradient of x (R, D), where wanted, is returned.

    Args:
        grad_z: (R, E) upstream, float32 or float64.
        x: (R, D).
        z: (R, E), from `adapter_forward`.
        norm: (R,), from `adapter_forward`.
        hidden: (R, H), as `adapter_forward` filled it.
        weights: the adapter.
        totals: four tensors like the weights, float32 or float64.
        want_x: compute the gradient of x.
    """
    w1, w2 = wide(weights.w1), wide(weights.w2)
    grad_x = torch.empty_like(x) if want_x else None
    for rows in _chunks(x, len(w1)):
        grad_y = grad_z[rows]
        if weights.normalize:
            unit = wide(z[rows])
            # Where the length was clamped, z is y / MIN_NORM: no length to differentiate.
            along = torch.linalg.vecdot(unit, grad_y).masked_fill_(norm[rows] <= MIN_NORM, 0)
            grad_y = torch.addcmul(grad_y, unit, along[:, None], value=-1).div_(norm[rows, None])
        before = wide(hidden[rows])
        grad_hidden = grad_y @ w2
        if weights.activation == "gelu":
            grad_before = torch.ops.aten.gelu_backward(grad_hidden, before)
        else:
            grad_before = grad_hidden.masked_fill_(before <= 0, 0)
        totals[0].addmm_(grad_before.T, wide(x[rows]))
        totals[1].add_(grad_before.sum(0))
        totals[2].addmm_(grad_y.T, ACTIVATIONS[weights.activation](before))
        totals[3].add_(grad_y.sum(0))
        if grad_x is not None:
            grad_x[rows] = grad_before @ w1
    return grad_x


class _Segment(NamedTuple):
    """Columns of one kind, (M, E), and what is known of each: all wide or integers."""

    columns: Tensor
    ids: Tensor | None
    log_q: Tensor | None
    own: int | None
    """The own column of row 0; None for negatives, which belong to no anchor."""


def _segments(positive: Tensor, negatives: Tensor | None, contrast: Contrast) -> list[_Segment]:
    k = wide(positive)
    log_q = None if contrast.log_q is None else contrast.log_q.to(k.dtype)
    segments = [_Segment(k, contrast.positive_ids, None if log_q is None else log_q[: len(k)], contrast.start)]
    if negatives is not None:
        rest = None if log_q is None or len(log_q) == len(k) else log_q[len(k) :]
        segments.append(_Segment(wide(negatives), contrast.negative_ids, rest, None))
    return segments


def _row_blocks(q: Tensor, segments: list[_Segment], block_rows: int | None) -> Iterator[slice]:
    return _chunks(q, max(len(segment.columns) for segment in segments), block_rows)


def _chunks(tensor: Tensor, width: int, rows: int | None = None) -> Iterator[slice]:
    """Runs of the tensor's rows, such that (rows, width) is a block."""
    elements = _BLOCK_ELEMENTS_CPU if tensor.device.type == "cpu" else _BLOCK_ELEMENTS
    step = rows or max(_MIN_BLOCK_ROWS, elements // width)
    return (slice(start, min(start + step, len(tensor))) for start in range(0, len(tensor), step))


def _similarities(q: Tensor, rows: slice, segment: _Segment, contrast: Contrast) -> Tensor:
    """q·k / τ of some rows with a segment's columns, (rows, M); −∞ at the own column and where ids mask."""
    scaled = (q[rows] / contrast.temperature) @ segment.columns.T
    mine = slice(contrast.start + rows.start, contrast.start + rows.stop)
    if contrast.anchor_ids is not None and segment.own is not None:
        scaled.masked_fill_(contrast.anchor_ids[mine, None] == contrast.anchor_ids, -torch.inf)
    if segment.ids is not None:
        for ids in (contrast.anchor_ids, contrast.positive_ids):
            if ids is not None:
                scaled.masked_fill_(ids[mine, None] == segment.ids, -torch.inf)
    if segment.own is not None:
        scaled.diagonal(segment.own + rows.start).fill_(-torch.inf)
    return scaled


def _within_margin(scaled: Tensor, own: Tensor, contrast: Contrast) -> Tensor:
    """−∞ where a similarity exceeds the own one, (rows, 1) or (columns,), by more than the margin."""
    if contrast.margin is None:
        return scaled
    return scaled.masked_fill(scaled > (own + contrast.margin) / contrast.temperature, -torch.inf)
