"""Whether a page that meets an item's name is the item's page: kind, year, and what the page says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kellm_spark.evidence import split_title
from kellm_spark.linking.hooks import MIN_PREFIX_WORDS
from kellm_spark.linking.options import LinkOptions
from kellm_spark.naming import exact_fold, is_numbered_part, key, leading_article, numerals, parts

TIERS = ("name", "piece", "prefix", "fuzzy", "year")
"""The best tier with a fitting page decides; the later ones are not looked at."""
_LONG_NAME = 4
"""Words in a key that hardly two works of neighbouring years share: what else differs is a slip."""
_WRONG_YEARS = 5
"""A long name may be this far off in its year where no other page has it: catalogues give the year of a release."""
_METHOD_OF_PIECE = {"head": "subtitle", "tail": "subtitle", "serial": "subtitle", "rest": "possessive"}


@dataclass(frozen=True)
class Match:
    """One name of an item on one name of a page: a candidate of `hooks.with_candidates`, seen from the item."""

    item_names: list[str]
    """All names of the item, the main one first."""
    gap: int | None
    """Years between item and page; None where one of the two is unknown."""
    how: str
    name: str
    key: str
    page_how: str
    found_as: str
    found_key: str
    wiki_page_id: int
    wiki_title: str
    page_year: int | None
    kind: str | None
    is_disambiguation: bool
    by_lead: bool
    """Kind and year of the page are its lead's word alone."""
    lead: str | None
    similarity: float

    @classmethod
    def of(cls, candidate: dict[str, Any], item_names: list[str], year: int | None) -> Match:
        """From a candidate's struct, for an item of these names and this year."""
        page_year = candidate["page_year"]
        gap = None if year is None or page_year is None else abs(year - page_year)
        return cls(item_names=item_names, gap=gap, **candidate)

    @property
    def piece(self) -> str:
        """What one name is of the other: head, tail, rest, serial; whole where neither is a piece."""
        return self.page_how if self.how == "whole" else self.how

    @property
    def is_dated(self) -> bool:
        """Whether the page's title says that there is another of the name: "Death at a Funeral (2010 film)"."""
        return any(char.isdigit() for char in split_title(self.wiki_title)[1])

    @property
    def is_long(self) -> bool:
        """Whether the name has so many words that two works hardly share it."""
        return len(self.key.split()) >= _LONG_NAME

    def says(self, name: str) -> bool:
        """Whether the first words of the page hold a name."""
        return f" {key(name)} " in f" {key(self.lead or '')} "


@dataclass(frozen=True)
class Fit:
    """The page may be the item's."""

    tier: str
    """One of `TIERS`."""
    method: str


@dataclass(frozen=True)
class Refusal:
    """The page is not the item's, for a reason worth telling."""

    distance: int
    """How near it came; less is nearer. The nearest refusal is an item's reason."""
    reason: str


def judge(match: Match, options: LinkOptions) -> Fit | Refusal | None:
    """Judge one match; None where it says nothing of the item."""
    if match.how not in ("main", "aka"):
        return _judge_part(match, options)
    if match.is_disambiguation:
        return Refusal(20_000, "disambiguation only")
    if match.kind not in options.kinds:
        return Refusal(10_000, "wrong kind")
    if match.gap is None:
        return Fit("name", _method(match))
    if match.gap > options.year_tolerance:
        return Fit("year", "year") if _only_the_year_is_wrong(match, options) else Refusal(match.gap, "year mismatch")
    if match.gap and not match.is_long and leading_article(match.name) != leading_article(match.found_as):
        # "The Boys" of 1997 is not "Boys" of 1996: two differences are one too many.
        return Refusal(match.gap, "year mismatch")
    others = match.item_names[1:]
    if match.gap and match.is_dated and match.how == "main" and others and not any(map(match.says, others)):
        # "The Class (Klass)" of 2007 is not "The Class (2008 film)", which knows no Klass.
        return Refusal(match.gap, "year mismatch")
    return Fit("name", _method(match))


def _method(match: Match) -> str:
    if match.how == "aka":
        return "aka"
    if match.page_how == "redirect":
        return "redirect"
    return "exact" if exact_fold(match.name) == exact_fold(match.found_as) else "normalized"


def _only_the_year_is_wrong(match: Match, options: LinkOptions) -> bool:
    return (
        match.gap is not None
        and 0 < options.year_tolerance < match.gap <= _WRONG_YEARS
        and (match.how, match.page_how) == ("main", "title")
        and match.is_long
        and not match.is_dated
    )


def _judge_part(match: Match, options: LinkOptions) -> Fit | Refusal | None:
    """Judge a match of names that are alike only in part: the year has to be right, and the page of the right kind."""
    if match.kind not in options.kinds or match.is_disambiguation or match.page_how == "redirect":
        return None
    if match.gap is None or match.gap > options.year_tolerance:
        return None
    same_numbers = numerals(match.key) == numerals(match.found_key)
    if match.how == "fuzzy":  # equal keys were judged as names
        return Fit("fuzzy", "fuzzy") if same_numbers and match.key != match.found_key else None
    if match.how == "prefix":
        short, long = sorted((match.key, match.found_key), key=len)
        cut = long.startswith(f"{short} ") and len(short.split()) >= MIN_PREFIX_WORDS
        return Fit("prefix", "prefix") if cut and same_numbers and not match.gap else None
    if not _piece_fits(match):
        return None
    return Fit("piece", _METHOD_OF_PIECE[match.piece]) if _page_says_so(match) else Refusal(5_000, "unconfirmed")


def _piece_fits(match: Match) -> bool:
    """Whether a piece is enough of a name, by its own looks."""
    if match.piece == "serial":  # of two numbers one may be missing, but they may not differ
        mine, others = set(numerals(match.key)), set(numerals(match.found_key))
        return mine <= others or others <= mine
    if match.piece == "tail" and " " not in match.key:
        return False
    if match.piece == "rest" and leading_article(match.name) != leading_article(match.found_as):
        return False  # "The Boys" is not "Miss Evers' Boys"
    numbered = match.piece == "head" and bool(numerals(match.key))  # "Children of the Corn III" of the year before
    return match.gap == 0 or match.is_long or numbered


def _page_says_so(match: Match) -> bool:
    """Whether the page's first words bear out that one name is a piece of the other: the years alone do not.

    "Steve Jobs: The Man in the Machine" came out in the year of "Steve Jobs", and "Aguirre: The Wrath of God" in that
    of "The Wrath of God".
    """
    whole = match.item_names[0]
    pieces = parts(whole)
    if match.how == "serial":
        return True  # series and subtitle are both equal
    if match.how == "head" and pieces:  # a part of a work is told of where the work is
        return is_numbered_part(whole) or match.says(pieces[1])
    if match.how == "tail" and pieces:
        return match.says(pieces[0])
    if match.how == "rest":
        owner = key(whole.removesuffix(match.name)).removesuffix(" presents").split()
        return bool(owner) and f" {owner[-1].removesuffix('s')}" in f" {key(match.lead or '')}"
    if match.page_how == "head" or (match.page_how == "rest" and " " in match.key):
        return True  # the longer name is the page's: it could only be of another work, one without a page
    page_name = key(split_title(match.wiki_title)[0])
    rest_of_lead = f" {key(match.lead or '')} ".replace(f" {page_name} ", " | ")
    return f" {match.key} " in rest_of_lead  # it has to go by the shorter name too
