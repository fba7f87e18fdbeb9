"""The adapter: a two-layer MLP from frozen encodings to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from kellm_kernels import ops
from kellm_kernels._checks import ACTIVATIONS, check_adapter, check_choice
from kellm_kernels._dispatch import choose_impl


def adapter_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: str = "gelu",
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Map encodings to embeddings: `z = act(x @ w1.T + b1) @ w2.T + b2`, then `z / max(‖z‖, 1e-12)`.

    Under autocast the products are in its dtype, as those of `nn.Linear` are; outside, all tensors have one dtype.

    Args:
        x: (..., D) floating; frozen encodings, though a gradient flows into them where they ask for one.
        w1: (H, D), as `nn.Linear` keeps it.
        b1: (H,).
        w2: (E, H).
        b2: (E,).
        activation: `gelu` (exact, by erf) or `relu`.
        normalize: divide each row by its L2 norm, which is taken in float32 at least.
        impl: `triton` (a GPU; D, H and E multiples of 8, E 512 at most), `torch` (anything), or `auto`: the first where
            it can.

    Returns:
        (..., E) in the dtype of the products.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, an impl that is unknown or cannot compute this.
        TypeError: dtypes that do not fit.
    """
    check_choice("activation", activation, ACTIVATIONS)
    dtype = check_adapter(x, w1, b1, w2, b2)
    chosen = choose_impl(impl, x.device, dtype, len(w2), *w1.shape)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, b1, w2, b2))
    flat = x.reshape(-1, x.shape[-1])
    z: Tensor = ops.run_adapt(flat, w1, b1, w2, b2, activation, normalize, dtype, chosen, keep)[0]
    return z.view(*x.shape[:-1], len(w2))
