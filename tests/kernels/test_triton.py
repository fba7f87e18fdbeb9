"""The loss with `impl="triton"` against the plain float64 expressions: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kellm_kernels import info_nce, info_nce_shard

from .device import DEVICE, TOLERANCE, problem_on
from .oracle import Problem, eager_loss, needs_triton, pairs_at, problem, relative_error

pytestmark = [needs_triton, pytest.mark.usefixtures("poison")]


def compare(given: Problem, *, dtype: torch.dtype, **options: Any) -> None:
    """Loss and gradients of `info_nce` by Triton within the dtype's tolerance of the float64 expression."""
    mine = problem_on(DEVICE, given)
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
    given = problem_on(DEVICE, problem(20, 0, 16, dtype=torch.float32))
    same = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    loss = info_nce(given.anchor, given.positive, anchor_ids=same, symmetric=symmetric, reduction="none", impl="triton")
    assert loss.tolist() == [0.0] * 20
    for grad in torch.autograd.grad(loss.sum(), (given.anchor, given.positive)):
        assert not bool(grad.any())


def test_weights_of_zero_give_a_mean_of_zero() -> None:
    given = problem_on(DEVICE, problem(5, 0, 8, dtype=torch.float32))
    loss = info_nce(given.anchor, given.positive, sample_weight=torch.zeros(5, device=DEVICE), impl="triton")
    assert loss.item() == 0
    assert not bool(torch.autograd.grad(loss, given.anchor)[0].any())


def test_rows_that_lie_apart_and_columns_that_do() -> None:
    given = problem(30, 7, 24, dtype=torch.float32)
    wide = torch.cat([given.anchor, given.positive], dim=1).detach().to(DEVICE)  # rows 48 apart
    turned = given.negatives.detach().T.contiguous().T.to(DEVICE) if given.negatives is not None else None
    assert turned is not None
    assert turned.stride(1) != 1
    options = problem_on(DEVICE, given).options
    loss = info_nce(wide[:, :24], wide[:, 24:], negatives=turned, impl="triton", **options)
    wanted = eager_loss(*given[:3], **given.options)
    torch.testing.assert_close(loss.detach().cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_a_shard_is_a_slice_of_the_whole() -> None:
    given = problem_on(DEVICE, problem(40, 6, 16, dtype=torch.float32))
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


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("place", ["anchor", "positive", "negatives"])
def test_a_nan_is_not_hidden(place: str) -> None:
    given = problem_on(DEVICE, problem(20, 5, 16, dtype=torch.float32).only("anchor_ids"))
    with torch.no_grad():
        getattr(given, place)[3, 2] = torch.nan
    loss = info_nce(
        *given[:2], negatives=given.negatives, anchor_ids=given.options["anchor_ids"], reduction="none", impl="triton"
    )
    # A NaN among the columns reaches every row, unless its own id masks it there.
    assert int(loss.isnan().sum()) >= {"anchor": 1, "positive": 15, "negatives": 20}[place]


@pytest.mark.parametrize("rows", [150] if DEVICE == "cpu" else [150, 8200])
def test_the_same_input_gives_the_same_bits(rows: int) -> None:
    given = problem_on(DEVICE, problem(rows, 20, 40, dtype=torch.float16))
    runs = []
    for _ in range(2):
        loss = info_nce(*given[:2], negatives=given.negatives, impl="triton", **given.options)
        runs.append((loss.detach(), *torch.autograd.grad(loss, given.leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_the_forward_alone_makes_no_means() -> None:
    given = problem_on(DEVICE, problem(20, 3, 16, dtype=torch.float32))
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
