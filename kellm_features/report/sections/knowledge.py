"""What is known of the items: links to Wikipedia, and descriptions beside the text they were made from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from kellm_features.errors import ArtifactError
from kellm_features.report.charts import Bar, bars
from kellm_features.report.view import RunView
from kellm_features.schemas import ITEM_DESCRIPTIONS

LEAST_CERTAIN = 12
EXCERPT_CHARACTERS = 700
EXAMPLES = 3
SMALL_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class UncertainLink:
    """A link that the linker was least sure of."""

    label: str
    wiki_title: str
    score: float
    method: str
    runner_up: str


@dataclass(frozen=True)
class Links:
    """Coverage of the links."""

    items: int
    linked: int
    interaction_share: float
    """Share of train interactions that are with linked items."""
    methods: tuple[Bar, ...]
    reasons: tuple[Bar, ...]
    uncertain: tuple[UncertainLink, ...]


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


def links(view: RunView) -> Links:
    """Coverage by method, abstentions by reason, and the links to read first."""
    rows = view.links.to_pylist()
    linked = [row for row in rows if row["wiki_page_id"] is not None]
    linked_ids = {row["item_id"] for row in linked}
    all_interactions = sum(view.interactions.values())
    covered = sum(count for key, count in view.interactions.items() if key in linked_ids)
    abstained: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        if row["wiki_page_id"] is None:
            abstained[row["reason"] or "no reason given"].append(row["item_id"])
    methods = Counter(row["method"] or "no method given" for row in linked)
    doubtful = sorted(linked, key=lambda row: (row["link_score"], -view.interactions.get(row["item_id"], 0)))
    return Links(
        len(rows),
        len(linked),
        covered / (all_interactions or 1),
        tuple(bars([(method, count, "") for method, count in methods.items()], len(rows))),
        tuple(bars([(why, len(keys), _examples(view, keys)) for why, keys in abstained.items()], len(rows))),
        tuple(
            UncertainLink(
                view.label(row["item_id"]),
                row["wiki_title"] or str(row["wiki_page_id"]),
                row["link_score"],
                row["method"] or "",
                row["runner_up"] or "",
            )
            for row in doubtful[:LEAST_CERTAIN]
        ),
    )


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
        excerpt = excerpt_of(page[1]) if page else _why_no_page(link)
        row = rows[key]
        title = page[0] if page else None
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


def excerpt_of(text: str, limit: int = EXCERPT_CHARACTERS) -> str:
    """The beginning of a text, cut between words, with an ellipsis where something is left out."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    cut = text[: limit + 1].rsplit(" ", 1)[0][:limit]
    return cut.rstrip(" ,;:") + " …"


def _choose(view: RunView, source_of: dict[Any, str], link_of: dict[Any, dict[str, Any]]) -> list[Any]:
    """Best-known items per source: of an LLM three with a page and one without, of any other source one of each."""
    by_kind: dict[tuple[str, bool], list[Any]] = defaultdict(list)
    for key in view.interactions:
        if key in source_of:
            grounded = link_of.get(key, {}).get("wiki_page_id") is not None
            by_kind[source_of[key], grounded].append(key)
    kinds: Iterable[tuple[str, bool]] = sorted(by_kind, key=lambda kind: (not is_llm(kind[0]), kind[0], not kind[1]))
    return [key for kind in kinds for key in by_kind[kind][: 3 if is_llm(kind[0]) and kind[1] else 1]]


def _pages(view: RunView, page_ids: set[int]) -> dict[int | None, tuple[str, str]]:
    if not page_ids or "wiki" not in view.artifacts:
        return {}
    where = pc.field("wiki_page_id").isin(sorted(page_ids))
    table = view.table("wiki", "pages.parquet", ["wiki_page_id", "wiki_title", "lead"], where)
    return {row["wiki_page_id"]: (row["wiki_title"], row["lead"]) for row in table.to_pylist()}


def _why_no_page(link: dict[str, Any]) -> str:
    if link.get("wiki_page_id") is not None:
        return "The linked page is not among the pages read."
    why = f" ({link['reason']})" if link.get("reason") else ""
    return f"No page is linked{why}: the title and the catalogue's fields were all that was given."


def _examples(view: RunView, keys: list[Any]) -> str:
    first = sorted(keys, key=lambda key: -view.interactions.get(key, 0))[:EXAMPLES]
    return ", ".join(view.label(key) for key in first)
