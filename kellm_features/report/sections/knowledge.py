"""Descriptions of the items beside the text they were made from, those with the least grounding first."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from kellm_features.errors import ArtifactError
from kellm_features.knowledge.claims import Claim
from kellm_features.knowledge.facts import Page
from kellm_features.knowledge.grounding import Grounding, grounding, source_text
from kellm_features.knowledge.text import bare_title, titled
from kellm_features.report.charts import Bar, bars
from kellm_features.report.pages import excerpt_of
from kellm_features.report.view import RunView
from kellm_features.schemas import DEAD_LETTERS, ITEM_DESCRIPTIONS

TABLE = "item_descriptions.parquet"
WORST = 24
"""What a person reads in a quarter of an hour."""
DEAD_LETTERS_SHOWN = 40
EXCERPT_CHARACTERS = 700
SECTIONS_CHARACTERS = 4000
"""Of a page's sections: enough for plot and cast, and 24 pages of it weigh 100 kB."""
BINS = 10
SMALL_MODEL = "smollm2-135m"
_BATCH_ROWS = 1024
"""Whole pages in memory at a time: of 20 kB each, 20 MB."""


@dataclass(frozen=True)
class Part:
    """A piece of a description."""

    text: str
    is_marked: bool = False
    """A name, year or number that does not stand in the source."""


@dataclass(frozen=True)
class PageText:
    """What is shown of a page."""

    title: str
    lead: str
    """Its beginning."""
    sections: str
    """The beginning of what follows the lead; may be empty."""


@dataclass(frozen=True)
class Sample:
    """One description beside its source."""

    label: str
    source: str
    model_id: str
    parts: tuple[Part, ...]
    """The description; empty where the factors are all that it says."""
    factors: tuple[tuple[str, tuple[Part, ...]], ...]
    score: float | None
    """Share of its names, years and numbers that stand in the source, 0..1; None where there is no source."""
    claims: int
    """How many these are, each counted once."""
    missing: int
    """How many of them do not stand in the source."""
    pages: tuple[PageText, ...]
    """The linked pages, the best first."""
    why_no_page: str


@dataclass(frozen=True)
class Histogram:
    """Grounding of the descriptions of one source."""

    source: str
    scored: int
    mean: float
    counts: tuple[int, ...]
    """Descriptions in each of `BINS` equal steps of the score; 1 falls in the last."""

    @property
    def is_llm(self) -> bool:
        """Whether the least grounding decided on these texts."""
        return is_llm(self.source)


@dataclass(frozen=True)
class Figure:
    """What writing took, in one number."""

    label: str
    value: float
    digits: int = 0


@dataclass(frozen=True)
class DeadLetter:
    """A request that failed for good."""

    side: str
    key: str
    title: str
    reason: str


@dataclass(frozen=True)
class Descriptions:
    """Where the descriptions come from, how well they keep to their sources, and some of them."""

    sources: tuple[Bar, ...]
    histograms: tuple[Histogram, ...]
    least: float | None
    """The score below which an answer was not kept; None: none was asked for."""
    figures: tuple[Figure, ...]
    worst: tuple[Sample, ...]
    worst_of: int
    """Scored descriptions of the source that the worst were chosen from."""
    samples: tuple[Sample, ...]
    dead_letters: tuple[DeadLetter, ...]
    dead: int
    """All dead letters, shown or not."""
    small_model: bool
    """Whether the model is the embedded one, which is there to try the path out."""


def descriptions(view: RunView) -> Descriptions:
    """Counts and grounding by source, the worst-grounded descriptions, and well-known items of each source.

    Raises:
        ArtifactError: `ingest` or `generate` has not run.
    """
    table = view.table(
        "generate", TABLE, ["item_id", "description_source", "model_id", "grounding", "completion_tokens"]
    )
    source_of = dict(zip(table["item_id"].to_pylist(), table["description_source"].to_pylist(), strict=True))
    try:
        links = _links(view)
    except ArtifactError:
        links = {}
    worst, worst_of = _worst(view, table)
    known = _choose(view, source_of, links)
    samples = _samples(view, [*worst, *(key for key in known if key not in set(worst))], links)
    sources = Counter(source_of.values())
    manifest = view.artifact("generate").manifest
    dead_letters, dead = _dead_letters(view)
    return Descriptions(
        tuple(bars([(source, count, "") for source, count in sources.items()], len(source_of))),
        _histograms(table),
        manifest.config.get("generate", {}).get("min_grounding") or None,
        _figures(manifest.notes, table),
        tuple(sorted((samples[key] for key in worst), key=_falsehood_first)),
        worst_of,
        tuple(samples[key] for key in known),
        dead_letters,
        dead,
        any(SMALL_MODEL in model.lower() for model in table["model_id"].unique().to_pylist()),
    )


def count_sources(view: RunView) -> dict[str, int]:
    """Description source -> items, most first."""
    column = view.table("generate", TABLE, ["description_source"])["description_source"]
    return dict(Counter(column.to_pylist()).most_common())


def is_llm(source: str) -> bool:
    """Whether a description's source tag names a language model."""
    return source.startswith("llm")


def _histograms(table: pa.Table) -> tuple[Histogram, ...]:
    """Of every source that has a score, those of language models first."""
    scored = table.filter(pc.field("grounding").is_valid())
    found = []
    for source in sorted(scored["description_source"].unique().to_pylist(), key=lambda name: (not is_llm(name), name)):
        scores = scored.filter(pc.field("description_source") == source)["grounding"].to_numpy().astype(np.float64)
        # A float32 0.7 is a little less than 0.7 and belongs in the step that begins there.
        steps = np.clip(np.floor(scores * BINS + 1e-4), 0, BINS - 1).astype(np.int64)
        counts = np.bincount(steps, minlength=BINS).tolist()
        found.append(Histogram(source, len(scores), float(scores.mean()), tuple(counts)))
    return tuple(found)


def _figures(notes: dict[str, Any], table: pa.Table) -> tuple[Figure, ...]:
    """What a language model was asked for, of those figures that the manifest has; none where there was no model."""
    if not notes.get("generated") and not notes.get("cache_hits") and not notes.get("dead_letters"):
        return ()
    # An answer that is not used still cost tokens; an extract stands for an answer whatever became of it.
    by_llm = pc.starts_with(table["description_source"], "llm")
    replaced = pc.or_(pc.equal(table["description_source"], "extract"), pc.greater(table["completion_tokens"], 0))
    fell_back = pc.sum(pc.and_(replaced, pc.invert(by_llm))).as_py() or 0
    told = {key: value for key, value in notes.items() if isinstance(value, int | float)} | {"fell_back": fell_back}
    words = (
        ("generated", "answers written in this run"),
        ("cache_hits", "answers kept from earlier runs"),
        ("asked_again", "asked for a second time"),
        ("unfit_answers", "answers of no use"),
        ("ungrounded_answers", "answers below the least grounding"),
        ("fell_back", "items that fell back"),
        ("dead_letters", "requests that failed"),
        ("waiting", "left for the next run by the budget"),
        ("prompt_tokens", "tokens of prompts"),
        ("completion_tokens", "tokens of answers"),
    )
    figures = [Figure(label, told[key]) for key, label in words if key in told]
    speed = told.get("tokens_per_s")
    return (*figures, Figure("tokens of answers per second", speed, 1)) if speed else tuple(figures)


def _worst(view: RunView, table: pa.Table) -> tuple[list[Any], int]:
    """The items with the lowest scores, and of how many: of a language model's, else of whatever has a score.

    Of equal scores the better-known item comes first.
    """
    scored = table.filter(pc.field("grounding").is_valid())
    by_llm = scored.filter(pc.starts_with(scored["description_source"], "llm"))
    chosen = by_llm if by_llm.num_rows else scored
    score_of = dict(zip(chosen["item_id"].to_pylist(), chosen["grounding"].to_pylist(), strict=True))
    order = heapq.nsmallest(WORST, score_of, key=lambda key: (score_of[key], -view.interactions.get(key, 0), key))
    return order, len(score_of)


def _falsehood_first(sample: Sample) -> tuple[float, bool]:
    """By score; of a score of 0, what claims something unfounded before what claims nothing."""
    return sample.score or 0.0, not sample.missing


def _choose(view: RunView, source_of: dict[Any, str], links: dict[Any, list[dict[str, Any]]]) -> list[Any]:
    """Best-known items per source: of an LLM three with a page and one without, of any other source one of each."""
    by_kind: dict[tuple[str, bool], list[Any]] = defaultdict(list)
    for key in view.interactions:
        if key in source_of:
            by_kind[source_of[key], bool(_page_ids(links.get(key, ())))].append(key)
    kinds: Iterable[tuple[str, bool]] = sorted(by_kind, key=lambda kind: (not is_llm(kind[0]), kind[0], not kind[1]))
    return [key for kind in kinds for key in by_kind[kind][: 3 if is_llm(kind[0]) and kind[1] else 1]]


def _links(view: RunView) -> dict[Any, list[dict[str, Any]]]:
    """Item -> its links, the best first."""
    table = view.links.sort_by([("link_score", "descending"), ("wiki_page_id", "ascending")])
    links: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in table.select(["item_id", "wiki_page_id", "reason"]).to_pylist():
        links[row["item_id"]].append(row)
    return links


def _page_ids(links: Iterable[dict[str, Any]]) -> list[int]:
    return [link["wiki_page_id"] for link in links if link["wiki_page_id"] is not None]


def _samples(view: RunView, keys: Sequence[Any], links: dict[Any, list[dict[str, Any]]]) -> dict[Any, Sample]:
    chosen = pc.field("item_id").isin(keys)
    rows = {row["item_id"]: row for row in view.table("generate", TABLE, ITEM_DESCRIPTIONS.names, chosen).to_pylist()}
    catalogue = view.table("ingest", "items.parquet", ["item_id", "title", "year", "genres"], chosen).to_pylist()
    items = {row["item_id"]: row for row in catalogue}
    pages = _read_pages(view, {page_id for key in keys for page_id in _page_ids(links.get(key, ()))})
    samples = {}
    for key in keys:
        row, of_item = rows[key], links.get(key, [])
        linked = [pages[page_id] for page_id in _page_ids(of_item) if page_id in pages]
        found = Grounding(0.0, 0, ())
        if row["grounding"] is not None and linked and key in items:
            found = grounding(row["description"], _source(items[key], linked))
        parts, factors = _cut(row["description"], found.unsupported, row["factors"] or ())
        samples[key] = Sample(
            view.label(key),
            row["description_source"],
            row["model_id"],
            parts,
            factors,
            row["grounding"],
            found.claims,
            found.claims - round(found.score * found.claims),
            tuple(_shown(page) for page in linked),
            _why_no_page(of_item),
        )
    return samples


def _source(item: dict[str, Any], pages: Sequence[Page]) -> str:
    """What the description was scored against."""
    return source_text(titled(bare_title(item["title"]), item["year"]), item["genres"], pages)


def _cut(
    description: str, claims: Sequence[Claim], factors: Sequence[tuple[str, str]]
) -> tuple[tuple[Part, ...], tuple[tuple[str, tuple[Part, ...]], ...]]:
    """Description and factors cut around what is to be marked.

    A description that was put together from its factors is not told twice: it is empty then, and the factors have
    the marks.
    """
    places, end = [], 0
    for name, text in factors:
        start = description.find(text, end)
        if start < 0:
            return _parts(description, claims), tuple((name, (Part(text),)) for name, text in factors)
        end = start + len(text)
        places.append((name, start, end))
    if not places:
        return _parts(description, claims), ()
    within = (
        (name, [c for c in claims if start <= c.start and c.end <= end], start, end) for name, start, end in places
    )
    return (), tuple((name, _parts(description[:end], marks, start)) for name, marks, start, end in within)


def _parts(text: str, claims: Iterable[Claim], start: int = 0) -> tuple[Part, ...]:
    """The text from `start` on, cut before and after every claim."""
    parts = []
    for claim in claims:
        parts += [Part(text[start : claim.start]), Part(text[claim.start : claim.end], True)]
        start = claim.end
    return tuple(part for part in (*parts, Part(text[start:])) if part.text)


def _read_pages(view: RunView, page_ids: Collection[int]) -> dict[int, Page]:
    """These pages with all their text; those that the run has not read are left out."""
    if not page_ids or "wiki" not in view.artifacts:
        return {}
    scanner = ds.dataset(view.file("wiki", "pages.parquet"), format="parquet").scanner(
        columns=["wiki_page_id", "wiki_title", "lead", "sections"],
        filter=pc.field("wiki_page_id").isin(pa.array(page_ids, pa.int64())),
        batch_size=_BATCH_ROWS,
        batch_readahead=2,  # the defaults read 16 batches of 131,072 pages ahead: gigabytes
        fragment_readahead=1,
    )
    return {
        row["wiki_page_id"]: Page(
            row["wiki_title"], row["lead"] or "", tuple((s["name"] or "", s["text"] or "") for s in row["sections"])
        )
        for row in scanner.to_table().to_pylist()
    }


def _shown(page: Page) -> PageText:
    sections = " ".join(f"{name}: {text}" if name else text for name, text in page.ordered(()) if text != page.lead)
    return PageText(page.title, excerpt_of(page.lead, EXCERPT_CHARACTERS), excerpt_of(sections, SECTIONS_CHARACTERS))


def _why_no_page(links: Sequence[dict[str, Any]]) -> str:
    if _page_ids(links):
        return "The linked page is not among the pages read."
    why = next((f" ({link['reason']})" for link in links if link["reason"]), "")
    return f"No page is linked{why}: the title and the catalogue's fields were all that was given."


def _dead_letters(view: RunView) -> tuple[tuple[DeadLetter, ...], int]:
    """The first dead letters, and how many there are."""
    table = view.table("generate", "dead_letters.parquet", DEAD_LETTERS.names)
    if not table.num_rows:
        return (), 0
    shown = table.sort_by([("side", "ascending"), ("id", "ascending")]).slice(0, DEAD_LETTERS_SHOWN).to_pylist()
    label_of = {str(key): item.label for key, item in view.items.items()}
    letters = [
        DeadLetter(row["side"], row["id"], label_of.get(row["id"], "") if row["side"] == "item" else "", row["reason"])
        for row in shown
    ]
    return tuple(letters), table.num_rows
