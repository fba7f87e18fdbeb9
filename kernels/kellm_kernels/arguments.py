"""Tensors as kernels take them: rows' elements side by side, pointers, strides and counts in the order of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kellm_kernels.problem import AdapterWeights, Contrast, Vectors


def matrices(vectors: Vectors) -> tuple[Any, ...]:
    """The vectors and how far apart their rows are; no negatives are any pointer, never read."""
    given = [or_else(v, vectors.anchor) for v in vectors]
    return *given, *(v.stride(0) for v in given)


def columns(vectors: Vectors, problem: Contrast) -> tuple[Any, ...]:
    """The vectors, ids, log q and temperature, likewise."""
    by_column = (problem.anchor_ids, problem.positive_ids, problem.negative_ids, problem.log_q)
    given = [vectors.anchor if values is None else values.contiguous() for values in by_column]
    return *matrices(vectors), *given, problem.temperature


def counts(vectors: Vectors, problem: Contrast) -> tuple[int, int, int, int]:
    """B, P, N, and where the rows' own columns begin."""
    negatives = 0 if vectors.negatives is None else vectors.negatives.shape[0]
    return vectors.anchor.shape[0], vectors.positive.shape[0], negatives, problem.start


def with_rows(vectors: Vectors) -> Vectors:
    """`rows_together` of each."""
    anchor, positive, negatives = vectors
    return Vectors(
        rows_together(anchor), rows_together(positive), None if negatives is None else rows_together(negatives)
    )


def rows_together(tensor: Tensor) -> Tensor:
    """The tensor with each row's elements side by side; the rows themselves may lie apart."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(weights: AdapterWeights) -> AdapterWeights:
    """The matrices and biases, all elements side by side."""
    w1, b1, w2, b2 = (weight.contiguous() for weight in weights[:4])
    return weights._replace(w1=w1, b1=b1, w2=w2, b2=b2)


def empty(tensor: Tensor) -> Tensor:
    """A tensor like this one, its elements side by side."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def or_else(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or another where there is none: any pointer, never read."""
    return other if tensor is None else tensor


def three(tensors: Sequence[Any]) -> list[Any]:
    """The tensors, the last one repeated until there are three."""
    return [*tensors, *[tensors[-1]] * (3 - len(tensors))]


def strides_of(towers: Sequence[Tensor]) -> list[int]:
    """How far apart each tower's rows are."""
    return [x.stride(0) for x in three(towers)]


def lengths_of(towers: Sequence[Any]) -> list[int]:
    """How many rows each of three towers has, 0 where there is none."""
    return [*(x.shape[0] for x in towers), 0, 0][:3]


def dims_of(weights: AdapterWeights) -> dict[str, int]:
    """D, H and E by the kernels' names."""
    hidden, encoding = weights.w1.shape
    return {"D": encoding, "H": hidden, "E": weights.w2.shape[0]}
