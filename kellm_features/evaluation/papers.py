"""What the papers print for MovieLens-1M, as data: the figures that the replication table sets beside ours.

`ID` is a backbone on ids, `LLMRec` KELLMRec's own framework without external knowledge and without contrastive terms
(which is close to KAR), `KELLMRec` all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KELLMREC = "KELLMRec"
KAR = "KAR"


@dataclass(frozen=True)
class PaperFigure:
    """One printed figure."""

    paper: str
    backbone: str
    """deepfm, din or dien."""
    arm: str
    """As the paper calls it."""
    metric: Literal["auc", "log_loss"]
    value: float


@dataclass(frozen=True)
class Paper:
    """Where figures come from and under what protocol."""

    name: str
    citation: str
    protocol: str
    read: str
    """How the figures came here."""


PAPERS: Mapping[str, Paper] = {
    KELLMREC: Paper(
        KELLMREC,
        "arXiv 2403.06642v1, tables of CTR and ablation",
        "users 8:1:1, rating > 3; seeds, intervals and history length are not stated",
        "from the paper",
    ),
    KAR: Paper(
        KAR,
        "arXiv 2306.10933, RecSys 2024",
        "users 9:1 without a validation part, stopped on test AUC; 5 events of history in its code",
        "from a summary of the paper",
    ),
}


def _kellmrec() -> list[PaperFigure]:
    """CTR on MovieLens-1M: AUC and LogLoss of each arm, then the ablations, of which AUC alone is printed."""
    table = {
        "deepfm": {"ID": (0.7672, 0.5665), "LLMRec": (0.7786, 0.5567), "KELLMRec": (0.7791, 0.5561)},
        "din": {"ID": (0.7690, 0.5639), "LLMRec": (0.7791, 0.5550), "KELLMRec": (0.7795, 0.5554)},
        "dien": {"ID": (0.7526, 0.5821), "LLMRec": (0.7785, 0.5586), "KELLMRec": (0.7797, 0.5559)},
    }
    figures = [
        figure
        for backbone, arms in table.items()
        for arm, (auc, log_loss) in arms.items()
        for figure in (
            PaperFigure(KELLMREC, backbone, arm, "auc", auc),
            PaperFigure(KELLMREC, backbone, arm, "log_loss", log_loss),
        )
    ]
    return [
        *figures,
        PaperFigure(KELLMREC, "dien", "KELLMRec without external knowledge", "auc", 0.7792),
        PaperFigure(KELLMREC, "dien", "KELLMRec without contrastive terms", "auc", 0.7789),
    ]


FIGURES: tuple[PaperFigure, ...] = (
    *_kellmrec(),
    PaperFigure(KAR, "din", "base", "auc", 0.7863),
    PaperFigure(KAR, "din", "KAR", "auc", 0.7961),
)

DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    (KELLMREC, "KELLMRec", "ID"),
    (KELLMREC, "KELLMRec", "LLMRec"),
    (KAR, "KAR", "base"),
)
"""(paper, arm, the arm that it is said to beat)."""

OURS: Mapping[str, str] = {
    "ID": "id-5",
    "base": "id-5",
    "LLMRec": "closed-book",
    "KAR": "closed-book",
    "KELLMRec": "printed",
    "KELLMRec without contrastive terms": "profile",
}
"""A paper's arm -> the key of ours (`arms`) that is nearest; what has no counterpart here is left out."""


def printed(paper: str, backbone: str, arm: str, metric: str) -> float | None:
    """The printed figure, or None where there is none."""
    found = [f.value for f in FIGURES if (f.paper, f.backbone, f.arm, f.metric) == (paper, backbone, arm, metric)]
    return found[0] if found else None
