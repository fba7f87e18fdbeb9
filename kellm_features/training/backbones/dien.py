"""Deep Interest Evolution Network, from its paper's equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_features.training.backbones.sequence import HeadOptions, Sequence, SequenceRanker
from kellm_features.training.features import Features

Evolution = Literal["augru", "agru", "aigru"]


class AttentionalGru(nn.Module):
    """A GRU whose steps an attention scales (Zhou et al. 2019, "Interest Evolving Layer").

    From `x_t`, the attention `a_t` and the state `h` before it, with ∘ elementwise:

        u = σ(W_u x_t + U_u h + b_u)    r = σ(W_r x_t + U_r h + b_r)    n = tanh(W_n x_t + b_n + r ∘ (U_n h + c_n))
        augru: h ← (1 − a_t u) ∘ h + a_t u ∘ n     each dimension keeps its own gate, scaled
        agru:  h ← (1 − a_t) h + a_t n             the attention is the gate
        aigru: a GRU over a_t x_t                  h ← (1 − u) ∘ h + u ∘ n

    The paper has r inside, `U_n (r ∘ h)`; outside is cuDNN's form and `nn.GRU`'s, one product a step instead of two.

    State dict: `of_input.weight` (3H, V), `of_input.bias` (3H,), `of_state.weight` (3H, H), `of_state.bias` (3H,), in
    the order r, u, n, as `nn.GRU` has them.

    Args:
        input_width: V.
        width: H.
        evolution: which of the three.

    Raises:
        ValueError: an unknown one.
    """

    def __init__(self, input_width: int, width: int, evolution: Evolution = "augru") -> None:
        super().__init__()
        if evolution not in ("augru", "agru", "aigru"):
            raise ValueError(f"evolution={evolution!r}: 'augru', 'agru' and 'aigru' are accepted")
        self.evolution: Evolution = evolution
        self.width = width
        self.of_input = nn.Linear(input_width, 3 * width)
        self.of_state = nn.Linear(width, 3 * width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)  # as in nn.GRU

    def forward(self, inputs: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        """The last state, (B, H); a step whose mask is False leaves the state as it is.

        Args:
            inputs: (L, B, V), time first.
            attention: (L, B).
            mask: (L, B) bool.
        """
        scale = attention[..., None]
        if self.evolution == "aigru":
            inputs = inputs * scale
            scale = mask[..., None].to(attention.dtype)
        steps = self.of_input(inputs).unbind(0)
        state = attention.new_zeros(inputs.shape[1], self.width)
        # A masked step's attention is 0, so that the scale stands for the mask as well.
        for given, a in zip(steps, scale.unbind(0), strict=True):
            gates_given, new_given = given.split([2 * self.width, self.width], dim=1)
            gates_state, new_state = self.of_state(state).split([2 * self.width, self.width], dim=1)
            reset, update = torch.sigmoid(gates_given + gates_state).chunk(2, dim=1)
            candidate = torch.tanh(new_given + reset * new_state)
            gate = a if self.evolution == "agru" else a * update
            state = torch.lerp(state, candidate.to(state.dtype), gate.to(state.dtype).expand_as(state))
        return state


class DIEN(SequenceRanker):
    """DIEN (Zhou et al. 2019): a GRU over the events, then one that evolves with the attention of the target.

    `h_t` are the states of a GRU over the events (interest extraction); `a_t = softmax_t(h_t W v)` over the steps
    (attention to the target v); the last state of `AttentionalGru` over `h_t` with `a_t` is the interest. What events
    and v are is told by `SequenceInput`, and the rest of the model by `SequenceRanker`.

    Args, beside those of `SequenceRanker`:
        evolution: `augru` (the paper's best), `agru` or `aigru` (KAR's).
        auxiliary_weight: of `auxiliary` in the loss; 0 leaves it out, as KAR does.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        tables: Mapping[str, int],
        field_dim: int,
        *,
        evolution: Evolution = "augru",
        auxiliary_weight: float = 0.0,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__(fields, tables, field_dim, **head)
        width = self.input.width
        self.extraction = nn.GRU(width, width)
        self.attention = nn.Linear(width, width, bias=False)
        self.evolution = AttentionalGru(width, width, evolution)
        self.auxiliary_weight = auxiliary_weight

    def interest(self, seen: Sequence) -> Tensor:
        """The last state of the evolution, (B, V)."""
        rows, mask = _in_time(seen)
        states, _ = self.extraction(functional.embedding(rows, seen.distinct))
        scores = torch.einsum("lbh,bh->lb", states, self.attention(seen.target))
        lowest = torch.finfo(scores.dtype).min
        attention = torch.softmax(scores.masked_fill(~mask, lowest), dim=0) * mask
        out: Tensor = self.evolution(states, attention, mask)
        return out

    def auxiliary(self, features: Features, generator: torch.Generator | None = None) -> Tensor:
        """The paper's second loss: a state tells the event that came next from one that did not.

        The mean over steps of `−log σ(⟨h_t, e_{t+1}⟩) − log(1 − σ(⟨h_t, ê_{t+1}⟩))`, where ê is another of the batch's
        items with the flag of the event: the state is asked which item it was. (The paper sums over steps; with a mean
        the weight means the same at any length.) 0 where no history has two events, or the batch only one item.

        Args:
            features: of the batch.
            generator: on the CPU, for the negatives; None: PyTorch's own.
        """
        seen: Sequence = self.input(features)
        rows, mask = _in_time(seen)
        events = functional.embedding(rows, seen.distinct)
        states: Tensor = self.extraction(events)[0]
        flags = self.input.flags
        items = len(seen.distinct) // flags
        if items < 2:
            return states.new_zeros(())
        other = torch.randint(1, items, rows[1:].shape, generator=generator).to(rows.device)
        negatives = functional.embedding((rows[1:] + other * flags) % len(seen.distinct), seen.distinct)
        truth = (states[:-1] * events[1:]).sum(2)
        false = (states[:-1] * negatives).sum(2)
        terms = functional.softplus(-truth) + functional.softplus(false)
        counted = mask[1:].to(terms.dtype)
        mean: Tensor = (terms * counted).sum() / counted.sum().clamp(min=1)
        return mean


def _in_time(seen: Sequence) -> tuple[Tensor, Tensor]:
    """A batch's events, as rows and mask, (L, B): time first, what is no event behind the rest.

    A GRU then passes over gaps without being told of them.
    """
    order = torch.argsort(~seen.mask, dim=1, stable=True)
    return seen.events.gather(1, order).T.contiguous(), seen.mask.gather(1, order).T
