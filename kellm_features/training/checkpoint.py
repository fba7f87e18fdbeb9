"""Adapters on disk: one safetensors file whose single metadata entry says what they are and what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kellm_features.errors import ArtifactError, first_line
from kellm_features.training.adapter import Activation, Adapter

_KEY = "kellm"  # one entry: safetensors writes several in an order that changes from run to run


class AdapterMeta(BaseModel):
    """What an adapter file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    in_dim: int
    hidden: int
    dim: int
    activation: Activation
    normalize: bool
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
    """Write the adapters under `user.…` and `item.…`, and return what was said of them."""
    tensors = adapters.state_dict()
    first = next(iter(adapters.values()))
    assert isinstance(first, Adapter)
    meta = AdapterMeta(
        in_dim=first.in_dim,
        hidden=first.hidden.out_features,
        dim=first.out_dim,
        activation=first.activation,
        normalize=first.normalize,
        encoder_id=encoder_id,
        model_id=f"{encoder_id}+adapter-{weights_hash(tensors)[:12]}",
    )
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
        sides = sorted({name.partition(".")[0] for name in tensors})
        adapters = nn.ModuleDict(
            {
                side: Adapter(meta.in_dim, meta.hidden, meta.dim, activation=meta.activation, normalize=meta.normalize)
                for side in sides
            }
        )
        adapters.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValidationError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} is not an adapter of this version of kellm ({first_line(error)}): run  kellm run --from train"
        ) from error
    return adapters.eval(), meta
