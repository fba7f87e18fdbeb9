"""The loss and the adapter written out plainly in float64, from the words of their contract, and inputs to compare on.

Nothing here is shared with the package: whole (B, B + N) tensors, gradients by autograd.
"""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

needs_triton = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="Triton has wheels for Linux on x86-64 alone",
)


def eager_rows(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Tensor | float = 0.03,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Each row's loss, (B,) float64; the mean of both directions where `symmetric`."""
    anchor, positive = anchor.double(), positive.double()
    temperature = temperature.double() if isinstance(temperature, Tensor) else temperature
    others = anchor.new_empty(0, anchor.shape[1]) if negatives is None else negatives.double()
    # An id that is not given matches nothing: each gets a number of its own, below those that are given.
    unique = itertools.count(-1, -1)
    of_anchors, of_positives, of_others = (
        _ids(ids, len(vectors), unique)
        for ids, vectors in ((anchor_ids, anchor), (positive_ids, positive), (negative_ids, others))
    )
    rows = _direction(anchor, positive, others, of_anchors, of_positives, of_others, temperature, log_q, margin)
    if not symmetric:
        return rows
    nothing = (others[:0], of_positives, of_anchors, of_others[:0])
    return (rows + _direction(positive, anchor, *nothing, temperature, None, margin)) / 2


def eager_loss(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """`eager_rows`, weighted and reduced."""
    rows = eager_rows(anchor, positive, negatives, **options)
    weight = torch.ones_like(rows) if sample_weight is None else sample_weight.double()
    if reduction == "none":
        return rows * weight
    total = (rows * weight).sum()
    return total / weight.sum() if reduction == "mean" else total


def eager_adapter(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str = "gelu", normalize: bool = True
) -> Tensor:
    """Embeddings (..., E) float64."""
    x, w1, b1, w2, b2 = (tensor.double() for tensor in (x, w1, b1, w2, b2))
    before = x @ w1.T + b1
    hidden = before * 0.5 * (1 + torch.erf(before / 2**0.5)) if activation == "gelu" else before.clamp_min(0)
    z = hidden @ w2.T + b2
    return z / z.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) if normalize else z


class Problem(NamedTuple):
    """Inputs of the loss: vectors that take gradients, and every option that does not change its form."""

    anchor: Tensor
    positive: Tensor
    negatives: Tensor | None
    options: dict[str, Any]
    """temperature, anchor_ids, positive_ids, negative_ids, log_q, sample_weight, margin: what `info_nce` calls them."""

    @property
    def leaves(self) -> list[Tensor]:
        """What takes a gradient: the vectors and, where it is a tensor, the temperature."""
        given = (self.anchor, self.positive, self.negatives, self.options.get("temperature"))
        return [tensor for tensor in given if isinstance(tensor, Tensor)]

    def only(self, *names: str) -> Problem:
        """The same vectors with these options alone."""
        return self._replace(options={name: value for name, value in self.options.items() if name in names})


def problem(
    rows: int,
    negatives: int,
    dim: int,
    *,
    seed: int = 0,
    temperature: float = 0.1,
    cosine: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Unit vectors, positives near `cosine` to their anchors, and all options.

    Ids repeat within and across the three kinds, some weights are 0, the temperature is a tensor that takes a gradient,
    log_q is of all columns, and the margin masks a few columns, none of which is near it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rows * 1_009 + negatives * 101 + dim)

    def normal(count: int) -> Tensor:
        return functional.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)

    anchor = normal(rows)
    positive = functional.normalize(cosine * anchor + (1 - cosine**2) ** 0.5 * normal(rows), dim=1)
    further = normal(negatives)
    vectors = [tensor.to(dtype).requires_grad_() for tensor in (anchor, positive, further)]
    ids = torch.randint(0, max(3, rows // 2), (2 * rows + negatives,), generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(rows, generator=generator, dtype=wide) + 0.1
    weight[1::5] = 0
    return Problem(
        vectors[0],
        vectors[1],
        vectors[2] if negatives else None,
        {
            "temperature": torch.tensor(temperature, dtype=wide, requires_grad=True),
            "anchor_ids": ids[:rows],
            "positive_ids": ids[rows : 2 * rows],
            "negative_ids": ids[2 * rows :] if negatives else None,
            "log_q": torch.randn(rows + negatives, generator=generator, dtype=wide) - 3,
            "sample_weight": weight,
            "margin": margin_among(*vectors),
        },
    )


def margin_among(anchor: Tensor, positive: Tensor, negatives: Tensor) -> float:
    """A margin that a few negatives exceed, in the middle of the widest gap near the top: rounding decides on none."""
    anchor, positive, negatives = (tensor.detach().double() for tensor in (anchor, positive, negatives))
    similarity = anchor @ torch.cat([positive, negatives]).T
    own, apart = similarity.diagonal(), ~torch.eye(*similarity.shape, dtype=torch.bool)
    over = (similarity - own[:, None])[apart]
    backwards = (similarity[:, : len(own)] - own)[apart[:, : len(own)]]
    top = torch.cat([over, backwards]).sort(descending=True).values
    if len(top) < 2:
        return 0.1
    top = top[: max(2, len(top) // 10)]
    least = len(top) // 4 if len(top) > 8 else 0
    widest = least + int((top[:-1] - top[1:])[least:].argmax())
    return float((top[widest] + top[widest + 1]) / 2)


def pairs_at(cosine: float, rows: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit anchors and positives, (B, E) float64, each pair at exactly this cosine."""
    generator = torch.Generator().manual_seed(seed)
    anchor, noise = functional.normalize(
        torch.randn(2, rows, dim, generator=generator, dtype=torch.float64), dim=-1
    ).unbind()
    across = functional.normalize(noise - (noise * anchor).sum(1, keepdim=True) * anchor, dim=1)
    return anchor, cosine * anchor + (1 - cosine**2) ** 0.5 * across


def adapter_weights(
    encoding: int, hidden: int, embedding: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """w1 (H, D), b1 (H,), w2 (E, H), b2 (E,), at the scale that `nn.Linear` starts from, taking gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((hidden, encoding), (hidden,), (embedding, hidden), (embedding,))
    scales = (encoding**-0.5, encoding**-0.5, hidden**-0.5, hidden**-0.5)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def relative_error(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest error of a tensor in proportion to the truth's length."""
    pairs = [(value.detach().double(), truth.detach()) for value, truth in zip(values, truths, strict=True)]
    return max(float((value - truth).norm() / truth.norm()) for value, truth in pairs)


def transposed(tensor: Tensor) -> Tensor:
    """The same values, columns side by side."""
    return tensor.T.contiguous().T


def strided(tensor: Tensor) -> Tensor:
    """The same values as every other row and every other element of a larger tensor."""
    wide = tensor.new_full(tuple(2 * size for size in tensor.shape), torch.nan if tensor.is_floating_point() else -7)
    return wide[tuple(slice(None, None, 2) for _ in tensor.shape)].copy_(tensor)


def _ids(ids: Tensor | None, count: int, unique: Iterator[int]) -> Tensor:
    return torch.tensor(list(itertools.islice(unique, count))) if ids is None else ids.long()


def _direction(
    query: Tensor,
    target: Tensor,
    others: Tensor,
    query_ids: Tensor,
    target_ids: Tensor,
    other_ids: Tensor,
    temperature: Tensor | float,
    log_q: Tensor | None,
    margin: float | None,
) -> Tensor:
    """−log softmax of row i at column i, the columns being `target` and then `others`."""
    rows, columns = len(query), len(target) + len(others)
    column_ids = torch.cat([target_ids, other_ids])
    similarity = query @ torch.cat([target, others]).T
    masked = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        masked[row] |= column_ids == query_ids[row]  # the column is the row itself
        masked[row] |= column_ids == target_ids[row]  # or its target once more
        masked[row, :rows] |= query_ids == query_ids[row]  # or the target of another that is the same
        if margin is not None:
            masked[row] |= similarity[row] - similarity[row, row] > margin
        masked[row, row] = False
    logits = similarity / temperature
    if log_q is not None:
        logits = logits - functional.pad(log_q.double(), (0, columns - len(log_q)))
    return -logits.masked_fill(masked, -torch.inf).log_softmax(1).diagonal()
