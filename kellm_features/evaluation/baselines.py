"""Clicks from counts alone: what any model has to beat."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from kellm_features.errors import MissingExtraError
from kellm_features.training.data import CtrData
from kellm_features.training.features import DISLIKED, LIKED

Floats = npt.NDArray[np.float64]

_PRIOR = 10.0
"""Events of the overall share that a share of few events is shrunk by."""


def baseline_scores(kind: Literal["item-mean", "rating-statistics"], data: CtrData, part: str) -> Floats:
    """Probabilities of a like for the targets of one part, (n,).

    `item-mean` is the item's smoothed share of likes in train rows. `rating-statistics` is a logistic regression on six
    numbers: the item's share and count, the share of likes in the history, its length, how far its likes lie above what
    its items' shares predict (the user's leniency), and whether the item is known. No ids, no text.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    if kind == "item-mean":
        shares: Floats = data.item_mean.numpy()[data.examples[part].item.numpy()]
        return shares
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", "sklearn", "The baseline of rating statistics") from error
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(_statistics(data, "train"), data.examples["train"].label.numpy() > 0)
    probabilities: Floats = model.predict_proba(_statistics(data, part))[:, 1]
    return probabilities


def _statistics(data: CtrData, part: str) -> Floats:
    examples = data.examples[part]
    user, item = examples.user.numpy(), examples.item.numpy()
    share, count = data.item_mean.numpy().astype(np.float64), data.item_count.numpy().astype(np.float64)
    of_item, seen = share[item], count[item]
    overall = float(data.examples["train"].label.mean())
    if part == "train":  # the target's own label is in its item's share: take it out
        label = examples.label.numpy()
        of_item = (of_item * (seen + _PRIOR) - label) / np.maximum(seen + _PRIOR - 1, 1)
        seen = seen - 1
    flags = data.flags.numpy()
    liked, events = flags == LIKED, (flags == LIKED) | (flags == DISLIKED)
    length = events.sum(1)
    likes = liked.sum(1)
    expected = (share[np.maximum(data.events.numpy() - 1, 0)] * events).sum(1)
    taste = (likes + _PRIOR * overall) / (length + _PRIOR)
    leniency = (likes - expected) / (length + _PRIOR)
    columns = [
        _logit(of_item),
        np.log1p(seen),
        seen == 0,
        _logit(taste)[user],
        np.log1p(length)[user],
        leniency[user],
    ]
    return np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])


def _logit(share: npt.ArrayLike) -> Floats:
    p = np.clip(np.asarray(share, dtype=np.float64), 1e-4, 1 - 1e-4)
    out: Floats = np.log(p) - np.log1p(-p)
    return out
