"""Random batches, and what sequence models compute of them, in NumPy, one event at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kellm_features.training.features import Bag, Features

Array = npt.NDArray[np.float64]

FIELDS = {
    "item": "item",
    "genres": "genre",
    "age": "age",
    "history_liked": "item",
    "history_disliked": "item",
    "history_flags": "flag",
    "history_liked_genres": "genre",
}
TABLES = {"item": 7, "genre": 5, "age": 3, "flag": 3}
USER_FIELDS = ("age", "history_flags", "history_liked_genres")


def make_features(seed: int, examples: int = 5, length: int = 6, items: int = 4) -> Features:
    """Flags with gaps anywhere; the first example has no history, the last a full one."""
    generator = torch.Generator().manual_seed(seed)

    def bag(rows: int, width: int, table: str) -> Bag:
        weights = torch.rand(rows, width, generator=generator)
        return Bag(torch.randint(0, TABLES[table], (rows, width), generator=generator), weights)

    flags = torch.randint(0, 3, (examples, length), generator=generator)
    flags[0], flags[-1] = 0, flags[-1].clamp(min=1)
    history = torch.randint(0, items, (examples, length), generator=generator)
    widths = {"item": 1, "genres": 3, "age": 1, "history_flags": 2}
    return Features(
        fields={field: bag(examples, widths.get(field, 4), table) for field, table in FIELDS.items()},
        items={"item": bag(items, 1, "item"), "genres": bag(items, 3, "genre")},
        target=torch.randint(0, items, (examples,), generator=generator),
        history=torch.where(flags > 0, history, 0),
        flags=flags,
        places=torch.where(flags > 0, history + 1, 0),
    )


def with_history(features: Features, history: Tensor, flags: Tensor) -> Features:
    return replace(features, history=history, flags=flags)


def padded(features: Features, more: int) -> Features:
    """The same histories with padding behind."""
    wide = {name: nn.functional.pad(getattr(features, name), (0, more)) for name in ("history", "flags", "places")}
    return replace(features, **wide)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with every parameter and running statistic random: defaults of 0 would hide mistakes."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7, generator=generator)
        for name, buffer in module.named_buffers():
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + name.endswith("var"))
    return module


class Reference:
    """The parts that DIN and DIEN share, from a model's state dict."""

    def __init__(self, model: nn.Module, features: Features, knowledge: Tensor) -> None:
        self.w: dict[str, Array] = {name: value.numpy() for name, value in model.state_dict().items()}
        self.features = features
        self.knowledge: Array = knowledge.numpy()

    def mean(self, table: str, bag: Bag, row: int) -> Array:
        pairs = zip(bag.ids[row].tolist(), bag.weights[row].tolist(), strict=True)
        return sum((x * self.w[f"input.tables.{table}.weight"][i] for i, x in pairs), np.zeros(1))

    def item(self, row: int) -> Array:
        items = self.features.items
        return np.concatenate([self.mean("item", items["item"], row), self.mean("genre", items["genres"], row)])

    def event(self, row: int, flag: int) -> Array:
        both = np.concatenate([self.item(row), self.w["input.tables.flag.weight"][flag]])
        return self.w["input.project.weight"] @ both + self.w["input.project.bias"]

    def events(self, b: int) -> list[Array]:
        pairs = zip(self.features.history[b].tolist(), self.features.flags[b].tolist(), strict=True)
        return [self.event(row, flag) for row, flag in pairs if flag]

    def target(self, b: int) -> Array:
        return self.item(int(self.features.target[b]))

    def dice(self, name: str, s: Array) -> Array:
        w = self.w
        p = 1 / (1 + np.exp(-(s - w[f"{name}.mean"]) / np.sqrt(w[f"{name}.var"] + 1e-8)))
        return p * s + (1 - p) * w[f"{name}.alpha"] * s

    def layer(self, name: str, x: Array) -> Array:
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def logit(self, b: int, interest: Array) -> float:
        user = [self.mean(FIELDS[field], self.features.fields[field], b) for field in USER_FIELDS]
        x = np.concatenate([interest, self.target(b), *user, self.knowledge[b]])
        for block in (0, 3):
            x = self.dice(f"deep.{block + 1}", self.layer(f"deep.{block}", x))
        bag, row = self.features.items["item"], int(self.features.target[b])
        bias = self.w["linear.item.weight"][int(bag.ids[row, 0]), 0] * float(bag.weights[row, 0])
        return float(self.layer("deep.6", x)[0] + bias)
