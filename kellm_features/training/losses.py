"""The contrastive loss as a module that a trainer imports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from kellm_kernels import info_nce

Reduction = Literal["sum", "mean", "none"]


class AdapterInfoNCE(nn.Module):
    """Adapt anchors and their positives, and contrast each positive with the others of the batch (KELLMRec Eq. 3).

    Eq. 3 as printed cancels to (B−1)·Σ v·v⁺/τ, whose minimum pushes positives apart; this is the InfoNCE that it
    stands for, with the positive in the denominator. `kellm_kernels.info_nce` states it as an eager expression.

    Args:
        temperature: > 0; the paper's best is 0.03.
        reduction: `mean` over anchors, `sum` (the printed form, whose weight of 0.004 goes with it), or `none`.
        impl: of `kellm_kernels.info_nce`.
    """

    def __init__(self, *, temperature: float = 0.03, reduction: Reduction = "mean", impl: str = "auto") -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.impl = impl

    def forward(
        self,
        adapter: Callable[[Tensor], Tensor],
        x: Tensor,
        x_pos: Tensor,
        *,
        anchor_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and both sides adapted, so that a second loss may use them.

        Args:
            adapter: maps (B, D) encodings to (B, E) embeddings.
            x: (B, D) encodings of the anchors.
            x_pos: (B, D) encodings of their positives.
            anchor_ids: (B,) integers; columns that are false negatives by id are masked.
            positive_ids: (B,) integers in the same id space.

        Returns:
            loss (scalar, or (B,) for `none`), z (B, E), z_pos (B, E).
        """
        z, z_pos = adapter(x), adapter(x_pos)
        loss = info_nce(
            z,
            z_pos,
            temperature=self.temperature,
            anchor_ids=anchor_ids,
            positive_ids=positive_ids,
            reduction=self.reduction,
            impl=self.impl,
        )
        return loss, z, z_pos

    def extra_repr(self) -> str:
        """The options, for `print(module)`."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}, impl={self.impl!r}"
