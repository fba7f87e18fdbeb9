"""`impl="triton"`: the operators of `ops` as launches, at most eight for forward and backward together.

Forward: `adapter_forward`, for a small batch layer by layer, else after `narrow_weights` where weights are wider than
products, `contrast_rows`, `contrast_finish`. Backward: `contrast_columns`, `assemble`, `adapter_weights` and, where
those sum in parts, `add_parts`; `adapter_encodings` only for encodings that take a gradient. A temperature that does is
one sum more where there are no parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from kellm_kernels.arguments import (
    columns,
    contiguous,
    counts,
    dims_of,
    empty,
    lengths_of,
    matrices,
    or_else,
    rows_together,
    strides_of,
    three,
    with_rows,
)
from kellm_kernels.gpu import adapter as adapter_kernels
from kellm_kernels.gpu import contrast_backward as backward_kernels
from kellm_kernels.gpu import contrast_forward as forward_kernels
from kellm_kernels.plan import AdapterPlan, ContrastPlan, Device, blocks_of, padded, plan_adapter, plan_contrast
from kellm_kernels.problem import MIN_NORM, AdapterWeights, Contrast, Rows, Vectors, WeightGrads

INTERPRETED = not isinstance(forward_kernels.contrast_rows, triton.JITFunction)
"""Kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set when they were imported."""

_FINISH_BLOCK = 1024
_ADD_BLOCK = 1024
_ASSEMBLE_ELEMENTS = 8192  # of a tile, over 8 warps: 32 registers a thread
_WARPS = 8
MIN_BOUNDED = 0.0145
"""The least temperature at which e_ij of unit vectors are taken without their maximum: logits are within ±100 there."""


_Record = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_records: list[_Record] = []


@contextlib.contextmanager
def watched(record: _Record) -> Iterator[None]:
    """Within, every launch is told of: kernel, grid, arguments, options."""
    _records.append(record)
    try:
        yield
    finally:
        _records.remove(record)


def contrast(vectors: Vectors, problem: Contrast, *, keep: bool, hidden: int = 0) -> tuple[Tensor, Rows]:
    """The loss, () or (B,), and what backward needs; without `keep` the negatives' means are left out."""
    vectors = with_rows(vectors)
    plan = _contrast_plan(vectors, problem.symmetric, hidden)
    count, dim = vectors.anchor.shape
    rows = empty_rows(vectors, symmetric=problem.symmetric, keep=keep, hidden=hidden)
    with_means = keep and not problem.symmetric
    parts = rows.parts
    if not with_means:
        parts = rows.own.new_empty(plan.row_parts, problem.directions, count)
    loss = rows.own.new_empty((count,) if problem.reduction == "none" else ())
    with _device_of(vectors.anchor):
        _launch(
            forward_kernels.contrast_rows,
            (blocks_of(count, plan.rows.m), plan.row_parts * blocks_of(dim, plan.block_e), problem.directions),
            *columns(vectors, problem), rows.own, parts, rows.means, *counts(vectors, problem), problem.margin or 0.0,
            E=dim, BLOCK_M=plan.rows.m, BLOCK_N=plan.rows.n, BLOCK_E=plan.block_e, MEANS=with_means,
            BOUNDED=_bounded(vectors, problem),
            **_options(vectors, problem), num_warps=plan.rows.warps, num_stages=plan.rows.stages,
        )  # fmt: skip
        _launch(
            forward_kernels.contrast_finish,
            (blocks_of(count, _FINISH_BLOCK) if problem.reduction == "none" else 1,),
            rows.own, parts, or_else(problem.log_q, loss), or_else(problem.sample_weight, loss), problem.temperature,
            loss, rows.log_rest, rows.pull, rows.log_factor, rows.inverse_weight, rows.largest,
            count, problem.start, plan.row_parts,
            DIRECTIONS=problem.directions, LOG_Q=problem.log_q is not None,
            WEIGHTED=problem.sample_weight is not None, TENSOR=isinstance(problem.temperature, Tensor),
            REDUCTION=problem.reduction, BLOCK=_FINISH_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return loss, rows


def empty_rows(vectors: Vectors, *, symmetric: bool, keep: bool, hidden: int = 0) -> Rows:
    """`Rows` of the right shapes, unfilled."""
    count, dim = vectors.anchor.shape
    by_direction = (2 if symmetric else 1, count)
    means: tuple[int, ...] = (0,)
    parts: tuple[int, ...] = (0,)
    if keep and not symmetric:
        row_parts = _contrast_plan(vectors, symmetric, hidden).row_parts
        means, parts = (row_parts, count, dim), (row_parts, 1, count)
    shapes = ((count,), by_direction, by_direction, by_direction, (), (), means, parts)
    return Rows(*(vectors.anchor.new_empty(shape, dtype=torch.float32) for shape in shapes))


def contrast_backward(
    grad: Tensor, vectors: Vectors, problem: Contrast, rows: Rows, *, want_temperature: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of anchors, positives, negatives and, where wanted, temperature, in their dtypes."""
    vectors, grad = with_rows(vectors), grad.contiguous()
    plan = _contrast_plan(vectors, problem.symmetric, 0)
    d_anchor, d_positive = empty(vectors.anchor), empty(vectors.positive)
    d_negatives = None if vectors.negatives is None else empty(vectors.negatives)
    with _device_of(grad):
        sums = _column_sums(grad, vectors, problem, rows, plan, None)
        by_block = _assemble(
            grad, vectors, (None, None), problem, rows, plan, sums, None, (d_anchor, d_positive, d_negatives),
            normalize=False, temperature=want_temperature,
        )  # fmt: skip
    return d_anchor, d_positive, d_negatives, None if by_block is None else by_block.sum()


def empty_half(z: Tensor, count: int, *, wanted: bool) -> Tensor:
    """Room for embeddings once more in float16, (ΣR, E), where they are bfloat16 and that is wanted, else (0,).

    At length 1 float16 holds them to the last digit that matters, and weights with 11 bits instead of 8: with bfloat16
    ones the columns' sums need two products each (see `_pulled`).
    """
    shape = (count, z.shape[1]) if wanted and z.dtype == torch.bfloat16 else (0,)
    return z.new_empty(shape, dtype=torch.float16)


def adapt(
    towers: Sequence[Tensor], weights: AdapterWeights, *, keep: bool, halve: bool = False
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Embeddings of each tower; lengths before normalisation (ΣR,); if kept, the hidden layer (ΣR, H); `empty_half`."""
    towers, weights = [rows_together(x) for x in towers], contiguous(weights)
    plan = _adapter_plan(towers, weights, 0)
    tile = plan.forward
    total, x = sum(tower.shape[0] for tower in towers), towers[0]
    embeddings = [x.new_empty(tower.shape[0], weights.w2.shape[0], dtype=weights.dtype) for tower in towers]
    norm = x.new_empty(total, dtype=torch.float32)
    hidden = x.new_empty(total if keep else 0, weights.w1.shape[0], dtype=weights.dtype)
    half = empty_half(embeddings[0], total, wanted=halve and weights.normalize)
    with _device_of(x):
        steps = plan.layers if keep else ("both",)
        if steps == ("both",):
            weights = _narrowed(weights)
        for layers in steps:
            _launch(
                adapter_kernels.adapter_forward,
                (
                    sum(blocks_of(tower.shape[0], tile.m) for tower in towers),
                    blocks_of(weights.w1.shape[0], tile.n) if layers == "first" else 1,
                ),
                *three(towers), *strides_of(towers), *lengths_of(towers), *weights[:4],
                *three(embeddings), norm, hidden, half,
                **dims_of(weights), BLOCK_R=tile.m, BLOCK_D=tile.k, BLOCK_H=tile.n, BLOCK_E=padded(weights.w2.shape[0]),
                LAYERS=layers, ACTIVATION=weights.activation, NORMALIZE=weights.normalize, KEEP=keep,
                HALVE=half.numel() > 0, MIN_NORM=MIN_NORM,
                **_precision(weights.dtype), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return embeddings, norm, hidden, half


def _narrowed(weights: AdapterWeights) -> AdapterWeights:
    """The matrices in the dtype of the products."""
    if weights.w1.dtype == weights.w2.dtype == weights.dtype:
        return weights
    w1, w2 = (torch.empty_like(weight, dtype=weights.dtype) for weight in (weights.w1, weights.w2))
    _launch(
        adapter_kernels.narrow_weights,
        (blocks_of(max(w1.numel(), w2.numel()), _ADD_BLOCK),),
        weights.w1, weights.w2, w1, w2, **dims_of(weights), BLOCK=_ADD_BLOCK, UPCAST=_upcast(weights.dtype),
        num_warps=_WARPS,
    )  # fmt: skip
    return weights._replace(w1=w1, w2=w2)


def adapt_backward(
    grad_z: Tensor, x: Tensor, z: Tensor, norm: Tensor, hidden: Tensor, weights: AdapterWeights, *, want_x: bool
) -> tuple[Tensor | None, WeightGrads]:
    """Gradients of x, where wanted, and of w1, b1, w2, b2, in their dtypes."""
    x, weights, d_y = rows_together(x), contiguous(weights), empty(z)
    alone = Vectors(z, z[:0], None)
    plan = _contrast_plan(alone, False, 0)
    with _device_of(z):
        _assemble(
            None, alone, (grad_z.contiguous(), None), Contrast(1.0), None, plan, None, norm, (d_y, d_y, None),
            normalize=weights.normalize, temperature=False,
        )  # fmt: skip
        (d_x,), d_weights, _ = _weight_gradients(d_y, [x], hidden, weights, [want_x], 0, None)
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
    towers, weights = [rows_together(x) for x in towers], contiguous(weights)
    plan = _contrast_plan(vectors, problem.symmetric, weights.w1.shape[0])
    anchors, pairs = vectors.anchor.shape[0], vectors.anchor.shape[0] + vectors.positive.shape[0]
    d_y = vectors.anchor.new_empty(sum(x.shape[0] for x in towers), weights.w2.shape[0])
    upstream = (
        None if grad_z is None else grad_z.contiguous(),
        None if grad_z_pos is None else grad_z_pos.contiguous(),
    )
    outs = (d_y[:anchors], d_y[anchors:pairs], d_y[pairs:])
    sums = None
    with _device_of(d_y):
        if grad is not None:
            grad = grad.contiguous()
            precise = vectors
            if half.numel():
                precise = Vectors(half[:anchors], half[anchors:pairs], half[pairs:] if len(towers) > 2 else None)
            sums = _column_sums(grad, precise, problem, rows, plan, d_y)
        by_block = _assemble(
            grad, vectors, upstream, problem, rows, plan, sums, norm, outs,
            normalize=weights.normalize, temperature=want_temperature,
        )  # fmt: skip
        del sums  # its memory is free for the parts of the weights' gradients
        return _weight_gradients(d_y, towers, hidden, weights, want_x, len(rows.means), by_block)


def _column_sums(
    grad: Tensor, vectors: Vectors, problem: Contrast, rows: Rows, plan: ContrastPlan, place: Tensor | None
) -> Tensor:
    """What every vector draws from those of the other side, (parts, vectors, E) float32.

    Vectors are positives, negatives and, if symmetric, before them the anchors. One part of float32 goes where the
    gradients of the embeddings, (B + P + N, E), will be: `assemble` reads each row of it before writing the same one.
    """
    dim, tile = vectors.anchor.shape[1], plan.columns
    lengths = [vectors.positive.shape[0], 0 if vectors.negatives is None else vectors.negatives.shape[0]]
    if problem.symmetric:
        lengths.append(vectors.anchor.shape[0])
    if place is not None and place.dtype == torch.float32 and plan.column_parts == 1:
        sums = place[len(place) - sum(lengths) :]
    else:
        sums = grad.new_empty(plan.column_parts, sum(lengths), dim, dtype=torch.float32)
    _launch(
        backward_kernels.contrast_columns,
        (sum(blocks_of(length, tile.m) for length in lengths), plan.column_parts, blocks_of(dim, plan.block_e)),
        *columns(vectors, problem), rows.own, rows.pull, rows.log_factor, rows.largest, grad, sums,
        *counts(vectors, problem), problem.margin or 0.0,
        E=dim, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_E=plan.block_e,
        ROWS=problem.reduction == "none", SCALED=vectors.anchor.dtype == torch.float16,
        **_options(vectors, problem), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return sums


def _assemble(
    grad: Tensor | None,
    vectors: Vectors,
    upstream: tuple[Tensor | None, Tensor | None],
    problem: Contrast,
    rows: Rows | None,
    plan: ContrastPlan,
    sums: Tensor | None,
    norm: Tensor | None,
    outs: tuple[Tensor, Tensor, Tensor | None],
    *,
    normalize: bool,
    temperature: bool,
) -> Tensor | None:
    """Write the whole gradient of each vector into `outs`; return the temperature's by blocks, if asked for."""
    anchor, positive, negatives = vectors
    loss = grad is not None and rows is not None
    width = padded(anchor.shape[1])
    block = min(64, _ASSEMBLE_ELEMENTS // width)
    blocks = blocks_of(anchor.shape[0], block)
    by_block = anchor.new_empty(blocks if temperature and loss else 0, dtype=torch.float32)
    kept = Rows(*[anchor] * len(Rows._fields)) if rows is None else rows
    others = [v for v in (positive, negatives) if v is not None]
    _launch(
        backward_kernels.assemble,
        (blocks + sum(blocks_of(other.shape[0], block) for other in others),),
        *matrices(vectors), kept.means, kept.parts, kept.log_rest, kept.pull,
        or_else(sums, anchor), or_else(grad, anchor), kept.inverse_weight,
        problem.temperature if temperature else anchor,
        or_else(upstream[0], anchor), or_else(upstream[1], anchor), or_else(norm, anchor),
        outs[0], outs[1], or_else(outs[2], anchor), by_block,
        *counts(vectors, problem), len(kept.means), plan.column_parts,
        E=anchor.shape[1], BLOCK=block, BLOCK_E=width, LOSS=loss, SECOND=problem.symmetric,
        ROWS=problem.reduction == "none", ANCHOR_UPSTREAM=upstream[0] is not None,
        POSITIVE_UPSTREAM=upstream[1] is not None, NORMALIZE=normalize, TEMPERATURE=temperature and loss,
        MIN_NORM=MIN_NORM, UPCAST=_upcast(anchor.dtype), num_warps=_WARPS,
    )  # fmt: skip
    return by_block if temperature else None


def _weight_gradients(
    d_y: Tensor,
    towers: Sequence[Tensor],
    hidden: Tensor,
    weights: AdapterWeights,
    want_x: Sequence[bool],
    kept_parts: int,
    by_block: Tensor | None,
) -> tuple[list[Tensor | None], WeightGrads, Tensor | None]:
    """From the gradients of the embeddings before normalisation: those of encodings, where wanted, and of weights.

    What `by_block` holds of the temperature's gradient is added up on the way.
    """
    plan = _adapter_plan(towers, weights, kept_parts)
    grads = (empty(weights.w1), empty(weights.b1), empty(weights.w2), empty(weights.b2))
    parts: Sequence[Tensor] = grads
    if plan.weight_parts > 1:
        parts = [grad.new_empty(plan.weight_parts, *grad.shape, dtype=torch.float32) for grad in grads]
    tile, dims = plan.backward, dims_of(weights)
    d_blocks, e_blocks = blocks_of(dims["D"], tile.k), blocks_of(dims["E"], plan.block_e)
    _launch(
        adapter_kernels.adapter_weights,
        (blocks_of(dims["H"], tile.n), d_blocks + e_blocks, plan.weight_parts),
        *three(towers), *strides_of(towers), *lengths_of(towers), d_y, hidden, weights.w2, *parts,
        **dims, BLOCK_R=tile.m, BLOCK_D=tile.k, BLOCK_H=tile.n, BLOCK_E=plan.block_e,
        ACTIVATION=weights.activation, **_precision(weights.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    d_temperature = None
    if by_block is not None:
        d_temperature = by_block.new_empty(()) if plan.weight_parts > 1 else by_block.sum()
    if plan.weight_parts > 1:
        longest = max(grad.numel() for grad in grads)
        _launch(
            adapter_kernels.add_parts,
            (blocks_of(longest, _ADD_BLOCK),),
            *parts, *grads, plan.weight_parts, or_else(by_block, d_y), or_else(d_temperature, d_y),
            0 if by_block is None else by_block.numel(),
            **dims, BLOCK=_ADD_BLOCK, FURTHER=by_block is not None, UPCAST=_upcast(grads[0].dtype), num_warps=_WARPS,
        )  # fmt: skip
    return _encoding_gradients(d_y, towers, hidden, weights, want_x, plan), grads, d_temperature


def _encoding_gradients(
    d_y: Tensor,
    towers: Sequence[Tensor],
    hidden: Tensor,
    weights: AdapterWeights,
    want_x: Sequence[bool],
    plan: AdapterPlan,
) -> list[Tensor | None]:
    d_towers: list[Tensor | None] = []
    wanted, offsets, start = [], [], 0
    for x, want in zip(towers, want_x, strict=True):
        d_towers.append(empty(x) if want else None)
        if want:
            wanted.append(d_towers[-1])
            offsets.append(start)
        start += x.shape[0]
    if not wanted:
        return d_towers
    tile, dims = plan.backward, dims_of(weights)
    _launch(
        adapter_kernels.adapter_encodings,
        (sum(blocks_of(length, tile.m) for length in lengths_of(wanted)), blocks_of(dims["D"], tile.k)),
        *lengths_of(wanted), *[*offsets, 0, 0][:3], d_y, hidden, weights.w1, weights.w2, *three(wanted),
        **dims, BLOCK_R=tile.m, BLOCK_D=tile.k, BLOCK_H=tile.n, BLOCK_E=plan.block_e,
        ACTIVATION=weights.activation, **_precision(weights.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return d_towers


# --- Launches -----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """One launch; tests count them here. Of no rows at all there is nothing to launch."""
    if 0 in grid:
        return
    kernel[grid](*arguments, **options)
    for record in _records:
        record(kernel, grid, arguments, options)


def _options(vectors: Vectors, problem: Contrast) -> dict[str, Any]:
    """What the loss's kernels are compiled for."""
    return {
        "NEGATIVES": vectors.negatives is not None,
        "ANCHOR_IDS": problem.anchor_ids is not None,
        "POSITIVE_IDS": problem.positive_ids is not None,
        "NEGATIVE_IDS": problem.negative_ids is not None,
        "LOG_Q": problem.log_q is not None,
        "NEGATIVE_LOG_Q": problem.log_q is not None and len(problem.log_q) > vectors.positive.shape[0],
        "MARGIN": problem.margin is not None,
        "TENSOR": isinstance(problem.temperature, Tensor),
        "SECOND": problem.symmetric,
        **_precision(vectors.anchor.dtype),
    }


def _bounded(vectors: Vectors, problem: Contrast) -> bool:
    """No logit is far above 1/τ or below −1/τ, and a float32 holds e_ij for both at once."""
    if not problem.unit or problem.log_q is not None or isinstance(problem.temperature, Tensor):
        return False
    return vectors.anchor.dtype != torch.float16 and problem.temperature >= MIN_BOUNDED


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    """How float32 is multiplied, after `torch.set_float32_matmul_precision`: `highest` is three TF32 products."""
    precision = "ieee"
    if dtype == torch.float32 and not INTERPRETED and torch.version.hip is None:
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {"PRECISION": precision, "UPCAST": _upcast(dtype)}


def _upcast(dtype: torch.dtype) -> bool:
    """The interpreter neither multiplies nor rounds bfloat16 as a GPU does."""
    return INTERPRETED and dtype == torch.bfloat16


def _contrast_plan(vectors: Vectors, symmetric: bool, hidden: int) -> ContrastPlan:
    anchor, positive, negatives = vectors
    return plan_contrast(
        anchor.shape[0], positive.shape[0], 0 if negatives is None else negatives.shape[0], anchor.shape[1],
        itemsize=anchor.dtype.itemsize, symmetric=symmetric, device=device_of(anchor.device), hidden=hidden,
    )  # fmt: skip


def _adapter_plan(towers: Sequence[Tensor], weights: AdapterWeights, kept_parts: int) -> AdapterPlan:
    dims = dims_of(weights)
    return plan_adapter(
        sum(x.shape[0] for x in towers), dims["D"], dims["H"], dims["E"], itemsize=weights.dtype.itemsize,
        device=device_of(towers[0].device), kept_parts=kept_parts,
    )  # fmt: skip


@cache
def device_of(device: torch.device) -> Device:
    """What plans look at of a device."""
    if device.type != "cuda":
        return Device(4, 64 << 10, "interpreter")  # small, so that sums in parts are tried there too
    properties = torch.cuda.get_device_properties(device)
    gpu = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        gpu = properties.gcnArchName.split(":")[0]
    # PyTorch for ROCm has no such property; 64 KiB is what CDNA gives.
    shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    return Device(properties.multi_processor_count, shared, gpu)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
