"""A batch's items and users as the adapters and the contrastive terms want them, whole or as one rank's share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from kellm_features.training.data import distinct_places
from kellm_features.training.features import DISLIKED, LIKED, Bag, Features
from kellm_features.training.knowledge import PAST, Side
from kellm_features.training.pairs import PositiveSampler
from kellm_features.training.ranks import Ranks

_PAD_ID = -1  # no index of a catalogue, so that padding masks nothing
_PAD_LOG_Q = 1e6
"""Subtracted from a padding column's logit (a similarity over the temperature, 50 at most for unit vectors at 0.02):
its share of any softmax is exactly 0 in float32. Finite, since its own row's loss is multiplied by a weight of 0."""


class SideBuilder:
    """Builds `Side`s; every draw is made for the whole batch, on all ranks alike.

    Args:
        encodings: side -> (N, D) in catalogue order, on the model's device.
        samplers: side -> positives; needed for the contrasted sides.
        contrasted: the sides whose terms are in the loss.
        ranks: who shares a batch.

    Raises:
        ValueError: a contrasted side has no sampler.
    """

    def __init__(
        self,
        encodings: Mapping[str, Tensor],
        samplers: Mapping[str, PositiveSampler],
        contrasted: Collection[str],
        ranks: Ranks,
    ) -> None:
        missing = sorted(set(contrasted) - set(samplers))
        if missing:
            raise ValueError(
                f"no positives were given for {missing}, whose contrastive terms are in the loss: give a sampler, or "
                "leave the side out of train.sides"
            )
        self.encodings = encodings
        self.samplers = samplers
        self.ranks = ranks
        self.contrasted = tuple(side for side in contrasted if bool((samplers[side].sizes > 0).any()))

    def of_batch(
        self,
        own: Mapping[str, Tensor],
        whole: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        contrast: bool,
        seen: Features | None = None,
    ) -> dict[str, Side]:
        """Each side's share of a batch of examples.

        Args:
            own: side -> (b,) indices, of the examples that this rank scores; a side whose vectors they do not need may
                be left out.
            whole: side -> (B,) indices, of the whole batch.
            generator: of the positives, at the same state on all ranks.
            contrast: False leaves out anchors and positives.
            seen: on the CPU, of the examples that this rank scores: their histories' items are described as well.
        """
        none = torch.empty(0, dtype=torch.int64)
        return {
            side: self._side(
                side,
                own.get(side, none),
                self._anchors(side, whole[side]) if contrast and side in self.contrasted else none,
                generator,
                seen if side == "item" else None,
            )
            for side in self.encodings
        }

    def of_anchors(self, anchors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Side]:
        """Anchors alone, for a step without examples: side -> (P,) distinct indices that have positives."""
        return {side: self._side(side, ids[:0], ids, generator) for side, ids in anchors.items()}

    def passes(self, size: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Batches of each side's anchors without end, shuffled anew in each pass."""
        streams = {
            side: _passes(torch.nonzero(self.samplers[side].sizes > 0).squeeze(1), size, generator)
            for side in self.contrasted
        }
        while True:
            yield {side: next(stream) for side, stream in streams.items()}

    def _anchors(self, side: str, ids: Tensor) -> Tensor:
        distinct: Tensor = torch.unique(ids)
        return distinct[self.samplers[side].sizes[distinct] > 0]

    def _side(
        self, side: str, ids: Tensor, anchors: Tensor, generator: torch.Generator, seen: Features | None = None
    ) -> Side:
        """One side: this rank's share of the anchors stands first, then what else its examples need."""
        x = self.encodings[side]
        positives = self.samplers[side].sample(anchors, generator) if len(anchors) else anchors
        anchor_ids, positive_ids, weights, log_q = anchors, positives, None, None
        if self.ranks.world > 1 and len(anchors):
            share = -(-len(anchors) // self.ranks.world)
            place = torch.arange(self.ranks.rank * share, (self.ranks.rank + 1) * share)
            padding = place >= len(anchors)
            place = place.masked_fill(padding, 0)
            anchors, positives = anchors[place], positives[place]
            anchor_ids, positive_ids = (kept.masked_fill(padding, _PAD_ID) for kept in (anchors, positives))
            weights, log_q = (~padding).float().to(x.device), (_PAD_LOG_Q * padding).float().to(x.device)
        places = ids + 1 if seen is None else torch.cat([ids + 1, seen.places.flatten()])
        distinct, row = distinct_places(places, len(x) + 1)
        distinct = distinct - 1
        described = torch.cat([anchors, distinct[~torch.isin(distinct, anchors)]])
        ordered, order = described.sort(stable=True)  # padding repeats an anchor: its first place counts
        rows = order[torch.searchsorted(ordered, distinct)][row]
        past = None if seen is None else past_bags(rows[len(ids) :].view(seen.places.shape), seen, x.device)
        return Side(
            encodings=x[described.to(x.device)],
            rows=rows[: len(ids)].to(x.device),
            positives=x[positives.to(x.device)],
            anchor_ids=anchor_ids.to(x.device),
            positive_ids=positive_ids.to(x.device),
            weights=weights,
            log_q=log_q,
            past=past,
        )


def past_bags(rows: Tensor, seen: Features, device: torch.device) -> dict[str, Bag]:
    """`PAST` -> rows of a history's items (B, L), liked or disliked, each weighing the same.

    Args:
        rows: (B, L) int64, of the events of `seen`.
        seen: whose flags and places part them; an event without a place is none.
        device: where the bags are wanted.
    """
    bags = {}
    for name, flag in zip(PAST, (LIKED, DISLIKED), strict=True):
        weights = ((seen.flags == flag) & (seen.places > 0)).float()
        weights /= weights.sum(1, keepdim=True).clamp_min(1)
        bags[name] = Bag(rows, weights).to(device)
    return bags


def _passes(ids: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.split(ids[torch.randperm(len(ids), generator=generator)], size)
