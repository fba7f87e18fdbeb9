"""What is to be computed, as every implementation is handed it: checked, and with nothing left to choose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIN_NORM = 1e-12
"""Lengths below it count as it, as in `functional.normalize`."""


class Vectors(NamedTuple):
    """What is contrasted: one dtype, one device."""

    anchor: Tensor
    """(B, E)"""
    positive: Tensor
    """(P, E), P ≥ B"""
    negatives: Tensor | None
    """(N, E), N ≥ 1"""


class Contrast(NamedTuple):
    """The loss's options: B anchors are its rows, P positives and N negatives its columns."""

    temperature: Tensor | float
    """> 0; a tensor is 0-dimensional and float32, or float64 for float64 vectors."""
    anchor_ids: Tensor | None = None
    """(P,) integers: the anchor that each positive belongs to."""
    positive_ids: Tensor | None = None
    """(P,) integers."""
    negative_ids: Tensor | None = None
    """(N,) integers."""
    log_q: Tensor | None = None
    """(P,) or (P + N,) floating."""
    sample_weight: Tensor | None = None
    """(B,) floating."""
    margin: float | None = None
    symmetric: bool = False
    """Only where P = B."""
    start: int = 0
    """Row i's own column is start + i: the rows are a part of a larger batch, all of whose positives are columns."""
    reduction: str = "mean"
    unit: bool = False
    """Vectors are known to be of length 1, or 0."""

    @property
    def directions(self) -> int:
        """Softmaxes over the same similarities."""
        return 2 if self.symmetric else 1


WeightGrads = tuple[Tensor, Tensor, Tensor, Tensor]
"""Gradients of w1, b1, w2, b2."""


class AdapterWeights(NamedTuple):
    """The adapter: its weights, and what is done between and after the products."""

    w1: Tensor
    """(H, D)"""
    b1: Tensor
    """(H,)"""
    w2: Tensor
    """(E, H)"""
    b2: Tensor
    """(E,)"""
    activation: str
    normalize: bool
    dtype: torch.dtype
    """Of the products and of the embeddings."""


class Rows(NamedTuple):
    """What the loss leaves for backward, beside its inputs."""

    own: Tensor
    """(B,) similarity with the own positive, float32 or float64."""
    log_rest: Tensor
    """(directions, B) logarithm of the sum over negatives; the unit is the implementation's."""
    pull: Tensor
    """(directions, B) weight · (1 − p_ii) / (τ · directions); (0,) where backward computes it anew."""
    log_factor: Tensor
    """(directions, B) logarithm of pull over that sum, which makes of a pair's logit its weight; (0,) likewise."""
    largest: Tensor
    """() the largest pull, unless the reduction is `none`; (0,) likewise."""
    inverse_weight: Tensor
    """() what a mean multiplies by; 1 for the other reductions."""
    means: Tensor
    """(S, B, E) negatives averaged under their softmax, in S parts; (0,) likewise."""
    parts: Tensor
    """(S, 1, B) logarithm of each part of the sum; (0,) likewise."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor as `wide_dtype`; itself where it is that already."""
    return tensor.to(wide_dtype(tensor.dtype))
