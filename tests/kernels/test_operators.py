"""The operators: what PyTorch asks of a custom one, and the public functions under `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kellm_kernels import adapter_info_nce, adapter_mlp, info_nce, ops

from .device import device_of, problem_on, weights_on
from .oracle import Problem, needs_triton, problem

IMPLS = ["torch", pytest.param("triton", marks=needs_triton)]
EXTRAS = ("anchor_ids", "positive_ids", "negative_ids", "log_q", "sample_weight")
ALL_OPTIONS = ("temperature", *EXTRAS, "margin")


def case_on(impl: str, rows: int, negatives: int, dim: int, names: Sequence[str] = ALL_OPTIONS) -> Problem:
    return problem_on(device_of(impl), problem(rows, negatives, dim, dtype=torch.float32).only(*names))


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, columns side by side."""
    return tensor.detach().T.contiguous().T.requires_grad_(tensor.requires_grad)


def relayed(tensor: Tensor | None, *, other_way: bool) -> Tensor | None:
    return transposed(tensor) if other_way and tensor is not None else tensor


# What PyTorch asks


SAMPLES: dict[str, tuple[int, Sequence[str], bool, str]] = {
    "plain": (0, (), False, "mean"),
    "everything": (3, ALL_OPTIONS, False, "mean"),
    "everything, symmetric": (3, ALL_OPTIONS, True, "sum"),
    "negatives, each row": (3, ("temperature",), False, "none"),
    "anchor ids, symmetric, each row": (0, ("anchor_ids",), True, "none"),
}
"""Negatives, options, symmetric and reduction."""
JOINT_SAMPLES = ("plain", "everything", "anchor ids, symmetric, each row")


def contrast_arguments(impl: str, sample: str, *, other_way: bool = False) -> tuple[Any, ...]:
    negatives, names, symmetric, reduction = SAMPLES[sample]
    case = case_on(impl, 9, negatives, 16, names)
    vectors = (relayed(case.anchor, other_way=other_way), case.positive, case.negatives)
    options = case.options
    extras = [options.get(name) for name in EXTRAS]
    constant = 1.0 if "temperature" in options else 0.1
    return (
        *(*vectors, options.get("temperature"), *extras),
        *(constant, options.get("margin"), symmetric, 0, reduction, impl, True),
    )


def adapt_arguments(
    impl: str, *, frozen: bool = True, activation: str = "gelu", other_way: bool = False
) -> tuple[Any, ...]:
    x = case_on(impl, 9, 0, 24).anchor.detach().requires_grad_(not frozen)
    w1, b1, w2, b2 = weights_on(device_of(impl), 24, 32, 16)
    matrices = [relayed(matrix, other_way=other_way) for matrix in (x, w1, w2)]
    weights = (matrices[1], b1, matrices[2], b2)
    return matrices[0], *weights, activation, activation == "gelu", torch.float32, impl, True


def adapt_contrast_arguments(impl: str, sample: str, *, other_way: bool = False) -> tuple[Any, ...]:
    """Encodings take gradients where there are negatives."""
    negatives, names, symmetric, reduction = SAMPLES[sample]
    case = case_on(impl, 9, negatives, 24, names)
    temperature, *options = contrast_arguments(impl, sample)[3:]
    *extras, constant, margin, _symmetric, _start, _reduction, _impl, keep = options
    encodings = [None if x is None else x.detach().requires_grad_(negatives > 0) for x in case[:3]]
    w1, b1, w2, b2 = weights_on(device_of(impl), 24, 32, 16)
    x, x_pos, x_neg, w1_laid, w2_laid = (relayed(t, other_way=other_way) for t in (*encodings, w1, w2))
    return (
        *(x, x_pos, x_neg, w1_laid, b1, w2_laid, b2, temperature, *extras),
        *("gelu", True, torch.float32, constant, margin, symmetric, reduction, impl, keep),
    )


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("impl", IMPLS)
def test_contrast_keeps_the_rules(impl: str, sample: str) -> None:
    torch.library.opcheck(ops.contrast, contrast_arguments(impl, sample))


@pytest.mark.parametrize(("frozen", "activation"), [(True, "gelu"), (False, "gelu"), (False, "relu")])
@pytest.mark.parametrize("impl", IMPLS)
def test_adapt_keeps_the_rules(impl: str, frozen: bool, activation: str) -> None:
    torch.library.opcheck(ops.adapt, adapt_arguments(impl, frozen=frozen, activation=activation))


@pytest.mark.parametrize("sample", JOINT_SAMPLES)
@pytest.mark.parametrize("impl", IMPLS)
def test_adapt_contrast_keeps_the_rules(impl: str, sample: str) -> None:
    torch.library.opcheck(ops.adapt_contrast, adapt_contrast_arguments(impl, sample))


def detached(values: Sequence[Any]) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def check_backward(operator: Any, arguments: Sequence[Any]) -> None:
    """A backward has no gradient of its own: what is told of its results' shapes, strides and aliases is checked."""
    torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("sample", "other_way"),
    [*((sample, False) for sample in SAMPLES), ("everything", True), ("everything, symmetric", True)],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_contrast_backward_keeps_the_rules(impl: str, sample: str, other_way: bool) -> None:
    """With anchors whose columns lie side by side, too: compiled code relies on the strides it was told."""
    given = detached(contrast_arguments(impl, sample, other_way=other_way))
    loss, *rows = ops.contrast(*given)
    temperature = given[3]
    check_backward(
        ops.contrast_backward,
        [torch.ones_like(loss), *given[:4], given[4:9], rows, *given[9:-1], temperature is not None],
    )


@pytest.mark.parametrize("other_way", [False, True])
@pytest.mark.parametrize("want_x", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_adapt_backward_keeps_the_rules(impl: str, want_x: bool, other_way: bool) -> None:
    given = detached(adapt_arguments(impl, other_way=other_way))
    z, norm, hidden = ops.adapt(*given)
    check_backward(ops.adapt_backward, [torch.ones_like(z), *given[:5], z, norm, hidden, *given[5:-1], want_x])


@pytest.mark.parametrize(
    ("sample", "other_way"), [*((sample, False) for sample in JOINT_SAMPLES), ("everything", True)]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_adapt_contrast_backward_keeps_the_rules(impl: str, sample: str, other_way: bool) -> None:
    given = detached(adapt_contrast_arguments(impl, sample, other_way=other_way))
    loss, z, z_pos, *kept = ops.adapt_contrast(*given)
    wanted = [True, True, given[2] is not None, *[True] * 4, given[7] is not None]
    grads = [torch.ones_like(loss), torch.ones_like(z), None]
    check_backward(
        ops.adapt_contrast_backward,
        [*grads, *given[:8], given[8:13], [z, z_pos, *kept], *given[13:-1], wanted],
    )


# Compiled


Compiled = Callable[..., Any]


def compiled(function: Compiled, backend: str, *, dynamic: bool | None = None) -> Compiled:
    """Compiled whole or not at all, from scratch: what other tests compiled counts towards no limit."""
    torch.compiler.reset()
    result: Compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    return result


def assert_agree(function: Compiled, eager: Compiled, inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """The same value and gradients, to the rounding of what is around the operators."""
    values = [given(*inputs) for given in (function, eager)]
    grads = [torch.autograd.grad(value, leaves) for value in values]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-7)
    assert all(bool(grad.any()) for grad in grads[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def loss_of(case: Problem, impl: str, **form: Any) -> Compiled:
    """The loss of vectors that something was done to before, so that compiled code meets both ends of the operator."""
    options = {name: value for name, value in case.options.items() if name != "temperature"}

    def loss(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: Tensor) -> Tensor:
        given = {"negatives": negatives.tanh(), "temperature": temperature.exp() / 10, "impl": impl, **options, **form}
        return info_nce(anchor.tanh(), positive.tanh(), **given).square().sum()

    return loss


@pytest.mark.parametrize(("symmetric", "reduction"), [(False, "mean"), (True, "none")])
@pytest.mark.parametrize("impl", IMPLS)
def test_info_nce_compiles(impl: str, symmetric: bool, reduction: str) -> None:
    case = case_on(impl, 17, 5, 16)
    loss = loss_of(case, impl, symmetric=symmetric, reduction=reduction)
    assert_agree(compiled(loss, "aot_eager"), loss, case.leaves, case.leaves)


def test_auto_compiles() -> None:
    """What `auto` takes is decided, and would be logged, outside of compiled code."""
    case = problem(17, 5, 16, dtype=torch.float32)
    loss = loss_of(case, "auto")
    assert_agree(compiled(loss, "aot_eager"), loss, case.leaves, case.leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_adapter_mlp_compiles(impl: str) -> None:
    leaves = [case_on(impl, 17, 0, 24).anchor, *weights_on(device_of(impl), 24, 32, 16)]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return (adapter_mlp(x * 2, *weights, impl=impl) * torch.arange(16, device=x.device)).sin().sum()

    assert_agree(compiled(function, "aot_eager"), function, leaves, leaves)


def joint(case: Problem, impl: str, *, use_embeddings: bool) -> Compiled:
    options = {name: value for name, value in case.options.items() if name != "temperature"}

    def function(x: Tensor, x_pos: Tensor, x_neg: Tensor, temperature: Tensor, *weights: Tensor) -> Tensor:
        loss, z, z_pos = adapter_info_nce(
            x * 2, x_pos, *weights, x_neg=x_neg, temperature=temperature, impl=impl, **options
        )
        return loss + (z - z_pos).square().sum() if use_embeddings else loss

    return function


@pytest.mark.parametrize("use_embeddings", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_adapter_info_nce_compiles(impl: str, use_embeddings: bool) -> None:
    case = case_on(impl, 17, 5, 24, ("temperature", "anchor_ids", "positive_ids", "log_q"))
    leaves = [*case.leaves, *weights_on(device_of(impl), 24, 32, 16)]
    function = joint(case, impl, use_embeddings=use_embeddings)
    assert_agree(compiled(function, "aot_eager"), function, leaves, leaves)


# Inductor imports parts of PyTorch that PyTorch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("other_way", [False, True])
def test_inductor_agrees(other_way: bool) -> None:
    """The default backend relies on what the operators tell of their results, strides included."""
    case = case_on("torch", 17, 5, 24, ("temperature",))
    anchor = relayed(case.anchor, other_way=other_way)
    assert anchor is not None
    leaves = [anchor, *case.leaves[1:]]
    loss = loss_of(case, "torch")
    # Its cache on disk does not know what the operators tell: code of an earlier version of them would be run.
    torch.compiler.reset()
    options: dict[str, Any] = {"fx_graph_cache": False}
    assert_agree(torch.compile(loss, fullgraph=True, options=options), loss, leaves, leaves)


@pytest.mark.parametrize("name", ["info_nce", "adapter_mlp", "adapter_info_nce"])
def test_no_batch_size_is_compiled_in(name: str) -> None:
    """The last batch of an epoch is smaller. With `dynamic=True` numbers vary too, the default temperature for one."""

    def loss(anchor: Tensor, positive: Tensor) -> Tensor:
        return info_nce(anchor, positive, symmetric=True, impl="torch")

    def embeddings(x: Tensor, x_pos: Tensor) -> Tensor:
        return (adapter_mlp(x, *weights, impl="torch") * adapter_mlp(x_pos, *weights, impl="torch")).sin().sum()

    def both(x: Tensor, x_pos: Tensor) -> Tensor:
        return adapter_info_nce(x, x_pos, *weights, impl="torch")[0]

    weights = weights_on("cpu", 24, 32, 16)
    function = {"info_nce": loss, "adapter_mlp": embeddings, "adapter_info_nce": both}[name]
    dynamic = compiled(function, "aot_eager", dynamic=True)
    for rows in (33, 17, 9):
        anchor, positive, *_ = case_on("torch", rows, 0, 24, ())
        leaves = [anchor, positive] if name == "info_nce" else weights
        with torch.compiler.set_stance("default" if rows == 33 else "fail_on_recompile"):
            assert_agree(dynamic, function, [anchor, positive], leaves)
