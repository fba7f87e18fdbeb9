"""A run's tables up to `link`, small, with what parts paths from each other: ties, several pages, odd ids, no page."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from kellm_features.artifacts import Artifact, Manifest
from kellm_features.knowledge.generate import run
from kellm_features.schemas import INTERACTIONS, ITEMS, LINKS, PAGES, USERS, TableSchema, write_table
from kellm_features.settings import Settings
from kellm_features.stages import StageContext

GENRES = ["Action", "Comedy", "Drama", "Horror", "unknown"]


@dataclass
class Films:
    """Tables in `root`, as the stages `ingest`, `link` and `wiki` leave them. Lists may be changed before `write`."""

    root: Path
    items: int = 30
    users: int = 14
    id_of: Callable[[int], Any] = int
    item_rows: list[dict[str, Any]] = field(init=False)
    user_rows: list[dict[str, Any]] = field(init=False)
    events: list[dict[str, Any]] = field(init=False)
    links: list[dict[str, Any]] = field(init=False)
    pages: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        draw, ids = random.Random(11), self.id_of
        years = [None if i % 7 == 0 else 1950 + i for i in range(self.items)]
        self.item_rows = [
            {"item_id": ids(i), "title": f"Film {i:03d}x, The", "year": years[i], "genres": draw.sample(GENRES, i % 3)}
            for i in range(self.items)
        ]
        self.user_rows = [
            {"user_id": ids(u), "gender": draw.choice(["M", "F", None]), "age": draw.choice(["24", None])}
            for u in range(self.users)
        ]
        start = datetime(1998, 1, 1, tzinfo=UTC)
        self.events = [
            {
                "user_id": ids(u),
                "item_id": ids(i),
                "rating": draw.choice([1.0, 3.5, 5.0, None]),
                "liked": draw.random() < 0.6,
                # A coarse clock: most of a user's events tie.
                "event_timestamp": start + timedelta(days=draw.randrange(3)),
                "split": draw.choice(["train", "train", "test"]),
            }
            for u in range(self.users - 1)  # of the last one nothing is known
            for i in draw.sample(range(self.items), draw.randrange(1, 20))
        ]
        draw.shuffle(self.events)
        self.pages = [
            {
                "wiki_page_id": 100 + i,
                "wiki_title": f"Film {i:03d}x",
                "is_disambiguation": False,
                "lead": f"Film {i:03d}x is a {1950 + i} American drama film directed by Jane Number{i}. It stars Tom.",
                "sections": [{"name": "Cast", "text": "Tom Extra as Hero"}, {"name": None, "text": None}][: i % 3],
                "categories": [],
                "evidence": [],
            }
            for i in range(self.items + 1)  # nobody links to the last one
        ]
        self.links = [link(ids(i), 100 + i, 1.0) for i in range(self.items) if i % 4]
        self.links += [link(ids(i), 100 + i + 1, 1.0 if i % 2 else 0.5) for i in range(1, self.items - 1, 5) if i % 4]
        self.links += [link(ids(i), None, 0.0) for i in range(0, self.items, 4)]

    def write(self) -> Films:
        id_type = pa.string() if isinstance(self.id_of(0), str) else pa.int64()
        for name, schema, rows in (
            ("ingest/items", ITEMS, self.item_rows),
            ("ingest/users", USERS, self.user_rows),
            ("ingest/interactions", INTERACTIONS, self.events),
            ("link/links", LINKS, self.links),
            ("wiki/pages", PAGES, self.pages),
        ):
            put(rows, self.root / f"{name}.parquet", schema, id_type)
        return self

    def inputs(self, side: str) -> dict[str, str]:
        """Paths by the names that `GenerateJob` has for them."""
        at = {name: str(self.root / "ingest" / f"{name}.parquet") for name in ("items", "users", "interactions")}
        if side == "item":
            return {"items": at["items"], "links": str(self.root / "link"), "pages": str(self.root / "wiki")}
        return {**at, "descriptions": str(self.root / "items")}

    def stage(self, settings: Settings) -> Path:
        """What the stage `generate` writes of the same tables."""
        out, work = self.root / "stage", self.root / "stage-work"
        out.mkdir()
        work.mkdir()
        inputs = {s: Artifact(self.root / s, Manifest.model_construct(stage=s)) for s in ("ingest", "link", "wiki")}
        run(StageContext(settings, self.root, out, work, inputs, {}, "split"))
        return out


def link(item_id: Any, page: int | None, score: float) -> dict[str, Any]:
    return {"item_id": item_id, "wiki_page_id": page, "link_score": score}


def put(rows: list[dict[str, Any]], path: Path, schema: TableSchema, id_type: pa.DataType) -> None:
    write_table(pa.Table.from_pylist(rows, schema=schema.arrow(id_type)), path, schema)
