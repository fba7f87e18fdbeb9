"""Wikipedia pages of a run, a few of them looked up by id or title."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

_BATCH_ROWS = 16_384


@dataclass(frozen=True)
class WikiPage:
    """What the report shows of a page."""

    page_id: int
    title: str
    year: int | None
    lead: str


def find_pages(table: Path, page_ids: Collection[int] = (), titles: Collection[str] = ()) -> list[WikiPage]:
    """The pages with one of these ids or titles, by id; redirects are not found by title.

    One pass over the columns shown, a few batches in memory: the table may hold millions of pages.

    Args:
        table: `pages.parquet` of the stage `wiki`, a file or a folder (`schemas.PAGES`).
        page_ids: ids wanted; those that the table lacks are left out.
        titles: exact titles wanted; those that the table lacks are left out.
    """
    if not page_ids and not titles:
        return []
    by_id = pc.field("wiki_page_id").isin(pa.array(page_ids, pa.int64()))
    by_title = pc.field("wiki_title").isin(pa.array(titles, pa.string())) & pc.field("redirect_to").is_null()
    found = (
        ds.dataset(table, format="parquet")
        .scanner(
            columns=["wiki_page_id", "wiki_title", "year", "lead"],
            filter=by_id | by_title,
            batch_size=_BATCH_ROWS,
            batch_readahead=2,  # the defaults read 16 batches of 131,072 leads ahead: gigabytes
            fragment_readahead=1,
        )
        .to_table()
        .sort_by("wiki_page_id")
    )
    return [
        WikiPage(row["wiki_page_id"], row["wiki_title"], row["year"], row["lead"] or "") for row in found.to_pylist()
    ]


def excerpt_of(text: str, limit: int) -> str:
    """The beginning of a text, cut between words, with an ellipsis where something is left out."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    cut = text[: limit + 1].rsplit(" ", 1)[0][:limit]
    return cut.rstrip(" ,;:") + " …"
