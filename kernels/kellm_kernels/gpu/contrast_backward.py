"""InfoNCE backward: `contrast_columns` and `assemble`, in the units of `contrast_forward`."""

from __future__ import annotations

import triton
import triton.language as tl

from kellm_kernels.gpu.columns import LOG2E, same, take, temperature_of
from kellm_kernels.gpu.contrast_forward import LIFT
from kellm_kernels.gpu.tiles import narrow, product, rows_of, similarities


@triton.jit
def _upstream(grad, pull, row, mask, ROWS: tl.constexpr):
    """Each row's gradient, without the factor that all rows share: pull, times upstream where that is by row."""
    value = tl.load(pull + row, mask=mask, other=0.0)
    if ROWS:
        value *= tl.load(grad + row, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _shared(grad, inverse, ROWS: tl.constexpr):
    """The factor that all rows share."""
    factor = tl.load(inverse)
    if not ROWS:
        factor *= tl.load(grad).to(tl.float32)
    return factor


@triton.jit
def _largest(grad, pull, B, SECOND: tl.constexpr):
    """The largest factor of a row, gradients from upstream being by row."""
    BLOCK: tl.constexpr = 1024
    largest = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.cdiv(B, BLOCK)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(_upstream(grad, pull, row, row < B, True)))
        if SECOND:
            largest = tl.maximum(largest, tl.abs(_upstream(grad, pull + B, row, row < B, True)))
    return tl.max(largest, 0)


@triton.jit
def _factor(grad, log_factor, row, mask, shift, ROWS: tl.constexpr):
    """log₂ of each row's factor in its pairs' weights, and its gradient from upstream where that is by row, else 1.

    Rows beyond the last have any: their pairs are masked by similarity.
    """
    log = tl.load(log_factor + row, mask=mask, other=0.0) + shift
    upstream = tl.full(row.shape, 1.0, tl.float32)
    if ROWS:
        upstream = tl.load(grad + row, mask=mask, other=0.0).to(tl.float32)
    return log, upstream


@triton.jit
def _pulled(
    tile, vectors, vectors_stride, tile_row, tile_count, total, element, others, stride, first, last, other_count,
    own, log_factor, grad, anchor_ids, positive_ids, column_ids, log_q, B, scale, margin, start, shift, first_tile_row,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_E: tl.constexpr, TILE_IS_ROW: tl.constexpr,
    ANCHOR_IDS: tl.constexpr, POSITIVE_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr, PAIRED: tl.constexpr,
    LOG_Q: tl.constexpr, MARGIN: tl.constexpr, ROWS: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add to `total`, for each vector of a tile, the sum of the others under their weights in the loss.

    The tile is of columns and the others are all anchors, or (TILE_IS_ROW) of anchors and the others are columns. A
    weight is c_i π_ij, softmax i's part over negatives times its pull; with SECOND, that of the other direction too.
    Weights come 2^shift times too large; pairs beyond the last have none.
    """
    axis: tl.constexpr = 1 if TILE_IS_ROW else 0
    BY_PAIR: tl.constexpr = (ANCHOR_IDS and (PAIRED or COLUMN_IDS)) or (POSITIVE_IDS and COLUMN_IDS)
    own_first = first_tile_row - start  # where the others begin that are the tile's own pairs
    if TILE_IS_ROW:
        own_first = first_tile_row + start
    for block in range(first, last):
        other = block * BLOCK_I + tl.arange(0, BLOCK_I)
        similarity = similarities(
            tile, vectors, vectors_stride, tile_row, tile_count, others, stride, other, other_count,
            E, BLOCK_E, PRECISION, UPCAST,
        )
        if TILE_IS_ROW:
            i, j = tile_row, other
            i_here, j_here = tile_row < tile_count, other < other_count
        else:
            i, j = other, tile_row
            i_here, j_here = other < other_count, tile_row < tile_count
        if BY_PAIR:
            i_anchor = take(anchor_ids, i + start, i_here, ANCHOR_IDS)
            i_positive = take(positive_ids, i + start, i_here, POSITIVE_IDS)
            j_anchor = take(anchor_ids, j, j_here, ANCHOR_IDS and PAIRED)
            j_id = take(column_ids, j, j_here, COLUMN_IDS)
            masked = same(
                tl.expand_dims(i_anchor, axis), tl.expand_dims(i_positive, axis),
                tl.expand_dims(j_anchor, 1 - axis), tl.expand_dims(j_id, 1 - axis),
                ANCHOR_IDS, POSITIVE_IDS, COLUMN_IDS, PAIRED,
            )
            if PAIRED:
                masked = masked | (tl.expand_dims(i + start, axis) == tl.expand_dims(j, 1 - axis))
            masked = masked | ~(tl.expand_dims(tile_row < tile_count, 1) & tl.expand_dims(other < other_count, 0))
            similarity = tl.where(masked, -float("inf"), similarity)
        else:
            edge = (first_tile_row + BLOCK_M > tile_count) | ((block + 1) * BLOCK_I > other_count)
            if PAIRED:
                edge = edge | ((block * BLOCK_I < own_first + BLOCK_M) & ((block + 1) * BLOCK_I > own_first))
            if edge:
                masked = ~(tl.expand_dims(tile_row < tile_count, 1) & tl.expand_dims(other < other_count, 0))
                if PAIRED:
                    masked = masked | (tl.expand_dims(i + start, axis) == tl.expand_dims(j, 1 - axis))
                similarity = tl.where(masked, -float("inf"), similarity)
        i_log, i_upstream = _factor(grad, log_factor, i, i_here, shift, ROWS)
        logit = similarity * scale
        first_logit = logit + tl.expand_dims(i_log, axis)
        if LOG_Q:
            j_log_q = tl.load(log_q + j, mask=j_here, other=0.0).to(tl.float32) * LOG2E
            first_logit -= tl.expand_dims(j_log_q, 1 - axis)
        if MARGIN:
            i_own = tl.load(own + i, mask=i_here, other=0.0)
            first_logit = tl.where(similarity > tl.expand_dims(i_own + margin, axis), -float("inf"), first_logit)
        weight = tl.exp2(first_logit)
        if ROWS:
            weight *= tl.expand_dims(i_upstream, axis)
        if SECOND and PAIRED:
            j_log, j_upstream = _factor(grad, log_factor + B, j, j_here, shift, ROWS)
            second_logit = logit + tl.expand_dims(j_log, 1 - axis)
            if MARGIN:
                j_own = tl.load(own + j, mask=j_here, other=0.0)
                beyond = similarity > tl.expand_dims(j_own + margin, 1 - axis)
                second_logit = tl.where(beyond, -float("inf"), second_logit)
            second = tl.exp2(second_logit)
            if ROWS:
                second *= tl.expand_dims(j_upstream, 1 - axis)
            weight += second
        o = rows_of(others, stride, other, other_count, element, E, BLOCK_E)
        coarse = narrow(weight, o.dtype, UPCAST)
        total = product(coarse, o, total, PRECISION, UPCAST)
        if o.dtype == tl.bfloat16:
            # A few anchors far from their positives make most of a column's gradient, so that the rounding of their
            # weights to 8 bits does not average out: what it took away is added (float64 emulation, B 256 and 2,048,
            # cosines 0.3 to 0.9: the gradient's error falls from 0.5e-3..1.7e-3 to 2e-6, before its own rounding).
            fine = narrow(weight - coarse.to(tl.float32), o.dtype, UPCAST)
            total = product(fine, o, total, PRECISION, UPCAST)
    return total


@triton.jit(do_not_specialize=["B", "P", "N", "start", "temperature", "margin"])
def contrast_columns(
    anchor, positive, negative, anchor_stride, positive_stride, negative_stride,
    anchor_ids, positive_ids, negative_ids, log_q, temperature,
    own, pull, log_factor, largest, grad, sums_out, B, P, N, start, margin,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    NEGATIVES: tl.constexpr, ANCHOR_IDS: tl.constexpr, POSITIVE_IDS: tl.constexpr, NEGATIVE_IDS: tl.constexpr,
    LOG_Q: tl.constexpr, NEGATIVE_LOG_Q: tl.constexpr, MARGIN: tl.constexpr, TENSOR: tl.constexpr,
    SECOND: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """One block of columns (positives, negatives; with SECOND, of anchors too) against one part of the other side.

    Grid (blocks, parts, blocks of E). Writes (parts, [B +] P + N, E) float32: gradients but for the own pair and the
    factor that all rows share. SCALED brings float16 weights up to 2^15, so that small ones keep their digits.
    """
    block, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    element = 0
    if E > BLOCK_E:
        element = tl.program_id(2) * BLOCK_E
    scale = LOG2E / temperature_of(temperature, TENSOR)
    shift = 0.0
    if SCALED:
        peak = tl.load(largest)
        if ROWS:
            peak = _largest(grad, pull, B, SECOND)
        shift = LIFT - tl.ceil(tl.log2(tl.where(peak > 0, peak, 1.0)))
        if SECOND:
            shift -= 1.0  # a pair's weight has two terms
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    positive_blocks = tl.cdiv(P, BLOCK_M)
    negative_blocks = 0
    if NEGATIVES:
        negative_blocks = tl.cdiv(N, BLOCK_M)
    columns_end = positive_blocks + negative_blocks
    each = tl.cdiv(tl.cdiv(B, BLOCK_N), parts)
    first, last = part * each, tl.minimum((part + 1) * each, tl.cdiv(B, BLOCK_N))
    anchors = 0
    if SECOND:
        anchors = B
    count, offset = P, anchors
    first_tile_row = block * BLOCK_M
    row = first_tile_row + tl.arange(0, BLOCK_M)
    if block < positive_blocks:
        tile = rows_of(positive, positive_stride, row, P, 0, E, BLOCK_E)
        total = _pulled(
            tile, positive, positive_stride, row, P, total, element, anchor, anchor_stride, first, last, B,
            own, log_factor, grad, anchor_ids, positive_ids, positive_ids, log_q, B, scale, margin, start, shift,
            first_tile_row, E, BLOCK_M, BLOCK_N, BLOCK_E, False, ANCHOR_IDS, POSITIVE_IDS, POSITIVE_IDS, True, LOG_Q,
            MARGIN, ROWS, SECOND, PRECISION, UPCAST,
        )
    elif block < columns_end:
        if NEGATIVES:
            first_tile_row = (block - positive_blocks) * BLOCK_M
            row = first_tile_row + tl.arange(0, BLOCK_M)
            count, offset = N, anchors + P
            tile = rows_of(negative, negative_stride, row, N, 0, E, BLOCK_E)
            total = _pulled(
                tile, negative, negative_stride, row, N, total, element, anchor, anchor_stride, first, last, B,
                own, log_factor, grad, anchor_ids, positive_ids, negative_ids, log_q + P, B, scale, margin, start,
                shift, first_tile_row, E, BLOCK_M, BLOCK_N, BLOCK_E, False, ANCHOR_IDS, POSITIVE_IDS, NEGATIVE_IDS,
                False, NEGATIVE_LOG_Q, MARGIN, ROWS, SECOND, PRECISION, UPCAST,
            )
    elif SECOND:
        first_tile_row = (block - columns_end) * BLOCK_M
        row = first_tile_row + tl.arange(0, BLOCK_M)
        count, offset = B, 0
        tile = rows_of(anchor, anchor_stride, row, B, 0, E, BLOCK_E)
        total = _pulled(
            tile, anchor, anchor_stride, row, B, total, element, positive, positive_stride, first, last, P,
            own, log_factor, grad, anchor_ids, positive_ids, positive_ids, log_q, B, scale, margin, start, shift,
            first_tile_row, E, BLOCK_M, BLOCK_N, BLOCK_E, True, ANCHOR_IDS, POSITIVE_IDS, POSITIVE_IDS, True, LOG_Q,
            MARGIN, ROWS, SECOND, PRECISION, UPCAST,
        )
        if NEGATIVES:
            further = tl.cdiv(N, BLOCK_N)
            each = tl.cdiv(further, parts)
            total = _pulled(
                tile, anchor, anchor_stride, row, B, total, element,
                negative, negative_stride, part * each, tl.minimum((part + 1) * each, further), N,
                own, log_factor, grad, anchor_ids, positive_ids, negative_ids, log_q + P, B, scale, margin, start,
                shift, first_tile_row, E, BLOCK_M, BLOCK_N, BLOCK_E, True, ANCHOR_IDS, POSITIVE_IDS, NEGATIVE_IDS,
                False, NEGATIVE_LOG_Q, MARGIN, ROWS, SECOND, PRECISION, UPCAST,
            )
    vectors = anchors + P + N
    e = element + tl.arange(0, BLOCK_E)
    out = (part.to(tl.int64) * vectors + offset + row)[:, None] * E + e[None, :]
    tl.store(sums_out + out, total * tl.exp2(-shift), mask=(row < count)[:, None] & (e < E)[None, :])


@triton.jit
def _added(parts_in, parts, vectors, offset, row, here, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sum over parts of a (parts, vectors, E) buffer's rows, in their order."""
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((row.shape[0], BLOCK_E), tl.float32)
    for part in range(parts):
        at = (vectors.to(tl.int64) * part + offset + row)[:, None] * E + e[None, :]
        total += tl.load(parts_in + at, mask=here[:, None] & (e < E)[None, :], other=0.0)
    return total


@triton.jit(do_not_specialize=["B", "P", "N", "start", "row_parts", "column_parts"])
def assemble(
    anchor, positive, negative, anchor_stride, positive_stride, negative_stride,
    means, row_parts_in, log_rest, pull, sums, grad, inverse,
    temperature, anchor_upstream, positive_upstream, norm, anchor_out, positive_out, negative_out, temperature_out,
    B, P, N, start, row_parts, column_parts,
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, LOSS: tl.constexpr, SECOND: tl.constexpr,
    ROWS: tl.constexpr, ANCHOR_UPSTREAM: tl.constexpr, POSITIVE_UPSTREAM: tl.constexpr, NORMALIZE: tl.constexpr,
    TEMPERATURE: tl.constexpr, MIN_NORM: tl.constexpr, UPCAST: tl.constexpr,
):
    """Each vector's whole gradient: the other vectors' part, the own pair's, upstream; then through the norm."""
    block = tl.program_id(0)
    anchor_blocks, positive_blocks = tl.cdiv(B, BLOCK), tl.cdiv(P, BLOCK)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    anchors = 0
    if SECOND:
        anchors = B
    vectors = anchors + P + N
    if block < anchor_blocks:
        row = block * BLOCK + tl.arange(0, BLOCK)
        here = row < B
        vector = rows_of(anchor, anchor_stride, row, B, 0, E, BLOCK_E).to(tl.float32)
        if LOSS:
            strength = _upstream(grad, pull, row, here, ROWS)
            shared = _shared(grad, inverse, ROWS)
            own = rows_of(positive, positive_stride, row + start, B + start, 0, E, BLOCK_E).to(tl.float32)
            if SECOND:
                strength += _upstream(grad, pull + B, row, here, ROWS)
                total = _added(sums, column_parts, vectors, 0, row, here, E, BLOCK_E)
                total -= strength[:, None] * own
            else:
                level = tl.load(log_rest + row, mask=here, other=0.0)
                level = tl.where(level == -float("inf"), 0.0, level)
                for part in range(row_parts):
                    at = B.to(tl.int64) * part + row
                    share = tl.exp2(tl.load(row_parts_in + at, mask=here, other=-float("inf")) - level)
                    mean = tl.load(
                        means + at[:, None] * E + e[None, :], mask=here[:, None] & (e < E)[None, :], other=0.0
                    )
                    total += share[:, None] * mean
                total = strength[:, None] * (total - own)
            total *= shared
            if TEMPERATURE:
                # dτ = −1/τ Σ_i q_i·dq_i
                along = tl.sum(tl.sum(tl.where(here[:, None], vector * total, 0.0), 1), 0)
                tl.store(temperature_out + block, -along / tl.load(temperature))
        if ANCHOR_UPSTREAM:
            total += rows_of(anchor_upstream, E, row, B, 0, E, BLOCK_E).to(tl.float32)
        count, offset, out = B, 0, anchor_out
    elif block < anchor_blocks + positive_blocks:
        row = (block - anchor_blocks) * BLOCK + tl.arange(0, BLOCK)
        here = row < P
        vector = rows_of(positive, positive_stride, row, P, 0, E, BLOCK_E).to(tl.float32)
        if LOSS:
            mine = row - start
            paired = (mine >= 0) & (mine < B)
            strength = _upstream(grad, pull, mine, paired, ROWS)
            if SECOND:
                strength += _upstream(grad, pull + B, mine, paired, ROWS)
            own = tl.load(
                anchor + mine.to(tl.int64)[:, None] * anchor_stride + e[None, :],
                mask=paired[:, None] & (e < E)[None, :],
                other=0.0,
            ).to(tl.float32)
            total = _added(sums, column_parts, vectors, anchors, row, here, E, BLOCK_E) - strength[:, None] * own
            total *= _shared(grad, inverse, ROWS)
        if POSITIVE_UPSTREAM:
            total += rows_of(positive_upstream, E, row, P, 0, E, BLOCK_E).to(tl.float32)
        count, offset, out = P, B, positive_out
    else:
        row = (block - anchor_blocks - positive_blocks) * BLOCK + tl.arange(0, BLOCK)
        here = row < N
        vector = rows_of(negative, negative_stride, row, N, 0, E, BLOCK_E).to(tl.float32)
        if LOSS:
            total = _added(sums, column_parts, vectors, anchors + P, row, here, E, BLOCK_E) * _shared(
                grad, inverse, ROWS
            )
        count, offset, out = N, B + P, negative_out
    if NORMALIZE:
        length = tl.load(norm + offset + row, mask=row < count, other=1.0)
        along = tl.where(length > MIN_NORM, tl.sum(vector * total, 1), 0.0)
        total = (total - vector * along[:, None]) / length[:, None]
    at = row.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty, UPCAST), mask=(row < count)[:, None] & (e < E)[None, :])
