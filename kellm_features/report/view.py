"""A run as the report reads it: finished stages, their tables, and the items by how well known they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from kellm_features.artifacts import Artifact, load_artifact
from kellm_features.errors import ArtifactError
from kellm_features.report import neighbours
from kellm_features.schemas import LINKS
from kellm_features.settings import Settings
from kellm_features.stages import STAGE_NAMES


@dataclass(frozen=True)
class Item:
    """One item of the catalogue."""

    label: str
    """Title with its year."""
    genres: tuple[str, ...]

    @property
    def main_genre(self) -> str:
        """The genre that the catalogue lists first."""
        return self.genres[0] if self.genres else "no genre"


class RunView:
    """Reads what a run has made so far; a stage that has not run is an `ArtifactError` in one line."""

    def __init__(self, run_dir: Path, settings: Settings) -> None:
        self.run_dir = run_dir
        self.settings = settings
        found = {name: load_artifact(run_dir, name) for name in STAGE_NAMES}
        self.artifacts: dict[str, Artifact] = {name: artifact for name, artifact in found.items() if artifact}

    def artifact(self, stage: str) -> Artifact:
        """The finished artefact of a stage.

        Raises:
            ArtifactError: the stage has not run.
        """
        if stage not in self.artifacts:
            raise ArtifactError(
                f"The stage '{stage}' has not run yet. Run  kellm run --out {self.run_dir} --until {stage}"
            )
        return self.artifacts[stage]

    def file(self, stage: str, name: str) -> Path:
        """One output of a finished stage."""
        return self.artifact(stage).file(name)

    def table(self, stage: str, name: str, columns: Sequence[str], where: pc.Expression | None = None) -> pa.Table:
        """Columns of one output table, filtered while reading.

        Raises:
            ArtifactError: the stage has not run, or an earlier version of it, without one of the columns.
        """
        path = self.file(stage, name)
        missing = set(columns) - set(ds.dataset(path, format="parquet").schema.names)
        if missing:
            raise ArtifactError(
                f"{path} lacks {', '.join(sorted(missing))}: an earlier version wrote it. "
                f"Run  kellm run --out {self.run_dir} --from {stage}"
            )
        return pq.read_table(path, columns=list(columns), filters=where)

    @cached_property
    def items(self) -> dict[Any, Item]:
        """Item id -> item."""
        table = self.table("ingest", "items.parquet", ["item_id", "title", "year", "genres"])
        rows = zip(neighbours.labels(table), table["genres"].to_pylist(), strict=True)
        return {
            key: Item(label, tuple(genres))
            for key, (label, genres) in zip(table["item_id"].to_pylist(), rows, strict=True)
        }

    @cached_property
    def interactions(self) -> dict[Any, int]:
        """Item id -> train interactions, best-known first; items that no train row names follow with 0."""
        known, counts = neighbours.popularity(self.file("ingest", "interactions.parquet"))
        ranked = dict(zip(known.tolist(), counts.tolist(), strict=True))
        return ranked | {key: 0 for key in self.items if key not in ranked}

    @cached_property
    def links(self) -> pa.Table:
        """The links of all items."""
        return self.table("link", "links.parquet", LINKS.names)

    def label(self, item_id: Any) -> str:
        """The item's title, or its id where the catalogue lacks it."""
        item = self.items.get(item_id)
        return item.label if item else str(item_id)

    def vectors(self, stage: str, column: str, keys: Sequence[Any]) -> np.ndarray:
        """(len(keys), D) float32 vectors of these items, from `encode` or `export`."""
        ids, matrix = neighbours.read_vectors(self.file(stage, f"item_{column}s.parquet"), column)
        row = {key: position for position, key in enumerate(ids.tolist())}
        return matrix[[row[key] for key in keys]]
