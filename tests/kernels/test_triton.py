"""`impl="triton"` against the plain float64 expressions: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kellm_kernels import adapter_info_nce, adapter_mlp, info_nce, info_nce_shard

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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
"""Relative error of losses and gradients, inputs being the same rounded ones: a few roundings of the dtype."""

pytestmark = needs_triton

if DEVICE == "cuda":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms, see `poison`, ask for it


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is not written before it is read is NaN: PyTorch fills what `empty` returns."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; they are counted in place of being run."""
    from kellm_kernels import fused

    names: list[str] = []
    monkeypatch.setattr(fused, "_launch", lambda kernel, *_arguments, **_options: names.append(kernel.fn.__name__))
    return names


def on_device(given: Problem) -> Problem:
    """The same problem, its leaves anew on the device."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)

    return Problem(*map(moved, given[:3]), {name: moved(value) for name, value in given.options.items()})


def compare(given: Problem, *, dtype: torch.dtype, **options: Any) -> None:
    """Loss and gradients of `info_nce` by Triton within the dtype's tolerance of the float64 expression."""
    mine = on_device(given)
    loss = info_nce(mine.anchor, mine.positive, negatives=mine.negatives, impl="triton", **mine.options, **options)
    wanted = eager_loss(*given[:3], **given.options, **options)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.rand(wanted.shape, generator=generator, dtype=torch.float64) - 0.3
    error = float((loss.detach().cpu().double() - wanted.detach()).norm())
    assert error <= TOLERANCE[dtype] * float(wanted.detach().norm())
    grads = torch.autograd.grad(loss, mine.leaves, upstream.to(DEVICE, loss.dtype))
    truths = torch.autograd.grad(wanted, given.leaves, upstream)
    for grad, truth in zip(grads, truths, strict=True):
        error = float((grad.cpu().double() - truth).norm())
        # Where nearly all is masked a gradient may be tiny: the others' scale is the one that rounding has.
        assert error <= TOLERANCE[dtype] * max(float(truth.norm()), 1e-3 * max(float(t.norm()) for t in truths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "negatives", "dim"), [(1, 0, 8), (2, 3, 200), (17, 5, 96), (257, 70, 48)])
def test_every_option_together(rows: int, negatives: int, dim: int, symmetric: bool, dtype: torch.dtype) -> None:
    given = problem(rows, negatives, dim, dtype=dtype)
    compare(given, dtype=dtype, symmetric=symmetric, reduction="none" if rows == 17 else "mean")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("anchor_ids",),
        ("positive_ids",),
        ("anchor_ids", "positive_ids"),
        ("anchor_ids", "negative_ids"),
        ("positive_ids", "negative_ids"),
        ("log_q",),
        ("sample_weight",),
        ("margin",),
        ("temperature",),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_option_alone(options: tuple[str, ...], symmetric: bool) -> None:
    given = problem(70, 9, 24, dtype=torch.float32).only(*options)
    compare(given, dtype=torch.float32, symmetric=symmetric, reduction="sum")


def test_log_q_of_the_positives_alone() -> None:
    given = problem(40, 9, 16, dtype=torch.float32).only("log_q")
    given.options["log_q"] = given.options["log_q"][:40]
    compare(given, dtype=torch.float32)


@pytest.mark.parametrize("dim", [264, 512])
def test_vectors_longer_than_a_block(dim: int) -> None:
    compare(problem(40, 9, dim, dtype=torch.float32), dtype=torch.float32)
    compare(problem(40, 9, dim, dtype=torch.float16), dtype=torch.float16, symmetric=True)


# 4,097 rows take a minute in the interpreter.
@pytest.mark.parametrize("rows", [1000] if DEVICE == "cpu" else [1000, 4097])
def test_many_rows(rows: int) -> None:
    compare(problem(rows, 0, 8, dtype=torch.float32).only("sample_weight"), dtype=torch.float32)


def test_a_few_rows_among_many_columns() -> None:
    anchor, positive = (v.float().to(DEVICE).requires_grad_() for v in pairs_at(0.5, 4097, 8))
    few = anchor[4064:]
    got = [few, positive, info_nce_shard(few, positive, start=4064, impl="triton")]
    wanted = [few, positive, info_nce_shard(few, positive, start=4064, impl="torch")]
    torch.testing.assert_close(got[2], wanted[2])
    torch.testing.assert_close(torch.autograd.grad(got[2], got[:2]), torch.autograd.grad(wanted[2], wanted[:2]))


@pytest.mark.parametrize("temperature", [0.01, 0.03, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    given = problem(50, 0, 32, temperature=temperature, dtype=dtype).only("temperature")
    compare(given, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "cosine"),
    [*((torch.bfloat16, cosine) for cosine in (0.3, 0.5, 0.7, 0.9)), (torch.float16, 0.9), (torch.float32, 0.9)],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_keep_their_digits_at_high_similarity(cosine: float, dtype: torch.dtype, symmetric: bool) -> None:
    """Against float64 on the same rounded inputs; what is left in bfloat16 is about the rounding of its results."""
    inputs = [vectors.to(dtype) for vectors in pairs_at(cosine, 256, 128)]
    truths = [vectors.double().requires_grad_() for vectors in inputs]
    mine = [vectors.to(DEVICE).requires_grad_() for vectors in inputs]
    # Gradients fall to 1e-9 at a cosine of 0.9: a loss scale, as float16 is trained with, brings them to about 1.
    wanted = torch.autograd.grad(eager_loss(*truths, symmetric=symmetric, reduction="sum"), truths)
    scale = 2.0 ** -float(wanted[0].abs().max().log2().ceil())
    loss = info_nce(*mine, symmetric=symmetric, impl="triton", reduction="none")
    assert bool((loss >= 0).all())
    grads = [grad.cpu().double() / scale for grad in torch.autograd.grad(scale * loss.sum(), mine)]
    assert relative_error(grads, wanted) < {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]


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
        given = on_device(problem(rows, 20, dim, cosine=cosine)).only("anchor_ids", "positive_ids", "negative_ids")
        weight = torch.linspace(0, 1e-6, rows, device=DEVICE)  # small weights leave float16's range, unscaled
        options |= given.options | {"sample_weight": weight, "reduction": "none"}
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_beyond_the_last_pair_stay_out_of_the_sums(dtype: torch.dtype) -> None:
    """All similarities are low, so that a vector of zeros would weigh 2^60 times as much as any pair."""
    generator = torch.Generator().manual_seed(4)
    anchor = torch.randn(70, 16, generator=generator, dtype=torch.float64)
    anchor[:, 0] += 20
    anchor = anchor / anchor.norm(dim=1, keepdim=True)
    positive = -anchor.roll(1, 0)
    leaves = [vectors.to(DEVICE, dtype).requires_grad_() for vectors in (anchor, positive)]
    truths = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    options: dict[str, Any] = {"temperature": 0.02, "symmetric": True, "reduction": "sum"}
    grads = torch.autograd.grad(info_nce(*leaves, impl="triton", **options), leaves)
    wanted = torch.autograd.grad(eager_loss(*truths, **options), truths)
    assert relative_error([grad.cpu() for grad in grads], wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_losses_of_many_columns_keep_their_digits_in_float16(symmetric: bool) -> None:
    """Thousands of equal columns: each has 1/4,096 of a row's softmax, near what float16 holds."""
    generator = torch.Generator().manual_seed(6)
    anchor = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    anchor = anchor / anchor.norm(dim=1, keepdim=True)
    negatives = torch.randn(4096, 8, generator=generator, dtype=torch.float64)
    negatives = negatives / negatives.norm(dim=1, keepdim=True)
    leaves = [vectors.to(DEVICE, torch.float16).requires_grad_() for vectors in (anchor, anchor.roll(1, 0), negatives)]
    truths = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    options: dict[str, Any] = {"temperature": 1.0, "symmetric": symmetric}
    loss = info_nce(leaves[0], leaves[1], negatives=leaves[2], impl="triton", **options)
    grads = torch.autograd.grad(1e3 * loss, leaves)
    wanted = [1e3 * grad for grad in torch.autograd.grad(eager_loss(*truths, **options), truths)]
    assert relative_error([grad.cpu() for grad in grads], wanted) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_whose_negatives_are_all_masked_cost_nothing(symmetric: bool) -> None:
    given = on_device(problem(20, 0, 16, dtype=torch.float32))
    same = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    loss = info_nce(given.anchor, given.positive, anchor_ids=same, symmetric=symmetric, reduction="none", impl="triton")
    assert loss.tolist() == [0.0] * 20
    for grad in torch.autograd.grad(loss.sum(), (given.anchor, given.positive)):
        assert not bool(grad.any())


def test_weights_of_zero_give_a_mean_of_zero() -> None:
    given = on_device(problem(5, 0, 8, dtype=torch.float32))
    loss = info_nce(given.anchor, given.positive, sample_weight=torch.zeros(5, device=DEVICE), impl="triton")
    assert loss.item() == 0
    assert not bool(torch.autograd.grad(loss, given.anchor)[0].any())


def test_rows_that_lie_apart_and_columns_that_do() -> None:
    given = problem(30, 7, 24, dtype=torch.float32)
    wide = torch.cat([given.anchor, given.positive], dim=1).detach().to(DEVICE)  # rows 48 apart
    turned = given.negatives.detach().T.contiguous().T.to(DEVICE) if given.negatives is not None else None
    assert turned is not None
    assert turned.stride(1) != 1
    options = on_device(given).options
    loss = info_nce(wide[:, :24], wide[:, 24:], negatives=turned, impl="triton", **options)
    wanted = eager_loss(*given[:3], **given.options)
    torch.testing.assert_close(loss.detach().cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_a_shard_is_a_slice_of_the_whole() -> None:
    given = on_device(problem(40, 6, 16, dtype=torch.float32))
    weight = given.options.pop("sample_weight")
    whole = info_nce(*given[:2], negatives=given.negatives, impl="triton", reduction="none", **given.options)
    d_whole = torch.autograd.grad((whole * weight).sum(), given.leaves)
    d_shards = [torch.zeros_like(leaf) for leaf in given.leaves]
    for start, stop in ((0, 13), (13, 40)):
        shard = info_nce_shard(
            given.anchor[start:stop], given.positive, start=start, negatives=given.negatives,
            sample_weight=weight[start:stop], reduction="none", impl="triton", **given.options,
        )  # fmt: skip
        torch.testing.assert_close(shard, (whole * weight)[start:stop])
        for total, grad in zip(d_shards, torch.autograd.grad(shard.sum(), given.leaves), strict=True):
            total += grad
    torch.testing.assert_close(tuple(d_shards), d_whole, rtol=1e-4, atol=1e-6)


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
        options = on_device(given) if impl else given
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
    weights = [
        weight.detach().to(DEVICE).requires_grad_() for weight in adapter_weights(72, 104, 40, dtype=torch.float32)
    ]
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


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("place", ["anchor", "positive", "negatives"])
def test_a_nan_is_not_hidden(place: str) -> None:
    given = on_device(problem(20, 5, 16, dtype=torch.float32).only("anchor_ids"))
    with torch.no_grad():
        getattr(given, place)[3, 2] = torch.nan
    loss = info_nce(
        *given[:2], negatives=given.negatives, anchor_ids=given.options["anchor_ids"], reduction="none", impl="triton"
    )
    # A NaN among the columns reaches every row, unless its own id masks it there.
    assert int(loss.isnan().sum()) >= {"anchor": 1, "positive": 15, "negatives": 20}[place]


def test_no_rows_give_no_rows() -> None:
    weights = [weight.detach().to(DEVICE).requires_grad_() for weight in adapter_weights(16, 8, 8, dtype=torch.float32)]
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
    weights = [weight.detach().to(DEVICE).requires_grad_() for weight in adapter_weights(16, 8, 8, dtype=torch.float32)]
    _, z, _ = adapter_info_nce(x[0], x[1], *weights, impl="triton")
    grads = torch.autograd.grad(z[:, 0].sum(), weights)
    truths = torch.autograd.grad(adapter_mlp(x[0], *weights, impl="torch")[:, 0].sum(), weights)
    torch.testing.assert_close(grads, truths, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [33, 300])
def test_autocast_takes_its_dtype_and_gives_gradients_in_the_weights_own(rows: int) -> None:
    x = torch.randn(2, rows, 24, device=DEVICE)
    weights = [
        weight.detach().to(DEVICE).requires_grad_() for weight in adapter_weights(24, 16, 8, dtype=torch.float32)
    ]
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss, z, z_pos = adapter_info_nce(x[0], x[1], *weights, impl="triton")
    assert (loss.dtype, z.dtype, z_pos.dtype) == (torch.float32, torch.float16, torch.float16)
    grads = torch.autograd.grad(loss, weights)
    wanted = torch.autograd.grad(adapter_info_nce(x[0], x[1], *weights, impl="torch")[0], weights)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert relative_error(grads, [grad.double() for grad in wanted]) < 2e-2


@pytest.mark.parametrize("rows", [150] if DEVICE == "cpu" else [150, 8200])
def test_the_same_input_gives_the_same_bits(rows: int) -> None:
    given = on_device(problem(rows, 20, 40, dtype=torch.float16))
    runs = []
    for _ in range(2):
        loss = info_nce(*given[:2], negatives=given.negatives, impl="triton", **given.options)
        runs.append((loss.detach(), *torch.autograd.grad(loss, given.leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rows", [20, 300] if DEVICE == "cpu" else [20, 300, 20_000])
def test_the_whole_gives_the_same_bits_again(rows: int) -> None:
    """In bfloat16, by every way there is: layer by layer or both at once, sums in parts or whole."""
    x = torch.randn(2, rows, 24, device=DEVICE).bfloat16()
    weights = [weight.detach().to(DEVICE, torch.bfloat16).requires_grad_() for weight in adapter_weights(24, 40, 16)]
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
    weights = [
        weight.detach().to(DEVICE).requires_grad_() for weight in adapter_weights(40, 64, 16, dtype=torch.float32)
    ]
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


def test_the_forward_alone_makes_no_means() -> None:
    given = on_device(problem(20, 3, 16, dtype=torch.float32))
    with torch.no_grad():
        alone = info_nce(*given[:2], negatives=given.negatives, impl="triton", **given.options)
    loss = info_nce(*given[:2], negatives=given.negatives, impl="triton", **given.options)
    assert torch.equal(alone, loss.detach())


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((4, 12), torch.float32, "multiples of 8 long, and one is 12"),
        ((4, 520), torch.float32, "embeddings are 520 long, 512 at most"),
        ((4, 8), torch.float64, "not in float64"),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused(shape: tuple[int, int], dtype: torch.dtype, words: str) -> None:
    vectors = torch.zeros(shape, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"{words}.*; impl='torch' can"):
        info_nce(vectors, vectors, impl="triton")
