"""What `info_nce` refuses, in which words, and what `impl="auto"` says."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kellm_kernels import _dispatch, info_nce, info_nce_shard

from .oracle import needs_triton, problem


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"impl": "numpy"}, ValueError, r"impl='numpy' is unknown; accepted: 'auto', 'triton', 'torch'"),
        ({"reduction": "max"}, ValueError, r"reduction='max' is unknown; accepted: 'mean', 'sum', 'none'"),
        ({"temperature": 0.0}, ValueError, r"temperature=0.0: expected a finite number above 0"),
        ({"temperature": -0.03}, ValueError, r"temperature=-0.03: expected a finite number above 0"),
        ({"temperature": math.nan}, ValueError, r"temperature=nan: expected a finite number above 0"),
        ({"temperature": torch.tensor(0.0)}, ValueError, r"temperature=0.0: expected a finite number above 0"),
        ({"temperature": torch.tensor([0.1, 0.2])}, ValueError, r"temperature \(2,\) of torch.float32: expected one"),
        ({"temperature": torch.tensor(1)}, ValueError, r"temperature \(\) of torch.int64: expected one floating"),
        ({"temperature": zeros(1, device="meta")}, ValueError, r"temperature is on meta and the vectors on cpu"),
        ({"margin": math.inf}, ValueError, r"margin=inf: expected a finite difference of similarities, or None"),
        ({"anchor": zeros(4)}, ValueError, r"anchor \(4,\) and positive \(4, 8\): expected the same \(B, E\)"),
        ({"positive": zeros(5, 8)}, ValueError, r"anchor \(4, 8\) and positive \(5, 8\): expected the same"),
        ({"positive": zeros(4, 7)}, ValueError, r"positive \(4, 7\): expected the same"),
        ({"anchor": zeros(0, 8), "positive": zeros(0, 8)}, ValueError, r"at least one row"),
        ({"positive": zeros(4, 8, dtype=torch.float64)}, TypeError, r"positive torch.float64: expected one floating"),
        (
            {"anchor": zeros(4, 8, dtype=torch.int64), "positive": zeros(4, 8, dtype=torch.int64)},
            TypeError,
            r"anchor is torch.int64 and positive torch.int64: expected one floating dtype",
        ),
        ({"positive": zeros(4, 8, device="meta")}, ValueError, r"positive is on meta and anchor on cpu: expected one"),
        ({"negatives": zeros(3, 7)}, ValueError, r"negatives \(3, 7\): expected \(B, E\) and \(N, E\)"),
        ({"negatives": zeros(3, 8, dtype=torch.float64)}, TypeError, r"negatives torch.float64: expected one"),
        (
            {"negative_ids": zeros(3, dtype=torch.int64)},
            ValueError,
            r"negative_ids \(3,\) without negatives: pass both or neither",
        ),
        (
            {"negatives": zeros(3, 8), "negative_ids": zeros(3, dtype=torch.int64)},
            ValueError,
            r"nothing to be compared with: pass anchor_ids, positive_ids or both",
        ),
        (
            {"negatives": zeros(3, 8), "negative_ids": zeros(2, dtype=torch.int64)},
            ValueError,
            r"negative_ids \(2,\): expected \(3,\), one id for each row",
        ),
        ({"anchor_ids": zeros(3, dtype=torch.int64)}, ValueError, r"anchor_ids \(3,\): expected \(4,\), one id for"),
        ({"positive_ids": zeros(4)}, TypeError, r"positive_ids is torch.float32: expected an integer dtype"),
        ({"anchor_ids": zeros(4, dtype=torch.bool)}, TypeError, r"anchor_ids is torch.bool: expected an integer"),
        (
            {"anchor_ids": zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            r"anchor_ids is on meta and the vectors on cpu",
        ),
        ({"log_q": zeros(5)}, ValueError, r"log_q \(5,\): expected \(4,\)$"),
        ({"log_q": zeros(5), "negatives": zeros(3, 8)}, ValueError, r"log_q \(5,\): expected \(4,\) or \(7,\)"),
        ({"log_q": zeros(4, dtype=torch.int64)}, TypeError, r"log_q is torch.int64: expected a floating dtype"),
        ({"log_q": zeros(4).requires_grad_()}, ValueError, r"log_q takes no gradient, .* pass log_q.detach\(\)"),
        ({"sample_weight": zeros(4, 1)}, ValueError, r"sample_weight \(4, 1\): expected \(4,\)"),
        ({"sample_weight": zeros(4).requires_grad_()}, ValueError, r"pass sample_weight.detach\(\)"),
        ({"sample_weight": zeros(4, device="meta")}, ValueError, r"sample_weight is on meta and the vectors on cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"anchor": zeros(4, 8), "positive": zeros(4, 8)} | change
    with pytest.raises(error, match=words):
        info_nce(**arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start": -1}, r"start=-1: expected 0 to 2, 4 anchors being among 6 positives"),
        ({"start": 3}, r"start=3: expected 0 to 2"),
        ({"symmetric": True}, r"symmetric=True with 4 anchors and 6 positives"),
        ({"anchor_ids": zeros(4, dtype=torch.int64)}, r"anchor_ids \(4,\): expected \(6,\)"),
        ({"sample_weight": zeros(6)}, r"sample_weight \(6,\): expected \(4,\)"),
        ({"log_q": zeros(4)}, r"log_q \(4,\): expected \(6,\)"),
    ],
)
def test_bad_shards_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        info_nce_shard(zeros(4, 8), zeros(6, 8), **change)


@needs_triton
def test_triton_is_refused_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit impl never falls back."""
    monkeypatch.setattr("kellm_kernels.fused.INTERPRETED", True)
    with pytest.raises(ValueError, match=r"it computes in bfloat16, float16 and float32, not in float64; impl='torch'"):
        info_nce(zeros(4, 8, dtype=torch.float64), zeros(4, 8, dtype=torch.float64), impl="triton")
    with pytest.raises(ValueError, match=r"embeddings are 520 long, 512 at most are accepted"):
        info_nce(zeros(4, 520), zeros(4, 520), impl="triton")
    with pytest.raises(ValueError, match=r"multiples of 8 long, and one is 12"):
        info_nce(zeros(4, 12), zeros(4, 12), impl="triton")
    monkeypatch.setattr("kellm_kernels.fused.INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"impl='triton' cannot compute this: it needs a GPU .* the tensors are on cpu"
    ):
        info_nce(zeros(4, 8), zeros(4, 8), impl="triton")


def test_auto_says_once_what_it_takes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On the CPU it is PyTorch, interpreter or not."""
    monkeypatch.setattr(_dispatch, "_logged", set())
    case = problem(9, 0, 8, dtype=torch.float32)
    with caplog.at_level(logging.INFO, "kellm_kernels"):
        for _ in range(2):
            loss = info_nce(case.anchor, case.positive, **case.options)
    wanted = info_nce(case.anchor, case.positive, impl="torch", **case.options)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
    assert [record.message[:24] for record in caplog.records] == ["impl='auto' takes torch:"]
