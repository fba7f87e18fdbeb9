"""InfoNCE against the eager float64 expression of its docstring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kellm_kernels import info_nce
from kellm_kernels.reference import info_nce_rows


def eager(anchor: Tensor, positive: Tensor, temperature: float, ids: Tensor | None, pos_ids: Tensor | None) -> Tensor:
    """Per-row loss the plain way, in float64."""
    rows = len(anchor)
    logits = anchor.double() @ positive.double().T / temperature
    masked = torch.zeros(rows, rows, dtype=torch.bool)
    for i in range(rows):
        for j in range(rows):
            same_anchor = ids is not None and bool(ids[i] == ids[j])
            same_positive = pos_ids is not None and bool(pos_ids[i] == pos_ids[j])
            is_anchor = ids is not None and pos_ids is not None and bool(ids[i] == pos_ids[j])
            masked[i, j] = i != j and (same_anchor or same_positive or is_anchor)
    return functional.cross_entropy(logits.masked_fill(masked, -torch.inf), torch.arange(rows), reduction="none")


def vectors(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    pair = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    anchor, positive = functional.normalize(pair, dim=-1).to(dtype)
    return anchor.requires_grad_(), positive.requires_grad_()


def some_ids(rows: int) -> tuple[Tensor, Tensor]:
    """Ids with many repeats within and across both sides."""
    generator = torch.Generator().manual_seed(rows)
    drawn = torch.randint(0, max(2, rows // 2), (2, rows), generator=generator)
    return drawn[0], drawn[1]


@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (2, 3), (17, 48), (130, 200)])
@pytest.mark.parametrize("with_ids", ["none", "anchors", "positives", "both"])
@pytest.mark.parametrize("temperature", [0.01, 0.03, 1.0])
def test_equals_the_eager_expression(rows: int, dim: int, with_ids: str, temperature: float) -> None:
    anchor, positive = vectors(rows, dim, torch.float64)
    ids, pos_ids = some_ids(rows)
    used = (ids if with_ids in ("anchors", "both") else None, pos_ids if with_ids in ("positives", "both") else None)
    upstream = torch.linspace(-1, 2, rows, dtype=torch.float64)

    wanted = eager(anchor, positive, temperature, *used)
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), (anchor, positive))
    loss = info_nce(
        anchor, positive, temperature=temperature, anchor_ids=used[0], positive_ids=used[1], reduction="none"
    )
    grads = torch.autograd.grad((loss * upstream).sum(), (anchor, positive))

    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str) -> None:
    anchor, positive = vectors(17, 16)
    rows = info_nce(anchor, positive, reduction="none")
    torch.testing.assert_close(info_nce(anchor, positive, reduction=reduction), getattr(rows, reduction)())


def test_gradcheck_with_masks() -> None:
    anchor, positive = vectors(9, 5, torch.float64)
    ids, pos_ids = some_ids(9)
    assert torch.autograd.gradcheck(
        lambda a, p: info_nce(a, p, temperature=0.2, anchor_ids=ids, positive_ids=pos_ids, reduction="none"),
        (anchor, positive),
    )


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_blocks_change_nothing(block_rows: int) -> None:
    anchor, positive = vectors(65, 24, torch.float64)
    ids, pos_ids = some_ids(65)
    whole = info_nce_rows(anchor, positive, 0.03, ids, pos_ids, block_rows=65)
    whole_grads = torch.autograd.grad(whole.sum(), (anchor, positive))
    loss = info_nce_rows(anchor, positive, 0.03, ids, pos_ids, block_rows=block_rows)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), (anchor, positive)), whole_grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cosine", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_keep_their_digits_at_high_similarity(cosine: float, dtype: torch.dtype) -> None:
    """Truth in float64 on the same rounded inputs; the usual form is off by 13% at 0.5 and 96% at 0.7."""
    generator = torch.Generator().manual_seed(3)
    q, noise = functional.normalize(torch.randn(2, 256, 128, generator=generator, dtype=torch.float64), dim=-1)
    noise = functional.normalize(noise - (noise * q).sum(1, keepdim=True) * q, dim=1)
    k = cosine * q + (1 - cosine**2) ** 0.5 * noise
    anchor, positive = (v.to(dtype).requires_grad_() for v in (q, k))
    true_q, true_k = (v.detach().double().requires_grad_() for v in (anchor, positive))
    wanted = torch.autograd.grad(info_nce(true_q, true_k).mul(256), (true_q, true_k))
    wide_q, wide_k = (v.detach().float().requires_grad_() for v in (anchor, positive))
    grads = torch.autograd.grad(info_nce(wide_q, wide_k).mul(256), (wide_q, wide_k))
    for grad, truth in zip(grads, wanted, strict=True):
        assert float((grad - truth).norm() / truth.norm()) < 1e-4
    narrow = torch.autograd.grad(info_nce(anchor, positive).mul(256), (anchor, positive))
    for grad, truth in zip(narrow, wanted, strict=True):  # what is left is the rounding of a bfloat16 gradient
        assert float((grad.double() - truth).norm() / truth.norm()) < (2.5e-3 if dtype == torch.bfloat16 else 1e-4)


def test_losses_are_never_negative() -> None:
    anchor, _ = vectors(200, 64)
    for other in (anchor, -anchor, anchor.roll(1, 0)):
        loss = info_nce(anchor.detach(), other.detach(), temperature=0.01, reduction="none")
        assert bool((loss >= 0).all())
        assert bool(loss.isfinite().all())


def test_a_row_whose_negatives_are_all_masked_costs_nothing() -> None:
    anchor, positive = vectors(5, 8)
    same = torch.zeros(5, dtype=torch.int64)
    loss = info_nce(anchor, positive, anchor_ids=same, reduction="none")
    assert loss.tolist() == [0.0] * 5
    for grad in torch.autograd.grad(loss.sum(), (anchor, positive)):
        assert not bool(grad.any())


def test_two_rows_by_hand() -> None:
    """Cosines 1 and 0 at temperature 1: loss = log(1 + e^(0-1))."""
    unit = torch.eye(2)
    assert info_nce(unit, unit, temperature=1.0).item() == pytest.approx(0.3132617, abs=1e-6)


def test_autocast_does_not_narrow_it() -> None:
    anchor, positive = vectors(33, 32)
    plain = info_nce(anchor, positive)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(info_nce(anchor, positive), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"impl": "triton"}, ValueError, "impl='triton' is unknown; accepted: 'auto', 'torch'"),
        ({"impl": "numpy"}, ValueError, "'numpy' is unknown"),
        ({"reduction": "max"}, ValueError, "accepted: 'mean', 'sum', 'none'"),
        ({"temperature": 0.0}, ValueError, "above 0"),
        ({"anchor_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "one id for each row"),
        ({"positive_ids": torch.zeros(4)}, TypeError, "integer"),
        ({"positive": torch.zeros(5, 8)}, ValueError, "the same"),
        ({"positive": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "one floating dtype"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments = {"anchor": torch.zeros(4, 8), "positive": torch.zeros(4, 8)} | change
    with pytest.raises(error, match=words):
        info_nce(**arguments)  # type: ignore[arg-type]
