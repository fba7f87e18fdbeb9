"""Adapters on disk: one safetensors file whose single metadata entry says what they are and what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kellm_features.errors import ArtifactError, first_line
from kellm_features.training.adapter import Activation, Adapter
from kellm_features.training.experts import AdapterKind, HybridExperts, build_adapters

_KEY = "kellm"  # one entry: safetensors writes several in an order that changes from run to run
_SHARED = "shared"


class AdapterMeta(BaseModel):
    """What an adapter file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    in_dim: int
    hidden: int
    dim: int
    activation: Activation
    normalize: bool
    kind: AdapterKind = "mlp"
    """Files of before there were kinds do not say: `mlp`."""
    shared_experts: int = 0
    """Of `experts`; so are the next two."""
    specific_experts: int = 0
    relu_output: bool = False
    encoder_id: str
    model_id: str
    """Encoder and a hash of the weights: equal ids mean equal embeddings of equal texts."""


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of the names."""
    seen = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        seen.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        seen.update(tensor.numpy().tobytes())
    return seen.hexdigest()


def save_module(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata; the same content gives the same bytes."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, path, metadata={_KEY: json.dumps(metadata, sort_keys=True)})


def save_adapters(path: Path, adapters: nn.ModuleDict, encoder_id: str) -> AdapterMeta:
    """Write adapters under `user.…` and `item.…`, experts of both under `shared.…`, and return what was said of them.

    Raises:
        ValueError: there are none, or they are of several forms, of none that `build_adapters` makes, or share experts
            in name alone.
    """
    forms = [_form(adapter) for adapter in adapters.values()]
    if not forms or any(form != forms[0] for form in forms):
        raise ValueError(f"adapters of forms {forms}: one form for all sides is accepted")
    tensors = _pack(adapters.state_dict())
    model_id = f"{encoder_id}+adapter-{weights_hash(tensors)[:12]}"
    meta = AdapterMeta.model_validate(forms[0] | {"encoder_id": encoder_id, "model_id": model_id})
    save_module(path, tensors, meta.model_dump())
    return meta


def load_adapters(path: Path) -> tuple[nn.ModuleDict, AdapterMeta]:
    """The adapters of a file, on the CPU, ready to apply.

    Raises:
        ArtifactError: not an adapter file of this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = AdapterMeta.model_validate_json((file.metadata() or {})[_KEY])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        sides = sorted({name.partition(".")[0] for name in tensors} - {_SHARED})
        adapters = build_adapters(
            meta.kind,
            dict.fromkeys(sides, meta.in_dim),
            hidden=meta.hidden,
            dim=meta.dim,
            activation=meta.activation,
            shared_experts=meta.shared_experts,
            specific_experts=meta.specific_experts,
            relu_output=meta.relu_output,
            normalize=meta.normalize,
        )
        adapters.load_state_dict(_unpack(tensors, sides))
    except (OSError, SafetensorError, KeyError, ValidationError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} is not an adapter of this version of kellm ({first_line(error)}): run  kellm run --from train"
        ) from error
    return adapters.eval(), meta


def _form(adapter: nn.Module) -> dict[str, Any]:
    """The fields of `AdapterMeta` that say how to build it."""
    if isinstance(adapter, Adapter):
        return {
            "kind": "mlp",
            "in_dim": adapter.in_dim,
            "hidden": adapter.hidden.out_features,
            "dim": adapter.out_dim,
            "activation": adapter.activation,
            "normalize": adapter.normalize,
        }
    if isinstance(adapter, HybridExperts):
        return {
            "kind": "experts",
            "in_dim": adapter.in_dim,
            "hidden": adapter.hidden_dim,
            "dim": adapter.out_dim,
            "activation": adapter.activation,
            "normalize": adapter.normalize,
            "shared_experts": len(adapter.shared),
            "specific_experts": len(adapter.specific),
            "relu_output": adapter.relu_output,
        }
    raise ValueError(
        f"{type(adapter).__name__} is no adapter that can be exported: Adapter and HybridExperts are accepted"
    )


def _pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`user.shared.…` and `item.shared.…`, which are the same tensors, once as `shared.…`.

    Raises:
        ValueError: they are not the same.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        rest = name.partition(".")[2]
        key = rest if rest.startswith(f"{_SHARED}.") else name
        if not torch.equal(packed.setdefault(key, tensor), tensor):
            raise ValueError(
                f"'{name}' is another tensor than the '{rest}' of a side before: a file holds shared experts once; "
                "give all sides the same, as build_adapters does, or write a file for each side"
            )
    return packed


def _unpack(tensors: Mapping[str, Tensor], sides: Iterable[str]) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_SHARED}.")}
    common = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{_SHARED}.")}
    return state | {f"{side}.{name}": tensor for side in sides for name, tensor in common.items()}
