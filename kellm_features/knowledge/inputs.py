"""What is to be described: catalogue, linked pages and histories of a run, as requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from kellm_features.errors import DataError
from kellm_features.knowledge.domain import Domain, load_domain
from kellm_features.knowledge.facts import Event, Page, known_genres
from kellm_features.knowledge.requests import Request, item_request, user_request
from kellm_features.knowledge.text import bare_title
from kellm_features.schemas import INTERACTIONS, ITEMS, LINKS, PAGES, USERS, read_table
from kellm_features.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

InputPath = Callable[[str, str], Path]
"""(stage, file) -> path of a finished output, as in `StageContext.input`."""


def domain_of(settings: Settings) -> Domain:
    """The domain that the settings name, with their budgets.

    Raises:
        ConfigError: an unknown domain, or one with a faulty template.
    """
    generate = settings.generate
    domain = load_domain(generate.domain)
    return domain.budgeted(page_tokens=generate.page_tokens, profile_tokens=generate.profile_tokens)


class Inputs:
    """The tables that stage `generate` reads, and the requests made of them."""

    def __init__(self, settings: Settings, path: InputPath) -> None:
        """Read the tables.

        Raises:
            ConfigError: see `domain_of`.
            DataError: an item is linked to a page that is not there.
            SchemaError: an input lacks a column.
        """
        self.settings = settings
        self.domain = domain_of(settings)
        self.items = read_table(path("ingest", "items.parquet"), ITEMS)
        self.users = read_table(path("ingest", "users.parquet"), USERS)
        self.interactions: pd.DataFrame = read_table(path("ingest", "interactions.parquet"), INTERACTIONS).to_pandas()
        self.pages = _read_pages(path("wiki", "pages.parquet"), read_table(path("link", "links.parquet"), LINKS))

    @cached_property
    def item_order(self) -> list[Any]:
        """All items, those with the most train rows first, equals by id."""
        train = self.interactions["split"].eq("train")
        counts = self.interactions.loc[train, "item_id"].value_counts().to_dict()
        return sorted(self._items, key=lambda item_id: (-counts.get(item_id, 0), item_id))

    @cached_property
    def user_order(self) -> list[Any]:
        """All users, those with the longest history first, equals by id."""
        events = self._history
        return sorted(self.users["user_id"].to_pylist(), key=lambda user_id: (-len(events.get(user_id, ())), user_id))

    def history_length(self, user_id: Any) -> int:
        """Events of a user before the cut, as many as the history's settings keep."""
        return len(self._history.get(user_id, ()))

    def item_requests(self, ids: Sequence[Any]) -> list[Request]:
        """What is asked for these items."""
        by_factor = self.settings.generate.factors
        rows = (self._items[item_id] for item_id in ids)
        return [
            item_request(
                self.domain,
                row["title"],
                row["year"],
                row["genres"],
                self.pages.get(row["item_id"], ()),
                by_factor=by_factor,
            )
            for row in rows
        ]

    def user_requests(self, ids: Sequence[Any], descriptions: Mapping[Any, str]) -> list[Request]:
        """What is asked for these users.

        Args:
            ids: of users.
            descriptions: of all items, for the digests.
        """
        generate = self.settings.generate
        users = {row["user_id"]: row for row in self.users.to_pylist()}
        return [
            user_request(
                self.domain,
                users[user_id],
                [(event, descriptions[item_id]) for item_id, event in self._history.get(user_id, ())],
                by_factor=generate.factors,
                by_history=generate.user_refresh == "history",
            )
            for user_id in ids
        ]

    @cached_property
    def _items(self) -> dict[Any, dict[str, Any]]:
        return {row["item_id"]: row for row in self.items.to_pylist()}

    @cached_property
    def _history(self) -> dict[Any, list[tuple[Any, Event]]]:
        """Per user the rows that `assign_roles` calls history, in time order, and no others."""
        from kellm_features.data.history import assign_roles

        settings = self.settings
        roles = assign_roles(
            self.interactions,
            split=settings.data.split,
            max_history=settings.history.max_events,
            ties=settings.history.ties,
            seed=settings.run.seed,
        )
        names = {
            row["item_id"]: (bare_title(row["title"]), row["year"], known_genres(row["genres"]))
            for row in self._items.values()
        }
        known = roles[roles["role"].eq("history")]
        found: dict[Any, list[tuple[Any, Event]]] = {}
        columns = (known[name].tolist() for name in ("user_id", "item_id", "rating", "liked"))
        for user_id, item_id, rating, liked in zip(*columns, strict=True):
            event = Event(*names[item_id], None if rating != rating else float(rating), bool(liked))
            found.setdefault(user_id, []).append((item_id, event))
        return found


def _read_pages(path: Path, links: pa.Table) -> dict[Any, list[Page]]:
    """The linked pages alone, by item, the best first; an article may mention several."""
    linked = links.filter(pc.is_valid(links["wiki_page_id"])).sort_by(
        [("item_id", "ascending"), ("link_score", "descending"), ("wiki_page_id", "ascending")]
    )
    dataset = ds.dataset(path, format="parquet")
    PAGES.check(dataset.schema, str(path))
    wanted = dataset.to_table(
        columns=["wiki_page_id", "wiki_title", "lead", "sections"],
        filter=pc.field("wiki_page_id").isin(linked["wiki_page_id"].unique()),
    )
    pages = {
        row["wiki_page_id"]: Page(
            row["wiki_title"], row["lead"], tuple((s["name"] or "", s["text"] or "") for s in row["sections"])
        )
        for row in wanted.to_pylist()
    }
    by_item: dict[Any, list[Page]] = {}
    for link in linked.select(["item_id", "wiki_page_id"]).to_pylist():
        if link["wiki_page_id"] not in pages:
            raise DataError(
                f"{path}: page {link['wiki_page_id']}, to which item {link['item_id']!r} is linked, is not there: "
                "run  kellm run --from wiki"
            )
        by_item.setdefault(link["item_id"], []).append(pages[link["wiki_page_id"]])
    return by_item
