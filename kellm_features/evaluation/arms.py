"""What is compared: the ladder of arms, the text variants, and the forms of the contrastive term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kellm_features.evaluation.texts import CLOSED_BOOK, DIGEST, PAGE, TITLE

Rows = Literal["own", "shuffled", "noise"]
Changes = tuple[tuple[str, str | int | float | bool], ...]
"""Settings of [train] by name: hashable, so that an arm is a key."""


def changes(base: Changes = (), /, **values: str | int | float | bool) -> Changes:
    """Settings by name, on top of others."""
    return tuple(sorted((dict(base) | values).items()))


_PLAIN = changes(sides="none", schedule="joint")


@dataclass(frozen=True)
class Arm:
    """One way to predict clicks. Arms differ in what they see and in their loss, and in nothing else."""

    key: str
    label: str
    seen_history: int | None = None
    """Events of the history that the model sees, the newest; None: all that the roles keep."""
    text: str | None = None
    """Variants of the item text, joined by +; None: a model without text."""
    rows: Rows = "own"
    """`shuffled`: each item has another's vector; `noise`: normal noise of the same moments. Nulls."""
    pairs: Literal["swing", "random"] = "swing"
    train: Changes = _PLAIN
    """Settings of [train] that make this arm."""
    baseline: Literal["item-mean", "rating-statistics"] | None = None
    """A closed form instead of a backbone."""


CONTRASTIVE = changes(
    sides="item", schedule="pretrain", warmup_steps=600, reduction="mean", weight=0.01, positives="raw"
)
"""The default form of the contrastive term: what the table of forms speaks for (docs/evaluation.md)."""

PRINTED = changes(sides="both", schedule="joint", reduction="mean", weight=1.024, positives="raw")
"""KELLMRec's: a sum over its batches of 256 at w = 0.004, which is 1.024 times a mean, whatever the batch here."""

REFERENCE = "id-30"
ITEM_MEAN = Arm("item-mean", "item mean", baseline="item-mean")
RATING_STATISTICS = Arm("rating-statistics", "rating statistics, logistic", baseline="rating-statistics")
ID_5 = Arm("id-5", "ID, 5 events", seen_history=5)
ID_30 = Arm(REFERENCE, "ID, matched 30 events")
TEXTS = {
    variant: Arm(variant, f"+ {label}", text=variant)
    for variant, label in (
        (TITLE, "title and genres"),
        (CLOSED_BOOK, "closed-book LLM text"),
        (PAGE, "linked Wikipedia page"),
        (DIGEST, "factor digest of the page"),
        (f"{TITLE}+{DIGEST}", "title | digest"),
        (f"{TITLE}+{CLOSED_BOOK}", "title | closed-book"),
        (f"{TITLE}+{DIGEST}+{PAGE}+{CLOSED_BOOK}", "title | digest | page | closed-book"),
    )
}
KNOWLEDGE = PAGE
"""The text of the contrastive arms and of the nulls in the ladder: external knowledge."""


def ladder(text: str = KNOWLEDGE, *, closed_book: bool = True) -> list[Arm]:
    """From the item mean to KELLMRec, and its nulls."""
    texts = [TEXTS[TITLE], *([TEXTS[CLOSED_BOOK]] if closed_book else []), TEXTS[PAGE]]
    return [
        ID_5,
        ID_30,
        *texts,
        Arm("kellmrec", "+ contrastive (KELLMRec)", text=text, train=CONTRASTIVE),
        Arm("random-pairs", "null: random pairs", text=text, train=CONTRASTIVE, pairs="random"),
        Arm("shuffled", "null: rows shuffled", text=text, rows="shuffled"),
        Arm("noise", "null: noise vectors", text=text, rows="noise"),
    ]


BASELINES = [ITEM_MEAN, RATING_STATISTICS]


def forms(text: str = KNOWLEDGE) -> list[Arm]:
    """The contrastive term in the forms in which it may earn its place, beside the same model without it."""

    def form(key: str, label: str, pairs: Literal["swing", "random"] = "swing", **values: str | float) -> Arm:
        return Arm(key, label, text=text, pairs=pairs, train=changes(CONTRASTIVE, **values))

    return [
        Arm("none", "no contrastive term", text=text),
        Arm("printed", "joint, as printed (sum, w = 0.004)", text=text, train=PRINTED),
        form("mean-0.1", "joint, mean, w = 0.1, item side", weight=0.1, schedule="joint"),
        form("mean-0.01", "joint, mean, w = 0.01, item side", schedule="joint"),
        form("pretrain", "pretrained, then joint, item side"),
        form("alternating", "alternating, item side", schedule="alternating"),
        form("user", "pretrained, then joint, user side", sides="user"),
        form("both", "pretrained, then joint, both sides", sides="both"),
        form("normalized", "pretrained, normalised pairs", positives="normalized"),
        form("random", "pretrained, random pairs", pairs="random"),
    ]
