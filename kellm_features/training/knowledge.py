"""Knowledge for any backbone: adapters beside it, and the joint loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.features import Bag
from kellm_features.training.losses import AdapterInfoNCE, Reduction

Mode = Literal["joint", "ctr", "contrastive"]
Affinity = Literal["none", "profile", "history"]

PAST = ("liked", "disliked")
"""What a history's items are parted into, for `affinity="history"`."""


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
    weights: Tensor | None = None
    """(P,) ≥ 0, of the anchors' terms; 0 makes a row padding, where ranks must have equal P. None: 1 each."""
    log_q: Tensor | None = None
    """(P,) log of each positive's chance to be drawn, which its column is corrected by; None: no correction."""
    past: Mapping[str, Bag] | None = None
    """`PAST` -> rows in `encodings` of the items that each example's user liked or disliked before, (B, L), and weights
    that sum to 1 or are all 0; for `affinity="history"`."""

    @classmethod
    def of(cls, encodings: Tensor, ids: Tensor, partners: Tensor) -> Side:
        """The side of a batch, looked up in the encodings of a whole catalogue.

        Args:
            encodings: (N, D).
            ids: (B,) int64, the row in `encodings` of each example.
            partners: (N,) int64, the row of each row's positive; −1: it has none.
        """
        distinct, rows = torch.unique(ids, return_inverse=True)
        lone = partners[distinct] < 0
        order = torch.argsort(lone, stable=True)
        anchors = distinct[~lone]
        positives = partners[anchors]
        return cls(encodings[distinct[order]], torch.argsort(order)[rows], encodings[positives], anchors, positives)


class JointLoss(NamedTuple):
    """ℓ = ℓ_ctr + w · Σ contrastive, and its parts: nothing but tensors, as DistributedDataParallel wants to see."""

    total: Tensor
    """The part or parts that the step is for: what to run backward on."""
    ctr: Tensor
    """Mean cross entropy of clicks; 0 in a contrastive step."""
    contrastive: dict[str, Tensor]
    """Side -> its term before the weight; a side without any positive in the batch is 0. Empty in a step of clicks."""
    auxiliary: Tensor | None = None
    """The backbone's own second loss before its weight, where it has one."""


@runtime_checkable
class SecondLoss(Protocol):
    """A backbone with a loss beside that of clicks: `DIEN`."""

    auxiliary_weight: float
    """At which the loss is added; 0 leaves it out."""

    def auxiliary(self, features: Any) -> Tensor:
        """The loss of a batch, a scalar."""


class KnowledgeAugmented(nn.Module):
    """A backbone that also sees adapted knowledge vectors (KELLMRec §3.4): ℓ = ℓ_ctr + w(ℓ_uu + ℓ_ii).

    Each item of a batch is adapted once, however many examples it stands in, and the contrastive term has it as an
    anchor once. The printed ℓ sums over the batch's examples, so popular items would weigh more there, and their
    copies would be masked against one another as false negatives.

    A backbone may have a second loss of its own (`SecondLoss`), which is then added at its own weight.

    Args:
        backbone: any module called as `backbone(features, knowledge) -> logits (B,)`. `features` is whatever the caller
            hands in; `knowledge` is the adapted vectors of `shown` side by side in the order of `adapters`, (B, K), or
            None without any.
        adapters: side (`user`, `item`) -> module from (B, D) encodings to (B, E).
        weight: w.
        temperature: of the contrastive terms.
        reduction: of the contrastive terms: `sum` (printed) or `mean`; ℓ_ctr is a mean.
        impl: of `AdapterInfoNCE`.
        sides: whose contrastive terms are in the loss; the other adapters learn from clicks alone. None: all.
        shown: whose vectors the backbone gets; the other adapters learn from their contrastive terms alone. None: all.
        affinity: products that follow the vectors in the knowledge, √E · z_item ∘ v, which add up to √E times a cosine:
            a DNN sees how near v is to the item as a linear function of its input. √E makes them as large as a unit
            vector's own components. `profile`: v is the user's vector. `history`: two products, of the mean vectors of
            the items that the user liked and disliked before, all through the one adapter of items, so that a cold item
            is near or far as any other. `none`: KELLMRec, which concatenates only. Where the sides that it takes, both
            for `profile` and the items' for `history`, are not shown, it becomes `none`: so a model without text is
            built alike.
        gather: contrast over the batches of all ranks, as in `AdapterInfoNCE`; P must then be equal on all of them.

    Raises:
        ValueError: a reduction that is no scalar, a side without an adapter, an adapter that would learn from nothing,
            or an unknown affinity.
    """

    def __init__(
        self,
        backbone: nn.Module,
        adapters: Mapping[str, nn.Module] | nn.ModuleDict,
        *,
        weight: float = 0.004,
        temperature: float = 0.03,
        reduction: Reduction = "sum",
        impl: str = "auto",
        sides: Collection[str] | None = None,
        shown: Collection[str] | None = None,
        affinity: Affinity = "none",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r}: the joint loss is a scalar, 'sum' and 'mean' are accepted")
        for name, named in (("sides", sides), ("shown", shown)):
            if unknown := sorted(set(named or ()) - set(adapters)):
                raise ValueError(f"{name}={unknown} have no adapter: {sorted(adapters)} are accepted")
        self.backbone = backbone
        self.adapters = nn.ModuleDict(dict(adapters.items()))
        self.contrast = AdapterInfoNCE(temperature=temperature, reduction=reduction, gather=gather, impl=impl)
        self.weight = weight
        self.sides = tuple(side for side in self.adapters if sides is None or side in sides)
        self.shown = tuple(side for side in self.adapters if shown is None or side in shown)
        if idle := sorted(set(self.adapters) - set(self.sides) - set(self.shown)):
            raise ValueError(f"the adapters of {idle} are in neither sides nor shown: they would learn from nothing")
        self.affinity: Affinity = affinity if set(self.shown) >= _adapters_of(affinity) else "none"
        self._has_second_loss = isinstance(backbone, SecondLoss)

    @property
    def knowledge_width(self) -> int:
        """K, width of the knowledge that the backbone gets."""
        return knowledge_width({side: self.adapters[side] for side in self.shown}, affinity=self.affinity)

    def forward(self, features: Any, encodings: Mapping[str, Tensor]) -> Tensor:
        """Logits (B,), given the encodings of each shown side by example, (B, D)."""
        return self.logits(features, {side: self.adapters[side](encodings[side]) for side in self.shown})

    def logits(self, features: Any, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Logits (B,), given the embeddings of each shown side by example, (B, E).

        It is the call of a server, which stores embeddings. With `affinity="history"` also the means of the history's
        item embeddings, under the names of `PAST`; 0 for an empty one.
        """
        parts = [embeddings[side] for side in self.shown]
        if self.affinity != "none":
            item = embeddings["item"]
            others = ("user",) if self.affinity == "profile" else PAST
            parts += [item * embeddings[other] * item.shape[1] ** 0.5 for other in others]
        out: Tensor = self.backbone(features, torch.cat(parts, dim=1) if parts else None)
        return out

    def loss(self, features: Any, sides: Mapping[str, Side], labels: Tensor, *, contrast: bool = True) -> JointLoss:
        """The joint loss of a batch.

        Args:
            features: the backbone's.
            sides: for each adapter, its part of the batch; none for one that has no part in this step.
            labels: (B,) float, 0 or 1.
            contrast: False leaves the contrastive terms out: a step of clicks.
        """
        terms: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        for name, adapter in self.adapters.items():
            if contrast and name in self.sides:
                terms[name], z = self.contrastive(name, sides[name])
            elif name in self.shown:
                z = adapter(sides[name].encodings)
            if name not in self.shown:
                continue
            # Indexing would do, but this one's backward sums in a fixed order on the CPU.
            embeddings[name] = functional.embedding(sides[name].rows, z)
            if name == "item" and self.affinity == "history":
                embeddings |= pooled(sides[name].past, z)
        logits = self.logits(features, embeddings)
        wide = torch.promote_types(logits.dtype, torch.float32)  # autocast hands out bfloat16
        ctr = functional.binary_cross_entropy_with_logits(logits.to(wide), labels.to(wide))
        total = ctr
        auxiliary: Tensor | None = None
        if self._has_second_loss:
            backbone = cast(SecondLoss, self.backbone)
            if backbone.auxiliary_weight > 0:
                auxiliary = backbone.auxiliary(features)
                total = total + backbone.auxiliary_weight * auxiliary
        for term in terms.values():
            total = total + self.weight * term
        return JointLoss(total, ctr, terms, auxiliary)

    def contrastive_loss(self, sides: Mapping[str, Side]) -> JointLoss:
        """w · Σ contrastive alone, over those given of the sides that are contrasted: a step without clicks."""
        terms = {name: self.contrastive(name, sides[name])[0] for name in self.sides if name in sides}
        if not terms:
            raise ValueError(f"no side to contrast: given {sorted(sides)}, and {list(self.sides)} are contrasted")
        total = self.weight * torch.stack(list(terms.values())).sum()
        return JointLoss(total, torch.zeros_like(total), terms)

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
            sample_weight=side.weights,
            log_q=side.log_q,
        )
        if paired < len(side.encodings):
            z = torch.cat([z, adapter(side.encodings[paired:])])
        return loss, z


class JointStep(nn.Module):
    """A step's loss as a forward: what DistributedDataParallel and `torch.compile` wrap, which see forward only.

    In a contrastive step the backbone, and in one of contrasted sides the adapters of the others, get no gradient.

    Args:
        model: whose parameters these are.
    """

    def __init__(self, model: KnowledgeAugmented) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, features: Any, sides: Mapping[str, Side], labels: Tensor | None, mode: Mode = "joint"
    ) -> JointLoss:
        """The loss of one step.

        Args:
            features: the backbone's; not looked at by `contrastive`.
            sides: by adapter; `contrastive` takes some of them as well.
            labels: (B,) float, 0 or 1; not looked at by `contrastive`.
            mode: `joint`, `ctr` (no contrastive terms), `contrastive` (those alone).

        Raises:
            ValueError: an unknown mode; clicks without labels.
        """
        if mode == "contrastive":
            return self.model.contrastive_loss(sides)
        if mode not in ("joint", "ctr"):
            raise ValueError(f"mode={mode!r}: 'joint', 'ctr' and 'contrastive' are accepted")
        if labels is None:
            raise ValueError(f"labels=None with mode={mode!r}: only 'contrastive' goes without labels")
        return self.model.loss(features, sides, labels, contrast=mode == "joint")


def pooled(past: Mapping[str, Bag] | None, vectors: Tensor) -> dict[str, Tensor]:
    """Means of a history's vectors, (B, E), by name of `PAST`.

    Args:
        past: rows and weights.
        vectors: (U, E).

    Raises:
        ValueError: no rows are given.
    """
    if past is None:
        raise ValueError('affinity="history" needs the items of each history: give Side.past')
    wide = vectors.float() if vectors.dtype in (torch.bfloat16, torch.float16) else vectors
    return {
        name: functional.embedding_bag(bag.ids, wide, mode="sum", per_sample_weights=bag.weights.to(wide.dtype))
        for name, bag in past.items()
    }


def knowledge_width(adapters: Mapping[str, nn.Module] | nn.ModuleDict, *, affinity: Affinity = "none") -> int:
    """K, width of the knowledge that a backbone beside these adapters gets: what it is built for.

    Raises:
        ValueError: an adapter does not say its `out_dim`, or an unknown affinity.
    """
    widths: dict[str, int] = {}
    for side, adapter in adapters.items():
        width = getattr(adapter, "out_dim", None)
        if not isinstance(width, int):
            raise ValueError(f"the adapter of {side!r} has out_dim={width!r}: give it an int `out_dim`, its width")
        widths[side] = width
    products = {"none": 0, "profile": 1, "history": len(PAST)}
    given = set(widths) >= _adapters_of(affinity)
    return sum(widths.values()) + (products[affinity] * widths["item"] if given and affinity != "none" else 0)


def _adapters_of(affinity: Affinity) -> set[str]:
    """The adapters that its products are made of."""
    needed: dict[str, set[str]] = {"none": set(), "profile": {"user", "item"}, "history": {"item"}}
    if affinity not in needed:
        raise ValueError(f"affinity={affinity!r}: {', '.join(map(repr, needed))} are accepted")
    return needed[affinity]
