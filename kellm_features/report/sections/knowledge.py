"""Descriptions of the items beside the text they were made from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from kellm_features.errors import ArtifactError
from kellm_features.report.charts import Bar, bars
from kellm_features.report.pages import WikiPage, excerpt_of, find_pages
from kellm_features.report.view import RunView
from kellm_features.schemas import ITEM_DESCRIPTIONS

EXCERPT_CHARACTERS = 700
SMALL_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Sample:
    """One description beside its source."""

    label: str
    source: str
    model_id: str
    description: str
    page: str | None
    """Title of the linked page."""
    excerpt: str
    """Beginning of the page's lead, or why there is none."""


@dataclass(frozen=True)
class Descriptions:
    """Where the descriptions come from, and some of them."""

    sources: tuple[Bar, ...]
    samples: tuple[Sample, ...]
    small_model: bool
    """Whether the model is the embedded one, which is there to try the path out."""


def descriptions(view: RunView) -> Descriptions:
    """Counts by source, and well-known items of each source with the page that they were linked to."""
    name = "item_descriptions.parquet"
    table = view.table("generate", name, ["item_id", "description_source", "model_id"])
    source_of = dict(zip(table["item_id"].to_pylist(), table["description_source"].to_pylist(), strict=True))
    try:
        link_of = {row["item_id"]: row for row in view.links.to_pylist()}
    except ArtifactError:
        link_of = {}
    chosen = _choose(view, source_of, link_of)
    texts = view.table("generate", name, ITEM_DESCRIPTIONS.names, pc.field("item_id").isin(chosen))
    rows = {row["item_id"]: row for row in texts.to_pylist()}
    pages = _pages(view, {link_of[key]["wiki_page_id"] for key in chosen if link_of.get(key, {}).get("wiki_page_id")})
    samples = []
    for key in chosen:
        link = link_of.get(key, {})
        page = pages.get(link.get("wiki_page_id"))
        excerpt = excerpt_of(page.lead, EXCERPT_CHARACTERS) if page else _why_no_page(link)
        row = rows[key]
        title = page.title if page else None
        samples.append(
            Sample(view.label(key), row["description_source"], row["model_id"], row["description"], title, excerpt)
        )
    sources = Counter(source_of.values())
    return Descriptions(
        tuple(bars([(source, count, "") for source, count in sources.items()], len(source_of))),
        tuple(samples),
        any(SMALL_MODEL in model.lower() for model in table["model_id"].unique().to_pylist()),
    )


def count_sources(view: RunView) -> dict[str, int]:
    """Description source -> items, most first."""
    column = view.table("generate", "item_descriptions.parquet", ["description_source"])["description_source"]
    return dict(Counter(column.to_pylist()).most_common())


def is_llm(source: str) -> bool:
    """Whether a description's source tag names a language model."""
    return source.startswith("llm")


def _choose(view: RunView, source_of: dict[Any, str], link_of: dict[Any, dict[str, Any]]) -> list[Any]:
    """Best-known items per source: of an LLM three with a page and one without, of any other source one of each."""
    by_kind: dict[tuple[str, bool], list[Any]] = defaultdict(list)
    for key in view.interactions:
        if key in source_of:
            grounded = link_of.get(key, {}).get("wiki_page_id") is not None
            by_kind[source_of[key], grounded].append(key)
    kinds: Iterable[tuple[str, bool]] = sorted(by_kind, key=lambda kind: (not is_llm(kind[0]), kind[0], not kind[1]))
    return [key for kind in kinds for key in by_kind[kind][: 3 if is_llm(kind[0]) and kind[1] else 1]]


def _pages(view: RunView, page_ids: set[int]) -> dict[int, WikiPage]:
    if not page_ids or "wiki" not in view.artifacts:
        return {}
    return {page.page_id: page for page in find_pages(view.file("wiki", "pages.parquet"), page_ids)}


def _why_no_page(link: dict[str, Any]) -> str:
    if link.get("wiki_page_id") is not None:
        return "The linked page is not among the pages read."
    why = f" ({link['reason']})" if link.get("reason") else ""
    return f"No page is linked{why}: the title and the catalogue's fields were all that was given."
