"""How much of a text stands in its source: KELLMRec's Challenge 1, hallucination, made measurable."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kellm_features.knowledge.claims import Claim, find_claims, fold_word, split_words, whole_decade
from kellm_features.knowledge.facts import Page, known_genres
from kellm_features.knowledge.text import bare_title

_HONORIFICS = frozenset("dr mr mrs ms prof sir".split())
_LEFT_OUT = _HONORIFICS | {"jr", "sr"}
_YEAR = re.compile(r"(?:1\d{3}|20\d\d)s?|\d0s")
_RANGE = re.compile(r"(1\d{3}|20\d\d)[-–](\d\d)(?!\d)")
_DECIMAL = re.compile(r"[1-9]\d{1,11}\.\d+")
"""From ten: "3 million" of 2.6 says too little. Up to what a float holds to the unit."""


@dataclass(frozen=True, slots=True)
class Grounding:
    """What of a text was found in its source."""

    score: float
    """Share of the text's claims that stand in the source, in [0, 1]; 0 where the text claims nothing."""
    claims: int
    """Names, years and numbers in the text; each counts once, however often it is mentioned."""
    unsupported: tuple[Claim, ...]
    """Every mention of a claim that does not stand in the source, in the order of the text."""


class Source:
    """A text prepared to be looked up in. Worth keeping where more than one text is scored against it."""

    def __init__(self, text: str) -> None:
        forms = split_words(text)
        folded = {form: fold_word(form) for form in set(forms)}
        self._words = [folded[form] for form in forms]
        self._stream = f" {' '.join(self._words)} "
        self._capitals = {word for form, word in folded.items() if form[0].isupper() or form[0].isdigit()}
        self._years = {whole_decade(form) for form in folded if _YEAR.fullmatch(form)}
        self._years.update(year[:2] + until for year, until in _RANGE.findall(text))
        self._years |= {f"{year[:3]}0s" for year in self._years}

    def supports(self, claim: Claim) -> bool:
        """Whether the claim stands in the source.

        A name does as the same words in a row, apart from initials, "Dr." and "Jr."; so a surname does in a full
        name, but a word alone has to be capitalised. "Mann's Heat" does also if "Mann" and "Heat" do, a decade if a
        year of it does, a whole number as a decimal number that it rounds: the 202 million of 202.3 million.
        """
        if claim.kind == "year":
            return claim.key in self._years
        if claim.kind == "number":
            return f" {claim.key} " in self._stream or claim.key in self._rounded
        parts = claim.key.split("|")
        return self._has_name(" ".join(parts)) or (len(parts) > 1 and all(map(self._has_name, parts)))

    def _has_name(self, name: str) -> bool:
        if " " not in name:
            return name in self._capitals
        if f" {name} " in self._stream:
            return True
        words = name.split()
        short = _core(words)
        if len(short) > 1:
            return f" {' '.join(short)} " in self._core_stream
        return words[0] in _HONORIFICS and short[-1:] == words[1:] and words[-1] in self._capitals

    @functools.cached_property
    def _core_stream(self) -> str:
        return f" {' '.join(_core(self._words))} "

    @functools.cached_property
    def _rounded(self) -> set[str]:
        decimals = [float(word) for word in self._words if _DECIMAL.fullmatch(word)]
        return {str(whole) for number in decimals for whole in (int(number), round(number))}


def _core(words: Sequence[str]) -> list[str]:
    return [word for word in words if (len(word) > 1 or word.isdigit()) and word not in _LEFT_OUT]


def grounding(text: str, source: str | Source) -> Grounding:
    """Look up every name, year and number of a text in its source.

    Args:
        text: a description, by whatever wrote it.
        source: all that is known to be true of its subject, as `source_text` puts it together; prepared, or as text.
    """
    mentions = find_claims(text)
    if not mentions:
        return Grounding(0.0, 0, ())
    prepared = source if isinstance(source, Source) else Source(source)
    stands = {(claim.kind, claim.key): claim for claim in mentions}
    found = {key: prepared.supports(claim) for key, claim in stands.items()}
    missing = tuple(claim for claim in mentions if not found[claim.kind, claim.key])
    return Grounding(sum(found.values()) / len(found), len(found), missing)


def grounding_score(text: str, source: str | Source) -> float:
    """The share of a text's names, years and numbers that stand in its source, in [0, 1].

    A text that claims nothing scores 0, like one whose claims are all unfounded: nothing to check is not the same as
    checked. `grounding` tells the two apart.
    """
    return grounding(text, source).score


def unsupported(text: str, source: str | Source) -> tuple[Claim, ...]:
    """Every mention of a name, year or number that does not stand in the source, in the order of the text."""
    return grounding(text, source).unsupported


def source_text(title: str, genres: Sequence[str], pages: Sequence[Page]) -> str:
    """All that a description of an item may draw on: the catalogue's title and genres, and the linked pages."""
    parts = [bare_title(title), title, ", ".join(known_genres(genres))]
    for page in pages:
        parts += [page.title, *(text for _, text in page.ordered(()))]
    return "\n".join(dict.fromkeys(part for part in parts if part.strip()))
