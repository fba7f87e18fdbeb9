"""What a backbone of this package sees of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LIKED, DISLIKED = 1, 2
"""Rows of the table `flag`; 0 stands where there is no event."""


@dataclass(frozen=True)
class Bag:
    """One field of a batch: weighted ids. A plain category is one id of weight 1; padding has weight 0."""

    ids: Tensor
    """(B, L) int64."""
    weights: Tensor
    """(B, L) float32."""

    def to(self, device: torch.device) -> Bag:
        """The same on a device."""
        return Bag(self.ids.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Features:
    """B examples: bags by field for models of fields (DeepFM), and histories in order for models of sequences.

    Items of targets and histories are described once each: what a model computes of an item by itself, it computes for
    the U distinct ones of the batch and then looks up by row.
    """

    fields: Mapping[str, Bag]
    """Field -> (B, L) ids and weights, the target's and the user's."""
    items: Mapping[str, Bag]
    """`item` (U, 1) and `genres` (U, G): the distinct items of targets and histories."""
    target: Tensor
    """(B,) int64: row of each target in `items`."""
    history: Tensor
    """(B, L) int64: rows of the history in `items`, oldest first; 0 where `flags` is 0."""
    flags: Tensor
    """(B, L) int64: `LIKED`, `DISLIKED`, or 0 for no event (behind the last one, or hidden in training)."""
    places: Tensor
    """(B, L) int64: catalogue index + 1 of each event's item, by which vectors of items are looked up; 0 for none."""

    def to(self, device: torch.device) -> Features:
        """The same on a device."""
        if device.type == "cpu":
            return self
        return Features(
            fields={name: bag.to(device) for name, bag in self.fields.items()},
            items={name: bag.to(device) for name, bag in self.items.items()},
            target=self.target.to(device),
            history=self.history.to(device),
            flags=self.flags.to(device),
            places=self.places.to(device),
        )
