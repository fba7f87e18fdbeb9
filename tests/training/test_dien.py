"""DIEN against its equations in NumPy, one step at a time; its second loss; what must not change its output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kellm_features.training.backbones import DIEN
from kellm_features.training.backbones.dien import AttentionalGru, Evolution
from kellm_features.training.knowledge import KnowledgeAugmented
from tests.training.batches import FIELDS, TABLES, Array, Reference, make_features, padded, randomized, with_history

K = 3
EVOLUTIONS: tuple[Evolution, ...] = ("augru", "agru", "aigru")


def make_dien(evolution: Evolution = "augru", weight: float = 0.0) -> DIEN:
    model = DIEN(FIELDS, TABLES, 2, knowledge_dim=K, layers=(6, 4), evolution=evolution, auxiliary_weight=weight)
    randomized(model)
    return model


def knowledge(examples: int) -> torch.Tensor:
    return torch.randn(examples, K, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gates(w: list[Array], x: Array, h: Array) -> tuple[Array, Array]:
    """u and n of a GRU whose weights stack reset, update and new."""
    of_x, of_h = np.split(w[0] @ x + w[1], 3), np.split(w[2] @ h + w[3], 3)
    r, u = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
    return u, np.tanh(of_x[2] + r * of_h[2])


def extracted(reference: Reference, b: int) -> list[Array]:
    """States of the first GRU. `nn.GRU` has z = 1 − u: h ← (1 − z) n + z h."""
    w = [reference.w[f"extraction.{name}_l0"] for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
    h, states = np.zeros(w[2].shape[1]), []
    for e in reference.events(b):
        z, n = gates(w, e, h)
        h = (1 - z) * n + z * h
        states.append(h)
    return states


def interest(reference: Reference, b: int, evolution: str) -> Array:
    names = ("of_input.weight", "of_input.bias", "of_state.weight", "of_state.bias")
    w = [reference.w[f"evolution.{name}"] for name in names]
    states = extracted(reference, b)
    h = np.zeros(w[2].shape[1])
    scores = np.array([state @ reference.w["attention.weight"] @ reference.target(b) for state in states])
    attention = np.exp(scores) / np.exp(scores).sum()
    for a, state in zip(attention, states, strict=True):
        u, n = gates(w, a * state if evolution == "aigru" else state, h)
        gate = {"augru": a * u, "agru": a, "aigru": u}[evolution]
        h = (1 - gate) * h + gate * n
    return h


@pytest.mark.parametrize("evolution", EVOLUTIONS)
@pytest.mark.parametrize(("examples", "length", "items"), [(5, 6, 4), (2, 1, 1), (7, 3, 9)])
def test_dien_equals_its_equations(evolution: Evolution, examples: int, length: int, items: int) -> None:
    model, features, dense = make_dien(evolution).eval(), make_features(1, examples, length, items), knowledge(examples)
    reference = Reference(model, features, dense)
    wanted = [reference.logit(b, interest(reference, b, evolution)) for b in range(examples)]
    np.testing.assert_allclose(model(features, dense).detach().numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize("evolution", ["augru", "aigru"])
def test_with_full_attention_it_is_a_gru(evolution: Evolution) -> None:
    cell, gru = AttentionalGru(3, 5, evolution), nn.GRU(3, 5)
    with torch.no_grad():
        weights = (cell.of_input.weight, cell.of_state.weight, cell.of_input.bias, cell.of_state.bias)
        for mine, theirs in zip(weights, gru.parameters(), strict=True):
            mine.copy_(theirs)
            # Their gate keeps what ours replaces.
            mine[5:10] *= -1
    x = torch.randn(7, 4, 3)
    ones = torch.ones(7, 4)
    torch.testing.assert_close(cell(x, ones, ones > 0), gru(x)[1][0])


@pytest.mark.parametrize("evolution", EVOLUTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_gaps_and_padding_change_nothing_and_order_does(evolution: Evolution, training: bool) -> None:
    features, dense = make_features(5), knowledge(5)
    order = torch.argsort(features.flags == 0, dim=1, stable=True)
    closed = with_history(features, features.history.gather(1, order), features.flags.gather(1, order))
    assert not torch.equal(closed.flags, features.flags)
    runs = []
    for given in (features, padded(features, 3), closed):
        model = make_dien(evolution).train(training)
        logits = model(given, dense)
        logits.square().sum().backward()
        runs.append([logits, *(p.grad for p in model.parameters())])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0])
    second = [model.auxiliary(given, torch.Generator().manual_seed(1)) for given in (features, closed)]
    torch.testing.assert_close(second[0], second[1])
    backwards = with_history(features, features.history.flip(1), features.flags.flip(1))
    model = make_dien(evolution).eval()
    change = (model(backwards, dense) - model(features, dense)).abs()
    assert change[-1] > 1e-6
    assert change[0] == 0  # no history


def test_auxiliary_loss_equals_its_equation() -> None:
    """−log σ⟨h_t, e_{t+1}⟩ − log(1 − σ⟨h_t, ê_{t+1}⟩), over the steps that have a next event."""
    model, features = make_dien(), make_features(3)
    reference = Reference(model, features, knowledge(5))
    items, length = 4, features.flags.shape[1]
    offsets = torch.randint(1, items, (length - 1, 5), generator=torch.Generator().manual_seed(4))
    terms = []
    for b in range(5):
        happened = [(i, f) for i, f in zip(features.history[b].tolist(), features.flags[b].tolist(), strict=True) if f]
        states = extracted(reference, b)
        for t in range(len(happened) - 1):
            item, flag = happened[t + 1]
            other = (item + int(offsets[t, b])) % items
            assert other != item
            truth = sigmoid(states[t] @ reference.event(item, flag))
            false = sigmoid(states[t] @ reference.event(other, flag))
            terms.append(-np.log(truth) - np.log(1 - false))
    given = model.auxiliary(features, torch.Generator().manual_seed(4))
    assert given.item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_auxiliary_loss_of_nothing_is_zero() -> None:
    model, features = make_dien(), make_features(3)
    one_item = make_features(3, items=1)
    assert model.auxiliary(one_item).item() == 0
    empty = replace(features, flags=torch.zeros_like(features.flags))
    loss = model.auxiliary(empty)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_auxiliary_loss_enters_the_joint_loss_at_its_weight(weight: float) -> None:
    model = KnowledgeAugmented(DIEN(FIELDS, TABLES, 2, auxiliary_weight=weight), {})
    torch.manual_seed(0)
    loss = model.loss(make_features(3), {}, torch.tensor([0.0, 1, 0, 1, 1]))
    if weight == 0:
        assert loss.auxiliary is None
        assert loss.total.item() == loss.ctr.item()
        return
    torch.manual_seed(0)
    assert isinstance(model.backbone, DIEN)
    wanted = model.backbone.auxiliary(make_features(3))
    torch.testing.assert_close(loss.auxiliary, wanted)
    torch.testing.assert_close(loss.total, loss.ctr + weight * wanted)
    loss.total.backward()
    assert all(p.grad is not None for p in model.backbone.extraction.parameters())


def test_unknown_evolution_is_refused() -> None:
    with pytest.raises(ValueError, match="'augru', 'agru' and 'aigru'"):
        DIEN(FIELDS, TABLES, 2, evolution="gru")
