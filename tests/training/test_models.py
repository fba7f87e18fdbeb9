"""Adapter, DeepFM and the joint loss against formulas worked out elsewhere; a batch's sides."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.adapter import Adapter
from kellm_features.training.backbones import DeepFM
from kellm_features.training.features import Bag, Features
from kellm_features.training.knowledge import Affinity, JointStep, KnowledgeAugmented, Side, knowledge_width
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
    bags = {
        "item": bag([[(2, 1.0)], [(5, 1.0)]]),
        "seen": bag([[(1, 0.25), (3, 0.75)], [(0, 0.0), (0, 0.0)]]),
        "sex": bag([[(1, 1.0)], [(2, 1.0)]]),
    }
    none = torch.zeros(2, 0, dtype=torch.int64)
    features = Features(bags, {}, torch.zeros(2, dtype=torch.int64), none, none, none)
    knowledge = torch.randn(2, 5, dtype=torch.float64)
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    tables = {"item": "item", "seen": "item", "sex": "sex"}
    for b in range(2):
        embedded, first = [], float(w["bias"])
        for field, table in tables.items():
            ids, weights = bags[field].ids[b].tolist(), bags[field].weights[b].tolist()
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


def make_model(width: int = 8, **options: object) -> KnowledgeAugmented:
    torch.manual_seed(2)
    adapters = {side: Adapter(6, 8, 4) for side in ("user", "item")}
    return KnowledgeAugmented(Linear(width), adapters, weight=0.3, temperature=0.1, **options).double()


def make_sides() -> dict[str, Side]:
    """Five ids, three of them with a positive; the positive of the second anchor is the third anchor."""
    ids, pos_ids, rows = torch.tensor([10, 11, 12]), torch.tensor([20, 12, 22]), torch.tensor([0, 4, 2, 2, 1, 0])
    x = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {side: Side(x[i, :5], rows, x[i, 5:], ids, pos_ids) for i, side in enumerate(("user", "item"))}


LABELS = torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=torch.float64)


def term(model: KnowledgeAugmented, name: str, side: Side) -> Tensor:
    """InfoNCE by row, false negatives out."""
    z, z_pos = model.adapters[name](side.encodings[:3]), model.adapters[name](side.positives)
    scores = z @ z_pos.T / 0.1
    scores[2, 1] = -torch.inf  # the positive of row 1 is the anchor of row 2
    return functional.cross_entropy(scores, torch.arange(3), reduction="none")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("contrasted", [None, ("item",), ()])
def test_joint_loss_is_ctr_plus_weighted_contrast(reduction: str, contrasted: tuple[str, ...] | None) -> None:
    model, sides = make_model(reduction=reduction, sides=contrasted), make_sides()
    loss = model.loss(None, sides, LABELS)
    names = {"user", "item"} if contrasted is None else set(contrasted)
    assert set(loss.contrastive) == names

    logits = model(None, {name: side.encodings[side.rows] for name, side in sides.items()})
    wanted = ctr = functional.binary_cross_entropy_with_logits(logits, LABELS)
    for name in names:
        one = getattr(term(model, name, sides[name]), reduction)()
        torch.testing.assert_close(loss.contrastive[name], one)
        wanted = wanted + 0.3 * one
    torch.testing.assert_close(loss.ctr, ctr)
    torch.testing.assert_close(loss.total, wanted)
    loss.total.backward()  # clicks reach the adapters of both sides, contrasted or not
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_step_may_be_of_clicks_or_of_contrast_alone() -> None:
    model, sides = make_model(), make_sides()
    step = JointStep(model)
    joint, clicks = step(None, sides, LABELS), step(None, sides, LABELS, "ctr")
    alone = step(None, {"item": sides["item"]}, None, "contrastive")
    assert clicks.contrastive == {}
    torch.testing.assert_close(clicks.total, joint.ctr)
    torch.testing.assert_close(alone.total, 0.3 * term(model, "item", sides["item"]).sum())
    both = step(None, sides, None, mode="contrastive")
    torch.testing.assert_close(clicks.total + both.total, joint.total)
    both.total.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.adapters.parameters())
    with pytest.raises(ValueError, match="'joint', 'ctr' and 'contrastive'"):
        step(None, sides, LABELS, mode="both")
    with pytest.raises(ValueError, match="labels=None"):
        step(None, sides, None)
    with pytest.raises(ValueError, match="no side to contrast"):
        make_model(sides=()).contrastive_loss(sides)


def make_affine(width: int, affinity: Affinity) -> KnowledgeAugmented:
    """Its logits are the sums of what follows the two vectors of 4 numbers."""
    model = make_model(width, affinity=affinity)
    assert model.knowledge_width == knowledge_width(model.adapters, affinity=affinity) == width
    assert isinstance(model.backbone, Linear)
    with torch.no_grad():
        model.backbone.layer.weight.copy_((torch.arange(width) >= 8).double()[None])
        model.backbone.layer.bias.zero_()
    return model


def test_an_affinity_without_its_adapters_is_none_and_an_unknown_one_is_refused() -> None:
    item: dict[str, torch.nn.Module] = {"item": Adapter(6, 8, 4)}
    for affinity, width, became in (("profile", 4, "none"), ("history", 12, "history")):
        model = KnowledgeAugmented(Linear(width), item, affinity=affinity)
        assert model.knowledge_width == knowledge_width(item, affinity=affinity) == width
        assert model.affinity == became
    assert knowledge_width({}, affinity="history") == 0
    for build in (partial(KnowledgeAugmented, Linear(4), item), partial(knowledge_width, item)):
        with pytest.raises(ValueError, match="affinity='x': 'none', 'profile', 'history' are accepted"):
            build(affinity="x")


def test_affinity_to_the_profile_carries_the_cosine() -> None:
    model, sides = make_affine(12, "profile"), make_sides()
    user, item = (side.encodings[:3] for side in sides.values())
    cosine = functional.cosine_similarity(model.adapters["user"](user), model.adapters["item"](item))
    torch.testing.assert_close(model(None, {"user": user, "item": item}), cosine * 4**0.5)
    one = KnowledgeAugmented(Linear(4), {"item": Adapter(6, 8, 4)}, affinity="profile")
    assert one.knowledge_width == 4  # there is nothing to be near to
    with pytest.raises(ValueError, match="out_dim"):
        knowledge_width({"item": nn.Linear(2, 3)})


def test_affinity_to_the_history_compares_items_with_items() -> None:
    model, sides = make_affine(16, "history"), make_sides()
    past = {
        "liked": bag([[(0, 0.5), (3, 0.5)]] * 5 + [[(0, 0.0), (0, 0.0)]]),  # the last user liked nothing
        "disliked": bag([[(1, 1.0)]] * 6),
    }
    with pytest.raises(ValueError, match=r"Side\.past"):
        model.loss(None, sides, LABELS)
    loss = model.loss(None, sides | {"item": replace(sides["item"], past=past)}, LABELS)
    z = model.adapters["item"](sides["item"].encodings)
    target = z[sides["item"].rows]
    liked = target @ (0.5 * z[0] + 0.5 * z[3]) * torch.tensor([1.0, 1, 1, 1, 1, 0])
    logits = (liked + target @ z[1]) * 4**0.5
    torch.testing.assert_close(loss.ctr, functional.binary_cross_entropy_with_logits(logits, LABELS))


def test_weights_make_rows_padding() -> None:
    """Padding to equal sizes over ranks: the padded rows count neither as anchors nor, by their ids, as negatives."""
    model, side = make_model(), make_sides()["item"]
    padded = Side(
        torch.cat([side.encodings[:3], side.encodings[:1], side.encodings[3:]]),
        side.rows,
        torch.cat([side.positives, side.positives[:1]]),
        torch.tensor([10, 11, 12, 10]),
        torch.tensor([20, 12, 22, 20]),
        weights=torch.tensor([1.0, 1, 1, 0], dtype=torch.float64),
    )
    given = model.contrastive("item", padded)[0]
    scores = model.adapters["item"](side.encodings[:3]) @ model.adapters["item"](padded.positives).T / 0.1
    scores[2, 1] = scores[0, 3] = -torch.inf
    torch.testing.assert_close(given, functional.cross_entropy(scores, torch.arange(3), reduction="sum"))


def test_side_of_a_batch_is_looked_up_in_the_catalogue() -> None:
    encodings, partners = torch.arange(7.0)[:, None], torch.tensor([-1, 4, 1, -1, 6, 0, 2])
    ids = torch.tensor([3, 1, 6, 3, 0, 1])
    side = Side.of(encodings, ids, partners)
    assert torch.equal(side.encodings[side.rows, 0].long(), ids)
    assert sorted(side.encodings[:, 0].tolist()) == [0, 1, 3, 6]
    assert side.anchor_ids.tolist() == side.encodings[:2, 0].tolist() == [1, 6]
    assert side.positives[:, 0].tolist() == side.positive_ids.tolist() == [4, 2]
    nobody = Side.of(encodings, torch.tensor([3, 0]), partners)
    assert len(nobody.positives) == 0
    assert torch.equal(nobody.encodings[nobody.rows, 0], torch.tensor([3.0, 0.0]))


def test_a_side_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['query'\] have no adapter"):
        make_model(sides=("query",))


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
