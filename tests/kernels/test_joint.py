"""The adapter and InfoNCE in one, `impl="torch"`, against both written out plainly in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kellm_kernels import adapter_info_nce, adapter_mlp, info_nce

from .memory import peak_bytes
from .oracle import (
    adapter_weights,
    eager_adapter,
    eager_loss,
    margin_among,
    needs_triton,
    problem,
    relative_error,
    strided,
    transposed,
)

Results = tuple[Tensor, Tensor, Tensor]
OPTIONS = {
    "nothing": (),
    "all ids": ("anchor_ids", "positive_ids", "negative_ids"),
    "log_q and weights": ("log_q", "sample_weight"),
    "everything": ("anchor_ids", "positive_ids", "negative_ids", "log_q", "sample_weight", "margin"),
}


class Joint:
    """Encodings, weights and a temperature that all take gradients, and the loss's options."""

    def __init__(
        self,
        rows: int,
        negatives: int,
        *,
        dims: tuple[int, int, int] = (24, 40, 16),
        option: str = "nothing",
        dtype: torch.dtype = torch.float64,
        **form: Any,
    ) -> None:
        vectors = problem(rows, negatives, dims[0], dtype=dtype, cosine=0.8)
        self.encodings = vectors.leaves[: 2 + bool(negatives)]
        self.weights = adapter_weights(*dims, dtype=dtype)
        self.options = {"temperature": vectors.options["temperature"]}
        self.options |= {name: vectors.options[name] for name in OPTIONS[option]} | form
        if "margin" in self.options:
            z, z_pos, *z_neg = (eager_adapter(x, *self.weights, **self.adapter_options()) for x in self.encodings)
            self.options["margin"] = margin_among(z, z_pos, z_neg[0] if z_neg else z[:0])

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.encodings, *self.weights, self.options["temperature"]]

    def adapter_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in ("activation", "normalize")}

    def loss_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in ("activation", "normalize")}

    def ours(self, **changes: Any) -> Results:
        x, x_pos, *x_neg = self.encodings
        options: dict[str, Any] = {"x_neg": x_neg[0] if x_neg else None, "impl": "torch"} | self.options | changes
        return adapter_info_nce(x, x_pos, *self.weights, **options)

    def in_two_steps(self) -> Results:
        z, z_pos, *z_neg = (
            adapter_mlp(x, *self.weights, **self.adapter_options(), impl="torch") for x in self.encodings
        )
        loss = info_nce(z, z_pos, negatives=z_neg[0] if z_neg else None, **self.loss_options(), impl="torch")
        return loss, z, z_pos

    def plain(self) -> Results:
        z, z_pos, *z_neg = (eager_adapter(x, *self.weights, **self.adapter_options()) for x in self.encodings)
        return eager_loss(z, z_pos, z_neg[0] if z_neg else None, **self.loss_options()), z, z_pos


def upstream(results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of all three results, each element's its own and of one size, so that none hides another."""
    return [
        (torch.linspace(0.3, 5, result.numel(), dtype=torch.float64) + seed).sin().to(result.dtype).view_as(result)
        for seed, result in enumerate(results)
    ]


def grads_of(results: Sequence[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, leaves, upstream(results))


def assert_equal(results: Sequence[Tensor], wanted: Sequence[Tensor], leaves: list[Tensor]) -> None:
    torch.testing.assert_close(results, wanted, rtol=1e-10, atol=1e-11)
    for grad, truth in zip(grads_of(results, leaves), grads_of(wanted, leaves), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-10 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("negatives", [0, 5])
@pytest.mark.parametrize("rows", [1, 2, 17, 130])
def test_equals_the_plain_expression(rows: int, negatives: int, option: str, symmetric: bool) -> None:
    case = Joint(rows, negatives, option=option, symmetric=symmetric, reduction="none")
    assert_equal(case.ours(), case.plain(), case.leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_every_form(activation: str, normalize: bool, reduction: str) -> None:
    case = Joint(17, 5, option="everything", activation=activation, normalize=normalize, reduction=reduction)
    assert_equal(case.ours(), case.plain(), case.leaves)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("option", ["anchor_ids", "positive_ids", "negative_ids", "log_q", "sample_weight", "margin"])
def test_each_option_counts(option: str, symmetric: bool) -> None:
    """The inputs above are such that a forgotten option would be seen."""
    case = Joint(17, 5, option="everything", symmetric=symmetric)
    assert abs(case.ours()[0].item() - case.ours(**{option: None})[0].item()) > 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_its_two_steps(symmetric: bool) -> None:
    """Rounding to bfloat16 included: what is contrasted is what is returned."""
    for dtype in (torch.float64, torch.bfloat16):
        case = Joint(33, 5, option="all ids", symmetric=symmetric, dtype=dtype)
        torch.testing.assert_close(case.ours(), case.in_two_steps(), rtol=1e-14, atol=1e-14)


def test_gradcheck_of_all_three_results() -> None:
    case = Joint(5, 3, dims=(4, 6, 3), option="everything", symmetric=True, reduction="none")
    options = {name: value for name, value in case.options.items() if name != "temperature"}

    def joint(x: Tensor, x_pos: Tensor, x_neg: Tensor, *others: Tensor) -> Results:
        weights, temperature = others[:4], others[4] * 5  # away from 0.1, where finite differences are too coarse
        return adapter_info_nce(x, x_pos, *weights, x_neg=x_neg, temperature=temperature, **options, impl="torch")

    assert torch.autograd.gradcheck(joint, case.leaves)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_any_of_the_results_may_be_used_alone(used: tuple[int, ...]) -> None:
    """A second loss may look at one side's embeddings alone; x_neg has no part in those."""
    case = Joint(17, 5, option="all ids")
    leaves = [*case.encodings[:2], *case.weights]

    def grads(results: Results) -> tuple[Tensor, ...]:
        chosen = [results[place] for place in used]
        given = torch.autograd.grad(chosen, leaves, upstream(chosen), allow_unused=True)
        return tuple(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(given, leaves, strict=True))

    for grad, truth in zip(grads(case.ours()), grads(case.plain()), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-10)


def test_a_second_loss_on_the_embeddings() -> None:
    """As a ranking model beside it has: everything into `backward` at once."""
    case = Joint(17, 0)

    def total(results: Results) -> Tensor:
        loss, z, z_pos = results
        return loss + torch.nn.functional.softplus((z * z_pos).sum(1) - z.sum(1)).mean()

    grads = torch.autograd.grad(total(case.ours()), case.leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(total(case.plain()), case.leaves), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", ["encodings", "weights", "all but the negatives' encodings"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    case = Joint(17, 5, option="all ids")
    if frozen != "weights":
        left = 2 if frozen == "all but the negatives' encodings" else 3
        case.encodings = [x.detach() if place < left else x for place, x in enumerate(case.encodings)]
    if frozen != "encodings":
        case.weights = [weight.detach() for weight in case.weights]
    asked = [leaf for leaf in case.leaves if leaf.requires_grad]
    torch.autograd.backward(case.ours()[0])
    wanted = torch.autograd.grad(case.plain()[0], asked)
    for leaf, truth in zip(asked, wanted, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, truth, rtol=1e-9, atol=1e-11)
    assert all(leaf.grad is None for leaf in case.leaves if not leaf.requires_grad)


def test_without_gradients() -> None:
    case = Joint(17, 5, option="everything")
    with torch.no_grad():
        torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-10, atol=1e-11)


def test_an_encoding_that_is_both_anchor_and_positive() -> None:
    case = Joint(17, 0)
    x = case.encodings[0]
    case.encodings = [x, x]
    leaves = [x, *case.weights]
    assert_equal(case.ours(), case.plain(), leaves)


# Dtypes and surroundings


@pytest.mark.parametrize("option", ["nothing", "everything"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float32(symmetric: bool, option: str) -> None:
    case = Joint(130, 5, dims=(96, 64, 48), option=option, symmetric=symmetric, dtype=torch.float32)
    results, wanted = case.ours(), case.plain()
    assert [result.dtype for result in results] == [torch.float32] * 3
    torch.testing.assert_close(results, [truth.float() for truth in wanted], rtol=1e-5, atol=1e-5)
    assert relative_error(grads_of(results, case.leaves), grads_of(wanted, case.leaves)) < 2e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_autocast_narrows_the_adapter_and_not_the_loss(symmetric: bool) -> None:
    """The loss is what it is of the bfloat16 embeddings in float32; gradients of float32 weights are float32."""
    case = Joint(130, 5, option="all ids", symmetric=symmetric, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, z, z_pos = case.ours()
        two_steps = case.in_two_steps()
    assert (loss.dtype, z.dtype, z_pos.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close((loss, z, z_pos), two_steps, rtol=1e-6, atol=1e-6)
    x_neg = case.encodings[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_neg = adapter_mlp(x_neg, *case.weights, impl="torch")
    wanted = eager_loss(z, z_pos, z_neg, **case.loss_options())
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, case.leaves)
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert relative_error(grads, torch.autograd.grad(case.plain()[0], case.leaves)) < 3e-2


@pytest.mark.parametrize("layout", [transposed, strided])
def test_inputs_need_not_be_contiguous(layout: Callable[[Tensor], Tensor]) -> None:
    case, other = (Joint(17, 5, option="all ids", symmetric=True) for _ in range(2))
    other.encodings = [layout(x.detach()).requires_grad_() for x in case.encodings]
    other.weights = [layout(w.detach()).requires_grad_() if w.dim() == 2 else w for w in case.weights]
    assert sum(not leaf.is_contiguous() for leaf in other.leaves) == 5
    results, wanted = other.ours(), case.plain()
    torch.testing.assert_close(results, wanted, rtol=1e-10, atol=1e-11)
    grads, truths = grads_of(results, other.leaves), grads_of(wanted, case.leaves)
    torch.testing.assert_close(grads, truths, rtol=1e-9, atol=1e-10)


def test_checkpointing_changes_nothing() -> None:
    case = Joint(17, 5, option="everything")
    results = checkpoint(lambda *_: case.ours(), *case.leaves, use_reentrant=False)
    for grad, truth in zip(grads_of(results, case.leaves), grads_of(case.ours(), case.leaves), strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=0)


def test_gradients_accumulate() -> None:
    """Two micro-batches into the same weights."""
    cases = [Joint(17, 5), Joint(9, 0)]
    weights = cases[0].weights
    cases[1].weights = weights
    for case in cases:
        torch.autograd.backward(case.ours()[0])
    wanted = torch.autograd.grad(cases[0].plain()[0] + cases[1].plain()[0], weights)
    for weight, truth in zip(weights, wanted, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, truth, rtol=1e-9, atol=1e-11)


def test_the_same_inputs_give_the_same_bits() -> None:
    case = Joint(130, 5, option="everything", symmetric=True, dtype=torch.float32)
    first, second = case.ours(), case.ours()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    pairs = zip(grads_of(first, case.leaves), grads_of(second, case.leaves), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# Memory

B, D, H, E = 16_384, 384, 256, 64


@pytest.mark.parametrize("every_option", [False, True])
def test_memory_grows_with_the_batch_and_not_with_its_square(every_option: bool) -> None:
    """At most 16·B·E + 8·B·H bytes beyond the results: 48 MiB here, where the logits alone would be 1 GiB."""
    x, x_pos = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
    weights = adapter_weights(D, H, E, dtype=torch.float32)
    options: dict[str, Any] = {}
    if every_option:
        ids = torch.arange(2 * B) % 20_000
        options = {"anchor_ids": ids[:B], "positive_ids": ids[B:], "margin": 0.3, "symmetric": True}
        options |= {"log_q": torch.zeros(B), "sample_weight": torch.ones(B)}

    def step() -> tuple[Tensor, ...]:
        loss, z, z_pos = adapter_info_nce(x, x_pos, *weights, **options, impl="torch")
        return loss, z, z_pos, *torch.autograd.grad(loss, weights)

    results = 4 * (1 + 2 * B * E + sum(weight.numel() for weight in weights))
    assert peak_bytes(step) <= 16 * B * E + 8 * B * H + results


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activation": "tanh"}, ValueError, r"activation='tanh' is unknown; accepted: 'gelu', 'relu'"),
        ({"reduction": "max"}, ValueError, r"reduction='max' is unknown; accepted: 'mean', 'sum', 'none'"),
        ({"impl": "numpy"}, ValueError, r"impl='numpy' is unknown; accepted: 'auto', 'triton', 'torch'"),
        ({"temperature": 0.0}, ValueError, r"temperature=0.0: expected a finite number above 0"),
        ({"x_pos": torch.zeros(5, 8)}, ValueError, r"x \(4, 8\) and x_pos \(5, 8\): expected the same"),
        ({"x_pos": torch.zeros(4, 8).double()}, TypeError, r"x is torch.float32 and x_pos torch.float64"),
        ({"x": torch.zeros(2, 2, 8)}, ValueError, r"x \(2, 2, 8\) and x_pos \(4, 8\): expected the same \(B, E\)"),
        ({"w1": torch.zeros(16, 9)}, ValueError, r"x \(4, 8\), w1 \(16, 9\), .* do not fit"),
        ({"b2": torch.zeros(8).double()}, TypeError, r"float64: expected one dtype, or torch.autocast"),
        ({"x_neg": torch.zeros(3, 9)}, ValueError, r"\(4, 8\) and \w+ \(3, 9\): expected"),
        ({"x_neg": torch.zeros(3, 8).double()}, TypeError, r"torch.float64: expected one floating dtype"),
        ({"negative_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"negative_ids \(3,\) without negatives"),
        ({"anchor_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"anchor_ids \(3,\): expected \(4,\)"),
        ({"log_q": torch.zeros(6), "x_neg": torch.zeros(3, 8)}, ValueError, r"expected \(4,\) or \(7,\)"),
        ({"sample_weight": torch.zeros(5)}, ValueError, r"sample_weight \(5,\): expected \(4,\)"),
        ({"margin": float("nan")}, ValueError, r"margin=nan: expected a finite difference"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    names = ("w1", "b1", "w2", "b2")
    weights = dict(zip(names, adapter_weights(8, 16, 8, dtype=torch.float32), strict=True))
    arguments: dict[str, Any] = {"x": torch.zeros(4, 8), "x_pos": torch.zeros(4, 8)} | weights | change
    with pytest.raises(error, match=words):
        adapter_info_nce(**arguments)


@needs_triton
def test_triton_is_refused_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Joint(4, 0, dims=(8, 16, 8), dtype=torch.float32)
    monkeypatch.setattr("kellm_kernels.fused.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"it needs a GPU .*, and the tensors are on cpu; impl='torch' can"):
        case.ours(impl="triton")
    monkeypatch.setattr("kellm_kernels.fused.INTERPRETED", True)
    for dims in ((9, 16, 8), (8, 17, 8), (8, 16, 9)):
        with pytest.raises(ValueError, match=r"hidden layers and encodings are multiples of 8 long, and one is"):
            Joint(4, 0, dims=dims, dtype=torch.float32).ours(impl="triton")
