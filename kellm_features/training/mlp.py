"""Which modules are the two-layer MLP that the fused loss computes: told by their parts, and by comparing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kellm_features.errors import first_line
from kellm_features.training.adapter import Activation, Adapter
from kellm_kernels import adapter_mlp


class Mlp(NamedTuple):
    """A module that is `adapter_mlp` of its own weights."""

    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    """w1 (H, D), b1 (H,), w2 (E, H), b2 (E,); a missing bias is zeros."""
    activation: Activation
    normalize: bool


class NotMlp(NamedTuple):
    """A module that has to be called."""

    reason: str
    compared: bool = False
    """It was compared with the MLP, and differs or could not be."""


_Form = tuple[Activation, bool]  # activation, normalize
_FORMS: tuple[_Form, ...] = (("gelu", True), ("gelu", False), ("relu", True), ("relu", False))
# DistributedDataParallel, DataParallel, DeepSpeed and averages; FSDP; torch.compile; PEFT.
_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod", "base_layer")
_SCALES = (0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)  # of probe rows: where GELU bends, and far out on either side
_TOLERANCE = 1e-9  # in float64: the tanh form of GELU is 1e-4 away, rounding 1e-15
_STATEFUL = "it keeps tensors or other state between calls"
_PLAIN = (bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType)

_compared: WeakKeyDictionary[nn.Module, tuple[list[object], _Form | str]] = WeakKeyDictionary()


def find_mlp(adapter: Callable[[Tensor], Tensor]) -> Mlp | NotMlp:
    """The MLP that `adapter` is, or why its forward has to be called.

    An `Adapter` says what it is, and `nn.Sequential(Linear, GELU or ReLU, Linear)` shows it. Another module is one if
    it owns two `nn.Linear` that chain, has no other parameter or buffer, and a copy of it with random weights in
    float64 gives what `adapter_mlp` gives; the comparison is remembered for as long as modes and plain attributes stay.
    Whatever would be passed over by not calling it keeps a module from being one: hooks, parametrizations, other kinds
    of Linear, wrappers such as DistributedDataParallel.

    `torch.compile` cannot compare, and takes what is remembered: call such a module once before. Modes are guarded; a
    hook that is added later goes unseen, as it does wherever compiled code calls a module.
    """
    if not isinstance(adapter, nn.Module):
        return NotMlp("it is not an nn.Module")
    reason = _detour(adapter)
    if reason is not None:
        return NotMlp(reason)
    if isinstance(adapter, Adapter) and type(adapter).forward is Adapter.forward:
        return Mlp(adapter.weights(), adapter.activation, adapter.normalize)
    linears = _linears(adapter)
    if len(linears) != 2:
        return NotMlp(f"it owns {len(linears)} Linear layers, not two")
    first, second = linears
    if first.out_features != second.in_features:
        return NotMlp(f"its Linear layers do not chain: {first.out_features} out, then {second.in_features} in")
    biases = (first.bias is not None) + (second.bias is not None)
    if len(list(adapter.parameters())) != 2 + biases or len(list(adapter.buffers())) > 0:
        return NotMlp("it has parameters or buffers beside those of two Linear layers")
    form: _Form | str | None = _shown(adapter)
    if form is None and torch.compiler.is_compiling():
        form = _remembered_constant(id(adapter), tuple(part.training for part in adapter.modules()))
    elif form is None:
        form = _compare(adapter)
    if form is None:
        return NotMlp("it was not called, and so compared, before it was compiled")
    if isinstance(form, str):
        return NotMlp(form, compared=True)
    return Mlp(_weights(first, second), *form)


def _shown(module: nn.Module) -> _Form | None:
    """The form of a plain `nn.Sequential` of three."""
    parts = list(module.children())
    if type(module) is not nn.Sequential or len(parts) != 3:
        return None
    if type(parts[1]) is nn.ReLU:
        return "relu", False
    if type(parts[1]) is nn.GELU and parts[1].approximate == "none":
        return "gelu", False
    return None


def _weights(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b1 = first.weight.new_zeros(first.out_features) if first.bias is None else first.bias
    b2 = second.weight.new_zeros(second.out_features) if second.bias is None else second.bias
    return first.weight, b1, second.weight, b2


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _detour(module: nn.Module) -> str | None:
    """What happens in a call of `module`, or of a part, beside its class's forward."""
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    for part in module.modules():
        name = type(part).__name__
        if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
            return f"{name} is a Linear of its own kind"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"{name} has hooks"
        if "forward" in part.__dict__ or part._compiled_call_impl is not None:
            return f"{name} has had its forward replaced"
        for wrapped in _WRAPPED:
            if wrapped in part._modules:
                return f"{name} wraps another module"
    return None


def _compare(module: nn.Module) -> _Form | str:
    """`_probe`, remembered."""
    state = _state(module)
    remembered = _compared.get(module)
    if remembered is not None and remembered[0] == state:
        return remembered[1]
    found = _probe(module)
    _compared[module] = (state, found)
    return found


def _state(module: nn.Module) -> list[object]:
    """What a forward may look at beside weights: types, modes, plain attributes."""
    state: list[object] = []
    for part in module.modules():
        state += (type(part), type(part).forward)
        state += [(name, value) for name, value in vars(part).items() if isinstance(value, _PLAIN)]
    return state


def _holds_tensors(module: nn.Module) -> bool:
    """Beside parameters and buffers."""
    return any(isinstance(value, Tensor) for part in module.modules() for value in vars(part).values())


@torch.no_grad()
def _probe(module: nn.Module) -> _Form | str:
    """Compare a copy of `module` that has random weights with the MLP of these, in float64 on the CPU.

    Weights of its own would not do: those of an output layer that starts at zero tell nothing, nor do they as they are
    after initialisation say what the module will compute later.
    """
    if _holds_tensors(module):
        return _STATEFUL
    try:
        twin = copy.deepcopy(module).to("cpu", torch.float64)
        generator = torch.Generator().manual_seed(0)
        for parameter in twin.parameters():
            width = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.normal_(std=width**-0.5, generator=generator)
        weights = _weights(*_linears(twin))
        x = torch.randn(len(_SCALES), weights[0].shape[1], generator=generator, dtype=torch.float64, device="cpu")
        x *= x.new_tensor(_SCALES)[:, None]
        before = _state(twin)
        # Dropout draws numbers that are not its own here.
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            given = twin(x)
    except Exception as error:  # a stranger's forward may raise anything, and then it is not this MLP
        return f"it could not be compared with a two-layer MLP ({first_line(error)})"
    if _state(twin) != before or _holds_tensors(twin):
        return _STATEFUL
    for activation, normalize in _FORMS:
        wanted = adapter_mlp(x, *weights, activation=activation, normalize=normalize, impl="torch")
        if (
            isinstance(given, Tensor)
            and given.shape == wanted.shape
            and given.dtype == wanted.dtype
            and torch.allclose(given, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
        ):
            return activation, normalize
    mode = "train" if module.training else "eval"
    return f"in {mode} mode it computes something else than a two-layer MLP"


def _remembered(key: int, _modes: tuple[bool, ...]) -> _Form | str | None:
    """What comparing the module of this id gave, for `torch.compile` to ask while it traces.

    A constant's arguments are constants: PyTorch 2.11 takes no module there. Passing ids and modes has them guarded.
    """
    return next((_compare(module) for module in list(_compared) if id(module) == key), None)


_remembered_constant: Callable[[int, tuple[bool, ...]], _Form | str | None]
_remembered_constant = torch.compiler.assume_constant_result(_remembered)  # type: ignore[no-untyped-call]  # PyTorch declares no types for it
