"""Knowledge for any backbone: adapters beside it, and the joint loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.losses import AdapterInfoNCE, Reduction


@dataclass(frozen=True)
class Side:
    """The items, or the users, of one batch: each distinct one once, those that have a positive first."""

    encodings: Tensor
    """(U, D): the distinct ones; the first P have a positive."""
    rows: Tensor
    """(B,) int64: the row of each example in `encodings`."""
    positives: Tensor
    """(P, D): encodings of the positives; P may be 0."""
    anchor_ids: Tensor
    """(P,) int64."""
    positive_ids: Tensor
    """(P,) int64, in the same id space."""


@dataclass(frozen=True)
class JointLoss:
    """ℓ = ℓ_ctr + w · Σ contrastive, and its parts."""

    total: Tensor
    ctr: Tensor
    contrastive: dict[str, Tensor]
    """Side -> its term before the weight; a side without any positive in the batch is 0."""


class KnowledgeAugmented(nn.Module):
    """A backbone that also sees adapted knowledge vectors (KELLMRec §3.4): ℓ = ℓ_ctr + w(ℓ_uu + ℓ_ii).

    Each item of a batch is adapted once, however many examples it stands in, and the contrastive term has it as an
    anchor once. The printed ℓ sums over the batch's examples, so popular items would weigh more there, and their
    copies would be masked against one another as false negatives.

    Args:
        backbone: called as `backbone(features, knowledge) -> logits (B,)`; `knowledge` is the adapted vectors side by
            side in the order of `adapters`, (B, ΣE), or None without adapters.
        adapters: side (`user`, `item`) -> module from (B, D) encodings to (B, E).
        weight: w.
        temperature: of the contrastive terms.
        reduction: of the contrastive terms: `sum` (printed) or `mean`; ℓ_ctr is a mean.
        impl: of `AdapterInfoNCE`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        adapters: Mapping[str, nn.Module],
        *,
        weight: float = 0.004,
        temperature: float = 0.03,
        reduction: Reduction = "sum",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r}: the joint loss is a scalar, 'sum' and 'mean' are accepted")
        self.backbone = backbone
        self.adapters = nn.ModuleDict(dict(adapters))
        self.contrast = AdapterInfoNCE(temperature=temperature, reduction=reduction, impl=impl)
        self.weight = weight

    def forward(self, features: Any, encodings: Mapping[str, Tensor]) -> Tensor:
        """Logits (B,), given each side's encodings by example, (B, D)."""
        return self.logits(features, {side: adapter(encodings[side]) for side, adapter in self.adapters.items()})

    def logits(self, features: Any, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Logits (B,), given each side's embeddings by example, (B, E): the call of a server that stores them."""
        knowledge = torch.cat([embeddings[side] for side in self.adapters], dim=1) if self.adapters else None
        out: Tensor = self.backbone(features, knowledge)
        return out

    def loss(self, features: Any, sides: Mapping[str, Side], labels: Tensor) -> JointLoss:
        """The joint loss of a batch.

        Args:
            features: the backbone's.
            sides: for each adapter, its part of the batch.
            labels: (B,) float, 0 or 1.
        """
        contrastive: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        for name in self.adapters:
            contrastive[name], z = self.contrastive(name, sides[name])
            # Indexing would do, but this one's backward sums in a fixed order on the CPU.
            embeddings[name] = functional.embedding(sides[name].rows, z)
        logits = self.logits(features, embeddings)
        ctr = functional.binary_cross_entropy_with_logits(logits, labels)
        total = ctr
        for term in contrastive.values():
            total = total + self.weight * term
        return JointLoss(total, ctr, contrastive)

    def contrastive(self, name: str, side: Side) -> tuple[Tensor, Tensor]:
        """One side's contrastive term, before the weight, and its distinct embeddings (U, E).

        The term is 0 where no id of the batch has a positive, and where the weight is 0.
        """
        adapter = self.adapters[name]
        paired = len(side.positives)
        if paired == 0 or self.weight == 0:
            return side.encodings.new_zeros(()), adapter(side.encodings)
        loss, z, _ = self.contrast(
            adapter,
            side.encodings[:paired],
            side.positives,
            anchor_ids=side.anchor_ids,
            positive_ids=side.positive_ids,
        )
        if paired < len(side.encodings):
            z = torch.cat([z, adapter(side.encodings[paired:])])
        return loss, z
