"""One item and its candidates: the page that it is about, or why none was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kellm_spark.evidence import split_title
from kellm_spark.linking.hooks import MIN_PREFIX_WORDS
from kellm_spark.linking.options import LinkOptions
from kellm_spark.naming import exact_fold, is_numbered_part, item_names, key, leading_article, numerals, parts

_SURENESS = {
    "exact": 1.0, "normalized": 0.97, "redirect": 0.95, "aka": 0.93, "fuzzy": 0.9, "subtitle": 0.85, "possessive": 0.85,
    "prefix": 0.8, "year": 0.95,
}  # fmt: skip
_YEAR_STEP = 0.08
"""Taken off for each year between item and page."""
_NO_YEAR = 0.65
"""What a match is worth when the year of one side is unknown."""
_OTHER_KIND = 0.9
"""What the further kinds of a domain are worth: a television film among films."""
_TIE = 0.015
"""Two pages whose scores are no further apart are not told apart; less than any difference above makes."""
_LONG_NAME = 4
"""Words in a key that hardly two works of neighbouring years share: what else differs is a slip."""
_WRONG_YEARS = 5
"""A long name may be this far off in its year where no other page has it: catalogues give the year of a release."""
_PIECE_METHOD = {"head": "subtitle", "tail": "subtitle", "serial": "subtitle", "rest": "possessive", "prefix": "prefix"}
_TIERS = ("name", "piece", "prefix", "fuzzy", "year")
"""The best tier with a fitting page decides; the later ones are not looked at."""


@dataclass(frozen=True)
class Candidate:
    """A page that fits, and how well."""

    score: float
    method: str
    page_id: int
    title: str


def decisions(options: LinkOptions) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function that turns items with candidates into rows of `schemas.LINKS`, for `mapInArrow`."""

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [decide(item, options) for item in batch.to_pylist()]
            schema = pa.schema(
                [
                    ("item_id", batch.schema.field("item_id").type), ("wiki_page_id", pa.int64()),
                    ("wiki_title", pa.string()), ("link_score", pa.float64()), ("method", pa.string()),
                    ("runner_up", pa.string()), ("reason", pa.string()),
                ]
            )  # fmt: skip
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return parse


def decide(item: dict[str, Any], options: LinkOptions) -> dict[str, Any]:
    """Choose among an item's candidates (see `hooks.with_candidates`), or say why not."""
    fitting: dict[str, dict[int, Candidate]] = {tier: {} for tier in _TIERS}
    refused: list[tuple[int, int, str, str]] = []  # how near it came (less is nearer), page, title, reason
    names = item_names(item["title"])
    for match in item["candidates"] or []:
        page_id, title = match["wiki_page_id"], match["wiki_title"]
        gap = None if None in (item["year"], match["page_year"]) else abs(item["year"] - match["page_year"])
        judged = _judge(match, gap, names, options)
        if isinstance(judged, _Refusal):
            refused.append((judged.distance, page_id, title, judged.reason))
        if isinstance(judged, _Refusal) and not _only_the_year_is_wrong(match, gap, options):
            continue
        if judged is None:
            continue
        tier, method = ("year", "year") if isinstance(judged, _Refusal) else judged
        year = _NO_YEAR if gap is None else 1 - _YEAR_STEP * gap
        kind = 1.0 if match["kind"] == options.kinds[0] else _OTHER_KIND
        score = round(_SURENESS[method] * year * kind * match["similarity"], 6)
        best = fitting[tier].get(page_id)
        if best is None or score > best.score:
            fitting[tier][page_id] = Candidate(score, method, page_id, title)
    for tier, candidates in fitting.items():
        ranked = sorted(candidates.values(), key=lambda c: (-c.score, c.page_id))
        if not ranked:
            continue
        best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
        # What fits less than a whole name must fit alone.
        if second and (best.score - second.score <= _TIE or tier in ("piece", "prefix", "year")):
            return _row(item, None, best.title, "ambiguous")
        return _row(item, best, second.title if second else None, None)
    if refused:
        _, _, title, reason = min(refused)
        return _row(item, None, title, reason)
    return _row(item, None, None, "no candidate")


@dataclass(frozen=True)
class _Refusal:
    distance: int
    reason: str


def _judge(
    match: dict[str, Any], gap: int | None, names: list[str], options: LinkOptions
) -> tuple[str, str] | _Refusal | None:
    """The tier and the method of a match that fits; a refusal worth telling; None for one that says nothing."""
    tier = _tier(match)
    if tier != "name":
        fits = (
            match["kind"] in options.kinds
            and not match["is_disambiguation"]
            and gap is not None
            and gap <= options.year_tolerance
            and _piece_fits(match, gap)
        )
        if not fits:
            return None
        if tier == "piece" and not _page_says_so(match, names[0]):
            return _Refusal(5_000, "unconfirmed")
        return tier, _method(match)
    if match["is_disambiguation"]:
        return _Refusal(20_000, "disambiguation only")
    if match["kind"] not in options.kinds:
        return _Refusal(10_000, "wrong kind")
    if gap is not None and gap > options.year_tolerance:
        return _Refusal(gap, "year mismatch")
    if gap and not _long(match["key"]) and leading_article(match["name"]) != leading_article(match["found_as"]):
        # "The Boys" of 1997 is not "Boys" of 1996: two differences are one too many.
        return _Refusal(gap, "year mismatch")
    if gap and _is_dated(match) and len(names) > 1 and not _goes_by_one_of(match, names[1:]):
        # "The Class (Klass)" of 2007 is not "The Class (2008 film)", which knows no Klass.
        return _Refusal(gap, "year mismatch")
    return "name", _method(match)


def _tier(match: dict[str, Any]) -> str:
    if match["how"] in ("fuzzy", "prefix"):
        return str(match["how"])
    return "name" if match["how"] in ("main", "aka") else "piece"


def _piece_fits(match: dict[str, Any], gap: int) -> bool:
    """Whether a name that is only in part the other one is still it, the years being within tolerance."""
    how = match["how"] if match["how"] != "whole" else match["page_how"]
    mine, other = match["key"], match["found_key"]
    words = len(mine.split())
    numbers, others = numerals(mine), numerals(other)
    if match["page_how"] == "redirect":
        return False
    if how == "fuzzy":  # equal keys were judged as names
        return numbers == others and mine != other
    if how == "serial":  # of two numbers one may be missing, but they may not differ
        return set(numbers) <= set(others) or set(others) <= set(numbers)
    if how == "prefix":
        short, long = sorted((mine, other), key=len)
        return (
            gap == 0 and len(short.split()) >= MIN_PREFIX_WORDS and long.startswith(f"{short} ") and numbers == others
        )
    if how == "tail" and words == 1:
        return False
    if how == "head":
        return gap == 0 or bool(numbers) or _long(mine)
    if how == "rest" and leading_article(match["name"]) != leading_article(match["found_as"]):
        return False  # "The Boys" is not "Miss Evers' Boys"
    return gap == 0 or _long(mine)


def _page_says_so(match: dict[str, Any], whole: str) -> bool:
    """Whether the page's first words bear out that one name is a part of the other: the years alone do not.

    "Steve Jobs: The Man in the Machine" came out in the year of "Steve Jobs", and "Aguirre: The Wrath of God" in that
    of "The Wrath of God".

    Args:
        match: of a piece.
        whole: the item's main name.
    """
    how, page_how = match["how"], match["page_how"]
    if how == "serial" or (how == "head" and is_numbered_part(whole)):
        return True  # series and subtitle are both equal; a part of a work is told of where the work is
    lead = f" {key(match['lead'] or '')} "
    pieces = parts(whole)
    if how in ("head", "tail") and pieces:
        return f" {key(pieces[how == 'head'])} " in lead  # the piece that the page's name lacks
    if how == "rest":
        owner = key(whole.removesuffix(match["name"])).removesuffix(" presents").split()
        return bool(owner) and f" {owner[-1].removesuffix('s')}" in lead
    if page_how == "head" or (page_how == "rest" and " " in match["key"]):
        return True  # the longer name is the page's: it could only be of another film, one without a page
    page_name = key(split_title(match["wiki_title"])[0])
    return f" {match['key']} " in lead.replace(f" {page_name} ", " | ")  # it has to go by the shorter name too


def _only_the_year_is_wrong(match: dict[str, Any], gap: int | None, options: LinkOptions) -> bool:
    return (
        match["kind"] in options.kinds
        and not match["is_disambiguation"]
        and gap is not None
        and options.year_tolerance < gap <= _WRONG_YEARS
        and match["how"] == "main"
        and match["page_how"] == "title"
        and _long(match["key"])
        and options.year_tolerance > 0
        and not _is_dated(match)
    )


def _is_dated(match: dict[str, Any]) -> bool:
    """Whether the page's title says that there is another of the name: "Death at a Funeral (2010 film)"."""
    return any(char.isdigit() for char in split_title(match["wiki_title"])[1])


def _goes_by_one_of(match: dict[str, Any], names: list[str]) -> bool:
    lead = f" {key(match['lead'] or '')} "
    return match["how"] == "aka" or any(f" {key(name)} " in lead for name in names)


def _long(name_key: str) -> bool:
    return len(name_key.split()) >= _LONG_NAME


def _method(match: dict[str, Any]) -> str:
    how = match["how"] if match["how"] != "whole" else match["page_how"]
    if how in _PIECE_METHOD:
        return _PIECE_METHOD[how]
    if how in ("fuzzy", "aka"):
        return str(how)
    if match["page_how"] == "redirect":
        return "redirect"
    return "exact" if exact_fold(match["name"]) == exact_fold(match["found_as"]) else "normalized"


def _row(item: dict[str, Any], chosen: Candidate | None, runner_up: str | None, reason: str | None) -> dict[str, Any]:
    return {
        "item_id": item["item_id"],
        "wiki_page_id": chosen.page_id if chosen else None,
        "wiki_title": chosen.title if chosen else None,
        "link_score": chosen.score if chosen else 0.0,
        "method": chosen.method if chosen else None,
        "runner_up": runner_up,
        "reason": reason,
    }
