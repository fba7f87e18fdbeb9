"""The operators behind the public functions: opaque to `torch.compile`, with their gradients as operators again.

Three forward operators (`kellm::contrast`, `kellm::adapt`, `kellm::adapt_contrast`) and the backward of each. Public
functions call them through `run_contrast`, `run_adapt` and `run_adapt_contrast`. `impl` is
`torch` or `triton`, chosen before; `keep` says that backward will follow. A schema has no optional result: gradients
that no one asked for, and parts of `Rows` that an implementation does without, are empty, (0,). The loss's tensors that
take no gradient are its `extras`: anchor_ids, positive_ids, negative_ids, log_q, sample_weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kellm_kernels import eager
from kellm_kernels.problem import AdapterWeights, Contrast, Rows, Vectors, wide_dtype

_Tensors = tuple[Tensor, ...]
_Forward = Callable[..., Any]
_Backward = Callable[..., Any]


def _runner(operator: _Forward, forward: _Forward, setup: Callable[..., None], backward: _Backward) -> _Forward:
    """What a public function calls: the operator while PyTorch compiles, and else what it does, without the way there.

    To call operators of forty arguments costs PyTorch 0.4 ms in forward and backward, more than small batches take.
    """

    def forward_in(ctx: Any, *arguments: Any) -> Any:
        output = forward(*arguments)
        setup(ctx, arguments, output)
        return output

    # Not as `setup_context`, for which PyTorch reads the forward's signature anew in each call.
    once = torch.autograd.function.once_differentiable(backward)
    members = {"forward": staticmethod(forward_in), "backward": staticmethod(once)}
    function: Any = type(forward.__name__, (torch.autograd.Function,), members)

    def run(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else function.apply(*arguments)

    return run


def _backend(impl: str) -> ModuleType:
    """The module that computes for `impl`; Triton is imported where it is used, and not before."""
    if impl == "triton":
        from kellm_kernels import fused

        return fused
    return eager


# --- InfoNCE ------------------------------------------------------------------------------------------------------


def _contrast(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor | None,
    anchor_ids: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    log_q: Tensor | None,
    sample_weight: Tensor | None,
    constant: float,
    margin: float | None,
    symmetric: bool,
    start: int,
    reduction: str,
    impl: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the fields of `Rows`; the temperature is `constant` where it is no tensor."""
    extras = (anchor_ids, positive_ids, negative_ids, log_q, sample_weight)
    problem = _problem(temperature, constant, extras, margin, symmetric, start, reduction)
    loss, rows = _backend(impl).contrast(Vectors(anchor, positive, negatives), problem, keep=keep)
    return loss, *rows


def _contrast_backward(
    grad: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor | None,
    extras: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    constant: float,
    margin: float | None,
    symmetric: bool,
    start: int,
    reduction: str,
    impl: str,
    want_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of anchor, positive, negatives and temperature."""
    problem = _problem(temperature, constant, extras, margin, symmetric, start, reduction)
    grads = _backend(impl).contrast_backward(
        grad, Vectors(anchor, positive, negatives), problem, Rows(*rows), want_temperature=want_temperature
    )
    d_anchor, d_positive, d_negatives, d_temperature = (_given(grad, anchor) for grad in grads)
    return d_anchor, d_positive, d_negatives, d_temperature


def _contrast_fake(anchor: Tensor, positive: Tensor, negatives: Tensor | None, *others: Any) -> _Tensors:
    *_others, symmetric, _start, reduction, impl, keep = others
    rows = _backend(impl).empty_rows(Vectors(anchor, positive, negatives), symmetric=symmetric, keep=keep)
    return _empty_loss(anchor, reduction), *rows


def _contrast_backward_fake(
    grad: Tensor, anchor: Tensor, positive: Tensor, negatives: Tensor | None, temperature: Tensor | None, *options: Any
) -> _Tensors:
    wanted = temperature if options[-1] else None
    return tuple(_empty_like(tensor, anchor) for tensor in (anchor, positive, negatives, wanted))


def _contrast_setup(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.options = inputs[9:-1]


def _contrast_grad(
    backward: _Backward, ctx: Any, grad: Tensor | None, *_rows: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    tensors, extras, rows = _split(ctx.saved_tensors, 4)
    grads = backward(grad, *tensors, extras, rows, *ctx.options, ctx.needs_input_grad[3])
    return *_asked(grads, ctx.needs_input_grad), *(None,) * 12


contrast = torch.library.custom_op("kellm::contrast", _contrast, mutates_args=())
contrast_backward = torch.library.custom_op("kellm::contrast_backward", _contrast_backward, mutates_args=())
contrast.register_fake(_contrast_fake)
contrast_backward.register_fake(_contrast_backward_fake)
contrast.register_autograd(partial(_contrast_grad, contrast_backward), setup_context=_contrast_setup)
run_contrast = _runner(contrast, _contrast, _contrast_setup, partial(_contrast_grad, _contrast_backward))


# --- The adapter --------------------------------------------------------------------------------------------------


def _adapt(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: str,
    normalize: bool,
    dtype: torch.dtype,
    impl: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (R, E), lengths before normalisation (R,) and, where `keep`, the hidden layer (R, H)."""
    weights = AdapterWeights(w1, b1, w2, b2, activation, normalize, dtype)
    (z,), norm, hidden, _half = _backend(impl).adapt([x], weights, keep=keep)
    return z, norm, hidden


def _adapt_backward(
    grad_z: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    z: Tensor,
    norm: Tensor,
    hidden: Tensor,
    activation: str,
    normalize: bool,
    dtype: torch.dtype,
    impl: str,
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2."""
    weights = AdapterWeights(w1, b1, w2, b2, activation, normalize, dtype)
    d_x, d_weights = _backend(impl).adapt_backward(grad_z, x, z, norm, hidden, weights, want_x=want_x)
    d_w1, d_b1, d_w2, d_b2 = (_given(grad, x) for grad in d_weights)
    return _given(d_x, x), d_w1, d_b1, d_w2, d_b2


def _adapt_fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *options: Any) -> _Tensors:
    *_others, dtype, _impl, keep = options
    rows = x.shape[0]
    return x.new_empty(rows, w2.shape[0], dtype=dtype), *_empty_hidden(x, rows, w1, dtype, keep)


def _adapt_backward_fake(grad_z: Tensor, x: Tensor, *others: Any) -> _Tensors:
    return tuple(_empty_like(tensor, x) for tensor in (x if others[-1] else None, *others[:4]))


def _adapt_setup(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:-1]


def _adapt_grad(
    backward: _Backward, ctx: Any, grad_z: Tensor | None, *_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_z is None:
        return (None,) * 10
    grads = backward(grad_z, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[0])
    return *_asked(grads, ctx.needs_input_grad), *(None,) * 5


adapt = torch.library.custom_op("kellm::adapt", _adapt, mutates_args=())
adapt_backward = torch.library.custom_op("kellm::adapt_backward", _adapt_backward, mutates_args=())
adapt.register_fake(_adapt_fake)
adapt_backward.register_fake(_adapt_backward_fake)
adapt.register_autograd(partial(_adapt_grad, adapt_backward), setup_context=_adapt_setup)
run_adapt = _runner(adapt, _adapt, _adapt_setup, partial(_adapt_grad, _adapt_backward))


# --- Both ---------------------------------------------------------------------------------------------------------


def _adapt_contrast(
    x: Tensor,
    x_pos: Tensor,
    x_neg: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    temperature: Tensor | None,
    anchor_ids: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    log_q: Tensor | None,
    sample_weight: Tensor | None,
    activation: str,
    normalize: bool,
    dtype: torch.dtype,
    constant: float,
    margin: float | None,
    symmetric: bool,
    reduction: str,
    impl: str,
    keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor,
]:  # fmt: skip
    """The loss; embeddings of each tower; the fields of `Rows`; lengths; the hidden layer; embeddings in float16."""
    weights = AdapterWeights(w1, b1, w2, b2, activation, normalize, dtype)
    extras = (anchor_ids, positive_ids, negative_ids, log_q, sample_weight)
    problem = _problem(temperature, constant, extras, margin, symmetric, 0, reduction, unit=normalize)
    compute = _backend(impl)
    towers = _towers(x, x_pos, x_neg)
    (z, z_pos, *z_neg), norm, hidden, half = compute.adapt(towers, weights, keep=keep, halve=keep)
    negatives = z_neg[0] if z_neg else None
    loss, rows = compute.contrast(Vectors(z, z_pos, negatives), problem, keep=keep, hidden=len(w1))
    return loss, z, z_pos, _given(negatives, z), *rows, norm, hidden, half


def _adapt_contrast_backward(
    grad: Tensor | None,
    grad_z: Tensor | None,
    grad_z_pos: Tensor | None,
    x: Tensor,
    x_pos: Tensor,
    x_neg: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    temperature: Tensor | None,
    extras: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    activation: str,
    normalize: bool,
    dtype: torch.dtype,
    constant: float,
    margin: float | None,
    symmetric: bool,
    reduction: str,
    impl: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x_pos, x_neg, w1, b1, w2, b2 and temperature; `wanted` tells of each."""
    weights = AdapterWeights(w1, b1, w2, b2, activation, normalize, dtype)
    problem = _problem(temperature, constant, extras, margin, symmetric, 0, reduction, unit=normalize)
    towers = _towers(x, x_pos, x_neg)
    z, z_pos, z_neg, *rows, norm, hidden, half = kept
    vectors = Vectors(z, z_pos, None if x_neg is None else z_neg)
    d_towers, d_weights, d_temperature = _backend(impl).adapt_contrast_backward(
        grad, grad_z, grad_z_pos, towers, vectors, norm, hidden, half, weights, problem, Rows(*rows),
        want_x=wanted[: len(towers)], want_temperature=wanted[7],
    )  # fmt: skip
    d_x, d_x_pos, *d_x_neg = (_given(grad, x) for grad in d_towers)
    d_w1, d_b1, d_w2, d_b2 = (_given(grad, x) for grad in d_weights)
    d_last = d_x_neg[0] if d_x_neg else x.new_empty(0)
    return d_x, d_x_pos, d_last, d_w1, d_b1, d_w2, d_b2, _given(d_temperature, x)


def _adapt_contrast_fake(x: Tensor, x_pos: Tensor, x_neg: Tensor | None, w1: Tensor, *others: Any) -> _Tensors:
    _b1, w2, *_rest, normalize, dtype, _constant, _margin, symmetric, reduction, impl, keep = others
    towers = _towers(x, x_pos, x_neg)
    z, z_pos, *z_neg = (tower.new_empty(tower.shape[0], w2.shape[0], dtype=dtype) for tower in towers)
    negatives = z_neg[0] if z_neg else None
    rows = _backend(impl).empty_rows(Vectors(z, z_pos, negatives), symmetric=symmetric, keep=keep, hidden=w1.shape[0])
    count = sum(tower.shape[0] for tower in towers)
    norm, hidden = _empty_hidden(x, count, w1, dtype, keep)
    half = _backend(impl).empty_half(z, count, wanted=keep and normalize)
    return _empty_loss(z, reduction), z, z_pos, _given(negatives, z), *rows, norm, hidden, half


def _adapt_contrast_backward_fake(
    grad: Tensor | None, grad_z: Tensor | None, grad_z_pos: Tensor | None, x: Tensor, *others: Any
) -> _Tensors:
    inputs = (x, *others[:6])
    wanted = list(others[-1])
    wanted[3:7] = [True] * 4
    return tuple(_empty_like(t if want else None, x) for t, want in zip((*inputs, others[6]), wanted, strict=True))


def _adapt_contrast_setup(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13], *output[1:])
    ctx.options = inputs[13:-1]


def _adapt_contrast_grad(backward: _Backward, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads[:3]):
        return (None,) * 22
    tensors, extras, kept = _split(ctx.saved_tensors, 8)
    wanted = ctx.needs_input_grad[:8]
    results = backward(*grads[:3], *tensors, extras, kept, *ctx.options, wanted)
    return *_asked(results, wanted), *(None,) * 14


adapt_contrast = torch.library.custom_op("kellm::adapt_contrast", _adapt_contrast, mutates_args=())
adapt_contrast_backward = torch.library.custom_op(
    "kellm::adapt_contrast_backward", _adapt_contrast_backward, mutates_args=()
)
adapt_contrast.register_fake(_adapt_contrast_fake)
adapt_contrast_backward.register_fake(_adapt_contrast_backward_fake)
adapt_contrast.register_autograd(
    partial(_adapt_contrast_grad, adapt_contrast_backward), setup_context=_adapt_contrast_setup
)
run_adapt_contrast = _runner(
    adapt_contrast, _adapt_contrast, _adapt_contrast_setup, partial(_adapt_contrast_grad, _adapt_contrast_backward)
)


# --- What they share ----------------------------------------------------------------------------------------------
# Sizes are read as `shape[0]`: `len` of a tensor that is only described would compile its number in.


def _problem(
    temperature: Tensor | None,
    constant: float,
    extras: Sequence[Tensor | None],
    margin: float | None,
    symmetric: bool,
    start: int,
    reduction: str,
    *,
    unit: bool = False,
) -> Contrast:
    anchor_ids, positive_ids, negative_ids, log_q, sample_weight = extras
    value = constant if temperature is None else temperature
    return Contrast(
        value, anchor_ids, positive_ids, negative_ids, log_q, sample_weight, margin, symmetric, start, reduction, unit
    )


def _towers(x: Tensor, x_pos: Tensor, x_neg: Tensor | None) -> list[Tensor]:
    return [x, x_pos] if x_neg is None else [x, x_pos, x_neg]


def _split(saved: Sequence[Any], tensors: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Saved tensors as they were given to `save_for_backward`: inputs, the five extras, results."""
    both = tensors + 5
    return list(saved[:tensors]), list(saved[tensors:both]), list(saved[both:])


def _asked(grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """None for what autograd does not need, so that no placeholder reaches it."""
    return [grad if need else None for grad, need in zip(grads, needed, strict=False)]


def _given(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, its elements side by side as `_empty_like` has them, or the schema's word for None."""
    return like.new_empty(0) if tensor is None else tensor.contiguous()


def _empty_like(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def _empty_loss(vectors: Tensor, reduction: str) -> Tensor:
    shape = (vectors.shape[0],) if reduction == "none" else ()
    return vectors.new_empty(shape, dtype=wide_dtype(vectors.dtype))


def _empty_hidden(x: Tensor, rows: int, w1: Tensor, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty((rows if keep else 0, w1.shape[0]), dtype=dtype)
    return x.new_empty(rows, dtype=wide_dtype(dtype)), hidden
