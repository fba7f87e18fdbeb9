"""The adapter's kernels: forward, gradients of the weights, their parts added up, gradient of the encodings.

Up to three towers (anchors, positives, negatives) go through one launch, side by side: programs pick theirs by index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kellm_kernels.gpu.tiles import activate, narrow, product, slope


@triton.jit
def _pick(which, a, b, c):
    """a, b or c as `which` is 0, 1 or 2; pointers or numbers."""
    return tl.where(which == 2, c, tl.where(which == 1, b, a))


@triton.jit
def _tower(block, n0, n1, n2, BLOCK: tl.constexpr):
    """Which tower a block of rows belongs to, and the first of its rows there."""
    blocks0, blocks1 = tl.cdiv(n0, BLOCK), tl.cdiv(n1, BLOCK)
    which = tl.where(block >= blocks0 + blocks1, 2, tl.where(block >= blocks0, 1, 0))
    before = tl.where(which == 2, blocks0 + blocks1, tl.where(which == 1, blocks0, 0))
    return which, (block - before) * BLOCK


@triton.jit
def _narrow(source, target, at, count, UPCAST: tl.constexpr):
    inside = at < count
    value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + at, narrow(value, target.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def narrow_weights(
    w1, w2, w1_out, w2_out,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):
    """Both matrices in the dtype of the products, for programs that each read the whole of them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _narrow(w1, w1_out, at, H * D, UPCAST)
    _narrow(w2, w2_out, at, E * H, UPCAST)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def adapter_forward(
    x0, x1, x2, stride0, stride1, stride2, n0, n1, n2, w1, b1, w2, b2, z0, z1, z2, norm_out, hidden_out, half_out,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr, HALVE: tl.constexpr,
    MIN_NORM: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """One block of rows through both layers; the hidden layer is made, used and, with KEEP, written block by block.

    LAYERS is `both`, or one after the other where rows are few: `first`, a program for each block of the hidden layer
    too, and `second`, which reads that layer. HALVE: embeddings are written once more, in float16.
    """
    which, first = _tower(tl.program_id(0), n0, n1, n2, BLOCK_R)
    x, stride, count = _pick(which, x0, x1, x2), _pick(which, stride0, stride1, stride2), _pick(which, n0, n1, n2)
    z, offset = _pick(which, z0, z1, z2), _pick(which, 0, n0, n0 + n1)
    dtype = z0.dtype.element_ty
    row = first + tl.arange(0, BLOCK_R)
    here = row < count
    out_row = (offset + row).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    y = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    first_h, last_h = 0, H
    if LAYERS == "first":
        first_h = tl.program_id(1) * BLOCK_H
        last_h = first_h + BLOCK_H
    for h_start in range(first_h, last_h, BLOCK_H):
        h = h_start + tl.arange(0, BLOCK_H)
        kept = hidden_out + out_row[:, None] * H + h[None, :]
        inside = here[:, None] & (h < H)[None, :]
        if LAYERS == "second":
            before = tl.load(kept, mask=inside, other=0.0)
        else:
            wide = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
            for d_start in range(0, D, BLOCK_D):
                d = d_start + tl.arange(0, BLOCK_D)
                x_at = row.to(tl.int64)[:, None] * stride + d[None, :]
                x_tile = tl.load(x + x_at, mask=here[:, None] & (d < D)[None, :], other=0.0)
                w_at = h[None, :] * D + d[:, None]
                w_tile = tl.load(w1 + w_at, mask=(h < H)[None, :] & (d < D)[:, None], other=0.0)
                wide = product(x_tile.to(dtype), w_tile.to(dtype), wide, PRECISION, UPCAST)
            wide += tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
            before = narrow(wide, dtype, UPCAST)
            if KEEP:
                tl.store(kept, before, mask=inside)
        if LAYERS != "first":
            after = narrow(activate(before.to(tl.float32), ACTIVATION), dtype, UPCAST)
            v_tile = tl.load(w2 + e[None, :] * H + h[:, None], mask=(e < E)[None, :] & (h < H)[:, None], other=0.0)
            y = product(after, v_tile.to(dtype), y, PRECISION, UPCAST)
    if LAYERS != "first":
        y += tl.load(b2 + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        norm = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), MIN_NORM)
        if NORMALIZE:
            y = y / norm[:, None]
        tl.store(norm_out + out_row, norm, mask=here)
        at = row.to(tl.int64)[:, None] * E + e[None, :]
        narrowed = narrow(y, dtype, UPCAST)
        tl.store(z + at, narrowed, mask=here[:, None] & (e < E)[None, :])
        if HALVE:
            half = narrowed.to(tl.float32).to(tl.float16)
            tl.store(half_out + out_row[:, None] * E + e[None, :], half, mask=here[:, None] & (e < E)[None, :])


@triton.jit
def _grad_before(
    grad_y, hidden, w2, w2_tile, at, here, h,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Gradient of a tile of the hidden layer before its activation; `w2_tile` is w2's if E is one block long."""
    total = tl.zeros((at.shape[0], h.shape[0]), tl.float32)
    for e_start in range(0, E, BLOCK_E):
        e = e_start + tl.arange(0, BLOCK_E)
        dy = tl.load(grad_y + at[:, None] * E + e[None, :], mask=here[:, None] & (e < E)[None, :], other=0.0)
        if E <= BLOCK_E:
            total = product(dy, w2_tile, total, PRECISION, UPCAST)
        else:
            total = product(dy, _w2_tile(w2, e, h, H, E).to(dy.dtype), total, PRECISION, UPCAST)
    before = tl.load(hidden + at[:, None] * H + h[None, :], mask=here[:, None] & (h < H)[None, :], other=0.0)
    return total * slope(before.to(tl.float32), ACTIVATION)


@triton.jit
def _w2_tile(w2, e, h, H: tl.constexpr, E: tl.constexpr):
    return tl.load(w2 + e[:, None] * H + h[None, :], mask=(e < E)[:, None] & (h < H)[None, :], other=0.0)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def adapter_weights(
    x0, x1, x2, stride0, stride1, stride2, n0, n1, n2, grad_y, hidden, w2, d_w1, d_b1, d_w2, d_b2,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Gradients of w1, b1, w2, b2 from a part of the rows of all towers.

    Grid (H blocks, D blocks + E blocks, parts): w1's columns, then w2's rows. Outputs are (parts, …) each, or the
    gradients themselves where there is one part.
    """
    h_block, d_block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    dtype = grad_y.dtype.element_ty
    blocks = tl.cdiv(n0, BLOCK_R) + tl.cdiv(n1, BLOCK_R) + tl.cdiv(n2, BLOCK_R)
    each = tl.cdiv(blocks, tl.num_programs(2))
    first, last = part * each, tl.minimum((part + 1) * each, blocks)
    h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
    out = part.to(tl.int64)
    bias = tl.zeros((BLOCK_H,), tl.float32)
    if d_block < d_blocks:
        d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
        w2_tile = _w2_tile(w2, tl.arange(0, BLOCK_E), h, H, E).to(dtype)
        total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for block in range(first, last):
            which, start = _tower(block, n0, n1, n2, BLOCK_R)
            x, stride = _pick(which, x0, x1, x2), _pick(which, stride0, stride1, stride2)
            count, offset = _pick(which, n0, n1, n2), _pick(which, 0, n0, n0 + n1)
            row = start + tl.arange(0, BLOCK_R)
            here = row < count
            at = (offset + row).to(tl.int64)
            d_before = _grad_before(
                grad_y, hidden, w2, w2_tile, at, here, h, H, E, BLOCK_E, ACTIVATION, PRECISION, UPCAST
            )
            x_tile = tl.load(
                x + row.to(tl.int64)[:, None] * stride + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0
            )
            total = product(tl.trans(narrow(d_before, dtype, UPCAST)), x_tile.to(dtype), total, PRECISION, UPCAST)
            bias += tl.sum(d_before, 0)
        at_w1 = out * H * D + h[:, None] * D + d[None, :]
        tl.store(d_w1 + at_w1, narrow(total, d_w1.dtype.element_ty, UPCAST), mask=(h < H)[:, None] & (d < D)[None, :])
        if d_block == 0:
            tl.store(d_b1 + out * H + h, narrow(bias, d_b1.dtype.element_ty, UPCAST), mask=h < H)
    else:
        e = (d_block - d_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
        outer = tl.zeros((BLOCK_E, BLOCK_H), tl.float32)
        end = tl.zeros((BLOCK_E,), tl.float32)
        for block in range(first, last):
            which, start = _tower(block, n0, n1, n2, BLOCK_R)
            count, offset = _pick(which, n0, n1, n2), _pick(which, 0, n0, n0 + n1)
            row = start + tl.arange(0, BLOCK_R)
            here = row < count
            at = (offset + row).to(tl.int64)
            dy = tl.load(grad_y + at[:, None] * E + e[None, :], mask=here[:, None] & (e < E)[None, :], other=0.0)
            before = tl.load(hidden + at[:, None] * H + h[None, :], mask=here[:, None] & (h < H)[None, :], other=0.0)
            after = narrow(activate(before.to(tl.float32), ACTIVATION), dtype, UPCAST)
            outer = product(tl.trans(dy), after, outer, PRECISION, UPCAST)
            end += tl.sum(dy.to(tl.float32), 0)
        at_w2 = out * E * H + e[:, None] * H + h[None, :]
        tl.store(d_w2 + at_w2, narrow(outer, d_w2.dtype.element_ty, UPCAST), mask=(e < E)[:, None] & (h < H)[None, :])
        if h_block == 0:
            tl.store(d_b2 + out * E + e, narrow(end, d_b2.dtype.element_ty, UPCAST), mask=e < E)


@triton.jit
def _add_parts(source, parts, target, at, COUNT: tl.constexpr, UPCAST: tl.constexpr):
    """target[at] = Σ over parts of source[part, at], for indices within COUNT."""
    here = (at >= 0) & (at < COUNT)
    total = tl.zeros_like(at).to(tl.float32)
    for part in range(parts):
        total += tl.load(source + at.to(tl.int64) + part * COUNT, mask=here, other=0.0)
    tl.store(target + at, narrow(total, target.dtype.element_ty, UPCAST), mask=here)


@triton.jit(do_not_specialize=["parts"])
def add_parts(
    w1_in, b1_in, w2_in, b2_in, w1_out, b1_out, w2_out, b2_out, parts, further_in, further_out, further,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, FURTHER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The parts that `adapter_weights` wrote, added in their order; with FURTHER, some more numbers to their sum."""
    if FURTHER:
        first = tl.program_id(0) == 0
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, tl.where(first, further, 0), BLOCK):
            index = start + tl.arange(0, BLOCK)
            sums += tl.load(further_in + index, mask=index < further, other=0.0)
        tl.store(further_out, tl.sum(sums, 0), mask=first)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _add_parts(w1_in, parts, w1_out, at, H * D, UPCAST)
    _add_parts(w2_in, parts, w2_out, at, E * H, UPCAST)
    _add_parts(b1_in, parts, b1_out, at, H, UPCAST)
    _add_parts(b2_in, parts, b2_out, at, E, UPCAST)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def adapter_encodings(
    n0, n1, n2, offset0, offset1, offset2, grad_y, hidden, w1, w2, d_x0, d_x1, d_x2,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Gradient of one block of encodings in one block of their dimensions; grid (row blocks, D blocks)."""
    which, first = _tower(tl.program_id(0), n0, n1, n2, BLOCK_R)
    count, offset = _pick(which, n0, n1, n2), _pick(which, offset0, offset1, offset2)
    d_x = _pick(which, d_x0, d_x1, d_x2)
    dtype = grad_y.dtype.element_ty
    row = first + tl.arange(0, BLOCK_R)
    at = (offset + row).to(tl.int64)
    here = row < count
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for h_start in range(0, H, BLOCK_H):
        h = h_start + tl.arange(0, BLOCK_H)
        w2_tile = _w2_tile(w2, tl.arange(0, BLOCK_E), h, H, E).to(dtype)
        d_before = _grad_before(grad_y, hidden, w2, w2_tile, at, here, h, H, E, BLOCK_E, ACTIVATION, PRECISION, UPCAST)
        w1_tile = tl.load(w1 + h[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
        total = product(narrow(d_before, dtype, UPCAST), w1_tile.to(dtype), total, PRECISION, UPCAST)
    out = row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(d_x + out, narrow(total, d_x0.dtype.element_ty, UPCAST), mask=here[:, None] & (d < D)[None, :])
