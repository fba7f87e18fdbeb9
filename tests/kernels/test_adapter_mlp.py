"""The adapter MLP, `impl="torch"`, against its formula in float64 NumPy, and its gradients against autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kellm_kernels import adapter_mlp, reference

from .memory import peak_bytes
from .oracle import (
    adapter_weights,
    eager_adapter,
    needs_triton,
    relative_error,
    strided,
    transposed,
)

Array = npt.NDArray[np.float64]
MIB = 2**20


def formula(x: Array, w1: Array, b1: Array, w2: Array, b2: Array, act: str) -> Array:
    hidden: Array = x @ w1.T + b1
    if act == "gelu":
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    else:
        hidden = np.maximum(hidden, 0)
    z: Array = hidden @ w2.T + b2
    return z


def encodings(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def upstream(z: Tensor) -> Tensor:
    """A gradient unlike any other row's."""
    return torch.linspace(-1, 2, z.numel(), dtype=torch.float64).reshape(z.shape).sin()


def grads_of(z: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(z, leaves, upstream(z).to(z.dtype))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_formula(activation: str, normalize: bool) -> None:
    rng = np.random.default_rng(0)
    x, w1, b1, w2, b2 = (rng.normal(size=s) for s in ((5, 7), (11, 7), (11,), (3, 11), (3,)))
    wanted = formula(x, w1, b1, w2, b2, activation)
    if normalize:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    got = adapter_mlp(*(torch.from_numpy(v) for v in (x, w1, b1, w2, b2)), activation=activation, normalize=normalize)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(("rows", "dims"), [(1, (3, 5, 2)), (17, (24, 40, 16)), (130, (7, 96, 13))])
def test_gradients_are_those_of_the_formula(
    rows: int, dims: tuple[int, int, int], activation: str, normalize: bool
) -> None:
    leaves = [encodings(rows, dims[0]), *adapter_weights(*dims)]
    z = adapter_mlp(*leaves, activation=activation, normalize=normalize, impl="torch")
    wanted = eager_adapter(*leaves, activation=activation, normalize=normalize)
    torch.testing.assert_close(z, wanted, rtol=1e-10, atol=1e-12)
    for grad, truth in zip(grads_of(z, leaves), grads_of(wanted, leaves), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize: bool) -> None:
    leaves = [encodings(4, 3), *adapter_weights(3, 5, 2)]
    assert torch.autograd.gradcheck(lambda *given: adapter_mlp(*given, normalize=normalize, impl="torch"), leaves)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    """An encoding alone, a batch of lists of them, and none."""
    leaves = [encodings(*shape), *adapter_weights(7, 5, 4)]
    z, wanted = adapter_mlp(*leaves, impl="torch"), eager_adapter(*leaves)
    torch.testing.assert_close(z, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads_of(z, leaves), grads_of(wanted, leaves), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["encodings", "weights", "hidden layer", "biases"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    places = {"encodings": {0}, "weights": {1, 2, 3, 4}, "hidden layer": {1, 2}, "biases": {2, 4}}[frozen]
    given = [encodings(9, 7), *adapter_weights(7, 5, 4)]
    given = [tensor.detach() if place in places else tensor for place, tensor in enumerate(given)]
    asked = [tensor for tensor in given if tensor.requires_grad]
    torch.autograd.backward(adapter_mlp(*given, impl="torch").sum())
    wanted = torch.autograd.grad(eager_adapter(*given).sum(), asked)
    for tensor, truth in zip(asked, wanted, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, truth, rtol=1e-10, atol=1e-10)
    assert all(tensor.grad is None for tensor in given if not tensor.requires_grad)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """130 rows at once, and 16 at a time."""
    leaves = [encodings(130, 24), *adapter_weights(24, 40, 8)]
    z = adapter_mlp(*leaves, impl="torch")
    grads = grads_of(z, leaves)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    blocked = adapter_mlp(*leaves, impl="torch")
    torch.testing.assert_close(blocked, z, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grads_of(blocked, leaves), grads, rtol=1e-11, atol=1e-12)


# Dtypes


@pytest.mark.parametrize("normalize", [True, False])
def test_float32(normalize: bool) -> None:
    leaves = [encodings(130, 96, dtype=torch.float32), *adapter_weights(96, 64, 48, dtype=torch.float32)]
    z, wanted = adapter_mlp(*leaves, normalize=normalize, impl="torch"), eager_adapter(*leaves, normalize=normalize)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, wanted.float(), rtol=1e-5, atol=1e-5)
    assert relative_error(grads_of(z, leaves), grads_of(wanted, leaves)) < 1e-5


def unfused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return functional.normalize(functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2), dim=-1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_lose_no_more_than_those_of_linear_layers(dtype: torch.dtype, autocast: bool) -> None:
    """In narrow tensors, and under autocast in float32 ones, whose gradients are float32."""
    given = torch.float32 if autocast else dtype
    leaves = [encodings(130, 96, dtype=given), *adapter_weights(96, 64, 48, dtype=given)]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        z, other = adapter_mlp(*leaves, impl="torch"), unfused(*leaves)
    wanted = eager_adapter(*leaves)
    truths = grads_of(wanted, leaves)
    grads = grads_of(z, leaves)
    assert z.dtype == dtype
    assert {grad.dtype for grad in grads} == {given}
    assert relative_error([z], [wanted]) < 1.2 * relative_error([other], [wanted]) + 1e-4
    assert relative_error(grads, truths) < 1.2 * relative_error(grads_of(other, leaves), truths)
    assert relative_error(grads, truths) < 2e-2


def test_autocast_leaves_float64_alone() -> None:
    leaves = [encodings(9, 7), *adapter_weights(7, 5, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = adapter_mlp(*leaves, impl="torch")
    torch.testing.assert_close(z, eager_adapter(*leaves), rtol=1e-10, atol=1e-12)


def test_autocast_takes_weights_and_encodings_of_different_dtypes() -> None:
    """Encodings kept in bfloat16, weights in float32: each gets a gradient in its own."""
    leaves = [encodings(33, 24, dtype=torch.bfloat16), *adapter_weights(24, 40, 16, dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = adapter_mlp(*leaves, impl="torch")
    wanted = eager_adapter(*leaves)
    torch.testing.assert_close(z.double(), wanted, rtol=0, atol=1e-2)
    grads = grads_of(z, leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * 4]
    assert relative_error(grads, grads_of(wanted, leaves)) < 2e-2


# Edges


def test_a_zero_vector_stays_zero() -> None:
    z = adapter_mlp(torch.ones(1, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4))
    assert z.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-10])
def test_gradients_of_vectors_of_hardly_any_length(scale: float) -> None:
    """Below 1e-12 the length is a constant, as in `functional.normalize`; above, it is not."""
    x, w1, b1, w2, b2 = encodings(3, 7), *adapter_weights(7, 5, 4)
    leaves = [x, w1, b1, (w2 * scale).detach().requires_grad_(), (b2 * scale).detach().requires_grad_()]
    grads, wanted = (grads_of(mlp(*leaves), leaves) for mlp in (adapter_mlp, unfused))
    for grad, truth in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-9 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("layout", [transposed, strided])
def test_inputs_need_not_be_contiguous(layout: Callable[[Tensor], Tensor]) -> None:
    leaves = [encodings(9, 7), *adapter_weights(7, 5, 4)]
    others = [layout(leaf.detach()).requires_grad_() if leaf.dim() == 2 else leaf for leaf in leaves]
    assert sum(not other.is_contiguous() for other in others) == 3
    z, wanted = adapter_mlp(*others, impl="torch"), eager_adapter(*leaves)
    torch.testing.assert_close(z, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads_of(z, others), grads_of(wanted, leaves), rtol=1e-10, atol=1e-10)
    expanded = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).expand(9, 4)
    grads = torch.autograd.grad(adapter_mlp(*others, impl="torch"), others, expanded)
    torch.testing.assert_close(
        grads, torch.autograd.grad(eager_adapter(*leaves), leaves, expanded), rtol=1e-10, atol=1e-10
    )


def test_the_hidden_layer_is_kept_for_a_backward_alone() -> None:
    """8,192 rows of 512 are 16 MiB, of which inference holds a block of 2 at a time, before and after activation."""
    x = encodings(8192, 16, dtype=torch.float32).detach()
    weights = adapter_weights(16, 512, 8, dtype=torch.float32)

    def inference() -> Tensor:
        with torch.no_grad():
            return adapter_mlp(x, *weights, impl="torch")

    assert peak_bytes(inference) < 6 * MIB
    assert 16 * MIB < peak_bytes(lambda: adapter_mlp(x, *weights, impl="torch")) < 22 * MIB


GOOD = (torch.ones(1, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4))


@pytest.mark.parametrize(
    ("place", "tensor", "error", "words"),
    [
        (1, torch.zeros(2, 3), ValueError, r"x \(1, 2\), w1 \(2, 3\), .* do not fit: expected \(..., D\), \(H, D\)"),
        (0, torch.tensor(1.0), ValueError, r"x \(\), w1 \(3, 2\)"),
        (2, torch.zeros(4), ValueError, r"b1 \(4,\), w2 \(4, 3\), b2 \(4,\) do not fit"),
        (3, torch.zeros(4, 4), ValueError, r"w2 \(4, 4\), b2 \(4,\) do not fit"),
        (4, torch.zeros(4, 1), ValueError, r"b2 \(4, 1\) do not fit"),
        (0, torch.ones(1, 2, dtype=torch.int64), TypeError, r"are int64, float32, .*: expected floating dtypes"),
        (
            0,
            torch.ones(1, 2, dtype=torch.bfloat16),
            TypeError,
            r"are bfloat16, float32, float32, float32, float32: expected one dtype, or torch.autocast around the call",
        ),
        (4, torch.zeros(4, device="meta"), ValueError, r"b2 is on meta and x on cpu: expected one device"),
    ],
)
def test_bad_tensors_are_named(place: int, tensor: Tensor, error: type[Exception], words: str) -> None:
    given = list(GOOD)
    given[place] = tensor
    with pytest.raises(error, match=words):
        adapter_mlp(*given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "tanh"}, r"activation='tanh' is unknown; accepted: 'gelu', 'relu'"),
        ({"impl": "numpy"}, r"impl='numpy' is unknown; accepted: 'auto', 'triton', 'torch'"),
    ],
)
def test_bad_names_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapter_mlp(*GOOD, **options)


@needs_triton
@pytest.mark.parametrize("dims", [(7, 16, 8), (8, 17, 8), (8, 16, 9)])
def test_triton_is_refused_where_it_cannot_compute(dims: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [encodings(3, dims[0], dtype=torch.float32), *adapter_weights(*dims, dtype=torch.float32)]
    monkeypatch.setattr("kellm_kernels.fused.INTERPRETED", True)
    odd = max(dim for dim in dims if dim % 8)
    with pytest.raises(ValueError, match=rf"hidden layers and encodings are multiples of 8 long, and one is {odd}"):
        adapter_mlp(*given, impl="triton")
    monkeypatch.setattr("kellm_kernels.fused.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"it needs a GPU .*, and the tensors are on cpu; impl='torch' can"):
        adapter_mlp(*given, impl="triton")
