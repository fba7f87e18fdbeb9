"""AdapterInfoNCE: computed together or by calls, on one rank or several, it is the same loss."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kellm_features.training import losses, mlp
from kellm_features.training.adapter import Adapter
from kellm_features.training.losses import AdapterInfoNCE
from kellm_features.training.mlp import Mlp, NotMlp, find_mlp
from kellm_kernels import info_nce

from . import ranks

B, N, D, H, E = 6, 4, 8, 16, 8


class Tower(nn.Module):
    """A user's own: two Linear layers, one without a bias, and functions."""

    def __init__(self, act: Callable[[Tensor], Tensor] = functional.relu, *, normalize: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(D, H, bias=False)
        self.second = nn.Linear(H, E)
        self.act = act
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(self.act(self.first(x)))
        return functional.normalize(z, dim=-1) if self.normalize else z


class Scaled(Tower):
    """Its gain is 1 today."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Remembering(Tower):
    """Something else looks at what it leaves behind."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Shrunk(Adapter):
    """A subclass that computes something else."""

    def forward(self, encodings: Tensor) -> Tensor:
        return super().forward(encodings) / 2


class Halved(nn.Sequential):
    """Three parts like any other, and a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def sequential(act: nn.Module | None = None, *others: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), act or nn.GELU(), *others, nn.Linear(H, E))


def standardised() -> Adapter:
    adapter = Adapter(D, H, E)
    adapter.standardize(torch.randn(50, D) * 3 + 1)
    return adapter


def hooked(name: str) -> nn.Module:
    module = sequential()
    part = module if name == "forward" else module[0]
    if name == "backward":
        part.register_full_backward_hook(lambda _module, _inputs, _outputs: None)
    elif name == "pre":
        part.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))
    else:
        part.register_forward_hook(lambda _module, _inputs, output: output * 2)
    return module


def replaced() -> nn.Module:
    module = sequential()
    vars(module)["forward"] = lambda x: x[:, :E] * 2  # what some libraries do to a model
    return module


def zeroed() -> nn.Module:
    module = sequential(nn.ReLU())
    for parameter in module[2].parameters():
        nn.init.zeros_(parameter)
    return module


FUSED: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "adapter": (standardised, "gelu", True),
    "adapter_relu": (lambda: Adapter(D, H, E, activation="relu", normalize=False), "relu", False),
    "sequential": (sequential, "gelu", False),
    "sequential_relu": (lambda: sequential(nn.ReLU()), "relu", False),
    "tower": (Tower, "relu", True),
    "tower_gelu": (lambda: Tower(functional.gelu, normalize=False), "gelu", False),
    "zeroed": (zeroed, "relu", False),
    "dropout_off": (lambda: sequential(nn.GELU(), nn.Dropout(0.5)).eval(), "gelu", False),
}
CALLED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tanh": (lambda: sequential(nn.Tanh()), "in train mode it computes something else"),
    "tanh_gelu": (lambda: sequential(nn.GELU("tanh")), "in train mode it computes something else"),
    "dropout": (lambda: sequential(nn.GELU(), nn.Dropout(0.5)), "in train mode it computes something else"),
    "layer_norm": (lambda: sequential(nn.GELU(), nn.LayerNorm(H)), "parameters or buffers beside"),
    "gain": (Scaled, "parameters or buffers beside"),
    "three": (lambda: sequential(nn.GELU(), nn.Linear(H, H)), "3 Linear layers, not two"),
    "apart": (
        lambda: nn.Sequential(nn.Linear(D, H), nn.GLU(), nn.Linear(H // 2, E)),
        "do not chain: 16 out, then 8 in",
    ),
    "halved": (lambda: Halved(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, E)), "in train mode it computes something else"),
    "state": (Remembering, "keeps tensors or other state"),
    "forward_hook": (lambda: hooked("forward"), "Sequential has hooks"),
    "pre_hook": (lambda: hooked("pre"), "Linear has hooks"),
    "backward_hook": (lambda: hooked("backward"), "Linear has hooks"),
    "replaced": (replaced, "forward replaced"),
    "subclass": (lambda: Shrunk(D, H, E), "buffers beside"),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(sequential()), "AveragedModel wraps another module"),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(D, H)), nn.ReLU(), nn.Linear(H, E)),
        "ParametrizedLinear is a Linear of its own kind",
    ),
    "half": (lambda: Tower(lambda h: functional.relu(h).float()), "could not be compared"),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (FUSED[name] if name in FUSED else CALLED[name])[0]()


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x, x_pos = torch.randn(2, B, D, dtype=dtype)
    return {
        "x": x,
        "x_pos": x + 0.5 * x_pos,
        "x_neg": torch.randn(N, D, dtype=dtype),
        "anchor_ids": torch.tensor([0, 1, 2, 3, 1, 5]),
        "positive_ids": torch.tensor([10, 11, 5, 13, 14, 10]),
        "negative_ids": torch.tensor([3, 21, 11, 23]),
        "log_q": -2 * torch.rand(B + N, dtype=dtype),
        "sample_weight": torch.rand(B, dtype=dtype),
    }


def by_calls(module: Callable[[Tensor], Tensor], given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The composition that the module stands for."""
    others: dict[str, Any] = {name: value for name, value in given.items() if not name.startswith("x")}
    z, z_pos, z_neg = module(given["x"]), module(given["x_pos"]), module(given["x_neg"])
    return info_nce(z, z_pos, negatives=z_neg, **others, **options, impl="torch"), z, z_pos


def gradients(results: tuple[Tensor, ...], *modules: nn.Module) -> dict[str, Tensor]:
    """Of a loss that uses all three results, the loss's rows unevenly."""
    loss, z, z_pos = results
    rows = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    total = (rows * loss).sum() + z.float().sin().sum() + z_pos.float().cos().sum()
    parameters = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.2},
    {"temperature": 0.5, "symmetric": True, "reduction": "sum", "margin": 0.2},
    {"temperature": 0.1, "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["mean", "symmetric_sum_margin", "none"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_the_composition(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = make(name).double(), batch()
    wanted = by_calls(module, given, **options)
    wanted_grads = gradients(wanted, module)
    _, activation, normalize = FUSED[name]
    for told in ({}, {"activation": activation, "normalize": normalize}):
        loss = AdapterInfoNCE(**options, **told)
        loss(module, **given)  # compares, where that has to be done
        with monkeypatch.context() as patch:
            patch.setattr(losses, "info_nce", None)  # not by calls
            results = loss(module, **given)
            same(results, wanted)
            same(gradients(results, module), wanted_grads)


@pytest.mark.parametrize("name", FUSED)
def test_what_is_an_mlp(name: str) -> None:
    found = find_mlp(make(name))
    assert isinstance(found, Mlp)
    assert (found.activation, found.normalize) == FUSED[name][1:]


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_logged", set())
    module, given = make(name), batch(torch.float32)
    torch.manual_seed(5)
    wanted = by_calls(module, given, temperature=0.2)
    loss = AdapterInfoNCE(temperature=0.2)
    with caplog.at_level(logging.INFO, logger=losses.__name__):
        torch.manual_seed(5)  # the comparison draws no numbers that dropout then misses
        results = loss(module, **given)
        loss(module, **given)
    torch.testing.assert_close(results, wanted)
    (record,) = caplog.records
    assert CALLED[name][1] in record.getMessage()
    assert type(module).__name__ in record.getMessage()


def test_a_function_is_called() -> None:
    given = batch()
    loss = AdapterInfoNCE(temperature=0.2, activation="gelu")
    same(loss(torch.tanh, **given), by_calls(torch.tanh, given, temperature=0.2))


def test_hooks_see_every_tower() -> None:
    module, seen = sequential(), []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    AdapterInfoNCE()(module, **batch(torch.float32))
    assert seen == [B, B, N]


def test_hooks_on_all_modules_see_each_layer() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, _output: seen.append(type(module).__name__)
    )
    try:
        AdapterInfoNCE()(sequential(), **batch(torch.float32))
    finally:
        handle.remove()
    assert seen == ["Linear", "GELU", "Linear", "Sequential"] * 3 + ["AdapterInfoNCE"]


def test_the_form_follows_mode_and_attributes() -> None:
    module = sequential(nn.ReLU(), nn.Dropout(0.5))
    assert isinstance(find_mlp(module), NotMlp)
    assert isinstance(find_mlp(module.eval()), Mlp)
    assert isinstance(find_mlp(module.train()), NotMlp)
    tower = Tower()
    assert find_mlp(tower)[1:] == ("relu", True)
    tower.act, tower.normalize = functional.gelu, False
    assert find_mlp(tower)[1:] == ("gelu", False)


def test_a_comparison_is_made_once_and_forgotten_with_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = Tower(), batch(torch.float32)
    loss = AdapterInfoNCE()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loss(module, **given)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "_probe", None)
        loss(module, **given)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        (
            "adapter",
            {"activation": "relu"},
            "activation='relu' was given for Adapter, which computes activation='gelu'",
        ),
        ("tower", {"activation": "relu", "normalize": False}, "given for Tower, which computes .*normalize=True"),
        ("tanh", {"activation": "gelu"}, "given for Sequential, and in train mode it computes something else"),
        ("half", {"normalize": True}, "given for Tower, and it could not be compared"),
    ],
)
def test_told_wrong(name: str, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterInfoNCE(**told)(make(name), **batch(torch.float32))


@pytest.mark.parametrize("name", ["adapter", "sequential"])
def test_autocast_is_near_float32(name: str) -> None:
    module, given = make(name), batch(torch.float32)
    loss = AdapterInfoNCE(temperature=0.5)
    wanted = loss(module, **given)
    with torch.autocast("cpu", torch.bfloat16):
        results = loss(module, **given)
    assert [result.dtype for result in results] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-6, atol=2**-6)
    got_grads, want_grads = gradients(results, module), gradients(wanted, module)
    for key, want in want_grads.items():
        assert got_grads[key].dtype == torch.float32
        assert (got_grads[key] - want).norm() <= 2**-5 * want.norm(), key


def test_accumulated_gradients_are_those_of_the_sum() -> None:
    """Negatives are those of each part, so two parts are compared with the sum of their two losses."""
    module, given, loss = make("adapter").double(), batch(), AdapterInfoNCE(temperature=0.2, reduction="sum")
    parts = [{"x": given["x"][part], "x_pos": given["x_pos"][part]} for part in (slice(0, 3), slice(3, B))]
    for part in parts:
        loss(module, **part)[0].backward()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        scores = module(part["x"]) @ module(part["x_pos"]).T / 0.2
        total = total + functional.cross_entropy(scores, torch.arange(3), reduction="sum")
    wanted = torch.autograd.grad(total, list(module.parameters()))
    same([p.grad for p in module.parameters()], list(wanted))


@pytest.mark.parametrize("name", ["adapter", "tower", "tanh"])
def test_checkpointed(name: str) -> None:
    module, given, loss = make(name).double(), batch(), AdapterInfoNCE(temperature=0.2, symmetric=True)
    wanted = gradients(loss(module, **given), module)
    results = checkpoint(lambda: loss(module, **given), use_reentrant=False)
    torch.testing.assert_close(gradients(results, module), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "called_before", "fused"),
    [
        ("adapter", False, True),
        ("sequential", False, True),
        ("tower", False, False),
        ("tower", True, True),
        ("dropout_off", True, True),
        ("tanh", True, False),
    ],
)
def test_compiled_in_one_graph(name: str, called_before: bool, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    module, given = make(name).double(), batch()
    loss = AdapterInfoNCE(temperature=torch.tensor(0.2, dtype=torch.float64), symmetric=True)
    if called_before:
        loss(module, **given)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "info_nce" if fused else "adapter_info_nce", None)  # the way that is not taken
        results = torch.compile(loss, fullgraph=True, backend="aot_eager")(module, **given)
    wanted = loss(module, **given)
    same(results, wanted)
    same(gradients(results, module, loss), gradients(wanted, module, loss))


def test_compiled_code_follows_the_mode() -> None:
    torch._dynamo.reset()
    module, given = make("dropout"), batch(torch.float32)
    loss = AdapterInfoNCE(temperature=0.2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mode in (False, True, False):
        module.train(mode)
        results = []
        for call in (loss, compiled):
            torch.manual_seed(3)
            results.append(call(module, **given))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["adapter", "tanh"])
def test_a_temperature_learns(name: str) -> None:
    module, given = make(name).double(), batch()
    given_temperature = torch.tensor([0.3], dtype=torch.float64)
    loss = AdapterInfoNCE(temperature=given_temperature, symmetric=True)
    (parameter,) = loss.parameters()
    assert set(loss.state_dict()) == {"temperature"}
    loss(module, **given)[0].backward()
    step = 1e-6
    ends = [AdapterInfoNCE(temperature=0.3 + s, symmetric=True)(module, **given)[0].item() for s in (step, -step)]
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    assert given_temperature.grad is None  # a tensor is copied, and a parameter is shared
    mine = nn.Parameter(torch.tensor(0.3))
    assert AdapterInfoNCE(temperature=mine).temperature is mine


def test_options_are_told() -> None:
    told = repr(AdapterInfoNCE(temperature=nn.Parameter(torch.tensor(0.25)), gather=True, activation="relu"))
    assert "temperature=0.25, margin=None" in told
    assert "activation='relu'" in told
    assert "gather=True" in told


def test_gather_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed\.init_process_group"):
        AdapterInfoNCE(gather=True)(Adapter(D, H, E), **batch(torch.float32))


def test_one_rank_is_the_plain_loss(tmp_path: Path) -> None:
    module, given = make("adapter"), batch(torch.float32)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        results = AdapterInfoNCE(gather=True)(module, **given)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(results, AdapterInfoNCE()(module, **given), rtol=0, atol=0)


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, of all cases at once: a start costs seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", ranks.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks.WORLD), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks.WORLD)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * ranks.WORLD, "\n".join(told)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks.WORLD)]


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_together_are_the_whole_batch(name: str, over_ranks: list[dict[str, Any]]) -> None:
    options, names, kind = ranks.CASES[name]
    model = ranks.Model(kind, False, options)
    loss, z, _ = model(ranks.choose(ranks.batch(None), names))
    wanted = ranks.gradients(model, loss)
    seen = [results[name] for results in over_ranks]
    if options.get("reduction") == "none":
        same(torch.cat([rank["loss"] for rank in seen]), loss.detach())
    else:
        same(torch.stack([rank["loss"] for rank in seen]).mean(), loss.detach())
    same(torch.cat([rank["z"] for rank in seen]), z.detach())
    for rank in seen:
        same(rank["grads"], wanted)


def test_the_ranks_need_each_other(over_ranks: list[dict[str, Any]]) -> None:
    """Ids and negatives of the other rank matter in these cases: a rank alone comes to something else."""
    for name in ("plain", "full_mean", "symmetric_mean"):
        options, names, kind = ranks.CASES[name]
        alone = [ranks.Model(kind, False, options)(ranks.choose(ranks.batch(rank), names))[0] for rank in range(2)]
        together = torch.stack([results[name]["loss"] for results in over_ranks]).mean()
        assert abs(torch.stack(alone).mean() - together) > 0.01
    given = ranks.choose(ranks.batch(None), ranks.FULL)
    loss = ranks.Model("adapter", False, {})
    masked = {**given, "anchor_ids": torch.arange(100, 110), "negative_ids": torch.arange(200, 206)}
    assert abs(loss(given)[0] - loss(masked)[0]) > 0.01


def test_ranks_that_differ_are_told_so(over_ranks: list[dict[str, Any]]) -> None:
    for results in over_ranks:
        assert "x: 5, 4; x_pos: 5, 4. " in results["refusals"]["uneven"]
        assert "sample_weight: 5, none. " in results["refusals"]["lonely"]
