"""The example of a ranker of one's own learns, from its features and from the knowledge."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from kellm_features.training.metrics import auc

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_backbone.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_backbone", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_backbone_learns_what_the_text_tells(example: ModuleType) -> None:
    model, losses = example.train()
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        encodings, taste, _ = example.make_world()
        for part in (range(300), range(300, 400)):  # ids of training; ids that it never saw, told by text alone
            batch = example.make_batch(taste, part, 2000)
            scores = model.eval()(batch, {"item": encodings[batch["item"]]})
            assert auc(batch["label"].numpy() > 0, scores.double().numpy()) > 0.7
            unlike = model(batch, {"item": encodings[batch["item"]].roll(1, 0)})
            assert auc(batch["label"].numpy() > 0, unlike.double().numpy()) < 0.65


def test_gradients_reach_adapter_and_backbone(example: ModuleType) -> None:
    model, losses = example.train(steps=1)
    assert len(losses) == 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
