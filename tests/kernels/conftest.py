"""What tests of the kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from .device import DEVICE

if DEVICE == "cuda":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms, see `poison`, ask for it


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that is not written before it is read is NaN: PyTorch fills what `empty` returns."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
