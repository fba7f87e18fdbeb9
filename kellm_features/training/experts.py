"""KAR's adapters: experts that users and items share, experts of each, and a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.adapter import Activation, Adapter, Standardized

AdapterKind = Literal["mlp", "experts"]


class Expert(nn.Module):
    """`W2 · act(W1 · x + b1) + b2`, (..., D) -> (..., E).

    Args:
        in_dim: D.
        hidden: H, width of the hidden layer.
        out_dim: E.
        activation: of the hidden layer.
        relu_output: a ReLU on the output as well.
    """

    def __init__(
        self, in_dim: int, hidden: int, out_dim: int, *, activation: Activation = "gelu", relu_output: bool = False
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, hidden)
        self.output = nn.Linear(hidden, out_dim)
        self.activation: Activation = activation
        self.relu_output = relu_output

    def forward(self, x: Tensor) -> Tensor:
        """The expert's vectors."""
        hidden = self.hidden(x)
        hidden = functional.gelu(hidden) if self.activation == "gelu" else functional.relu(hidden)
        out: Tensor = self.output(hidden)
        return functional.relu(out) if self.relu_output else out


class HybridExperts(Standardized):
    """KAR's hybrid-expert adapter (Xi et al. 2024, §3.4): `Σ_k g_k · expert_k(x)`, `g = softmax(W x + b)`.

    The experts are those that both sides share, then those of this side; the gate is of this side. Inputs are
    standardised and outputs of unit length, as `Adapter` has them and for its reasons. KAR's experts end in a ReLU,
    which confines cosines to [0, 1], so that no pair can be told apart by more than orthogonality; here they end
    linearly, and `relu_output` gives KAR's.

    State dict: `shared.{k}` and `specific.{k}`, each with `hidden` and `output`; `gate`; `mean` and `std`.

    Args:
        shared: modules that the other side's adapter holds as well; they are not copied.
        in_dim: D, length of an encoding.
        hidden: H, width of an expert's hidden layer (KAR: 128).
        out_dim: E, length of an embedding (KAR: 32).
        specific: experts of this side alone (KAR: 2 to 6).
        activation: of the hidden layers.
        relu_output: experts end in a ReLU.
        normalize: give embeddings unit length.
    """

    def __init__(
        self,
        shared: nn.ModuleList,
        in_dim: int,
        hidden: int,
        out_dim: int,
        *,
        specific: int = 5,
        activation: Activation = "gelu",
        relu_output: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__(in_dim)
        self.shared = shared
        self.specific = make_experts(specific, in_dim, hidden, out_dim, activation=activation, relu_output=relu_output)
        self.gate = nn.Linear(in_dim, len(shared) + specific)
        self.in_dim = in_dim
        self.hidden_dim = hidden
        self.out_dim = out_dim
        self.activation: Activation = activation
        self.relu_output = relu_output
        self.normalize = normalize

    def forward(self, encodings: Tensor) -> Tensor:
        """Encodings (..., D) -> embeddings (..., E)."""
        x = (encodings - self.mean) / self.std
        gate = torch.softmax(self.gate(x), dim=-1)
        experts = torch.stack([expert(x) for expert in (*self.shared, *self.specific)], dim=-2)
        z = (gate[..., None] * experts).sum(-2)
        return functional.normalize(z, dim=-1, eps=1e-12) if self.normalize else z


def make_experts(
    count: int, in_dim: int, hidden: int, out_dim: int, *, activation: Activation = "gelu", relu_output: bool = False
) -> nn.ModuleList:
    """So many `Expert`s with fresh weights."""
    return nn.ModuleList(
        Expert(in_dim, hidden, out_dim, activation=activation, relu_output=relu_output) for _ in range(count)
    )


def build_adapters(
    kind: AdapterKind,
    in_dims: Mapping[str, int],
    *,
    hidden: int,
    dim: int,
    activation: Activation = "gelu",
    shared_experts: int = 2,
    specific_experts: int = 5,
    relu_output: bool = False,
    normalize: bool = True,
) -> nn.ModuleDict:
    """Side -> adapter, with fresh weights from PyTorch's generator; call `standardize` on each before training.

    Args:
        kind: `mlp`: an `Adapter` each; `experts`: `HybridExperts` that share `shared_experts`.
        in_dims: side -> D.
        hidden: H.
        dim: E.
        activation: of the hidden layers.
        shared_experts: of `experts`, for all sides together.
        specific_experts: of `experts`, for each side.
        relu_output: of `experts`.
        normalize: give embeddings unit length.

    Raises:
        ValueError: an unknown kind; sides of different D, which cannot share experts.
    """
    if kind == "mlp":
        return nn.ModuleDict(
            {
                side: Adapter(in_dim, hidden, dim, activation=activation, normalize=normalize)
                for side, in_dim in in_dims.items()
            }
        )
    if kind != "experts":
        raise ValueError(f"kind={kind!r}: 'mlp' and 'experts' are accepted")
    if len(set(in_dims.values())) > 1:
        raise ValueError(f"encodings of {dict(in_dims)} numbers cannot share experts: use one encoder, or kind='mlp'")
    width = next(iter(in_dims.values()), 0)
    shared = make_experts(shared_experts, width, hidden, dim, activation=activation, relu_output=relu_output)
    return nn.ModuleDict(
        {
            side: HybridExperts(
                shared,
                width,
                hidden,
                dim,
                specific=specific_experts,
                activation=activation,
                relu_output=relu_output,
                normalize=normalize,
            )
            for side in in_dims
        }
    )
