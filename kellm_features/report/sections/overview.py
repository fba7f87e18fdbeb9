"""The run as a whole: headline figures, the table of stages, how to fetch, and the manifests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from kellm_features.errors import ArtifactError
from kellm_features.report.sections.behaviour import test_metrics
from kellm_features.report.sections.knowledge import count_sources, is_llm
from kellm_features.report.view import RunView
from kellm_features.stages import STAGE_NAMES

SHOWN_COMPONENTS = 6


@dataclass(frozen=True)
class Fact:
    """One headline figure."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class StageRow:
    """One stage of the table; None where it has not run."""

    name: str
    rows_in: int | None = None
    rows_out: int | None = None
    dropped: tuple[tuple[str, int], ...] = ()
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class StageTable:
    """All stages in order, with sums of the times and the largest of the memory peaks."""

    rows: tuple[StageRow, ...]
    seconds: float
    cpu_seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Fetch:
    """What the fetching code needs to name, and what it will return."""

    repo: str
    """The repository's path as a Python literal."""
    ids: tuple[str, ...]
    """Ids as Python literals."""
    command: str
    version: str
    dim: int
    heads: tuple[tuple[Any, str, tuple[float, ...]], ...]
    """(id, title, first components) as exported."""


def headline(view: RunView) -> list[Fact]:
    """Items served, share linked, descriptions by an LLM, quality of the click model, version."""

    def fact(label: str, build: Callable[[], tuple[str, str]]) -> Fact:
        try:
            return Fact(label, *build())
        except ArtifactError:
            return Fact(label, "–", "not run yet")

    def served() -> tuple[str, str]:
        view.artifact("publish")
        count = pq.read_metadata(view.file("export", "item_embeddings.parquet")).num_rows
        return f"{count:,}", f"of {len(view.items):,} in the catalogue"

    def linked() -> tuple[str, str]:
        items = pc.count_distinct(view.links["item_id"]).as_py()  # one item may have several pages
        count = pc.count_distinct(view.links.filter(pc.field("wiki_page_id").is_valid())["item_id"]).as_py()
        return (
            f"{100 * count / (items or 1):.1f}\N{NO-BREAK SPACE}%",
            f"{count:,} of {items:,} items have a Wikipedia page",
        )

    def described() -> tuple[str, str]:
        sources = count_sources(view)
        llm = sum(count for source, count in sources.items() if is_llm(source))
        others = ", ".join(f"{count:,} by {source}" for source, count in sources.items() if not is_llm(source))
        return f"{llm:,}", others or "all of them"

    def quality() -> tuple[str, str]:
        metrics = test_metrics(view)
        return f"{metrics['auc']:.4f}", "of the click model on test users"

    def version() -> tuple[str, str]:
        row = _first_row(view)
        return row["embedding_version"], f"{len(row['embedding'])} dimensions, float32"

    return [
        fact("Items served", served),
        fact("Linked to Wikipedia", linked),
        fact("Described by the LLM", described),
        fact("Test AUC", quality),
        fact("Embedding version", version),
    ]


def stage_table(view: RunView) -> StageTable:
    """Rows in and out, drops with reasons, seconds and memory of every stage."""
    rows = []
    for name in STAGE_NAMES:
        artifact = view.artifacts.get(name)
        if artifact is None:
            rows.append(StageRow(name))
            continue
        m = artifact.manifest
        dropped = tuple(sorted(((why, n) for why, n in m.dropped.items() if n), key=lambda pair: (-pair[1], pair[0])))
        rows.append(StageRow(name, m.rows_in, m.rows_out, dropped, m.seconds, m.cpu_seconds, m.peak_mib))
    return StageTable(
        tuple(rows),
        sum(row.seconds or 0 for row in rows),
        sum(row.cpu_seconds or 0 for row in rows),
        max((row.peak_mib or 0 for row in rows), default=0),
    )


def fetch(view: RunView) -> Fetch:
    """The repository's real path, three well-known ids, and what the store returns for them."""
    publish = view.artifact("publish")
    ids = list(view.interactions)[:3]
    vectors = view.vectors("export", "embedding", ids)
    heads = tuple(
        (key, view.label(key), tuple(vector[:SHOWN_COMPONENTS].tolist()))
        for key, vector in zip(ids, vectors, strict=True)
    )
    repo = publish.manifest.notes.get("repo") or str(view.settings.store.repo.resolve())
    command = shlex.join(["kellm", "fetch", *map(str, ids), "--repo", repo])
    version = _first_row(view)["embedding_version"]
    return Fetch(_literal(repo), tuple(map(_literal, ids)), command, version, vectors.shape[1], heads)


def manifests(view: RunView) -> list[tuple[str, str]]:
    """(name, indented JSON) of the resolved settings and of every finished stage's manifest."""
    settings = json.dumps(view.settings.model_dump(mode="json"), indent=2, ensure_ascii=False)
    stages = [(name, artifact.manifest.model_dump_json(indent=2)) for name, artifact in view.artifacts.items()]
    return [("resolved settings", settings), *stages]


def _literal(value: str | int) -> str:
    """A number or a double-quoted string, as Python reads it too."""
    return json.dumps(value, ensure_ascii=False)


def _first_row(view: RunView) -> dict[str, Any]:
    path = view.file("export", "item_embeddings.parquet")
    batch = next(pq.ParquetFile(path).iter_batches(1, columns=["embedding", "embedding_version"]), None)
    if batch is None:
        raise ArtifactError(f"{path} holds no rows")
    row: dict[str, Any] = batch.to_pylist()[0]
    return row
