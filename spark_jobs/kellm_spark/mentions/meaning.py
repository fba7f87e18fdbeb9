"""What a name that stands in a title means there: a page, several that cannot be told apart, or mere words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kellm_spark.mentions.spelling import Spelled, first_small, has_capital, has_case, is_stop_word, spell

AMBIGUOUS, NO_MENTION, WORDS = "ambiguous mention", "no mention", "stop words only"

_REDIRECT = 0.95
_CERTAIN, _LIKELY, _POSSIBLE = 1.0, 0.9, 0.7
_KINDS = {"entity": 1.0, "work": 0.95, "unknown": 0.85}
_COMMON = 0.5
_RIVALS = 0.9
_LONE = 0.8
_DOMINANT = 4.0
"""Among pages of which none is the primary topic, the best must weigh this many times the next. Lengths of leads alone
differ so much only where one page is a stub."""


@dataclass(frozen=True)
class Name:
    """One page under one of its names."""

    spelled: Spelled
    primary: bool
    """The name is the title of the page, or of a redirect to it, as it stands; else it lost a disambiguator."""
    redirect: bool
    page_id: int
    title: str
    kind: str
    common: bool
    proper: bool
    is_disambiguation: bool
    weight: float

    def value(self, certainty: float, prior: float) -> float:
        kind = _COMMON if self.common and self.kind != "entity" else _KINDS[self.kind]
        return round((_REDIRECT if self.redirect else 1.0) * certainty * kind * prior, 6)


@dataclass(frozen=True)
class Hit:
    """What a name found in a title, units `start` to `stop`, means there: a page, or the reason why none."""

    start: int
    stop: int
    page_id: int | None = None
    title: str | None = None
    score: float = 0.0
    method: str | None = None
    runner_up: str | None = None
    reason: str | None = None


def read(names: Iterable[Name], title: Spelled, start: int, stop: int) -> Hit:
    """What a name stands for in a title: the pages called so compete.

    A name that is no page's title, and not even a disambiguation page's, is ambiguous: the pages are a part of a
    Wikipedia and lack what it first means ("Pearl Harbor" where only "Pearl Harbor (film)" is known).

    Args:
        names: of one key, each page once; at least one.
        title: where it was found.
        start: first unit.
        stop: unit behind the last.
    """
    names = sorted(names, key=lambda name: (-name.weight, name.page_id))
    cuts = {place - start for place in title.breaks if start < place < stop}
    fit = [
        (name, certainty)
        for name in names
        if cuts <= name.spelled.breaks and (certainty := _certainty(name, title, start, stop))
    ]
    if not fit:
        return Hit(start, stop, reason=WORDS)
    primary = [one for one in fit if one[0].primary]
    primary = [one for one in primary if _reads_alike(one[0], title, start, stop)] or primary
    if any(name.is_disambiguation for name, _ in primary):
        primary = []
    field: dict[int, tuple[Name, float]] = {}
    for one in primary or fit:
        if not one[0].is_disambiguation:
            field.setdefault(one[0].page_id, one)
    if not field:
        return Hit(start, stop, reason=AMBIGUOUS)
    if not any(name.primary for name in names):
        return Hit(start, stop, runner_up=next(iter(field.values()))[0].title, reason=AMBIGUOUS)
    (name, certainty), *rivals = field.values()
    others = [other for other, _ in fit if other.page_id != name.page_id]
    runner_up = next((other.title for other in others if not other.is_disambiguation), None)
    if rivals:
        if name.weight < _DOMINANT * rivals[0][0].weight:
            return Hit(start, stop, runner_up=name.title, reason=AMBIGUOUS)
        prior = name.weight / sum(rival.weight for rival, _ in field.values())
    elif primary:
        prior = _RIVALS if others else 1.0
    else:
        prior = _LONE
    method = "mention-redirect" if name.redirect else "mention"
    return Hit(start, stop, name.page_id, name.title, name.value(certainty, prior), method, runner_up)


def _reads_alike(name: Name, title: Spelled, start: int, stop: int) -> bool:
    """Whether the title writes the name as its page does: accents always count, capitals where they tell."""
    units = title.units[start:stop]
    if title.telling_case:
        return first_small(units) == first_small(name.spelled.units)
    return [unit.lower() for unit in units] == [unit.lower() for unit in name.spelled.units]


def _certainty(name: Name, title: Spelled, start: int, stop: int) -> float | None:
    """How surely the units are meant as this name and not as words, by their spelling; None: they are words."""
    units, spelled = title.units[start:stop], name.spelled
    if not any(map(has_case, units)):
        enough = sum(map(len, units)) >= 3
        return _LIKELY if enough and name.primary else _POSSIBLE if enough or name.primary else None
    stops = [is_stop_word(key) for key in spelled.keys]
    inner = any(has_capital(unit[1:]) for unit in spelled.units)  # "NASA", "iPhone"
    own = inner or any(has_capital(unit) and not stop for unit, stop in zip(spelled.units[1:], stops[1:], strict=True))
    if title.telling_case:
        if own:
            wanted = [place == 0 or has_capital(unit) for place, unit in enumerate(spelled.units)]
            small = any(
                want and not stop and has_case(unit) and not has_capital(unit)
                for want, stop, unit in zip(wanted, stops, units, strict=True)
            )
            return None if small else _CERTAIN
        if spelled.solid > 1:
            return _LIKELY  # a phrase such as "climate change", which is written small
        if name.common or not has_capital(units[stops.index(False)]):
            return None
        if not _beside_capital(title, start, stop) and start + stops.index(False) not in {0, *title.breaks}:
            return _LIKELY
    elif inner:
        return _LIKELY
    if spelled.solid == 1:
        known = name.kind == "entity" or (name.proper and name.kind != "work")
        sure = name.primary and known and not name.common and not _beside_capital(title, start, stop)
        return _POSSIBLE if sure else None
    return _POSSIBLE if name.kind == "work" and spelled.solid < 3 else _LIKELY


def _beside_capital(title: Spelled, start: int, stop: int) -> bool:
    """Whether the name may be a part of a longer one that is no page: "Paris" in "Paris Hilton".

    Where capitals tell nothing, any word may be the rest of a name.
    """
    before = [start - 1] if start and start not in title.breaks else []
    after = [stop] if stop < len(title.units) and stop not in title.breaks else []
    return any(
        (has_capital(title.units[place]) or not title.telling_case) and not is_stop_word(title.keys[place])
        for place in before + after
    )


def choose(title: str, hits: Sequence[Hit], max_links: int) -> list[tuple[Any, ...]]:
    """An item's rows of `schemas.LINKS`, without its id, the best first.

    Of hits that overlap the longest counts, then the leftmost. Stop words make none longer: "Great Wall of China"
    comes before "The Great Wall".
    """
    spelled = spell(title, title=True)
    taken: list[Hit] = []
    for hit in sorted(hits, key=lambda hit: (-spelled.weight(hit.start, hit.stop), hit.start - hit.stop, hit.start)):
        if hit.reason != WORDS and all(hit.stop <= other.start or other.stop <= hit.start for other in taken):
            taken.append(hit)
    best: dict[int, Hit] = {}
    for hit in sorted(taken, key=lambda hit: (-hit.score, hit.start)):
        if hit.page_id is not None:
            best.setdefault(hit.page_id, hit)
    if best:
        return [(h.page_id, h.title, h.score, h.method, h.runner_up, None) for h in list(best.values())[:max_links]]
    if taken:
        return [(None, None, 0.0, None, taken[0].runner_up, AMBIGUOUS)]
    words = hits or not spelled.tokens
    return [(None, None, 0.0, None, None, WORDS if words else NO_MENTION)]
