"""Training an adapter to retrieve: the warm items' SWING rows, over the whole warm catalogue at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kellm_features.errors import DataError, MissingExtraError
from kellm_features.evaluation.cold import ColdRetrieval

if TYPE_CHECKING:
    from torch import Tensor

    from kellm_features.training.adapter import Adapter

YEAR_CENTERS = (1930, 1940, 1950, 1960, 1970, 1980, 1985, 1990, 1993, 1995, 1997, 1998, 1999, 2000)
"""Closer together where a catalogue of its time has most items."""
YEAR_WIDTH = 4.0
WARM_UP_SHARE = 0.1
"""Of the steps, while the learning rate rises."""


@dataclass(frozen=True)
class RetrievalTraining:
    """The defaults were chosen on the validation-cold items of one draw of MovieLens-1M."""

    hidden: int = 512
    dim: int = 128
    dropout: float = 0.3
    """Of encodings and of the hidden layer: 3,100 warm items are few for 400,000 weights."""
    steps: int = 60
    """Of all warm items at once."""
    learning_rate: float = 3e-3
    """The highest, of one cycle."""
    weight_decay: float = 0.01
    temperature: float = 0.1
    """Where it starts; it is learnt."""


def train_retrieval(
    task: ColdRetrieval,
    encodings: npt.NDArray[np.floating],
    training: RetrievalTraining | None = None,
    *,
    seed: int,
    targets: npt.NDArray[np.floating] | None = None,
) -> Adapter:
    """An adapter whose cosines tell the part of SWING that popularity does not.

    For warm items i and j,

        loss = −Σ_i Σ_j p(j | i) · log softmax_j(z_i·z_j / τ + log(likes_j + 10)),   p(j | i) = s(i, j) / Σ_j' s(i, j').

    The offset takes popularity upon itself, as logQ does for sampled negatives, so the cosines need not learn it:
    what a scorer adds of it is left to `tune`. All warm items are candidates, so nothing is sampled.

    Args:
        task: of which only what belongs to warm items is read.
        encodings: (N, D), rows of all items; those of cold items are neither trained on nor standardised by.
        training: sizes and steps; None for the defaults.
        seed: of the initial weights and of dropout.
        targets: (N, N) >= 0 instead of the SWING scores, for controls as `random_pairs`.

    Returns:
        In evaluation mode, on the CPU: `adapter(encodings)` are unit vectors (N, dim).

    Raises:
        DataError: encodings of another number of rows, or no warm item has a neighbour.
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
        from torch.nn import functional
    except ModuleNotFoundError as error:
        raise MissingExtraError("train", error.name or "torch", "Training") from error
    from kellm_features.training.adapter import Adapter

    training = training or RetrievalTraining()
    warm = task.split.warm
    if len(encodings) != len(warm):
        raise DataError(f"{len(encodings)} encodings are given for {len(warm)} items: one of each is accepted")
    scores = (task.swing if targets is None else targets)[np.ix_(warm, warm)].astype(np.float64)
    total = scores.sum(axis=1, keepdims=True)
    anchors = torch.from_numpy(np.flatnonzero(total[:, 0] > 0))
    if not len(anchors):
        raise DataError("no warm item has a neighbour to train on: more likes are needed")
    shares = torch.from_numpy((scores / np.where(total > 0, total, 1)).astype(np.float32))[anchors]
    offset = torch.from_numpy(task.log_degree[warm].astype(np.float32))
    vectors = torch.from_numpy(encodings[warm].astype(np.float32))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(vectors.shape[1], training.hidden, training.dim)
        adapter.standardize(vectors)
        standard = (vectors - adapter.mean) / adapter.std
        sharpness = torch.nn.Parameter(torch.tensor(1 / training.temperature).log())
        optimizer = torch.optim.AdamW(
            [
                {"params": list(adapter.parameters()), "weight_decay": training.weight_decay},
                {"params": [sharpness], "weight_decay": 0.0},
            ],
            lr=training.learning_rate,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, training.learning_rate, total_steps=training.steps, pct_start=WARM_UP_SHARE
        )

        def embed(x: Tensor) -> Tensor:
            hidden = functional.gelu(adapter.hidden(functional.dropout(x, training.dropout)))
            return functional.normalize(adapter.output(functional.dropout(hidden, training.dropout)), dim=1)

        for _ in range(training.steps):
            z = embed(standard)
            logits = z[anchors] @ z.T * sharpness.exp() + offset
            # Itself is no candidate: finite, since 0 · −inf is NaN.
            logits[torch.arange(len(anchors)), anchors] = torch.finfo(logits.dtype).min
            loss = -(shares * functional.log_softmax(logits, dim=1)).sum(1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return adapter.eval()


def random_pairs(task: ColdRetrieval, *, seed: int) -> npt.NDArray[np.float32]:
    """A control for `train_retrieval`: warm rows with the scores they have, at random warm neighbours. (N, N).

    Each row is shuffled by itself among warm items, so hubs are gone too.
    """
    draw = np.random.default_rng(seed)
    warm = np.flatnonzero(task.split.warm)
    shuffled = np.zeros_like(task.swing)
    for row in warm:
        others = warm[warm != row]
        shuffled[row, draw.permutation(others)] = task.swing[row, others]
    return shuffled


def shuffled_rows(encodings: npt.NDArray[np.floating], *, seed: int) -> npt.NDArray[np.floating]:
    """A control: every item has another's encoding, drawn at random. (N, D)."""
    shuffled: npt.NDArray[np.floating] = encodings[np.random.default_rng(seed).permutation(len(encodings))]
    return shuffled


def noise(encodings: npt.NDArray[np.floating], *, seed: int) -> npt.NDArray[np.float32]:
    """A control: standard normal vectors of the same shape."""
    return np.random.default_rng(seed).standard_normal(encodings.shape).astype(np.float32)


def item_facts(years: Sequence[int | None], genres: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
    """Year and genres as numbers beside a text's encoding, (N, 14 + distinct genres).

    A year is told by how near it is to each of `YEAR_CENTERS`, so that near years are near; unknown is near none.
    """
    known = sorted({genre for of_item in genres for genre in of_item})
    year = np.array([np.nan if value is None else float(value) for value in years])
    near = np.exp(-(((year[:, None] - np.array(YEAR_CENTERS)) / YEAR_WIDTH) ** 2))
    flags = np.array([[genre in of_item for genre in known] for of_item in genres]).reshape(len(genres), len(known))
    return np.concatenate([np.nan_to_num(near), flags], axis=1).astype(np.float32)
