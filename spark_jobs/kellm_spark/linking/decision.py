"""One item and its candidates: the page that it is about, or why none was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kellm_spark.evidence import defined_as
from kellm_spark.linking.judging import TIERS, Match, Refusal, judge
from kellm_spark.linking.options import LinkOptions
from kellm_spark.naming import item_names

_SURENESS = {
    "exact": 1.0, "normalized": 0.97, "redirect": 0.95, "year": 0.95, "aka": 0.93, "fuzzy": 0.9, "subtitle": 0.85,
    "possessive": 0.85, "prefix": 0.8,
}  # fmt: skip
_YEAR_STEP = 0.08
"""Taken off for each year between item and page."""
_NO_YEAR = 0.65
"""What a match is worth when the year of one side is unknown."""
_OTHER_KIND = 0.9
"""What the further kinds of a domain are worth: a television film among films."""
_BY_LEAD = 0.9
"""What a page is worth whose kind shows in its first sentence alone."""
_DEFINED_OTHERWISE = 0.6
"""What a page is worth that calls itself something else: "I'm Not Rappaport is a play", with its film further down."""
_TIE = 0.015
"""Two pages whose scores are no further apart are not told apart; less than any difference above makes."""
_ALONE = ("piece", "prefix", "year")
"""Tiers in which a page must be the only one that fits."""


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
    fitting: dict[str, dict[int, Candidate]] = {tier: {} for tier in TIERS}
    refused: list[tuple[int, int, str, str]] = []  # how near it came, page, title, reason
    names = item_names(item["title"])
    for candidate in item["candidates"] or []:
        match = Match.of(candidate, names, item["year"])
        judged = judge(match, options)
        if isinstance(judged, Refusal):
            refused.append((judged.distance, match.wiki_page_id, match.wiki_title, judged.reason))
        elif judged is not None:
            found = Candidate(
                _score(match, judged.method, options), judged.method, match.wiki_page_id, match.wiki_title
            )
            known = fitting[judged.tier].setdefault(found.page_id, found)
            fitting[judged.tier][found.page_id] = min(found, known, key=_preference)
    for tier in TIERS:
        ranked = sorted(fitting[tier].values(), key=_preference)
        if ranked:
            return _best_of(item, ranked, alone=tier in _ALONE)
    if refused:
        _, _, title, reason = min(refused)
        return _row(item, None, title, reason)
    return _row(item, None, None, "no candidate")


def _preference(candidate: Candidate) -> tuple[float, int, int]:
    """Best first, whatever the order in which matches came."""
    return -candidate.score, list(_SURENESS).index(candidate.method), candidate.page_id


def _score(match: Match, method: str, options: LinkOptions) -> float:
    year = _NO_YEAR if match.gap is None else 1 - _YEAR_STEP * match.gap
    kind = 1.0 if match.kind == options.kinds[0] else _OTHER_KIND
    kind *= _BY_LEAD if match.by_lead else 1.0
    defined = defined_as(match.lead or "")
    kind *= 1.0 if defined is None or defined in options.kinds else _DEFINED_OTHERWISE
    return round(_SURENESS[method] * year * kind * match.similarity, 6)


def _best_of(item: dict[str, Any], ranked: list[Candidate], *, alone: bool) -> dict[str, Any]:
    best, *others = ranked
    if others and (alone or best.score - others[0].score <= _TIE):
        return _row(item, None, best.title, "ambiguous")
    return _row(item, best, others[0].title if others else None, None)


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
