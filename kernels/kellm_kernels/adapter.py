"""The adapter: a two-layer MLP from frozen encodings to embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kellm_kernels._dispatch import check_impl

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}
_MIN_NORM = 1e-12


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

    Args:
        x: (..., D) floating; frozen encodings, though a gradient flows into them where they ask for one.
        w1: (H, D), as `nn.Linear` keeps it.
        b1: (H,).
        w2: (E, H).
        b2: (E,).
        activation: `gelu` (exact, by erf) or `relu`.
        normalize: divide each row by its L2 norm, which is taken in float32 at least.
        impl: `auto` or `torch`.

    Returns:
        (..., E) in the dtype of the matrix products (x's own outside autocast).

    Raises:
        ValueError: shapes that do not fit, or an unknown activation or impl.
    """
    check_impl(impl)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; accepted: {', '.join(map(repr, _ACTIVATIONS))}")
    if w1.dim() != 2 or w2.dim() != 2 or x.dim() < 1:
        raise ValueError(f"x {_shape(x)}, w1 {_shape(w1)}, w2 {_shape(w2)}: expected (..., D), (H, D) and (E, H)")
    if (x.shape[-1], w2.shape[1], tuple(b1.shape), tuple(b2.shape)) != (
        w1.shape[1],
        w1.shape[0],
        (w1.shape[0],),
        (w2.shape[0],),
    ):
        raise ValueError(
            f"x {_shape(x)}, w1 {_shape(w1)}, b1 {_shape(b1)}, w2 {_shape(w2)}, b2 {_shape(b2)} do not fit: "
            "expected (..., D), (H, D), (H,), (E, H) and (E,)"
        )
    z = functional.linear(_ACTIVATIONS[activation](functional.linear(x, w1, b1)), w2, b2)
    if not normalize:
        return z
    wide = z if z.dtype == torch.float64 else z.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(_MIN_NORM)
    unit: Tensor = (wide / norm).to(z.dtype)
    return unit


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
