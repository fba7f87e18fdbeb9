"""Adapter and loss with `impl="triton"` against the plain float64 expressions: on a GPU, else in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kellm_kernels import adapter_info_nce, adapter_mlp

from .device import DEVICE, TOLERANCE, problem_on, weights_on
from .oracle import (
    Problem,
    adapter_weights,
    eager_adapter,
    eager_loss,
    needs_triton,
    pairs_at,
    problem,
    relative_error,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("poison")]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; they are counted in place of being run."""
    from kellm_kernels import fused

    names: list[str] = []
    monkeypatch.setattr(fused, "_launch", lambda kernel, *_arguments, **_options: names.append(kernel.fn.__name__))
    return names


def by_identity(
    encodings: list[Tensor], options: dict[str, Any], *, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of encodings through an adapter that only normalises, and their float64 truth.

    The truth starts from the embeddings as they were rounded: at a high similarity their rounding alone moves it.
    """
    dim = encodings[0].shape[1]
    one = torch.eye(dim, device=DEVICE, dtype=dtype)
    weights = [torch.cat([one, -one]), one.new_zeros(2 * dim), torch.cat([one, -one], dim=1), one.new_zeros(dim)]
    x, x_pos, *x_neg = (encoding.to(DEVICE, dtype).requires_grad_() for encoding in encodings)
    loss, z, z_pos = adapter_info_nce(
        x, x_pos, *weights, x_neg=x_neg[0] if x_neg else None, activation="relu", impl="triton", **options
    )
    generator = torch.Generator().manual_seed(5)
    upstream = torch.rand(loss.shape, generator=generator) + 0.5
    grads = torch.autograd.grad(loss, [x, x_pos, *x_neg], upstream.to(DEVICE))
    lengths = [v.detach().cpu().double().norm(dim=1, keepdim=True) for v in (x, x_pos, *x_neg)]
    units = [z.detach().cpu(), z_pos.detach().cpu()]
    units += [
        (v.detach().cpu().float() / length.float()).to(dtype) for v, length in zip(x_neg, lengths[2:], strict=True)
    ]
    leaves = [v.double().requires_grad_() for v in units]
    on_cpu = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in options.items()}
    wanted = eager_loss(*leaves, **on_cpu)
    d_units = torch.autograd.grad(wanted, leaves, upstream.double())
    truths = [
        (grad - unit * (unit * grad).sum(1, keepdim=True)) / length
        for grad, unit, length in zip(d_units, (v.detach() for v in leaves), lengths, strict=True)
    ]
    return [v.detach().cpu() for v in (loss, *grads)], [wanted.detach(), *truths]


@pytest.mark.parametrize("cosine", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_the_whole_keeps_digits_at_high_similarity(cosine: float, symmetric: bool, everything: bool) -> None:
    """In bfloat16, whose columns' sums are computed in float16; what is left is the rounding of gradients, twice."""
    rows, dim = 150, 64
    pair = pairs_at(cosine, rows, dim)
    options: dict[str, Any] = {"symmetric": symmetric, "reduction": "sum"}
    encodings = [3.0 * pair[0], 0.5 * pair[1]]
    if everything:
        given = problem_on(DEVICE, problem(rows, 20, dim, cosine=cosine)).only(
            "anchor_ids", "positive_ids", "negative_ids"
        )
        weight = torch.linspace(0, 1e-6, rows, device=DEVICE)  # small weights leave float16's range, unscaled
        options |= problem_on(DEVICE, given).options | {"sample_weight": weight, "reduction": "none"}
        encodings.append(2.0 * pairs_at(0.1, 20, dim, seed=1)[1])
    got, wanted = by_identity(encodings, options, dtype=torch.bfloat16)
    assert relative_error(got[:1], wanted[:1]) < 2e-4
    assert relative_error(got[1:], wanted[1:]) < 5e-3


@pytest.mark.parametrize("temperature", [0.014, 0.0145, 0.03, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unit_vectors_as_far_apart_as_they_can_be(temperature: float, dtype: torch.dtype) -> None:
    """Logits of ±1/τ in the same row, where e_ij are taken without their maximum and where they are not."""
    anchor = torch.zeros(70, 16, dtype=torch.float64)
    anchor[:, 3] = 1
    positive = anchor.clone()
    positive[::2] *= -1
    got, wanted = by_identity([anchor, positive], {"temperature": temperature, "reduction": "none"}, dtype=dtype)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    # The vectors lie along one line, so that nothing of a gradient is left beside it.
    for grad, truth in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=0, atol=1e-4 / temperature)


def test_all_negatives_far_away_at_a_low_temperature() -> None:
    """No sum is lost for being small: negatives opposite to all anchors, each own positive a little less so."""
    generator = torch.Generator().manual_seed(3)
    anchor = torch.zeros(40, 16, dtype=torch.float64)
    anchor[:, 0] = 1
    anchor += 0.05 * torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    positive = -anchor + 0.1 * torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    options = {"temperature": 0.015, "reduction": "none"}
    for dtype, tolerance in ((torch.bfloat16, 5e-3), (torch.float32, 2e-5)):
        got, wanted = by_identity([anchor, positive], options, dtype=dtype)
        assert relative_error(got, wanted) < tolerance


def joint(
    given: Problem, encodings: list[Tensor], weights: list[Tensor], *, impl: str | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and embeddings: by `adapter_info_nce`, or (impl None) by the float64 expressions one after the other."""
    x, x_pos, x_neg = encodings
    if impl is not None:
        return adapter_info_nce(x, x_pos, *weights, x_neg=x_neg, impl=impl, **given.options, **options)
    names = ("activation", "normalize")
    how = {name: options.pop(name) for name in names if name in options}
    z, z_pos, z_neg = (eager_adapter(encoding, *weights, **how) for encoding in encodings)
    return eager_loss(z, z_pos, z_neg, **given.options, **options), z, z_pos


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("activation", "normalize"), [("gelu", True), ("relu", True), ("gelu", False)])
@pytest.mark.parametrize(("rows", "dims"), [(5, (16, 8, 8)), (150, (72, 104, 40))])
def test_the_whole(
    rows: int, dims: tuple[int, int, int], activation: str, normalize: bool, symmetric: bool, dtype: torch.dtype
) -> None:
    """Every gradient there is, upstream coming through loss and embeddings; D, H and E are multiples of 8, no more."""
    encoding, hidden, embedding = dims
    given = problem(rows, 9, encoding, dtype=torch.float32, temperature=0.5)
    given.options["margin"] = None  # of embeddings that are not yet made
    generator = torch.Generator().manual_seed(1)
    encodings = [torch.randn(count, encoding, generator=generator).to(dtype) for count in (rows, rows, 9)]
    weights = [weight.detach().to(dtype) for weight in adapter_weights(encoding, hidden, embedding)]
    up, up_pos = torch.randn(2, rows, embedding, generator=generator, dtype=torch.float64).mul(0.01).unbind()
    results = []
    for impl, place, kind in ((None, "cpu", torch.float64), ("triton", DEVICE, dtype)):
        x = [tensor.to(place, kind).requires_grad_() for tensor in encodings]
        w = [tensor.to(place, kind).requires_grad_() for tensor in weights]
        options = problem_on(DEVICE, given) if impl else given
        loss, z, z_pos = joint(
            options, x, w, impl=impl, activation=activation, normalize=normalize, symmetric=symmetric
        )
        total = loss.double() + (z.double() * up.to(place)).sum() + (z_pos.double() * up_pos.to(place)).sum()
        leaves = [*x, *w, options.options["temperature"]]
        grads = torch.autograd.grad(total, leaves)
        results.append([tensor.detach().cpu().double() for tensor in (loss, z, z_pos, *grads)])
    assert relative_error(results[1], results[0]) < 4 * TOLERANCE[dtype]  # five products deep


def test_a_temperature_that_learns_beside_sums_in_parts() -> None:
    """Its gradient is added up by the launch that adds the weights' parts."""
    from kellm_kernels import fused

    x = torch.randn(2, 300, 72, device=DEVICE)
    weights = weights_on(DEVICE, 72, 104, 40)
    temperature = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    names: list[str] = []
    with fused.watched(lambda kernel, *_launch: names.append(kernel.fn.__name__)):
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss, z, z_pos = adapter_info_nce(x[0], x[1], *weights, temperature=temperature, impl="triton")
        grads = torch.autograd.grad(loss, [*weights, temperature])
    assert "add_parts" in names or DEVICE == "cuda"
    alone = temperature.detach().cpu().double().requires_grad_()
    wanted = eager_loss(z.detach().cpu(), z_pos.detach().cpu(), temperature=alone)
    assert relative_error([grads[-1].cpu()], torch.autograd.grad(wanted, [alone])) < 1e-4


def test_the_adapter_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 50, 24, generator=generator)  # more than two dimensions
    weights = adapter_weights(24, 40, 16, dtype=torch.float32)
    upstream = torch.randn(3, 50, 16, generator=generator)
    mine = [tensor.detach().to(DEVICE).requires_grad_() for tensor in (x, *weights)]
    z = adapter_mlp(*mine, impl="triton")
    leaves = [x.requires_grad_(), *weights]
    wanted = eager_adapter(*leaves)
    torch.testing.assert_close(z.detach().cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    grads = [grad.cpu() for grad in torch.autograd.grad(z, mine, upstream.to(DEVICE))]
    truths = torch.autograd.grad(wanted, leaves, upstream.double())
    assert relative_error(grads, [truth.double() for truth in truths]) < 1e-5


def test_no_rows_give_no_rows() -> None:
    weights = weights_on(DEVICE, 16, 8, 8)
    z = adapter_mlp(torch.empty(0, 16, device=DEVICE), *weights, impl="triton")
    assert z.shape == (0, 8)
    for grad in torch.autograd.grad(z.sum(), weights):
        assert not bool(grad.any())


def test_weights_of_zero_give_zeros() -> None:
    x = torch.ones(5, 16, device=DEVICE)
    weights = [torch.zeros(shape, device=DEVICE, requires_grad=True) for shape in ((8, 16), (8,), (8, 8), (8,))]
    loss, z, _ = adapter_info_nce(x, x, *weights, impl="triton")
    assert loss.item() == pytest.approx(torch.tensor(5.0).log().item())
    assert not bool(z.any())
    for grad in torch.autograd.grad(loss, weights):
        assert not bool(grad.any())


def test_upstream_of_the_embeddings_alone() -> None:
    """A caller may use the embeddings and leave the loss."""
    x = torch.randn(2, 9, 16, device=DEVICE)
    weights = weights_on(DEVICE, 16, 8, 8)
    _, z, _ = adapter_info_nce(x[0], x[1], *weights, impl="triton")
    grads = torch.autograd.grad(z[:, 0].sum(), weights)
    truths = torch.autograd.grad(adapter_mlp(x[0], *weights, impl="torch")[:, 0].sum(), weights)
    torch.testing.assert_close(grads, truths, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [33, 300])
def test_autocast_takes_its_dtype_and_gives_gradients_in_the_weights_own(rows: int) -> None:
    x = torch.randn(2, rows, 24, device=DEVICE)
    weights = weights_on(DEVICE, 24, 16, 8)
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss, z, z_pos = adapter_info_nce(x[0], x[1], *weights, impl="triton")
    assert (loss.dtype, z.dtype, z_pos.dtype) == (torch.float32, torch.float16, torch.float16)
    grads = torch.autograd.grad(loss, weights)
    wanted = torch.autograd.grad(adapter_info_nce(x[0], x[1], *weights, impl="torch")[0], weights)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert relative_error(grads, [grad.double() for grad in wanted]) < 2e-2


@pytest.mark.parametrize("rows", [20, 300] if DEVICE == "cpu" else [20, 300, 20_000])
def test_the_whole_gives_the_same_bits_again(rows: int) -> None:
    """In bfloat16, by every way there is: layer by layer or both at once, sums in parts or whole."""
    x = torch.randn(2, rows, 24, device=DEVICE).bfloat16()
    weights = weights_on(DEVICE, 24, 40, 16, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        results = adapter_info_nce(x[0], x[1], *weights, impl="triton")
        runs.append((*(result.detach() for result in results), *torch.autograd.grad(results[0], weights)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():  # and so does a forward that keeps nothing
        alone = adapter_info_nce(x[0], x[1], *weights, impl="triton")
    for first, second in zip(runs[0], alone, strict=False):
        assert torch.equal(first, second)


ALLOCATE_OR_VIEW = {
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::fill_", "aten::as_strided",
    "aten::slice", "aten::view", "aten::reshape", "aten::detach", "aten::detach_", "aten::select", "aten::expand",
    "aten::alias", "aten::lift_fresh", "aten::set_", "aten::_unsafe_view", "aten::is_nonzero",
    "aten::to",  # as itself: a conversion would show as aten::_to_copy too
    "aten::item", "aten::_local_scalar_dense",  # a temperature on the CPU has its value checked
}  # fmt: skip


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [8, 300])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_eight_launches_at_most(
    rows: int, symmetric: bool, learn: bool, dtype: torch.dtype, launches: list[str]
) -> None:
    """Triton's launches and PyTorch's own operators, counted together; memory is not filled here."""
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, rows, 40, device=DEVICE, dtype=dtype)
    weights = weights_on(DEVICE, 40, 64, 16)
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    temperature = torch.tensor(0.1, device=DEVICE, requires_grad=True) if learn else 0.1
    one = torch.ones((), device=DEVICE)

    def step() -> None:
        with autocast:
            loss, z, z_pos = adapter_info_nce(
                x[0], x[1], *weights, temperature=temperature, symmetric=symmetric, impl="triton"
            )
        leaves = [*weights, temperature] if isinstance(temperature, Tensor) else weights
        torch.autograd.grad((loss, z, z_pos), leaves, (one, z.detach(), z_pos.detach()))

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        step()
    operators = [event.name for event in recorded.events() if event.name.startswith("aten::")]
    further = [name for name in operators if name not in ALLOCATE_OR_VIEW]
    first = ["adapter_forward", "adapter_forward"]  # layer by layer
    if rows == 300 and DEVICE == "cpu":
        first = ["adapter_forward"] if dtype == torch.float32 else ["narrow_weights", "adapter_forward"]
    assert launches[: len(first) + 2] == [*first, "contrast_rows", "contrast_finish"]
    assert len(launches) + len(further) <= 8, (launches, further)
    assert len(launches) >= 6
