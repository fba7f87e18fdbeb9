"""The adapter and InfoNCE in one: the training hot path."""

from __future__ import annotations

import torch
from torch import Tensor

from kellm_kernels import ops
from kellm_kernels._checks import ACTIVATIONS, REDUCTIONS, check_adapter, check_choice, check_temperature, check_vectors
from kellm_kernels._dispatch import choose_impl
from kellm_kernels.contrastive import loss_extras


def adapter_info_nce(
    x: Tensor,
    x_pos: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    x_neg: Tensor | None = None,
    activation: str = "gelu",
    normalize: bool = True,
    temperature: Tensor | float = 0.03,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    sample_weight: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Adapt anchors, positives and negatives, and contrast them, with nothing of size (B, B) or kept twice in between.

    Equals `z, z_pos, z_neg = (adapter_mlp(v, w1, b1, w2, b2) for v in (x, x_pos, x_neg))` followed by
    `info_nce(z, z_pos, negatives=z_neg)`. Embeddings are returned so that a second loss may use them: gradients flow
    through all three results.

    Args:
        x: (B, D) encodings of the anchors.
        x_pos: (B, D) encodings of their positives.
        w1: as in `adapter_mlp`; likewise b1, w2, b2, `activation` and `normalize`.
        b1: likewise.
        w2: likewise.
        b2: likewise.
        x_neg: (N, D) encodings of negatives that all anchors share.
        activation: likewise.
        normalize: likewise.
        temperature: as in `info_nce`; likewise all that follow.
        anchor_ids: likewise.
        positive_ids: likewise.
        negative_ids: likewise.
        log_q: likewise.
        sample_weight: likewise.
        margin: likewise.
        symmetric: likewise.
        reduction: likewise.
        impl: likewise, D and H being multiples of 8 as well.

    Returns:
        The loss, () or (B,) for `none`, in float32 (float64 for float64 products); z (B, E) and z_pos (B, E) in the
        products' dtype.

    Raises:
        ValueError: shapes, devices, values or an impl that do not fit.
        TypeError: dtypes that do not fit.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_vectors("x", x, "x_pos", x_pos, same_rows=True)
    dtype = check_adapter(x, w1, b1, w2, b2)
    x_neg, extras = loss_extras(
        x_pos, x_neg, anchor_ids, positive_ids, negative_ids, log_q, sample_weight, margin, rows=len(x)
    )
    learned, constant = check_temperature(temperature, x)
    chosen = choose_impl(impl, x.device, dtype, len(w2), *w1.shape)
    inputs = (x, x_pos, x_neg, w1, b1, w2, b2, learned)
    keep = torch.is_grad_enabled() and any(given is not None and given.requires_grad for given in inputs)
    loss, z, z_pos, *_ = ops.run_adapt_contrast(
        *inputs, *extras, activation, normalize, dtype, constant, margin, symmetric, reduction, chosen, keep
    )
    return loss, z, z_pos
