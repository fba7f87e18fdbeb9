"""What is compared: the ladder of arms, the text variants, and the forms of the contrastive term."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from kellm_features.evaluation.texts import CLOSED_BOOK, DIGEST, PAGE, TITLE, VARIANTS

Rows = Literal["own", "shuffled", "noise"]
Changes = tuple[tuple[str, str | int | float | bool], ...]
"""Settings of [train] by name: hashable, so that an arm is a key."""


def changes(base: Changes = (), /, **values: str | int | float | bool) -> Changes:
    """Settings by name, on top of others."""
    return tuple(sorted((dict(base) | values).items()))


_RUNGS = (TITLE, CLOSED_BOOK, PAGE, DIGEST)
_SIDE_BY_SIDE = (TITLE, DIGEST, PAGE, CLOSED_BOOK)
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
    profile: bool = False
    """Whether the user's profile is given as well."""
    rows: Rows = "own"
    """`shuffled`: each item has another's vector; `noise`: normal noise of the same moments. Nulls."""
    pairs: Literal["swing", "kellmrec", "random"] = "swing"
    """Positives: SWING's by the preset of [swing], by KELLMRec's preset, or drawn at random."""
    train: Changes = _PLAIN
    """Settings of [train] that make this arm."""
    baseline: Literal["item-mean", "rating-statistics"] | None = None
    """A closed form instead of a backbone."""

    def told(self) -> str:
        """What the arm is given and how it is trained, in a line."""
        if self.baseline:
            return "a closed form of counts in train rows; no ids"
        seen = "ids, genres, year, attributes and " + (
            f"the last {self.seen_history} events" if self.seen_history else "history"
        )
        if self.text is None:
            return seen
        rows = {"own": "", "shuffled": ", of another item or user each", "noise": ", replaced by noise"}[self.rows]
        values = ", ".join(f"{name} = {value}" for name, value in self.train)
        pairs = {"swing": "", "kellmrec": ", pairs by the preset kellmrec", "random": ", random pairs"}[self.pairs]
        profile = "profile and " if self.profile else ""
        return f"{seen}; {profile}{self.text.replace('+', ' | ')}{rows}{pairs}; {values}"


CONTRASTIVE = changes(
    sides="item", schedule="pretrain", warmup_steps=600, reduction="mean", weight=0.01, positives="normalized"
)
"""The default form of the contrastive term, of items: what the table of forms speaks for (docs/evaluation.md)."""

PRINTED = changes(sides="both", schedule="joint", reduction="mean", weight=1.024, positives="raw", top_k=1)
"""KELLMRec's: the first neighbour; a sum over its batches of 256 at w = 0.004, which is 1.024 times a mean whatever the
batch here. Batch, encoder and learning rate are those of all arms, not KELLMRec's."""

REFERENCE = "id-30"
ITEM_MEAN = Arm("item-mean", "item mean", baseline="item-mean")
RATING_STATISTICS = Arm("rating-statistics", "rating statistics, logistic", baseline="rating-statistics")
BASELINES = (ITEM_MEAN, RATING_STATISTICS)
ID_5 = Arm("id-5", "ID, 5 events", seen_history=5)
ID_30 = Arm(REFERENCE, "ID, matched history")


def single_texts(variants: Collection[str]) -> list[Arm]:
    """One text each: knowledge beside the ids as KELLMRec has it, vectors concatenated."""
    return [Arm(name, f"+ {VARIANTS[name]}", text=name) for name in _RUNGS if name in variants]


def all_texts(variants: Collection[str]) -> Arm:
    """All texts, as vectors side by side: a long text dilutes what a short one says, a vector of its own does not."""
    text = "+".join(name for name in _SIDE_BY_SIDE if name in variants)
    return Arm("knowledge", f"+ {text.replace('+', ' | ')}", text=text)


def profile_arm(variants: Collection[str]) -> Arm:
    """The user's profile beside the item's texts, as KAR and KELLMRec have it."""
    return replace(all_texts(variants), key="profile", label="+ user profile", profile=True)


def printed_arm(variants: Collection[str]) -> Arm:
    """KELLMRec's own form: profile and texts concatenated, both contrastive terms in one loss with the clicks."""
    label = "+ contrastive, after KELLMRec"
    return replace(profile_arm(variants), key="printed", label=label, pairs="kellmrec", train=PRINTED)


def affinity_arm(variants: Collection[str]) -> Arm:
    """Ours: the backbone also gets the products of the item's vector with the means of what was liked and disliked."""
    train = changes(_PLAIN, affinity="history")
    return replace(all_texts(variants), key="affinity", label="+ affinity to the history", train=train)


def kellmrec_arm(variants: Collection[str]) -> Arm:
    """All texts, affinity, and the contrastive term in its default form."""
    train = changes(CONTRASTIVE, affinity="history")
    return replace(all_texts(variants), key="kellmrec", label="+ contrastive, our form", train=train)


def nulls(variants: Collection[str]) -> list[Arm]:
    """What must not help as knowledge does: the same model with random pairs, with others' vectors, with noise."""
    model = affinity_arm(variants)
    train = changes(CONTRASTIVE, affinity="history", positives="raw")  # random scores are not to be normalised
    return [
        replace(model, key="random-pairs", label="null: random pairs", pairs="random", train=train),
        replace(model, key="shuffled", label="null: rows shuffled", rows="shuffled"),
        replace(model, key="noise", label="null: noise vectors", rows="noise"),
    ]


def ladder(variants: Collection[str]) -> list[Arm]:
    """From five events of ids to KELLMRec, and its nulls.

    Args:
        variants: the texts that are there.
    """
    papers = [all_texts(variants), profile_arm(variants), printed_arm(variants)]
    ours = [affinity_arm(variants), kellmrec_arm(variants)]
    return [ID_5, ID_30, *single_texts(variants), *papers, *ours, *nulls(variants)]


def forms(variants: Collection[str]) -> list[Arm]:
    """The contrastive term in the forms in which it may earn its place, beside the same model without it.

    All get the affinity to the history: there the geometry that the term makes is looked at directly.
    """
    model, raw = affinity_arm(variants), changes(CONTRASTIVE, affinity="history", positives="raw")

    def form(key: str, label: str, pairs: Literal["swing", "random"] = "swing", **values: str | float) -> Arm:
        train = changes(raw, **values)
        return replace(model, key=key, label=label, pairs=pairs, train=train)

    with_profile = replace(model, profile=True)
    printed = replace(with_profile, pairs="kellmrec", train=changes(PRINTED, affinity="history"))
    return [
        replace(model, key="none", label="no contrastive term"),
        form("printed-item", "joint, item side, w = 1.024", schedule="joint", weight=1.024),
        form("mean-0.1", "joint, item side, w = 0.1", schedule="joint", weight=0.1),
        form("mean-0.01", "joint, item side, w = 0.01", schedule="joint"),
        form("pretrain", "pretrained, then joint, item side"),
        form("alternating", "alternating, item side", schedule="alternating"),
        form("normalized", "pretrained, normalised pairs", positives="normalized"),
        form("random", "pretrained, random pairs", pairs="random"),
        replace(with_profile, key="none-profile", label="with profile, no contrastive term"),
        replace(form("user", "with profile: pretrained, user side", sides="user"), profile=True),
        replace(form("both", "with profile: pretrained, both sides", sides="both"), profile=True),
        replace(printed, key="printed-both", label="with profile: joint, after KELLMRec"),
    ]
