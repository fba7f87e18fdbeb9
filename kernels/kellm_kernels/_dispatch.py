"""Who computes: one rule for every public function."""

from __future__ import annotations

import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)

IMPLS = ("auto", "triton", "torch")
MAX_DIM = 512
"""The longest embedding that a kernel's registers hold."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_logged: set[tuple[str, str]] = set()


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype, embedding: int, *lengths: int) -> str:
    """`triton` or `torch`; an explicit impl is taken or refused, never replaced.

    Args:
        impl: as the caller gave it.
        device: of the tensors.
        dtype: of the products.
        embedding: E.
        lengths: H and D, where there is an adapter.

    Raises:
        ValueError: an unknown impl, or `triton` where it cannot compute this.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; accepted: {', '.join(map(repr, IMPLS))}")
    if impl == "torch":
        return impl
    obstacle = _obstacle(device, dtype, embedding, lengths, interpret=impl == "triton")
    if impl == "triton":
        if obstacle is not None:
            raise ValueError(f"impl='triton' cannot compute this: {obstacle}; impl='torch' can")
        return impl
    chosen = "triton" if obstacle is None else "torch"
    if not torch.compiler.is_compiling():
        _log_once(chosen, obstacle or f"{dtype} on {device.type}")
    return chosen


def _obstacle(
    device: torch.device, dtype: torch.dtype, embedding: int, lengths: tuple[int, ...], *, interpret: bool
) -> str | None:
    """Why Triton cannot compute this, or None."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type != "cuda" and not (interpret and device.type == "cpu" and _interpreted()):
        return f"it needs a GPU (or TRITON_INTERPRET=1, to debug on the CPU), and the tensors are on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes in bfloat16, float16 and float32, not in {str(dtype).removeprefix('torch.')}"
    if embedding > MAX_DIM:
        return f"embeddings are {embedding} long, {MAX_DIM} at most are accepted"
    for length in (embedding, *lengths):
        if length % 8:
            return f"embeddings, hidden layers and encodings are multiples of 8 long, and one is {length}"
    return None


def _interpreted() -> bool:
    from kellm_kernels import fused

    return fused.INTERPRETED


def _log_once(chosen: str, reason: str) -> None:
    if (chosen, reason) not in _logged:
        _logged.add((chosen, reason))
        logger.info("impl='auto' takes %s: %s", chosen, reason)
