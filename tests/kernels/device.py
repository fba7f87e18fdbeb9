"""Where the kernels are tested: on a GPU where there is one, else in Triton's interpreter; and inputs put there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .oracle import Problem, adapter_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
"""Relative error of losses and gradients, inputs being the same rounded ones: a few roundings of the dtype."""


def device_of(impl: str) -> str:
    return DEVICE if impl == "triton" else "cpu"


def on(device: str, value: Any) -> Any:
    """A tensor as a leaf of its own on the device; anything else as it is."""
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def problem_on(device: str, given: Problem) -> Problem:
    """The same problem, its leaves anew on the device."""
    anchor, positive, negatives = (on(device, tensor) for tensor in given[:3])
    return Problem(anchor, positive, negatives, {name: on(device, value) for name, value in given.options.items()})


def weights_on(
    device: str, encoding: int, hidden: int, embedding: int, *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """An adapter's W1 (H, D), b1 (H,), W2 (E, H) and b2 (E,) as leaves on the device."""
    return [
        weight.detach().to(device).requires_grad_()
        for weight in adapter_weights(encoding, hidden, embedding, dtype=dtype)
    ]
