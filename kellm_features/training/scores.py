"""How good predictions are for one part of the split."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kellm_features.training.data import CtrData
from kellm_features.training.metrics import auc, ece, gauc, log_loss


def score(data: CtrData, part: str, probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
    """AUC, LogLoss, GAUC (by user) and calibration error of given predictions for the targets of one part."""
    examples = data.examples[part]
    labels = examples.label.numpy() > 0
    return {
        "auc": auc(labels, probabilities),
        "log_loss": log_loss(labels, probabilities),
        "gauc": gauc(labels, probabilities, examples.user.numpy()),
        "ece": ece(labels, probabilities),
    }
