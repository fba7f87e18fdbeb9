"""Arguments of the public functions, checked once: what fails, the value seen, what is accepted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kellm_kernels.problem import wide_dtype

REDUCTIONS = ("mean", "sum", "none")
ACTIVATIONS = ("gelu", "relu")


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(map(repr, accepted))}")


def check_vectors(first: str, a: Tensor, second: str, b: Tensor, *, same_rows: bool) -> None:
    """Raise unless both are (rows, length) of one floating dtype and device, with equal lengths and, if asked, rows."""
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] and min(*a.shape, *b.shape) > 0
    if not fits or (same_rows and a.shape != b.shape):
        wanted = "the same (B, E)" if same_rows else "(B, E) and (N, E)"
        raise ValueError(f"{first} {_shape(a)} and {second} {_shape(b)}: expected {wanted}, at least one row")
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise TypeError(f"{first} is {a.dtype} and {second} {b.dtype}: expected one floating dtype")
    _check_device(second, b, first, a)


def check_ids(name: str, ids: Tensor | None, rows: int, like: Tensor) -> None:
    """Raise unless `ids` is None or (rows,) integers on the device of `like`."""
    if ids is None:
        return
    if ids.shape != (rows,):
        raise ValueError(f"{name} {_shape(ids)}: expected ({rows},), one id for each row")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} is {ids.dtype}: expected an integer dtype")
    _check_device(name, ids, "the vectors", like)


def check_constants(name: str, values: Tensor | None, lengths: tuple[int, ...], like: Tensor) -> None:
    """Raise unless `values` is None or floating, of one of the lengths, without a gradient, on the device of `like`."""
    if values is None:
        return
    if values.dim() != 1 or len(values) not in lengths:
        accepted = " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} {_shape(values)}: expected {accepted}")
    if not values.is_floating_point():
        raise TypeError(f"{name} is {values.dtype}: expected a floating dtype")
    if values.requires_grad:
        raise ValueError(f"{name} takes no gradient, and requires one: pass {name}.detach()")
    _check_device(name, values, "the vectors", like)


def check_temperature(temperature: Tensor | float, like: Tensor) -> tuple[Tensor | None, float]:
    """The temperature as a 0-dimensional wide tensor and 1, or as None and a number.

    A tensor's value is looked at on the CPU alone: on a GPU that would wait for the device.
    """
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: expected a finite number above 0")
        return None, float(temperature)
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(f"temperature {_shape(temperature)} of {temperature.dtype}: expected one floating number")
    _check_device("temperature", temperature, "the vectors", like)
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        check_temperature(float(temperature.detach()), like)
    return temperature.reshape(()).to(wide_dtype(like.dtype)), 1.0


def check_margin(margin: float | None) -> None:
    """Raise unless `margin` is None or finite."""
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"margin={margin!r}: expected a finite difference of similarities, or None")


def check_adapter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> torch.dtype:
    """The dtype of the products, that of autocast or else the one of all tensors; raise for shapes that do not fit."""
    fits = w1.dim() == w2.dim() == 2 and x.dim() >= 1 and x.shape[-1] == w1.shape[1] and w2.shape[1] == w1.shape[0]
    if not fits or b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
        raise ValueError(
            f"x {_shape(x)}, w1 {_shape(w1)}, b1 {_shape(b1)}, w2 {_shape(w2)}, b2 {_shape(b2)} do not fit: "
            "expected (..., D), (H, D), (H,), (E, H) and (E,)"
        )
    dtypes = [tensor.dtype for tensor in (x, w1, b1, w2, b2)]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"x, w1, b1, w2, b2 are {_names(dtypes)}: expected floating dtypes")
    for name, weight in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        _check_device(name, weight, "x", x)
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(x.device.type)
    if len(set(dtypes)) > 1:
        raise TypeError(
            f"x, w1, b1, w2, b2 are {_names(dtypes)}: expected one dtype, or torch.autocast around the call"
        )
    return x.dtype


def _check_device(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and {other} on {like.device}: expected one device")


def _names(dtypes: list[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
