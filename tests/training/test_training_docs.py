"""The code and the settings in docs/training.md do what is said of them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from kellm_features.settings import Settings
from kellm_features.training.loader import ExampleFiles
from kellm_features.training.schedule import chosen_sides, shown_sides

from .conftest import docs_block


@pytest.mark.parametrize("train", ["", "affinity = 'none'\nprofile = true", "sides = 'user'"])
def test_a_loop_of_ones_own(world: Path, monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    (world / "runs").mkdir()
    (world / "runs" / "nightly").symlink_to(world)
    (world / "kellm.toml").write_text(f"[train]\nhidden = 16\ndim = 8\n{train}\n")
    monkeypatch.chdir(world)
    names: dict[str, Any] = {}
    exec(docs_block("BatchLoader"), names)
    data, model = names["data"], names["model"]
    assert ExampleFiles(Path("examples.parquet"), 80, 60).group_rows == [len(data.examples["train"])]
    assert set(names["loss"].contrastive) == ({"user"} if "sides" in train else {"user", "item"})
    assert all(term > 0 for term in names["loss"].contrastive.values())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in gradients.values())


def test_kellmrec_as_printed() -> None:
    """Two vectors side by side, and both terms summed over a batch of 256, from the first step on (§3.3, §3.4)."""
    settings = Settings.model_validate(tomllib.loads(docs_block("reduction", "toml"))).train
    assert chosen_sides(settings) == shown_sides(settings) == ("user", "item")
    wanted = {"schedule": "joint", "affinity": "none", "positives": "raw", "top_k": 1, "reduction": "sum"}
    wanted |= {"batch_size": 256, "weight": 0.004}
    assert {name: getattr(settings, name) for name in wanted} == wanted
