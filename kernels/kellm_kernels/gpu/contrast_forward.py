"""InfoNCE forward: `contrast_rows` and `contrast_finish`.

Similarities are kept in base 2: s₂ = q·k · log₂e/τ − log₂ q_j, so that exp2 gives e_ij. Names follow `reference`: own
is q_i·k_i, log_rest is log₂ r⁻, and pull_i = w_i (1 − p_ii) / (τ · directions), a row's gradient for unit upstream.
Sums run in a fixed order and nothing is added atomically: the same input gives the same bits. Vectors longer than
BLOCK_E are summed a block of their elements by each program, which computes the similarities for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kellm_kernels.gpu.columns import LOG2E, same, take, temperature_of
from kellm_kernels.gpu.tiles import log1p, narrow, product, rows_of, similarities

LN2 = tl.constexpr(0.6931471805599453)
HEADROOM = tl.constexpr(80.0)
"""log₂ of the largest e_ij where logits are bounded: sums stay below 2^127, and the least, 200 lower, above 2^-126."""
LIFT = tl.constexpr(15.0)
"""log₂ of the largest float16 weight: it is in range, and what is 2^29 times smaller has all its digits."""


@triton.jit
def _stream(
    tile, vectors, vectors_stride, vectors_count, own, row, row_anchor, row_positive, log_peak, total, mean, element,
    columns, stride, column_anchor_ids, column_ids, log_q, first, last, count, scale, margin, start, first_row,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ANCHOR_IDS: tl.constexpr, POSITIVE_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr, PAIRED: tl.constexpr,
    LOG_Q: tl.constexpr, MARGIN: tl.constexpr, BOUNDED: tl.constexpr, MEANS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Online softmax over column blocks first..last: running log₂ peak, sum, and (unnormalised) mean of the columns.

    BOUNDED: no logit is more than HEADROOM above `log_peak` as it is handed over, which stays: nothing is scaled anew.
    """
    BY_PAIR: tl.constexpr = (ANCHOR_IDS and (PAIRED or COLUMN_IDS)) or (POSITIVE_IDS and COLUMN_IDS) or MARGIN
    for block in range(first, last):
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < count
        similarity = similarities(
            tile,
            vectors,
            vectors_stride,
            row,
            vectors_count,
            columns,
            stride,
            column,
            count,
            E,
            BLOCK_E,
            PRECISION,
            UPCAST,
        )
        if BY_PAIR:
            column_anchor = take(column_anchor_ids, column, inside, ANCHOR_IDS and PAIRED)
            column_positive = take(column_ids, column, inside, COLUMN_IDS)
            masked = ~inside[None, :] | same(
                row_anchor[:, None], row_positive[:, None], column_anchor[None, :], column_positive[None, :],
                ANCHOR_IDS, POSITIVE_IDS, COLUMN_IDS, PAIRED,
            )
            if PAIRED:
                masked = masked | (column[None, :] == row[:, None] + start)
            if MARGIN:
                masked = masked | (similarity > own[:, None] + margin)
            similarity = tl.where(masked, -float("inf"), similarity)
        else:
            edge = (block + 1) * BLOCK_N > count
            if PAIRED:
                edge = edge | ((block * BLOCK_N < first_row + BLOCK_M) & ((block + 1) * BLOCK_N > first_row))
            if edge:
                masked = ~inside[None, :]
                if PAIRED:
                    masked = masked | (column[None, :] == row[:, None] + start)
                similarity = tl.where(masked, -float("inf"), similarity)
        logit = similarity * scale
        if LOG_Q:
            logit -= tl.load(log_q + column, mask=inside, other=0.0).to(tl.float32)[None, :] * LOG2E
        if BOUNDED:
            e = tl.exp2(logit - log_peak[:, None])
            total += tl.sum(e, 1)
        else:
            peak = tl.maximum(log_peak, tl.max(logit, 1))
            level = tl.where(peak == -float("inf"), 0.0, peak)
            shrink = tl.exp2(log_peak - level)
            if tile.dtype == tl.float16:
                level -= LIFT
            e = tl.exp2(logit - level[:, None])
            total = total * shrink + tl.sum(e, 1)
            if MEANS:
                mean = mean * shrink[:, None]
            log_peak = peak
        if MEANS:
            k = rows_of(columns, stride, column, count, element, E, BLOCK_E)
            mean = product(narrow(e, k.dtype, UPCAST), k, mean, PRECISION, UPCAST)
    return log_peak, total, mean


@triton.jit(do_not_specialize=["B", "P", "N", "start", "temperature", "margin"])
def contrast_rows(
    anchor, positive, negative, anchor_stride, positive_stride, negative_stride,
    anchor_ids, positive_ids, negative_ids, log_q, temperature,
    own_out, parts_out, means_out, B, P, N, start, margin,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    NEGATIVES: tl.constexpr, ANCHOR_IDS: tl.constexpr, POSITIVE_IDS: tl.constexpr, NEGATIVE_IDS: tl.constexpr,
    LOG_Q: tl.constexpr, NEGATIVE_LOG_Q: tl.constexpr, MARGIN: tl.constexpr, TENSOR: tl.constexpr,
    SECOND: tl.constexpr, BOUNDED: tl.constexpr, MEANS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """One block of rows against one part of the columns: its log₂ sum, and its columns averaged under their softmax.

    Grid (row blocks, parts · blocks of E, directions). With SECOND, programs of the second direction have positives as
    rows and anchors as columns, no negatives and no log q.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    part, parts = tl.program_id(1) // chunks, tl.num_programs(1) // chunks
    element = tl.program_id(1) % chunks * BLOCK_E
    direction = tl.program_id(2)
    here = row < B
    scale = LOG2E / temperature_of(temperature, TENSOR)
    mine = row + start
    row_anchor = take(anchor_ids, mine, here, ANCHOR_IDS)
    row_positive = take(positive_ids, mine, here, POSITIVE_IDS)
    first_row = tl.program_id(0) * BLOCK_M + start
    log_peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if BOUNDED:
        log_peak = tl.zeros((BLOCK_M,), tl.float32) + (scale - HEADROOM)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    q = rows_of(anchor, anchor_stride, row, B, 0, E, BLOCK_E)
    k = rows_of(positive, positive_stride, mine, B + start, 0, E, BLOCK_E)
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    if E > BLOCK_E:
        for e_start in range(BLOCK_E, E, BLOCK_E):
            further_q = rows_of(anchor, anchor_stride, row, B, e_start, E, BLOCK_E)
            further_k = rows_of(positive, positive_stride, mine, B + start, e_start, E, BLOCK_E)
            own += tl.sum(further_q.to(tl.float32) * further_k.to(tl.float32), 1)
    blocks = tl.cdiv(P, BLOCK_N)
    if direction == 0:
        everything = blocks
        if NEGATIVES:
            everything += tl.cdiv(N, BLOCK_N)
        each = tl.cdiv(everything, parts)
        first, last = part * each, tl.minimum((part + 1) * each, everything)
        log_peak, total, mean = _stream(
            q, anchor, anchor_stride, B, own, row, row_anchor, row_positive, log_peak, total, mean, element,
            positive, positive_stride, anchor_ids, positive_ids, log_q,
            first, tl.minimum(last, blocks), P, scale, margin, start, first_row, E, BLOCK_M, BLOCK_N, BLOCK_E,
            ANCHOR_IDS, POSITIVE_IDS, POSITIVE_IDS, True, LOG_Q, MARGIN, BOUNDED, MEANS, PRECISION, UPCAST,
        )
        if NEGATIVES:
            log_peak, total, mean = _stream(
                q, anchor, anchor_stride, B, own, row, row_anchor, row_positive, log_peak, total, mean, element,
                negative, negative_stride, anchor_ids, negative_ids, log_q + P,
                tl.maximum(first - blocks, 0), last - blocks, N, scale, margin, start, first_row,
                E, BLOCK_M, BLOCK_N, BLOCK_E, ANCHOR_IDS, POSITIVE_IDS, NEGATIVE_IDS, False, NEGATIVE_LOG_Q, MARGIN,
                BOUNDED, MEANS, PRECISION, UPCAST,
            )
        if tl.program_id(1) == 0:
            tl.store(own_out + row, own, mask=here)
    elif SECOND:
        each = tl.cdiv(blocks, parts)
        # Roles are swapped: the column's anchor is compared with the row's positive.
        log_peak, total, mean = _stream(
            k, positive, positive_stride, P, own, row, row_positive, row_anchor, log_peak, total, mean, element,
            anchor, anchor_stride, positive_ids, anchor_ids, log_q,
            part * each, tl.minimum((part + 1) * each, blocks), P, scale, margin, start, first_row,
            E, BLOCK_M, BLOCK_N, BLOCK_E, POSITIVE_IDS, ANCHOR_IDS, ANCHOR_IDS, True, False, MARGIN,
            BOUNDED, False, PRECISION, UPCAST,
        )
    if q.dtype == tl.float16:
        log_peak -= LIFT
    none = total == 0.0  # every column is masked; a NaN is not, and goes on
    total = tl.where(none, 1.0, total)
    out = (part * tl.num_programs(2) + direction).to(tl.int64) * B + row
    if element == 0:
        tl.store(parts_out + out, tl.where(none, -float("inf"), log_peak + tl.log2(total)), mask=here)
    if MEANS:
        mean = mean / total[:, None]
        e = element + tl.arange(0, BLOCK_E)
        offsets = (part.to(tl.int64) * B + row)[:, None] * E + e[None, :]
        tl.store(means_out + offsets, mean, mask=here[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["B", "start", "temperature", "parts"])
def contrast_finish(
    own, parts_in, log_q, sample_weight, temperature,
    loss, log_rest_out, pull_out, log_factor_out, inverse_out, largest_out, B, start, parts,
    DIRECTIONS: tl.constexpr, LOG_Q: tl.constexpr, WEIGHTED: tl.constexpr, TENSOR: tl.constexpr,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):
    """Put the parts of each row's sum together, and reduce: one program for a scalar, any number for `none`."""
    scale = LOG2E / temperature_of(temperature, TENSOR)
    losses = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(B, BLOCK), tl.num_programs(0)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        here = row < B
        weight = tl.where(here, 1.0, 0.0)
        if WEIGHTED:
            weight = tl.load(sample_weight + row, mask=here, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for direction in tl.static_range(DIRECTIONS):
            logit = tl.load(own + row, mask=here, other=0.0) * scale
            if LOG_Q and direction == 0:
                logit -= tl.load(log_q + row + start, mask=here, other=0.0).to(tl.float32) * LOG2E
            peak = tl.full((BLOCK,), -float("inf"), tl.float32)
            for part in range(parts):
                at = B.to(tl.int64) * (part * DIRECTIONS + direction) + row
                peak = tl.maximum(peak, tl.load(parts_in + at, mask=here, other=-float("inf")))
            level = tl.where(peak == -float("inf"), 0.0, peak)
            rest = tl.zeros((BLOCK,), tl.float32)
            for part in range(parts):
                at = B.to(tl.int64) * (part * DIRECTIONS + direction) + row
                rest += tl.exp2(tl.load(parts_in + at, mask=here, other=-float("inf")) - level)
            none = rest == 0.0
            log_rest = tl.where(none, -float("inf"), level + tl.log2(tl.where(none, 1.0, rest)))
            over = log_rest - logit
            # log(1 + 2^over), either way round so that the power is at most 1
            small = tl.exp2(-tl.abs(over))
            total += tl.maximum(over, 0.0) * LN2 + log1p(small)
            missed = tl.where(over > 0, 1.0, small) / (1.0 + small)
            at = B.to(tl.int64) * direction + row
            pull = weight * missed * (scale / (LOG2E * DIRECTIONS))
            largest = tl.maximum(largest, tl.where(here, pull, 0.0))
            tl.store(log_rest_out + at, log_rest, mask=here)
            tl.store(pull_out + at, pull, mask=here)
            nothing = pull == 0.0  # no pair weighs anything; a NaN is not 0, and goes on
            log_factor = tl.log2(tl.where(nothing, 1.0, pull)) - log_rest
            tl.store(log_factor_out + at, tl.where(nothing, -float("inf"), log_factor), mask=here)
        total = weight * total / DIRECTIONS
        if REDUCTION == "none":
            tl.store(loss + row, total, mask=here)
        losses += tl.where(here, total, 0.0)
        weights += weight
    if tl.program_id(0) == 0:
        inverse = 1.0
        if REDUCTION == "mean":
            weight_sum = tl.sum(weights, 0)
            inverse = tl.where(weight_sum == 0, 0.0, 1.0 / tl.where(weight_sum == 0, 1.0, weight_sum))
        tl.store(inverse_out, inverse)
        tl.store(largest_out, tl.max(largest, 0))
        if REDUCTION != "none":
            tl.store(loss, tl.sum(losses, 0) * inverse)
