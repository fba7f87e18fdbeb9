"""A ranker of one's own, with features and a loop of its own, gets knowledge of its items.

    python examples/own_backbone.py

The world is made up: an item has one of four tastes, which its text encoding shows faintly and its likes follow.
"""

import torch
from torch import Tensor, nn

from kellm_features.training import Adapter, KnowledgeAugmented, Side

ITEMS, WIDTH, TASTES = 400, 64, 4


class Ranker(nn.Module):
    """Any module will do that takes the knowledge beside its features."""

    def __init__(self, knowledge: int) -> None:
        super().__init__()
        self.ids = nn.Embedding(ITEMS, 8)
        self.score = nn.Sequential(nn.Linear(8 + TASTES + knowledge, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features: dict[str, Tensor], knowledge: Tensor) -> Tensor:
        parts = [self.ids(features["item"]), features["user"], knowledge]
        return self.score(torch.cat(parts, dim=1)).squeeze(1)


def make_world() -> tuple[Tensor, Tensor, Tensor]:
    """Encodings (N, D), the taste of each item (N,), and its SWING partner (N,), here another of its taste."""
    taste = torch.arange(ITEMS) % TASTES
    encodings = nn.functional.normalize(torch.randn(ITEMS, WIDTH) + 2 * torch.eye(TASTES, WIDTH)[taste])
    return encodings, taste, (torch.arange(ITEMS) + TASTES) % ITEMS


def make_batch(taste: Tensor, items: range, size: int = 256) -> dict[str, Tensor]:
    """Users like what is of their own taste, with some noise."""
    item, user = torch.randint(items.start, items.stop, (size,)), torch.randint(0, TASTES, (size,))
    liked = (taste[item] == user) ^ (torch.rand(size) < 0.05)
    return {"item": item, "user": torch.eye(TASTES)[user], "label": liked.float()}


def train(steps: int = 300) -> tuple[KnowledgeAugmented, list[float]]:
    """Train on the first three quarters of the items; the model, and the loss of clicks by step."""
    torch.manual_seed(0)
    encodings, taste, partners = make_world()
    adapter = Adapter(WIDTH, 64, 16)
    adapter.standardize(encodings)

    model = KnowledgeAugmented(Ranker(knowledge=16), {"item": adapter}, weight=0.004)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        batch = make_batch(taste, range(ITEMS * 3 // 4))
        loss = model.loss(batch, {"item": Side.of(encodings, batch["item"], partners)}, batch["label"])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.ctr.item())
    return model, losses


if __name__ == "__main__":
    _, losses = train()
    print(f"loss of clicks: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
