"""InfoNCE in PyTorch, streamed over blocks of rows and recomputed in backward.

With s_ij = q_i·k_j / τ and e_ij = exp(s_ij), negatives of row i being all unmasked j ≠ i:

    r⁻_i   = Σ_{j≠i} e_ij                                  streamed; kept as its logarithm
    loss_i = log1p(r⁻_i / e_ii) = log(1 + exp(log r⁻_i − s_ii))
    p_ij   = exp(s_ij − s_ii − loss_i),   1 − p_ii = r⁻_i / (r⁻_i + e_ii)
    dq_i   = g_i/τ [ Σ_{j≠i} p_ij k_j − (1 − p_ii) k_i ]
    dk_j   = 1/τ [ Σ_{i≠j} g_i p_ij q_i − g_j (1 − p_jj) q_j ]

The usual form Σ_j p_ij k_j − k_i subtracts two nearly equal vectors once p_ii is near 1; here the own positive never
enters the sum, so nothing cancels. s_ii comes from a row dot of its own.

Extra memory: two (rows, B) blocks of `_BLOCK_ELEMENTS` each, the float32 gradients, two (B,) vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: near a core's L2, and small beside 16·B·E bytes from B = 16,384 on


def info_nce_rows(
    anchor: Tensor,
    positive: Tensor,
    temperature: float,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    block_rows: int | None = None,
) -> Tensor:
    """Per-row InfoNCE loss, (B,) float32 or float64; arguments as checked by `info_nce`.

    Args:
        block_rows: rows computed at once; None takes what fits `_BLOCK_ELEMENTS`.
    """
    rows = block_rows or max(1, _BLOCK_ELEMENTS // anchor.shape[0])
    # torch declares no types for Function.apply
    loss: Tensor = _InfoNCE.apply(anchor, positive, temperature, anchor_ids, positive_ids, rows)  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        positive: Tensor,
        temperature: float,
        anchor_ids: Tensor | None,
        positive_ids: Tensor | None,
        block_rows: int,
    ) -> Tensor:
        with torch.autocast(anchor.device.type, enabled=False):
            q, k = _wide(anchor), _wide(positive)
            own = (q * k).sum(1) / temperature
            log_rest = torch.empty_like(own)
            for start in range(0, len(q), block_rows):
                stop = min(start + block_rows, len(q))
                logits = _block(q, k, start, stop, temperature, anchor_ids, positive_ids)
                log_rest[start:stop] = torch.logsumexp(logits, dim=1)
            loss = torch.logaddexp(torch.zeros_like(own), log_rest - own)
        ctx.save_for_backward(anchor, positive, own, log_rest, anchor_ids, positive_ids)
        ctx.temperature, ctx.block_rows = temperature, block_rows
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchor, positive, own, log_rest, anchor_ids, positive_ids = ctx.saved_tensors
        with torch.autocast(anchor.device.type, enabled=False):
            q, k = _wide(anchor), _wide(positive)
            log_all = torch.logaddexp(own, log_rest)
            scale = grad.to(q.dtype) / ctx.temperature
            pull = (scale * torch.exp(log_rest - log_all))[:, None]
            want_q, want_k = ctx.needs_input_grad[:2]
            grad_q = -pull * k if want_q else None
            grad_k = -pull * q if want_k else None
            for start in range(0, len(q), ctx.block_rows):
                stop = min(start + ctx.block_rows, len(q))
                weights = _block(q, k, start, stop, ctx.temperature, anchor_ids, positive_ids)
                weights.sub_(log_all[start:stop, None]).exp_().mul_(scale[start:stop, None])
                if grad_q is not None:
                    grad_q[start:stop].addmm_(weights, k)
                if grad_k is not None:
                    grad_k.addmm_(weights.T, q[start:stop])
        narrow_q = grad_q.to(anchor.dtype) if grad_q is not None else None
        narrow_k = grad_k.to(positive.dtype) if grad_k is not None else None
        return narrow_q, narrow_k, None, None, None, None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _block(
    q: Tensor,
    k: Tensor,
    start: int,
    stop: int,
    temperature: float,
    anchor_ids: Tensor | None,
    positive_ids: Tensor | None,
) -> Tensor:
    """Logits of rows start..stop against all columns, −inf at the own positive and where ids mask: (rows, B)."""
    logits = (q[start:stop] / temperature) @ k.T
    logits.diagonal(start).fill_(-torch.inf)
    if anchor_ids is not None:
        logits.masked_fill_(anchor_ids[start:stop, None] == anchor_ids, -torch.inf)
    if positive_ids is not None:
        logits.masked_fill_(positive_ids[start:stop, None] == positive_ids, -torch.inf)
        if anchor_ids is not None:
            logits.masked_fill_(anchor_ids[start:stop, None] == positive_ids, -torch.inf)
    return logits
