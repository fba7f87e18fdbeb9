"""DIN and Dice against their equations in NumPy, and what must not change its output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kellm_features.training.backbones import DIN, DeepFM, build_backbone
from kellm_features.training.backbones.parts import Dice
from kellm_features.training.features import LIKED, Bag
from tests.training.batches import FIELDS, TABLES, Array, Reference, make_features, padded, randomized, with_history

K = 3


def make_din(seed: int = 0) -> nn.Module:
    return randomized(DIN(FIELDS, TABLES, 2, knowledge_dim=K, layers=(6, 4)), seed)


def knowledge(examples: int) -> torch.Tensor:
    return torch.randn(examples, K, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def interest(reference: Reference, b: int) -> Array:
    """Σ a(e, v) e, with a an MLP over [e, v, e − v, e ∘ v] (Eq. 3)."""
    v = reference.target(b)
    total = np.zeros_like(v)
    for e in reference.events(b):
        x = np.concatenate([e, v, e - v, e * v])
        x = reference.dice("unit.first_dice", reference.layer("unit.first", x))
        x = reference.dice("unit.second_dice", reference.layer("unit.second", x))
        total = total + reference.layer("unit.output", x)[0] * e
    return total


@pytest.mark.parametrize(("examples", "length", "items"), [(5, 6, 4), (1, 1, 1), (7, 3, 9)])
def test_din_equals_its_equations(examples: int, length: int, items: int) -> None:
    model, features, dense = make_din().eval(), make_features(1, examples, length, items), knowledge(examples)
    reference = Reference(model, features, dense)
    wanted = [reference.logit(b, interest(reference, b)) for b in range(examples)]
    np.testing.assert_allclose(model(features, dense).detach().numpy(), wanted, rtol=1e-9)


def test_dice_equals_its_equation_over_the_rows_that_count() -> None:
    dice = randomized(Dice(3))
    assert isinstance(dice, Dice)
    s = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 1
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    before = dice.mean.clone(), dice.var.clone()
    given = dice(s, mask).detach().numpy()
    rows, alpha = s.numpy()[mask.numpy()], dice.alpha.detach().numpy()
    p = 1 / (1 + np.exp(-(s.numpy() - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8)))
    np.testing.assert_allclose(given, p * s.numpy() + (1 - p) * alpha * s.numpy(), rtol=1e-10)
    np.testing.assert_allclose(dice.mean, 0.9 * before[0].numpy() + 0.1 * rows.mean(0), rtol=1e-10)
    np.testing.assert_allclose(dice.var, 0.9 * before[1].numpy() + 0.1 * rows.var(0), rtol=1e-10)

    kept = dice.mean.clone(), dice.var.clone()
    assert dice(s, torch.zeros_like(mask)).isfinite().all()  # a batch of empty histories teaches nothing
    dice.eval()(s, mask)
    assert torch.equal(dice.mean, kept[0])
    assert torch.equal(dice.var, kept[1])


def test_dice_without_mask_is_batch_normalisation_inside_a_gate() -> None:
    dice, norm = Dice(5), nn.BatchNorm1d(5, eps=1e-8, affine=False)
    s = torch.randn(40, 5, generator=torch.Generator().manual_seed(4)) * 2 + 7
    torch.testing.assert_close(dice(s), s * torch.sigmoid(norm(s)))  # α starts at 0
    torch.testing.assert_close(dice.mean, norm.running_mean)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training: bool) -> None:
    """Nor does the order of the history; in training they could by way of the batch's statistics."""
    features, dense = make_features(5), knowledge(5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(6))
    shuffled = with_history(features, features.history[:, order], features.flags[:, order])
    runs = []
    for given in (features, padded(features, 3), shuffled):
        model = make_din().train(training)
        logits = model(given, dense)
        logits.square().sum().backward()
        runs.append([logits, *(p.grad for p in model.parameters())])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0])


def test_items_may_be_listed_in_any_order() -> None:
    model, features, dense = make_din().eval(), make_features(7), knowledge(5)
    order = torch.tensor([2, 0, 3, 1])
    place = torch.argsort(order)
    items = {name: Bag(bag.ids[order], bag.weights[order]) for name, bag in features.items.items()}
    moved = replace(features, items=items, target=place[features.target], history=place[features.history])
    torch.testing.assert_close(model(moved, dense), model(features, dense))


def test_target_and_flags_matter() -> None:
    """The same history is another interest for another target, and a dislike is not a like."""
    model, features, dense = make_din().eval(), make_features(8, 2, 5, 4), knowledge(1).expand(2, K)
    same = slice(0, 1)
    fields = {
        f: Bag(bag.ids[same].expand(2, -1), bag.weights[same].expand(2, -1)) for f, bag in features.fields.items()
    }
    history, likes = torch.tensor([[0, 1, 2, 3, 1]] * 2), torch.ones(2, 5, dtype=torch.int64)
    liked = replace(features, fields=fields, target=torch.tensor([0, 1]), history=history, flags=likes)
    seen = model.input(liked)
    weights = model.unit(seen.event_vectors(), seen.target, seen.mask)
    assert (weights[0] - weights[1]).abs().min() > 1e-6
    disliked = replace(liked, flags=2 * likes)
    assert (model(liked, dense) - model(disliked, dense)).abs().min() > 1e-6


@pytest.mark.parametrize("name", ["deepfm", "din", "dien"])
def test_backbones_learn_under_autocast(name: str) -> None:
    """A target is liked if it is in the liked history: neither its id nor the history alone tells."""
    torch.manual_seed(0)
    model = build_backbone(name, FIELDS, TABLES, 4, knowledge_dim=0, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(60):
        features = make_features(step % 6, 64, 3, 7)
        liked = features.history.eq(features.target[:, None]) & (features.flags == LIKED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(features, None)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), liked.any(1).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    plain = model.eval()(features, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(features, None).float(), plain, rtol=0.05, atol=0.1)


# nn.GRU breaks the graph, and of what comes back Dynamo looks at `.grad`, with a warning that it means to hide.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["deepfm", "din", "dien"])
def test_compiled_backbones_are_the_same(name: str) -> None:
    dense = knowledge(5).float()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = build_backbone(name, FIELDS, TABLES, 4, knowledge_dim=K, dropout=0.0)
        call = torch.compile(model, backend="eager") if compiled else model
        logits = call(make_features(2), dense)
        logits.square().sum().backward()
        runs.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(runs[1], runs[0])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="'flag'"):
        DIN(FIELDS, {"item": 3, "genre": 2}, 2)
    with pytest.raises(ValueError, match="built for 3 columns"):
        make_din()(make_features(1), None)
    with pytest.raises(ValueError, match="built for none"):
        DeepFM(FIELDS, TABLES, 2)(make_features(1), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="'deepfm', 'din', 'dien'"):
        build_backbone("dcn", FIELDS, TABLES, 2, knowledge_dim=0, dropout=0.0)
