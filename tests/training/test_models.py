"""Adapter, DeepFM and the joint loss against formulas worked out elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.adapter import Adapter
from kellm_features.training.backbones import Bag, DeepFM
from kellm_features.training.knowledge import KnowledgeAugmented, Side
from kellm_features.training.losses import AdapterInfoNCE


def test_adapter_standardises_and_folds() -> None:
    torch.manual_seed(0)
    adapter = Adapter(6, 10, 4).double()
    x = torch.randn(50, 6, dtype=torch.float64) * 0.05 + 3
    x[:, 2] = 1.5  # never varies
    adapter.standardize(x)
    scale = x.std(0, correction=0)
    scale[2] = 1
    plain = adapter.output(functional.gelu(adapter.hidden((x - x.mean(0)) / scale)))
    torch.testing.assert_close(adapter(x), functional.normalize(plain, dim=1))
    assert set(adapter.state_dict()) == {
        "hidden.weight",
        "hidden.bias",
        "output.weight",
        "output.bias",
        "mean",
        "std",
    }


def bag(rows: list[list[tuple[int, float]]]) -> Bag:
    pairs = torch.tensor(rows, dtype=torch.float64)
    return Bag(pairs[..., 0].long(), pairs[..., 1])


def test_deepfm_equals_its_equations() -> None:
    """Pairwise sums over fields in loops, the DNN in NumPy."""
    torch.manual_seed(1)
    model = DeepFM(
        {"item": "item", "seen": "item", "sex": "sex"}, {"item": 6, "sex": 3}, 4, knowledge_dim=5, layers=(7,)
    )
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    features = {
        "item": bag([[(2, 1.0)], [(5, 1.0)]]),
        "seen": bag([[(1, 0.25), (3, 0.75)], [(0, 0.0), (0, 0.0)]]),
        "sex": bag([[(1, 1.0)], [(2, 1.0)]]),
    }
    knowledge = torch.randn(2, 5, dtype=torch.float64)
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    tables = {"item": "item", "seen": "item", "sex": "sex"}
    for b in range(2):
        embedded, first = [], float(w["bias"])
        for field, table in tables.items():
            ids, weights = features[field].ids[b].tolist(), features[field].weights[b].tolist()
            embedded.append(sum(x * w[f"tables.{table}.weight"][i] for i, x in zip(ids, weights, strict=True)))
            first += sum(x * w[f"linear.{field}.weight"][i, 0] for i, x in zip(ids, weights, strict=True))
        second = sum(float(u @ v) for u, v in itertools.combinations(embedded, 2))
        dense = knowledge[b].numpy()
        first += float(w["knowledge_linear.weight"][0] @ dense)
        hidden = np.maximum(w["deep.0.weight"] @ np.concatenate([*embedded, dense]) + w["deep.0.bias"], 0)
        wanted = first + second + float(w["deep.3.weight"][0] @ hidden)
        assert model(features, knowledge)[b].item() == pytest.approx(wanted, rel=1e-10)
    with pytest.raises(ValueError, match="built for 5 columns"):
        model(features, None)


class Linear(nn.Module):
    """The least backbone: features are ignored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, features: object, knowledge: Tensor | None) -> Tensor:
        out: Tensor = self.layer(knowledge).squeeze(1)
        return out


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_joint_loss_is_ctr_plus_weighted_contrast(reduction: str) -> None:
    torch.manual_seed(2)
    adapters = {side: Adapter(6, 8, 4) for side in ("user", "item")}
    model = KnowledgeAugmented(Linear(8), adapters, weight=0.3, temperature=0.1, reduction=reduction).double()  # type: ignore[arg-type]
    x = {side: torch.randn(5, 6, dtype=torch.float64) for side in adapters}
    rows = torch.tensor([0, 4, 2, 2, 1, 0])
    positives = torch.randn(3, 6, dtype=torch.float64)
    ids, pos_ids = torch.tensor([10, 11, 12]), torch.tensor([20, 12, 22])
    sides = {side: Side(x[side], rows, positives, ids, pos_ids) for side in adapters}
    labels = torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=torch.float64)
    loss = model.loss(None, sides, labels)

    logits = model(None, {side: x[side][rows] for side in adapters})
    ctr = functional.binary_cross_entropy_with_logits(logits, labels)
    wanted = ctr
    for side in ("user", "item"):
        z, z_pos = model.adapters[side](x[side][:3]), model.adapters[side](positives)
        scores = z @ z_pos.T / 0.1
        scores[2, 1] = -torch.inf  # the positive of row 1 is the anchor of row 2
        term = functional.cross_entropy(scores, torch.arange(3), reduction=reduction)
        torch.testing.assert_close(loss.contrastive[side], term)
        wanted = wanted + 0.3 * term
    torch.testing.assert_close(loss.ctr, ctr)
    torch.testing.assert_close(loss.total, wanted)


def test_a_batch_without_positives_has_no_contrast() -> None:
    model = KnowledgeAugmented(Linear(4), {"item": Adapter(6, 8, 4)})
    none = torch.zeros(0, dtype=torch.int64)
    side = Side(torch.randn(2, 6), torch.tensor([1, 0, 1]), torch.zeros(0, 6), none, none)
    loss = model.loss(None, {"item": side}, torch.ones(3))
    assert loss.contrastive["item"].item() == 0
    assert loss.total.item() == loss.ctr.item()


def test_contrastive_module_takes_any_adapter() -> None:
    layer = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x, x_pos = torch.randn(2, 7, 6)
    loss, z, z_pos = AdapterInfoNCE(temperature=0.5)(layer, x, x_pos)
    torch.testing.assert_close(loss, functional.cross_entropy(z @ z_pos.T / 0.5, torch.arange(7)))
    torch.testing.assert_close(z, layer(x))


def test_standardisation_is_not_narrowed_by_autocast() -> None:
    adapter = Adapter(64, 16, 8)
    adapter.standardize(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 0.05 + 3)
    plain = adapter.weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(adapter.weights(), plain, rtol=0, atol=0)
