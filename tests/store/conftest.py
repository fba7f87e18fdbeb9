"""Artefacts of a small run, written directly in the schemas of the stages before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kellm_features import schemas
from kellm_features.artifacts import Artifact, Manifest
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport

T1 = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
T2 = datetime(2026, 3, 8, 12, 0, 0, 750_000, tzinfo=UTC)


@dataclass
class Run:
    """One run directory: the tables that the stages before `publish` wrote, by (stage, file)."""

    folder: Path
    tables: dict[tuple[str, str], pa.Table]

    def write(self) -> None:
        for (stage, file), table in self.tables.items():
            schemas.write_table(table, self.folder / stage / file, SCHEMAS[stage, file])

    def context(self, repo: Path) -> StageContext:
        out, work = self.folder / ".publish.new", self.folder / ".work" / "publish"
        for path in (out, work):
            path.mkdir(parents=True, exist_ok=True)
        inputs = {stage: artifact(self.folder / stage, {}) for stage, _ in self.tables}
        settings = Settings.model_validate({"store": {"repo": repo}})
        return StageContext(settings, self.folder, out, work, inputs, {}, "split")

    def vectors(self, entity: str = "item") -> dict[Any, np.ndarray]:
        """Id -> float32 vector, as the export wrote it."""
        table = self.tables["export", f"{entity}_embeddings.parquet"]
        rows = zip(table[f"{entity}_id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
        return {key: np.array(vector, dtype=np.float32) for key, vector in rows}


SCHEMAS = {
    ("export", "item_embeddings.parquet"): schemas.ITEM_EMBEDDINGS,
    ("export", "user_embeddings.parquet"): schemas.USER_EMBEDDINGS,
    ("generate", "item_descriptions.parquet"): schemas.ITEM_DESCRIPTIONS,
    ("link", "links.parquet"): schemas.LINKS,
    ("swing", "item_pairs.parquet"): schemas.PAIRS,
    ("swing", "user_pairs.parquet"): schemas.PAIRS,
}


def artifact(path: Path, notes: dict[str, Any]) -> Artifact:
    return Artifact(
        path,
        Manifest(
            stage=path.name,
            run_id="20260301T120000Z-00000000",
            version="0",
            created=T1,
            config_hash="",
            split_hash="split",
            output_hash="",
            notes=notes,
        ),
    )


@pytest.fixture(scope="session")
def published_artifact() -> Callable[[Path, StageReport], Artifact]:
    """The artefact that the pipeline makes of a publish's report."""
    return lambda path, report: artifact(path, report.notes)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """`make_run(folder, version, when, seed, items=..., users=..., text=str|int)` writes the artefacts of one run."""

    def make(
        folder: Path,
        version: str = "v1",
        when: datetime = T1,
        seed: int = 1,
        items: range = range(1, 51),
        users: range = range(1, 31),
        key: Callable[[int], Any] = int,
        dim: int = 8,
    ) -> Run:
        rng = np.random.default_rng(seed)
        item_ids, user_ids = [key(i) for i in items], [key(u) for u in users]

        def embeddings(name: str, ids: list[Any]) -> pa.Table:
            vectors = rng.standard_normal((len(ids), dim)).astype(np.float32)
            count = len(ids)
            return pa.table(
                {
                    name: ids,
                    "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
                    "embedding_version": [version] * count,
                    "model_id": ["adapter"] * count,
                    "content_hash": [f"{version}-{i}" for i in ids],
                    "event_timestamp": pa.array([when] * count, schemas.TIMESTAMP),
                    "created_timestamp": pa.array([when] * count, schemas.TIMESTAMP),
                }
            )

        def pairs(ids: list[Any]) -> pa.Table:
            """Every id but the last has 0 to 29 neighbours, so that some have more than are served."""
            rows = []
            for place, anchor in enumerate(ids[:-1]):
                others = [other for other in ids if other != anchor][: place % 30]
                scores = sorted(rng.random(len(others)), reverse=True)
                rows += [
                    {"anchor_id": anchor, "neighbor_id": other, "score": score, "common": 2, "rank": rank}
                    for rank, (other, score) in enumerate(zip(others, scores, strict=True), start=1)
                ]
            rng.shuffle(rows)  # a Spark folder promises no order
            return pa.Table.from_pylist(rows, schema=schemas.PAIRS.arrow(pa.array(ids).type))

        linked = [i % 3 != 0 for i in items]
        tables = {
            ("export", "item_embeddings.parquet"): embeddings("item_id", item_ids),
            ("export", "user_embeddings.parquet"): embeddings("user_id", user_ids),
            ("generate", "item_descriptions.parquet"): pa.table(
                {
                    "item_id": item_ids,
                    "description": [f"About {i}, told for {version}: “naïve”." for i in item_ids],
                    "description_source": ["template"] * len(item_ids),
                    "prompt_hash": [f"p{i}" for i in item_ids],
                    "model_id": ["template-1"] * len(item_ids),
                }
            ),
            ("link", "links.parquet"): pa.table(
                {
                    "item_id": item_ids,
                    "wiki_page_id": pa.array([1000 + i if on else None for i, on in zip(items, linked, strict=True)]),
                    "wiki_title": pa.array([f"Film {i}" if on else None for i, on in zip(items, linked, strict=True)]),
                    "link_score": [1.0 if on else 0.0 for on in linked],
                    "method": pa.array(["exact" if on else None for on in linked]),
                    "runner_up": pa.nulls(len(item_ids), pa.string()),
                    "reason": pa.array([None if on else "no candidate" for on in linked]),
                }
            ),
            ("swing", "item_pairs.parquet"): pairs(item_ids),
            ("swing", "user_pairs.parquet"): pairs(user_ids),
        }
        run = Run(folder, tables)
        run.write()
        return run

    return make
