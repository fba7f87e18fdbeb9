"""Which columns a row of the loss does not see, and the scale of its logits."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def temperature_of(temperature, TENSOR: tl.constexpr):
    """The temperature, which is a number or (TENSOR) where one stands."""
    value = temperature
    if TENSOR:
        value = tl.load(temperature)
    return value


@triton.jit
def take(pointer, index, mask, GIVEN: tl.constexpr):
    """Values at `index`, or 0 where the option is not given."""
    values = tl.zeros_like(index)
    if GIVEN:
        values = tl.load(pointer + index, mask=mask, other=0)
    return values


@triton.jit
def same(
    row_anchor, row_positive, column_anchor, column_positive,
    ANCHOR_IDS: tl.constexpr, POSITIVE_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr, PAIRED: tl.constexpr,
):
    """Where ids mask, given anchors' and positives' ids already broadcast against each other.

    PAIRED columns are positives, whose anchor is known; others are negatives, whose id stands in `column_positive`.
    """
    masked = row_anchor != row_anchor
    masked = masked | (column_positive != column_positive)
    if ANCHOR_IDS and PAIRED:
        masked = masked | (row_anchor == column_anchor)
    if ANCHOR_IDS and COLUMN_IDS:
        masked = masked | (row_anchor == column_positive)
    if POSITIVE_IDS and COLUMN_IDS:
        masked = masked | (row_positive == column_positive)
    return masked
