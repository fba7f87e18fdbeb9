"""Links for a person to accept or reject: the least certain ones, abstentions, and what was decided before."""

from __future__ import annotations

import heapq
import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kellm_features.overrides import NO_PAGE, read_overrides
from kellm_features.report.pages import WikiPage, excerpt_of, find_pages
from kellm_features.report.view import RunView

SHOWN = 40
"""Of each kind: what a person reads in about half an hour."""
LEAD_CHARACTERS = 400

Rows = list[dict[str, Any]]
"""Of `schemas.LINKS`, of one item."""
Kind = Literal["link", "abstention", "override"]


@dataclass(frozen=True)
class Page:
    """A page to hold against an item."""

    title: str
    page_id: int | None
    """None where the pages read have none of that title."""
    year: int | None
    lead: str
    """Its beginning, or why there is none."""
    score: float | None = None
    """Of a link."""
    method: str | None = None

    @property
    def override(self) -> str | None:
        """What names this page in the overrides; None: nothing does, as all digits would be read as an id."""
        if self.page_id is not None:
            return str(self.page_id)
        return None if _is_id(self.title) or self.title == NO_PAGE else self.title


@dataclass(frozen=True)
class Choice:
    """A decision that one button or key makes."""

    label: str
    keys: str
    page: str | None
    """For the overrides; None takes the item out of them."""
    note: str
    verdict: str


@dataclass(frozen=True)
class Case:
    """One item with the pages to choose from."""

    item_id: str
    kind: Kind
    label: str
    about: str
    links: tuple[Page, ...]
    runner_up: Page | None
    reason: str | None
    """Of an abstention."""
    override: str | None
    """What the overrides say of it, in words."""
    choices: tuple[Choice, ...]

    @property
    def score(self) -> float | None:
        """Of the least certain of its links."""
        return min((page.score for page in self.links if page.score is not None), default=None)


@dataclass(frozen=True)
class LinkReview:
    """What there is to review, and what the page needs to save the decisions."""

    cases: tuple[Case, ...]
    shown: dict[Kind, int]
    totals: dict[Kind, int]
    overrides_path: str | None
    overrides: int
    run: str
    """Shell word for `--out`."""
    payload: str
    """JSON: the key that decisions are kept under, and the cells of the overrides in force."""


def link_review(view: RunView) -> LinkReview:
    """The `SHOWN` least certain links, abstentions and overrides, each with the pages in question.

    Raises:
        ArtifactError: `ingest` or `link` has not run.
        DataError: the overrides in force cannot be read.
    """
    path = view.settings.link.overrides
    overrides = read_overrides(path)
    in_force = overrides.pages()
    rows_of: dict[Any, Rows] = defaultdict(list)
    for row in view.links.to_pylist():
        rows_of[row["item_id"]].append(row)
    by_kind: dict[Kind, list[Any]] = {"link": [], "abstention": [], "override": []}
    for key, rows in rows_of.items():
        rows.sort(key=lambda row: row["link_score"])  # of several links the least certain first
        by_kind[_kind(rows, str(key) in in_force)].append(key)
    chosen = {kind: heapq.nsmallest(SHOWN, keys, key=_order(view, kind, rows_of)) for kind, keys in by_kind.items()}
    shown = {key: rows_of[key] for keys in chosen.values() for key in keys}
    pages = _Pages(view, shown, in_force)
    payload = {"run": view.artifact("link").manifest.run_id, "header": overrides.header, "rows": overrides.rows}
    return LinkReview(
        tuple(
            _case(view, kind, key, rows_of[key], in_force.get(str(key)), pages)
            for kind, keys in chosen.items()
            for key in keys
        ),
        {kind: len(keys) for kind, keys in chosen.items()},
        {kind: len(keys) for kind, keys in by_kind.items()},
        None if path is None else str(path),
        len(overrides.rows),
        shlex.quote(str(view.run_dir)),
        json.dumps(payload, ensure_ascii=False),
    )


def _kind(rows: Rows, decided: bool) -> Kind:
    if decided or any("override" in (row["method"], row["reason"]) for row in rows):
        return "override"
    return "link" if any(row["wiki_page_id"] is not None for row in rows) else "abstention"


def _order(view: RunView, kind: Kind, rows_of: dict[Any, Rows]) -> Callable[[Any], tuple[float, int, Any]]:
    """Lowest score first; abstentions with a page in sight first; then the best-known items; ties by id."""

    def order(key: Any) -> tuple[float, int, Any]:
        least = rows_of[key][0]
        first = {"link": least["link_score"], "abstention": float(least["runner_up"] is None), "override": 0.0}[kind]
        return first, -view.interactions.get(key, 0), key

    return order


class _Pages:
    """All pages that the cases show, read in one pass."""

    def __init__(self, view: RunView, shown: dict[Any, Rows], in_force: dict[str, str]) -> None:
        rows = [row for rows in shown.values() for row in rows]
        overrides = {in_force[str(key)] for key in shown if str(key) in in_force}
        ids = {row["wiki_page_id"] for row in rows if row["wiki_page_id"] is not None}
        ids |= {int(page) for page in overrides if _is_id(page)}
        titles = {row["runner_up"] for row in rows if row["runner_up"] is not None}
        titles |= {page for page in overrides if not _is_id(page)}
        found = find_pages(view.file("wiki", "pages.parquet"), ids, titles) if "wiki" in view.artifacts else []
        self._by_id = {page.page_id: page for page in found}
        self._by_title = {page.title: page for page in reversed(found)}  # of two with one title the lower id

    def linked(self, row: dict[str, Any]) -> Page:
        page_id = row["wiki_page_id"]
        return _page(self._by_id.get(page_id), row["wiki_title"] or str(page_id), page_id, row)

    def named(self, title: str) -> Page:
        return _page(self._by_title.get(title), title, None)

    def decided(self, override: str) -> tuple[str, str]:
        """An override by page id where the page is known, and in words."""
        if override == NO_PAGE:
            return NO_PAGE, "no page"
        page = self._by_id.get(int(override)) if _is_id(override) else self._by_title.get(override)
        return (str(page.page_id), page.title) if page else (override, override)


def _is_id(page: str) -> bool:
    return page.isascii() and page.isdigit()


def _page(found: WikiPage | None, title: str, page_id: int | None, row: dict[str, Any] | None = None) -> Page:
    score, method = (row["link_score"], row["method"]) if row else (None, None)
    if found is None:
        return Page(title, page_id, None, "This page is not among the pages read.", score, method)
    lead = excerpt_of(found.lead, LEAD_CHARACTERS) or "This page has no lead."
    return Page(found.title, found.page_id, found.year, lead, score, method)


def _case(view: RunView, kind: Kind, key: Any, rows: Rows, override: str | None, pages: _Pages) -> Case:
    item = view.items.get(key)
    count = view.interactions.get(key, 0)
    genres = ", ".join(item.genres) if item else ""
    about = f"{genres or 'no genre'} · {count:,} training interaction{'' if count == 1 else 's'}"
    links = tuple(pages.linked(row) for row in rows if row["wiki_page_id"] is not None)
    second = next((row["runner_up"] for row in rows if row["runner_up"] is not None), None)
    runner_up = None if second is None else pages.named(second)
    label = view.label(key)
    decided, words = (None, None) if override is None else pages.decided(override)
    return Case(
        str(key),
        kind,
        label,
        about,
        links,
        runner_up,
        None if links else rows[0]["reason"] or "no reason given",
        words,
        tuple(_choices(kind, label, links, runner_up, decided)),
    )


def _choices(
    kind: Kind, label: str, links: tuple[Page, ...], runner_up: Page | None, decided: str | None
) -> Iterator[Choice]:
    for page in links:
        if page.override not in (None, decided):
            words, keys, verdict = f"Only “{page.title}”", "", f"→ {page.title}"
            if len(links) == 1:
                words, keys, verdict = "Accept", "a", "accepted"
            yield Choice(words, keys, page.override, f"{label}: {page.title}", verdict)
    if decided != NO_PAGE:
        words, keys = ("Accept: no page", "ar") if kind == "abstention" else ("No page", "r")
        yield Choice(words, keys, NO_PAGE, f"{label}: no page", "no page")
    if runner_up and runner_up.override not in (None, decided):
        words = f"{label}: {runner_up.title}"
        yield Choice("Take the runner-up", "n", runner_up.override, words, f"→ {runner_up.title}")
    if decided is not None:
        yield Choice("Leave it to the linker", "", None, "", "left to the linker")
