"""What the kernels share: products in the right precision, the activation and its slope, exact small logarithms."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 rounded to `dtype`.

    UPCAST is for bfloat16 in the interpreter alone, whose cast truncates: here float32 is first rounded to what
    bfloat16 holds (to nearest, ties to even), so that the cast loses nothing.
    """
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b + total, (M, K) by (K, N), in float32.

    UPCAST is for bfloat16 in the interpreter alone, whose dot multiplies raw bits.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def activate(before, ACTIVATION: tl.constexpr):
    """act(before), float32; GELU is the exact one."""
    after = tl.maximum(before, 0.0)
    if ACTIVATION == "gelu":
        after = 0.5 * before * (1.0 + tl.math.erf(before * 0.7071067811865476))
    return after


@triton.jit
def slope(before, ACTIVATION: tl.constexpr):
    """act′(before), float32."""
    steepness = tl.where(before > 0.0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * before * before)
        steepness = 0.5 * (1.0 + tl.math.erf(before * 0.7071067811865476)) + before * density
    return steepness


@triton.jit
def log1p(t):
    """ln(1 + t) for t in [0, 1], to the last digits of float32: what 1 + t rounds away is given back."""
    u = 1.0 + t
    gone = u == 1.0
    return tl.where(gone, t, tl.log(u) * (t / tl.where(gone, 1.0, u - 1.0)))


@triton.jit
def rows_of(pointer, stride, rows, count, start, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Elements start to start + BLOCK_E of rows of a (count, E) matrix, 0 outside of it."""
    e = start + tl.arange(0, BLOCK_E)
    offsets = rows.to(tl.int64)[:, None] * stride + e[None, :]
    return tl.load(pointer + offsets, mask=(rows < count)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def similarities(
    tile, left, left_stride, left_rows, left_count, right, right_stride, right_rows, right_count,
    E: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Products of rows of one matrix with rows of another, (M, N); `tile` is the left rows if E is one block long."""
    total = tl.zeros((left_rows.shape[0], right_rows.shape[0]), tl.float32)
    if E <= BLOCK_E:
        b = rows_of(right, right_stride, right_rows, right_count, 0, E, BLOCK_E)
        total = product(tile, tl.trans(b), total, PRECISION, UPCAST)
    else:
        for start in range(0, E, BLOCK_E):
            a = rows_of(left, left_stride, left_rows, left_count, start, E, BLOCK_E)
            b = rows_of(right, right_stride, right_rows, right_count, start, E, BLOCK_E)
            total = product(a, tl.trans(b), total, PRECISION, UPCAST)
    return total
