"""The contrastive loss as a module that a trainer imports."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kellm_features.training.adapter import Activation
from kellm_features.training.gather import check_sizes, info_nce_over_ranks, world_size
from kellm_features.training.mlp import NotMlp, find_mlp
from kellm_kernels import adapter_info_nce, adapter_mlp, info_nce

logger = logging.getLogger(__name__)

Reduction = Literal["sum", "mean", "none"]

_logged: set[tuple[str, str]] = set()


class AdapterInfoNCE(nn.Module):
    """Adapt anchors and their positives, and contrast each positive with the others of the batch (KELLMRec Eq. 3).

    Eq. 3 as printed cancels to (B−1)·Σ v·v⁺/τ, whose minimum pushes positives apart; this is the InfoNCE that it
    stands for, with the positive in the denominator. `kellm_kernels.info_nce` states it as an eager expression.

    A module that is a two-layer MLP (`Adapter`, `nn.Sequential(Linear, GELU, Linear)`, one's own of two Linear layers
    with exact GELU or ReLU between, its output normalised or not) is computed together with the loss, by
    `kellm_kernels.adapter_info_nce`. Any other (with dropout on, hooks, parametrizations; a wrapper) is called for each
    tower, and a line at INFO says why once. Under `torch.compile`, one's own is taken as what an earlier call found.

    To train on several GPUs, let DistributedDataParallel wrap the module that holds the adapter and calls this one in
    its forward. An adapter that is wrapped itself is called for each tower, and must not have its buffers broadcast in
    each call: the second would change what backward needs of the first, which PyTorch may refuse.

    With `gather`, the other ranks' positives and negatives are negatives too. The average over ranks of the loss is
    then the loss of the whole batch, and the gradients that DistributedDataParallel averages are its gradients. That
    holds for `mean`, where weights are divided by their sum over all ranks, and for `sum`; `none` gives this rank's
    rows, whose mean follows the same rule. Ranks must have equal batches, which each call that is not compiled
    checks (and waits for the device to do so), and all of them must run backward.

    Args:
        temperature: > 0; the paper's best is 0.03. A tensor of one number becomes a parameter and learns; an
            `nn.Parameter` is taken as it is.
        margin: as in `info_nce`; likewise `symmetric`.
        symmetric: likewise.
        reduction: `mean` over anchors, `sum` (the printed form, whose weight of 0.004 goes with it), or `none`.
        activation: of the modules that this is called with, `gelu` or `relu`; those that compare otherwise are refused.
            None: whatever the comparison finds.
        normalize: likewise.
        gather: over W ranks of the default process group, columns are all W·B positives and W·N negatives.
        impl: of `kellm_kernels.info_nce` and `adapter_info_nce`.
    """

    def __init__(
        self,
        *,
        temperature: Tensor | float = 0.03,
        margin: float | None = None,
        symmetric: bool = False,
        reduction: Reduction = "mean",
        activation: Activation | None = None,
        normalize: bool | None = None,
        gather: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            temperature = nn.Parameter(temperature.detach().clone())
        self.temperature = temperature
        self.margin = margin
        self.symmetric = symmetric
        self.reduction: Reduction = reduction
        self.activation: Activation | None = activation
        self.normalize = normalize
        self.gather = gather
        self.impl = impl

    def forward(
        self,
        adapter: Callable[[Tensor], Tensor],
        x: Tensor,
        x_pos: Tensor,
        *,
        x_neg: Tensor | None = None,
        anchor_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        log_q: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and both sides adapted, so that a second loss may use them.

        Args:
            adapter: maps (B, D) encodings to (B, E) embeddings.
            x: (B, D) encodings of the anchors.
            x_pos: (B, D) encodings of their positives.
            x_neg: (N, D) encodings of negatives that all anchors share.
            anchor_ids: (B,) integers; columns that are false negatives by id are masked.
            positive_ids: (B,) integers in the same id space.
            negative_ids: (N,) integers in the same id space.
            log_q: (B,) or (B + N,) log of each column's chance to be drawn, as in `info_nce`.
            sample_weight: (B,) ≥ 0.

        Returns:
            loss (scalar, or (B,) for `none`), z (B, E), z_pos (B, E).

        Raises:
            ValueError: `activation` or `normalize` is not what the module computes; batches of ranks differ; what
                `adapter_info_nce` refuses.
            RuntimeError: `gather` without a process group.
        """
        labels: dict[str, Any] = {
            "anchor_ids": anchor_ids,
            "positive_ids": positive_ids,
            "negative_ids": negative_ids,
            "log_q": log_q,
            "sample_weight": sample_weight,
        }
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "margin": self.margin,
            "symmetric": self.symmetric,
            "reduction": self.reduction,
            "impl": self.impl,
        }
        gathered = self.gather and world_size() > 1
        if gathered and not torch.compiler.is_compiling():
            check_sizes(x.device, x=x, x_pos=x_pos, x_neg=x_neg, **labels)
        mlp = self._mlp(adapter)
        if mlp is not None and not gathered:
            return adapter_info_nce(x, x_pos, **mlp, x_neg=x_neg, **labels, **options)
        adapt: Callable[[Tensor], Tensor] = adapter
        if mlp is not None:
            adapt = partial(adapter_mlp, **mlp, impl=self.impl)
        z, z_pos = adapt(x), adapt(x_pos)
        z_neg = None if x_neg is None else adapt(x_neg)
        contrast = info_nce_over_ranks if gathered else info_nce
        return contrast(z, z_pos, negatives=z_neg, **labels, **options), z, z_pos

    def _mlp(self, adapter: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
        """What `adapter` computes, as arguments of `adapter_mlp`; None for a call of it."""
        found = find_mlp(adapter)
        name = type(adapter).__name__
        told = {"activation": self.activation, "normalize": self.normalize}
        told = {option: value for option, value in told.items() if value is not None}
        if isinstance(found, NotMlp):
            if told and found.compared:
                raise ValueError(f"{_given(told)} was given for {name}, and {found.reason}: leave out what was given")
            if not torch.compiler.is_compiling():
                _log_once(name, found.reason)
            return None
        form = {"activation": found.activation, "normalize": found.normalize}
        if any(form[option] != value for option, value in told.items()):
            raise ValueError(f"{_given(told)} was given for {name}, which computes {_given(form)}")
        w1, b1, w2, b2 = found.weights
        return {"w1": w1, "b1": b1, "w2": w2, "b2": b2, **form}

    def extra_repr(self) -> str:
        """The options, for `print(module)`."""
        names = ("margin", "symmetric", "reduction", "activation", "normalize", "gather", "impl")
        options = {name: getattr(self, name) for name in names}
        with torch.no_grad():
            return _given({"temperature": float(self.temperature), **options})


def _given(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _log_once(name: str, reason: str) -> None:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.info("%s is called, and not computed together with the loss: %s", name, reason)
