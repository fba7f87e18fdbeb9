"""Hybrid experts against their equation in NumPy, and adapters of both kinds on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from kellm_features.errors import ArtifactError
from kellm_features.training.adapter import Adapter
from kellm_features.training.checkpoint import load_adapters, save_adapters, save_module
from kellm_features.training.experts import AdapterKind, HybridExperts, build_adapters
from kellm_features.training.losses import AdapterInfoNCE
from kellm_features.training.mlp import NotMlp, find_mlp

D, H, E = 6, 9, 4


def make(kind: AdapterKind = "experts", **options: Any) -> nn.ModuleDict:
    torch.manual_seed(0)
    adapters = build_adapters(kind, {"user": D, "item": D}, hidden=H, dim=E, **options)
    for adapter in adapters.values():
        adapter.standardize(torch.rand(30, D) * 3 + 1)
    return adapters


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@pytest.mark.parametrize("relu_output", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_experts_equal_their_equation(relu_output: bool, normalize: bool) -> None:
    """Σ_k g_k · expert_k, g a softmax, over the standardised encoding: user and item with the same shared experts."""
    options = {"activation": "relu", "relu_output": relu_output, "normalize": normalize}
    adapters = make(shared_experts=2, specific_experts=3, **options).double()
    x = torch.randn(5, D, dtype=torch.float64)
    for side, adapter in adapters.items():
        w = {name: value.numpy() for name, value in adapter.state_dict().items()}
        for row, given in zip(x.numpy(), adapter(x).detach().numpy(), strict=True):
            z = (row - w["mean"]) / w["std"]
            scores = w["gate.weight"] @ z + w["gate.bias"]
            g = np.exp(scores) / np.exp(scores).sum()
            wanted = np.zeros(E)
            for k, name in enumerate(["shared.0", "shared.1", "specific.0", "specific.1", "specific.2"]):
                hidden = relu(w[f"{name}.hidden.weight"] @ z + w[f"{name}.hidden.bias"])
                out = w[f"{name}.output.weight"] @ hidden + w[f"{name}.output.bias"]
                wanted += g[k] * (relu(out) if relu_output else out)
            if normalize:
                wanted /= np.linalg.norm(wanted)
            np.testing.assert_allclose(given, wanted, rtol=1e-9, err_msg=side)
    user, item = adapters["user"].state_dict(), adapters["item"].state_dict()
    assert all(torch.equal(user[name], item[name]) for name in user if name.startswith("shared."))
    assert not torch.equal(user["specific.0.hidden.weight"], item["specific.0.hidden.weight"])


def test_experts_without_a_relu_reach_both_halves_of_the_cosine() -> None:
    x = torch.randn(200, D)
    cosines = {}
    for relu_output in (False, True):
        z = make(relu_output=relu_output)["item"](x)
        cosines[relu_output] = (z @ z.T).min().item()
    assert cosines[True] >= 0
    assert cosines[False] < -0.3


def test_shared_experts_learn_from_both_sides() -> None:
    adapters = make()
    one = adapters["user"].shared[0].hidden.weight
    assert one is adapters["item"].shared[0].hidden.weight
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in adapters.items()}
    expert = D * H + H + H * E + E
    assert sum(p.numel() for p in adapters.parameters()) == sum(count.values()) - 2 * expert
    x, w, gradients = torch.randn(2, 5, D), torch.randn(5, E), []
    for sides in (("user",), ("item",), ("user", "item")):
        adapters.zero_grad()
        sum((adapters[side](x[i]) * w).sum() for i, side in enumerate(("user", "item")) if side in sides).backward()
        assert one.grad is not None
        gradients.append(one.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


def test_the_contrastive_loss_calls_experts() -> None:
    adapter = make()["item"]
    assert isinstance(find_mlp(adapter), NotMlp)
    x, x_pos = torch.randn(2, 7, D)
    loss, z, z_pos = AdapterInfoNCE(temperature=0.5)(adapter, x, x_pos)
    torch.testing.assert_close(loss, functional.cross_entropy(z @ z_pos.T / 0.5, torch.arange(7)))


@pytest.mark.parametrize("kind", ["mlp", "experts"])
@pytest.mark.parametrize("sides", [("user", "item"), ("item",)])
def test_adapters_survive_the_disk(tmp_path: Path, kind: AdapterKind, sides: tuple[str, ...]) -> None:
    path = tmp_path / "adapter.safetensors"
    adapters = nn.ModuleDict({side: part for side, part in make(kind, activation="relu").items() if side in sides})
    meta = save_adapters(path, adapters, "encoder")
    loaded, said = load_adapters(path)
    assert said == meta
    assert (said.in_dim, said.dim, said.encoder_id, said.kind) == (D, E, "encoder", kind)
    x = torch.randn(3, D)
    for side in sides:
        assert torch.equal(loaded[side](x), adapters[side](x))
    if kind == "experts":
        assert isinstance(loaded[sides[0]], HybridExperts)
        assert loaded[sides[0]].shared is loaded[sides[-1]].shared
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        assert sum(name.endswith("shared.0.hidden.weight") for name in names) == 1
    again = tmp_path / "again.safetensors"
    assert save_adapters(again, loaded, "encoder").model_id == meta.model_id
    assert again.read_bytes() == path.read_bytes()


def test_files_from_before_there_were_kinds_load(tmp_path: Path) -> None:
    path, adapter = tmp_path / "old.safetensors", Adapter(D, H, E)
    metadata = {"in_dim": D, "hidden": H, "dim": E, "activation": "gelu", "normalize": True}
    tensors = {f"item.{name}": tensor for name, tensor in adapter.state_dict().items()}
    save_module(path, tensors, metadata | {"encoder_id": "encoder", "model_id": "m"})
    loaded, meta = load_adapters(path)
    x = torch.randn(3, D)
    assert torch.equal(loaded["item"](x), adapter(x))
    assert meta.kind == "mlp"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot share experts"):
        build_adapters("experts", {"user": 3, "item": 4}, hidden=H, dim=E)
    with pytest.raises(ValueError, match="'mlp' and 'experts'"):
        build_adapters("lora", {"user": 3}, hidden=H, dim=E)
    with pytest.raises(ValueError, match="Linear is no adapter"):
        save_adapters(tmp_path / "a", nn.ModuleDict({"item": nn.Linear(2, 3)}), "encoder")
    mixed = nn.ModuleDict({"user": make("mlp")["user"], "item": make()["item"]})
    with pytest.raises(ValueError, match="one form for all sides"):
        save_adapters(tmp_path / "a", mixed, "encoder")
    apart = nn.ModuleDict({"user": make()["user"], "item": make()["item"]})
    save_adapters(tmp_path / "a", apart, "encoder")  # equal numbers: nothing is lost
    nn.init.zeros_(apart["item"].shared[1].output.bias)
    with pytest.raises(ValueError, match=r"'item.shared.1.output.bias' is another tensor.*give all sides the same"):
        save_adapters(tmp_path / "a", apart, "encoder")
    path = tmp_path / "adapter.safetensors"
    save_module(path, {"item.gate.weight": torch.zeros(2, 2)}, {"kind": "lora"})
    with pytest.raises(ArtifactError, match="kellm run --from train"):
        load_adapters(path)
