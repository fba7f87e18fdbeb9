"""What `bench_train.py` compares with: joint training as one writes it without this package.

A `TensorDataset` of (user, item, label), a `DataLoader` whose `collate_fn` looks the features up in padded tables of
users and items, PyTorch's AdamW as it comes, and the model of the package, called eagerly. Each example is adapted and
contrasted by itself, as the paper writes the loss: its user and its item are anchors, one drawn neighbour of each is
the positive, and the other examples' positives are negatives. Each event of a history is embedded by itself.

`EagerInfoNCE` is the contrastive term alone as one writes it, for the package's own trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kellm_features.settings import TrainSettings
from kellm_features.training.adapter import Adapter
from kellm_features.training.data import ATTRIBUTES, HISTORY_DROPOUT, ID_DROPOUT, CtrData
from kellm_features.training.device import training_device
from kellm_features.training.features import DISLIKED, LIKED, Bag, Features
from kellm_features.training.knowledge import KnowledgeAugmented
from kellm_features.training.losses import AdapterInfoNCE
from kellm_features.training.optimizer import joint_optimizer
from kellm_features.training.pairs import PositiveSampler

Row = tuple[Tensor, Tensor, Tensor]


class PlainFeatures:
    """Features of a batch from padded tables; the same numbers as `CtrData.features` where nothing is hidden."""

    def __init__(self, data: CtrData) -> None:
        users, items = torch.arange(len(data.user_ids)), torch.arange(len(data.item_ids))
        by_user, by_item = data.features(users, users * 0), data.features(items * 0, items)
        self.item, self.genres = by_item.fields["item"].ids[:, 0], by_item.fields["genres"]
        self.year = by_item.fields["year"].ids
        self.attributes = {name: by_user.fields[name].ids for name in ATTRIBUTES}
        self.told = by_user.fields["history_flags"]
        self.flags = by_user.flags
        self.past = by_user.items["item"].ids[by_user.history, 0] * (self.flags > 0)
        past_genres = by_user.items["genres"]
        self.places = by_user.places
        self.past_genres = Bag(past_genres.ids[by_user.history], past_genres.weights[by_user.history])
        width = data.table_rows["genre"]
        self.dense = torch.zeros(*self.past.shape, width).scatter_add_(
            2, self.past_genres.ids, self.past_genres.weights
        )
        self.dense[..., 0] = 0

    def __call__(self, user: Tensor, item: Tensor, *, training: bool) -> Features:
        """What the model sees of a batch."""
        flags, shown, past = self.flags[user], self.item[item], self.past[user]
        if training:
            shown = shown.masked_fill(torch.rand(len(user)) < ID_DROPOUT, 0)
            flags = flags * (torch.rand(flags.shape) >= HISTORY_DROPOUT)
        liked, disliked = flags == LIKED, flags == DISLIKED
        one = torch.ones(len(user), 1)
        genres = Bag(self.genres.ids[item], self.genres.weights[item])
        fields = {"item": Bag(shown[:, None], one), "genres": genres, "year": Bag(self.year[item], one)}
        fields |= {name: Bag(column[user], one) for name, column in self.attributes.items()}
        fields |= {
            "history_liked": Bag(past, shares(liked & (past > 0))),
            "history_disliked": Bag(past, shares(disliked & (past > 0))),
            "history_flags": Bag(self.told.ids[user], self.told.weights[user]),
        }
        dense = self.dense[user]
        rows = torch.arange(dense.shape[2]).expand(len(user), -1)
        fields["history_liked_genres"] = Bag(rows, shares((liked[..., None] * dense).sum(1)))
        fields["history_disliked_genres"] = Bag(rows, shares((disliked[..., None] * dense).sum(1)))
        count, length = flags.shape
        events = torch.arange(count, count + count * length).view(count, length)
        items = {
            "item": Bag(torch.cat([shown, past.flatten()])[:, None], torch.ones(count + count * length, 1)),
            "genres": Bag(
                torch.cat([genres.ids, self.past_genres.ids[user].flatten(0, 1)]),
                torch.cat([genres.weights, self.past_genres.weights[user].flatten(0, 1)]),
            ),
        }
        return Features(
            fields, items, torch.arange(count), events * (flags > 0), flags, self.places[user] * (flags > 0)
        )

    def collate(self, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Features]:
        """A training batch of the dataset's rows."""
        user, item, label = (torch.stack(column) for column in zip(*rows, strict=True))
        return user, item, label, self(user, item, training=True)


class PlainLoop:
    """The loop; one call is one epoch."""

    def __init__(
        self,
        model: KnowledgeAugmented,
        data: CtrData,
        encodings: Mapping[str, Tensor],
        samplers: Mapping[str, PositiveSampler],
        settings: TrainSettings,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.device = training_device(settings)
        self.model = model.to(self.device)
        self.encodings = {side: vectors.to(self.device) for side, vectors in encodings.items()}
        self.samplers = samplers
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        groups = joint_optimizer(model, settings).param_groups  # the rates are the model's, the kernels PyTorch's own
        named = ("params", "lr", "weight_decay")
        self.optimizer = torch.optim.AdamW([{name: group[name] for name in named} for group in groups])
        train = data.examples["train"]
        self.loader = DataLoader(
            TensorDataset(train.user, train.item, train.label),
            batch_size=settings.batch_size,
            shuffle=True,
            num_workers=settings.workers,
            collate_fn=PlainFeatures(data).collate,
        )

    def epoch(self) -> float:
        """Train on every example once, and give the mean cross entropy of clicks."""
        total, rows = 0.0, 0
        self.model.train()
        for user, item, label, features in self.loader:
            ids, label = {"user": user, "item": item}, label.to(self.device)
            embeddings = {
                side: adapter(self.encodings[side][ids[side]]) for side, adapter in self.model.adapters.items()
            }
            ctr = functional.binary_cross_entropy_with_logits(
                self.model.logits(features.to(self.device), embeddings), label
            )
            loss = ctr
            for side, z in embeddings.items():
                loss = loss + self.settings.weight * self.contrastive(side, ids[side], z)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            total += ctr.item() * len(label)
            rows += len(label)
        return total / rows

    def contrastive(self, side: str, ids: Tensor, z: Tensor) -> Tensor:
        """The term as printed, or its mean: each example against the positives of all."""
        has_positive = self.samplers[side].sizes[ids] > 0
        positives = self.samplers[side].sample(ids[has_positive], self.generator)
        z_positive = self.model.adapters[side](self.encodings[side][positives])
        logits = z[has_positive] @ z_positive.T / self.settings.temperature
        rows = torch.arange(len(logits), device=self.device)
        return functional.cross_entropy(logits, rows, reduction=self.settings.reduction)


class EagerInfoNCE(AdapterInfoNCE):
    """`AdapterInfoNCE` in plain PyTorch: both towers, (B, B) logits, masks by id, cross entropy.

    For what one rank gives it: an `Adapter`, ids, and neither negatives beside the batch nor weights nor log q.
    """

    def forward(
        self,
        adapter: Callable[[Tensor], Tensor],
        x: Tensor,
        x_pos: Tensor,
        *,
        anchor_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        **others: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, z and z_pos."""
        given = any(value is not None for value in others.values())
        if given or not isinstance(adapter, Adapter) or anchor_ids is None or positive_ids is None:
            raise ValueError("the eager loss takes an Adapter, anchor_ids and positive_ids, and nothing beside them")
        w1, b1, w2, b2 = adapter.weights()
        act = functional.gelu if adapter.activation == "gelu" else functional.relu
        z, z_pos = (functional.linear(act(functional.linear(v, w1, b1)), w2, b2) for v in (x, x_pos))
        if adapter.normalize:
            z, z_pos = functional.normalize(z, dim=1), functional.normalize(z_pos, dim=1)
        anchor = anchor_ids[:, None]
        masked = (anchor == anchor_ids) | (anchor == positive_ids) | (positive_ids[:, None] == positive_ids)
        logits = (z @ z_pos.T / self.temperature).masked_fill(masked.fill_diagonal_(False), -torch.inf)
        own = torch.arange(len(logits), device=logits.device)
        return functional.cross_entropy(logits, own, reduction=self.reduction), z, z_pos


def shares(weights: Tensor) -> Tensor:
    """Rows scaled to sum to 1; an empty row stays 0."""
    weights = weights.float()
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
