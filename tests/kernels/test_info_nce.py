"""InfoNCE, `impl="torch"`, against the plain float64 expression of its contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kellm_kernels import info_nce, info_nce_shard, reference
from kellm_kernels.problem import Contrast

from .oracle import (
    Problem,
    eager_loss,
    eager_rows,
    pairs_at,
    problem,
    relative_error,
    strided,
    transposed,
)

IDS = ("anchor_ids", "positive_ids", "negative_ids")
ALONE = {
    "nothing": (),
    "anchor_ids": ("anchor_ids",),
    "positive_ids": ("positive_ids",),
    "anchor and negative ids": ("anchor_ids", "negative_ids"),
    "positive and negative ids": ("positive_ids", "negative_ids"),
    "all ids": IDS,
    "log_q": ("log_q",),
    "sample_weight": ("sample_weight",),
    "margin": ("margin",),
    "everything": (*IDS, "log_q", "sample_weight", "margin"),
}


def ours(case: Problem, **options: Any) -> Tensor:
    return info_nce(case.anchor, case.positive, negatives=case.negatives, **case.options, **options, impl="torch")


def plain(case: Problem, **options: Any) -> Tensor:
    return eager_loss(case.anchor, case.positive, case.negatives, **case.options, **options)


def upstream(loss: Tensor) -> Tensor:
    """Gradients that differ from row to row, in size and in sign."""
    return torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape)


def assert_equal(loss: Tensor, wanted: Tensor, leaves: list[Tensor], *, tolerance: float = 1e-10) -> None:
    """The same loss, and the same gradients of `leaves` under a non-uniform upstream gradient."""
    weight = upstream(wanted)
    grads = torch.autograd.grad(loss, leaves, weight.to(loss.dtype))
    truths = torch.autograd.grad(wanted, leaves, weight)
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)
    for grad, truth in zip(grads, truths, strict=True):
        scale = max(1.0, float(truth.detach().abs().max()))
        torch.testing.assert_close(grad, truth, rtol=tolerance, atol=tolerance * scale)


# Every option


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("negatives", [0, 5])
@pytest.mark.parametrize("rows", [1, 2, 17, 130, 257])
def test_equals_the_plain_expression(rows: int, negatives: int, option: str, symmetric: bool) -> None:
    case = problem(rows, negatives, 12).only("temperature", *ALONE[option])
    loss = ours(case, symmetric=symmetric, reduction="none")
    assert_equal(loss, plain(case, symmetric=symmetric, reduction="none"), case.leaves)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("option", [name for name in ALONE if name != "nothing"])
def test_each_option_counts(option: str, symmetric: bool) -> None:
    """The inputs above are such that a forgotten option would be seen."""
    case = problem(17, 5, 12)
    without = ours(case.only("temperature"), symmetric=symmetric)
    assert abs(ours(case.only("temperature", *ALONE[option]), symmetric=symmetric).item() - without.item()) > 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("option", ["nothing", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str, option: str, symmetric: bool) -> None:
    case = problem(17, 5, 12).only("temperature", *ALONE[option])
    wanted = plain(case, symmetric=symmetric, reduction=reduction)
    assert_equal(ours(case, symmetric=symmetric, reduction=reduction), wanted, case.leaves)


@pytest.mark.parametrize("option", ["nothing", "everything"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (2, 3), (17, 48), (130, 200)])
def test_float32(rows: int, dim: int, symmetric: bool, option: str) -> None:
    case = problem(rows, 5, dim, dtype=torch.float32).only("temperature", *ALONE[option])
    loss = ours(case, symmetric=symmetric, reduction="none")
    assert loss.dtype == torch.float32
    assert_equal(loss, plain(case, symmetric=symmetric, reduction="none").float(), case.leaves, tolerance=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.03, 1.0])
def test_temperatures(temperature: float, symmetric: bool) -> None:
    case = problem(33, 5, 12, temperature=temperature)
    loss = ours(case, symmetric=symmetric, reduction="none")
    assert_equal(loss, plain(case, symmetric=symmetric, reduction="none"), case.leaves)
    constant = case._replace(options=case.options | {"temperature": temperature})
    torch.testing.assert_close(ours(constant, symmetric=symmetric, reduction="none"), loss, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_temperature_of_any_shape_gets_a_gradient_of_that_shape(shape: tuple[int, ...]) -> None:
    case = problem(9, 0, 8).only("temperature")
    (wanted,) = torch.autograd.grad(ours(case), case.options["temperature"])
    temperature = case.options["temperature"].detach().reshape(shape).requires_grad_()
    (grad,) = torch.autograd.grad(ours(case._replace(options={"temperature": temperature})), temperature)
    torch.testing.assert_close(grad, wanted.reshape(shape), rtol=0, atol=0)


def test_the_default_temperature_is_that_of_the_paper() -> None:
    case = problem(9, 0, 8).only()
    torch.testing.assert_close(ours(case), ours(case, temperature=0.03), rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_log_q_of_the_positives_alone_leaves_the_negatives_as_they_are(symmetric: bool) -> None:
    case = problem(17, 5, 12).only("temperature", "log_q")
    short = case._replace(options=case.options | {"log_q": case.options["log_q"][:17]})
    padded = case._replace(options=case.options | {"log_q": functional.pad(short.options["log_q"], (0, 5))})
    assert_equal(ours(short, symmetric=symmetric), plain(short, symmetric=symmetric), case.leaves)
    torch.testing.assert_close(ours(short, symmetric=symmetric), ours(padded, symmetric=symmetric))


def test_log_q_moves_a_column_and_not_the_other_direction() -> None:
    """By hand, at temperature 1: column 1 counts twice for row 0, and half for itself."""
    unit = torch.eye(2, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": 1.0, "log_q": torch.tensor([0.0, math.log(0.5)]), "reduction": "none"}
    first = [math.log1p(2 / math.e), math.log1p(1 / math.e / 2)]
    assert info_nce(unit, unit, **options).tolist() == pytest.approx(first, rel=1e-6)
    second = math.log1p(1 / math.e)
    both = info_nce(unit, unit, symmetric=True, **options)
    assert both.tolist() == pytest.approx([(row + second) / 2 for row in first], rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_that_sum_to_zero_give_zero(reduction: str, symmetric: bool) -> None:
    case = problem(9, 2, 8).only("temperature")
    loss = ours(case, sample_weight=torch.zeros(9), symmetric=symmetric, reduction=reduction)
    assert not bool(loss.any())
    for grad in torch.autograd.grad(loss.sum(), case.leaves):
        assert not bool(grad.any())


def test_wider_weights_do_not_widen_the_loss() -> None:
    case = problem(9, 0, 8, dtype=torch.float32).only("sample_weight")
    wanted = ours(case, reduction="none")
    case.options["sample_weight"] = case.options["sample_weight"].double()
    torch.testing.assert_close(ours(case, reduction="none"), wanted, rtol=0, atol=0)


def test_equal_weights_change_no_mean() -> None:
    case = problem(17, 0, 8).only("temperature")
    torch.testing.assert_close(ours(case, sample_weight=torch.full((17,), 0.3, dtype=torch.float64)), ours(case))


@pytest.mark.parametrize("name", ["anchor_ids", "positive_ids", "negative_ids"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    """Even where the three kinds differ in theirs."""
    case = problem(17, 5, 8)
    other = case._replace(options=case.options | {name: case.options[name].to(dtype)})
    torch.testing.assert_close(ours(other), ours(case), rtol=0, atol=0)


def test_ids_are_compared_whole() -> None:
    """Two ids that agree in their lower 32 bits, and as float32 and float64, are two ids."""
    case = problem(2, 0, 8).only("temperature")
    ids = torch.tensor([2**60, 2**60 + 1])
    apart = torch.tensor([1, 1 + 2**32])
    for given in (ids, apart):
        torch.testing.assert_close(ours(case, anchor_ids=given), ours(case), rtol=0, atol=0)


def test_no_negatives_are_negatives_of_no_rows() -> None:
    case = problem(9, 0, 8)
    options = case.options | {"negative_ids": torch.empty(0, dtype=torch.int64)}
    empty = case._replace(negatives=case.anchor.detach()[:0], options=options)
    torch.testing.assert_close(ours(empty), ours(case), rtol=0, atol=0)


def test_gradients_only_of_what_asks_for_one() -> None:
    """Frozen negatives and a frozen positive, say."""
    case = problem(17, 5, 12)
    frozen = case._replace(positive=case.positive.detach(), negatives=case.leaves[2].detach())
    (grad,) = torch.autograd.grad(ours(frozen), case.anchor)
    (wanted,) = torch.autograd.grad(plain(frozen), case.anchor)
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours(case), plain(case), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck_with_every_option(symmetric: bool) -> None:
    case = problem(7, 3, 5, temperature=0.3)
    options = {name: value for name, value in case.options.items() if name != "temperature"}

    def loss(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: Tensor) -> Tensor:
        given = Problem(anchor, positive, negatives, options | {"temperature": temperature})
        return ours(given, symmetric=symmetric, reduction="none")

    assert torch.autograd.gradcheck(loss, case.leaves)


# Parts of a batch


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option", ["nothing", "everything"])
def test_shards_make_up_the_whole(option: str, reduction: str) -> None:
    case = problem(31, 5, 12).only("temperature", *ALONE[option])
    options = dict(case.options)
    weight = options.pop("sample_weight", torch.ones(31, dtype=torch.float64))
    whole = plain(case, reduction=reduction)
    whole_upstream = upstream(whole)
    wanted = torch.autograd.grad(whole, case.leaves, whole_upstream)
    total, losses = [torch.zeros_like(leaf) for leaf in case.leaves], []
    for rows in (slice(0, 10), slice(10, 11), slice(11, 31)):
        loss = info_nce_shard(
            case.anchor[rows],
            case.positive,
            start=rows.start,
            negatives=case.negatives,
            **options,
            sample_weight=weight[rows],
            reduction=reduction,
            impl="torch",
        )
        # A shard's mean is over its own rows: by its share of the weight it is a part of the whole's.
        share = whole_upstream[rows] if reduction == "none" else weight[rows].sum() / weight.sum()
        losses.append(loss if reduction == "none" else loss * share)
        share = share if reduction == "none" else share * whole_upstream
        for sum_, grad in zip(total, torch.autograd.grad(loss, case.leaves, share), strict=True):
            sum_ += grad
    joined = torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
    torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total, list(wanted), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_blocks_change_nothing(block_rows: int, symmetric: bool) -> None:
    case = problem(65, 9, 24)
    anchor, positive, negatives = (leaf.detach() for leaf in case.leaves[:3])
    options = {name: value for name, value in case.options.items() if name != "sample_weight"}
    contrast = Contrast(**options | {"temperature": 0.05}, symmetric=symmetric)
    grad_rows = torch.linspace(-1, 2, 65, dtype=torch.float64)

    def computed(block_rows: int) -> tuple[Tensor, ...]:
        own, log_rest = reference.contrast_forward(anchor, positive, negatives, contrast, block_rows)
        grads = reference.contrast_backward(grad_rows, anchor, positive, negatives, own, log_rest, contrast, block_rows)
        assert grads[2] is not None
        return own, log_rest, grads[0], grads[1], grads[2], grads[3]

    for got, wanted in zip(computed(block_rows), computed(65), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


# Digits


def usual_form(anchor: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
    """Σ p_ij k_j − k_i as fused kernels take it: p rounded to bfloat16 for the product, all the rest in float32."""
    p = (anchor.float() @ positive.float().T / 0.03).softmax(1).bfloat16().float()
    return (p @ positive.float() - positive.float()) / 0.03, (p.T @ anchor.float() - anchor.float()) / 0.03


def usual_form_under_autocast(anchor: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
    """Logits leave the product in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(anchor @ positive.T / 0.03, torch.arange(len(anchor)), reduction="sum")
    return torch.autograd.grad(loss, (anchor, positive))


def digits_lost(
    cosine: float, gradients: Callable[[Tensor, Tensor], tuple[Tensor, ...]], *, symmetric: bool = False
) -> float:
    """Relative error against float64 on the same bfloat16 inputs, B 256, E 128, temperature 0.03."""
    anchor, positive = (vectors.bfloat16().requires_grad_() for vectors in pairs_at(cosine, 256, 128, seed=3))
    wide = [vectors.detach().double().requires_grad_() for vectors in (anchor, positive)]
    truths = torch.autograd.grad(eager_rows(wide[0], wide[1], temperature=0.03, symmetric=symmetric).sum(), wide)
    return relative_error(gradients(anchor, positive), truths)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("cosine", [0.3, 0.5, 0.7, 0.9])
def test_gradients_keep_their_digits_at_high_similarity(cosine: float, symmetric: bool) -> None:
    """What is lost is the rounding of the gradients to bfloat16."""

    def gradients(anchor: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
        loss = info_nce(anchor, positive, temperature=0.03, reduction="sum", symmetric=symmetric, impl="torch")
        return torch.autograd.grad(loss, (anchor, positive))

    assert digits_lost(cosine, gradients, symmetric=symmetric) < 2e-3


@pytest.mark.parametrize(
    ("form", "cosine", "at_least"),
    [
        (usual_form, 0.5, 0.1),
        (usual_form, 0.7, 0.5),
        (usual_form, 0.9, 0.9),
        (usual_form_under_autocast, 0.3, 0.01),
        (usual_form_under_autocast, 0.5, 0.03),
        (usual_form_under_autocast, 0.7, 0.05),
        (usual_form_under_autocast, 0.9, 0.5),
    ],
)
def test_the_usual_form_loses_them(
    form: Callable[[Tensor, Tensor], tuple[Tensor, ...]], cosine: float, at_least: float
) -> None:
    """So that the test above means something."""
    assert digits_lost(cosine, form) > at_least


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_never_negative(dtype: torch.dtype, symmetric: bool) -> None:
    """Down to 1e-22 they keep their digits: log1p of Σ exp(s_ij − s_ii) says what they are."""
    query = pairs_at(0.5, 200, 64)[0].to(dtype)
    for other in (query, -query, query.roll(1, 0)):
        logits = query.double() @ other.double().T / 0.01
        apart = logits.clone().fill_diagonal_(-torch.inf)
        wanted = torch.log1p((apart - logits.diagonal()[:, None]).exp().sum(1))
        if symmetric:
            wanted = (wanted + torch.log1p((apart - logits.diagonal()).exp().sum(0))) / 2
        loss = info_nce(query, other, temperature=0.01, symmetric=symmetric, reduction="none", impl="torch")
        assert bool((loss >= 0).all())
        torch.testing.assert_close(loss, wanted.float(), rtol=1e-4, atol=0)  # logits of 100 have 1e-5 to spare


@pytest.mark.parametrize("symmetric", [False, True])
def test_long_vectors_do_not_overflow(symmetric: bool) -> None:
    """Logits of ±10⁴, whose exponentials no float holds; what is off is their rounding to float32, about 10⁻³."""
    vectors = [(100 * side).float().requires_grad_() for side in pairs_at(0.2, 33, 16)]
    options: dict[str, Any] = {"temperature": 1.0, "symmetric": symmetric, "reduction": "none"}
    loss, wanted = info_nce(vectors[0], vectors[1], **options, impl="torch"), eager_loss(*vectors, **options)
    assert wanted.max() > 1000
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-5, atol=1e-3)
    weight = upstream(wanted)
    grads, truths = (torch.autograd.grad(rows, vectors, weight.to(rows.dtype)) for rows in (loss, wanted))
    assert relative_error(grads, truths) < 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", ["anchor_ids", "positive_ids", "margin"])
def test_a_row_whose_negatives_are_all_masked_costs_nothing(mask: str, symmetric: bool) -> None:
    case = problem(5, 0, 8).only("temperature")
    value = -10.0 if mask == "margin" else torch.zeros(5, dtype=torch.int64)
    loss = ours(case, **{mask: value}, symmetric=symmetric, reduction="none")
    assert loss.tolist() == [0.0] * 5
    for grad in torch.autograd.grad(loss.sum(), case.leaves):
        assert not bool(grad.any())


def test_one_row_masked_whole_among_others() -> None:
    """Row 2 is masked against everything, by being everyone else's positive and theirs being its own."""
    case = problem(4, 2, 8).only("temperature")
    options: dict[str, Any] = {
        "anchor_ids": torch.tensor([0, 1, 9, 3]),
        "positive_ids": torch.tensor([9, 9, 5, 9]),
        "negative_ids": torch.tensor([9, 5]),
        "reduction": "none",
    }
    loss = ours(case, **options)
    assert loss[2].item() == 0
    assert bool((loss[[0, 1, 3]] > 0).all())
    assert_equal(loss, plain(case, **options), case.leaves)


# Layouts and surroundings


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", [transposed, strided])
def test_inputs_need_not_be_contiguous(layout: Callable[[Tensor], Tensor], symmetric: bool) -> None:
    case = problem(17, 5, 12)

    def laid_out(tensor: Tensor) -> Tensor:
        return layout(tensor.detach()) if tensor.dim() == 2 or (tensor.dim() == 1 and layout is strided) else tensor

    vectors = [laid_out(leaf).requires_grad_() for leaf in case.leaves[:3]]
    options = {n: laid_out(v) if isinstance(v, Tensor) else v for n, v in case.options.items()}
    other = Problem(vectors[0], vectors[1], vectors[2], options)
    assert not any(vector.is_contiguous() for vector in vectors)
    loss = ours(other, symmetric=symmetric, reduction="none")
    wanted = plain(case, symmetric=symmetric, reduction="none")
    weight = upstream(wanted)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(loss, other.leaves, weight)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, case.leaves, weight), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("view", [lambda g: g.expand(17), lambda _: torch.arange(34.0, dtype=torch.float64)[::2]])
def test_upstream_gradients_need_not_be_contiguous(view: Callable[[Tensor], Tensor]) -> None:
    case = problem(17, 5, 12)
    weight = view(torch.tensor(0.7, dtype=torch.float64))
    assert not weight.is_contiguous()
    grads = torch.autograd.grad(ours(case, reduction="none"), case.leaves, weight)
    wanted = torch.autograd.grad(plain(case, reduction="none"), case.leaves, weight)
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-10)


def test_the_same_tensor_may_be_anchor_and_positive() -> None:
    case = problem(17, 0, 12).only("temperature")
    same = case._replace(positive=case.anchor)
    assert_equal(ours(same), plain(same), [case.anchor])


def test_autocast_does_not_narrow_it() -> None:
    case = problem(33, 5, 32, dtype=torch.float32)
    loss = ours(case, symmetric=True)
    grads = torch.autograd.grad(loss, case.leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrowed = ours(case, symmetric=True)
        narrowed_grads = torch.autograd.grad(narrowed, case.leaves)
    torch.testing.assert_close(narrowed, loss, rtol=0, atol=0)
    torch.testing.assert_close(narrowed_grads, grads, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_same_inputs_give_the_same_bits(symmetric: bool) -> None:
    case = problem(130, 5, 48, dtype=torch.float32)
    first, second = (ours(case, symmetric=symmetric) for _ in range(2))
    assert torch.equal(first, second)
    pairs = zip(torch.autograd.grad(first, case.leaves), torch.autograd.grad(second, case.leaves), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_two_rows_by_hand() -> None:
    """Cosines 1 and 0 at temperature 1: loss = log(1 + e^(0−1)); with one more column at cosine 0, log(1 + 2e⁻¹)."""
    unit, negative = torch.eye(3)[:2], torch.eye(3)[2:]
    assert info_nce(unit, unit, temperature=1.0).item() == pytest.approx(0.3132617, abs=1e-6)
    assert info_nce(unit, unit, negatives=negative, temperature=1.0).item() == pytest.approx(0.5514447, abs=1e-6)
    both = info_nce(unit, unit, negatives=negative, temperature=1.0, symmetric=True)  # negatives in the first alone
    assert both.item() == pytest.approx((0.3132617 + 0.5514447) / 2, abs=1e-6)


def test_a_margin_by_hand() -> None:
    """Row 0 has its positive at 0.5 and a negative at 0.9, 0.4 above: masked from a margin of less than that."""
    anchor = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    positive = torch.tensor([[0.5, 0.0], [0.9, 0.8]], dtype=torch.float64)
    kept = [math.log1p(math.exp(0.9 - 0.5)), math.log1p(math.exp(0.0 - 0.8))]
    for margin, wanted in ((0.41, kept), (0.39, [0.0, kept[1]]), (-0.79, [0.0, kept[1]]), (-0.81, [0.0, 0.0])):
        loss = info_nce(anchor, positive, temperature=1.0, margin=margin, reduction="none")
        assert loss.tolist() == pytest.approx(wanted, rel=1e-12)


# What is refused
