"""Nearest items by raw encoding and by adapted embedding: what the adapter changed, on items that people know.

NumPy and Arrow only, so that the command line's closing tables stay cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kellm_features.artifacts import load_artifact
from kellm_features.errors import ArtifactError, DataError

CHUNK = 256
"""Anchors compared with all items at once: 256 x 100,000 float32 cosines are 100 MB."""


@dataclass(frozen=True)
class Neighbour:
    """An item near the anchor."""

    item_id: Any
    title: str
    cosine: float
    is_swing: bool
    """Whether it is one of the anchor's top SWING neighbours."""


@dataclass(frozen=True)
class NeighbourRow:
    """One anchor with its nearest items, best first."""

    item_id: Any
    title: str
    interactions: int
    """Train interactions of the anchor."""
    before: tuple[Neighbour, ...]
    """By raw encoding."""
    after: tuple[Neighbour, ...]
    """By adapted embedding."""


@dataclass(frozen=True)
class Agreement:
    """How many of the nearest items are SWING neighbours, over many anchors."""

    anchors: int
    before: float
    """Mean share of the k nearest by raw encoding that are among the anchor's top SWING neighbours."""
    after: float
    """The same by adapted embedding."""


def nearest(vectors: np.ndarray, ids: np.ndarray, anchors: Sequence[Any], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest items of each anchor by cosine, the anchor itself excluded.

    Args:
        vectors: (N, D) float; a zero vector has cosine 0 with everything.
        ids: (N,) ids of the rows, unique.
        anchors: A ids out of `ids`.
        k: neighbours wanted; at most N - 1 are returned.

    Returns:
        (A, k) ids and (A, k) float32 cosines, best first; ties keep the order of the rows.

    Raises:
        DataError: an anchor is not in `ids`.
    """
    rows = _rows_of(ids, anchors)
    k = min(k, len(ids) - 1)
    found = np.empty((len(rows), k), dtype=np.int64)
    cosines = np.empty((len(rows), k), dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    norms[norms == 0] = 1
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        similar = (vectors[part] @ vectors.T) / (norms[part, None] * norms)
        similar[np.arange(len(part)), part] = -np.inf
        for row, values in enumerate(similar, start):
            found[row] = _largest(values, k)
            cosines[row] = values[found[row]]
    return ids[found], cosines


def best_known_items(run_dir: Path, count: int) -> list[Any]:
    """Ids of the items with the most train interactions, most first; ties by id.

    Raises:
        ArtifactError: `ingest` has not run.
    """
    ids, _ = popularity(_file(run_dir, "ingest", "interactions.parquet"))
    return list(ids[:count].tolist())


def neighbours_before_after(
    run_dir: Path, *, anchors: Sequence[Any] | None = None, k: int = 5, swing_top: int = 20
) -> list[NeighbourRow]:
    """Nearest items by raw encoding and by adapted embedding.

    Args:
        run_dir: a run with the stages ingest, swing, encode and export.
        anchors: item ids; None takes the five best-known items.
        k: neighbours per side.
        swing_top: a neighbour is marked when SWING ranks it among the anchor's first `swing_top`.

    Raises:
        ArtifactError: one of the stages has not run.
        DataError: an anchor is not in the catalogue.
    """
    items = pq.read_table(_file(run_dir, "ingest", "items.parquet"), columns=["item_id", "title", "year"])
    titles = dict(zip(items["item_id"].to_pylist(), labels(items), strict=True))
    known, counts = popularity(_file(run_dir, "ingest", "interactions.parquet"))
    interactions = dict(zip(known.tolist(), counts.tolist(), strict=True))
    chosen = known[:5].tolist() if anchors is None else list(anchors)
    sides = [nearest(vectors, ids, chosen, k) for ids, vectors in _both_spaces(run_dir)]
    swing = swing_neighbours(_file(run_dir, "swing", "item_pairs.parquet"), chosen, swing_top)

    def side(found: np.ndarray, cosines: np.ndarray, anchor: Any) -> tuple[Neighbour, ...]:
        return tuple(
            Neighbour(item, titles.get(item, str(item)), cosine, item in swing[anchor])
            for item, cosine in zip(found.tolist(), cosines.tolist(), strict=True)
        )

    return [
        NeighbourRow(
            anchor,
            titles.get(anchor, str(anchor)),
            interactions.get(anchor, 0),
            *(side(found[row], cosines[row], anchor) for found, cosines in sides),
        )
        for row, anchor in enumerate(chosen)
    ]


def swing_agreement(run_dir: Path, *, k: int = 5, swing_top: int = 20, limit: int = 2000) -> Agreement:
    """How far each space agrees with SWING: the mean share of the k nearest that are top SWING neighbours.

    The adapter was trained on these very pairs: the figure says whether it learned them, not whether they generalise.

    Args:
        run_dir: a run with the stages ingest, swing, encode and export.
        k: nearest items compared.
        swing_top: SWING neighbours compared with.
        limit: best-known items taken as anchors; those without a SWING neighbour do not count.
    """
    swing = swing_neighbours(_file(run_dir, "swing", "item_pairs.parquet"), best_known_items(run_dir, limit), swing_top)
    anchors = [anchor for anchor, near in swing.items() if near]
    if not anchors:
        return Agreement(0, 0.0, 0.0)
    shares = []
    for ids, vectors in _both_spaces(run_dir):
        found, _ = nearest(vectors, ids, anchors, k)
        hits = sum(len(swing[anchor].intersection(row)) for anchor, row in zip(anchors, found.tolist(), strict=True))
        shares.append(hits / max(found.size, 1))
    return Agreement(len(anchors), shares[0], shares[1])


def swing_neighbours(pairs: Path, anchors: Sequence[Any], top: int) -> dict[Any, set[Any]]:
    """Anchor -> ids of its first `top` SWING neighbours; empty where it has none."""
    near: dict[Any, set[Any]] = {anchor: set() for anchor in anchors}
    if not near:
        return near
    table = pq.read_table(
        pairs,
        columns=["anchor_id", "neighbor_id"],
        filters=pc.field("anchor_id").isin(list(anchors)) & (pc.field("rank") <= top),
    )
    for anchor, neighbor in zip(table["anchor_id"].to_pylist(), table["neighbor_id"].to_pylist(), strict=True):
        near[anchor].add(neighbor)
    return near


def popularity(interactions: Path) -> tuple[np.ndarray, np.ndarray]:
    """Item ids and their numbers of train interactions, most first; ties by id."""
    table = pq.read_table(interactions, columns=["item_id"], filters=pc.field("split") == "train")
    counts = table.group_by("item_id").aggregate([([], "count_all")])
    counts = counts.sort_by([("count_all", "descending"), ("item_id", "ascending")])
    return to_ids(counts["item_id"]), counts["count_all"].to_numpy()


def read_vectors(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) item ids and the (N, D) float32 matrix of a vector column.

    Raises:
        DataError: the vectors differ in length.
    """
    table = pq.read_table(path, columns=["item_id", column])
    flat = pc.list_flatten(table[column]).to_numpy()
    lengths = pc.unique(pc.list_value_length(table[column])).to_pylist()
    if len(lengths) > 1:
        raise DataError(f"{path}: vectors of lengths {sorted(lengths)[:5]} in '{column}'; all must be of one length")
    return to_ids(table["item_id"]), flat.reshape(len(table), -1).astype(np.float32, copy=False)


def read_ids(path: Path) -> list[Any]:
    """The item ids of a table, in its order."""
    ids: list[Any] = pq.read_table(path, columns=["item_id"])["item_id"].to_pylist()
    return ids


def to_ids(column: pa.ChunkedArray) -> np.ndarray:
    """Ids as a NumPy array: int64, or Python strings."""
    if pa.types.is_int64(column.type):
        return np.asarray(column.to_numpy())
    return np.array(column.to_pylist(), dtype=object)


def labels(items: pa.Table) -> list[str]:
    """Titles as people write them: "Fargo (1996)"."""
    return [
        title if year is None else f"{title} ({year})"
        for title, year in zip(items["title"].to_pylist(), items["year"].to_pylist(), strict=True)
    ]


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest values, largest first, ties by position: a partition instead of a full sort."""
    if not k:
        return np.empty(0, dtype=np.int64)
    candidates = np.flatnonzero(values >= np.partition(values, -k)[-k])
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]


def _both_spaces(run_dir: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        read_vectors(_file(run_dir, stage, f"item_{column}s.parquet"), column)
        for stage, column in (("encode", "encoding"), ("export", "embedding"))
    ]


def _rows_of(ids: np.ndarray, anchors: Sequence[Any]) -> np.ndarray:
    position = {key: row for row, key in enumerate(ids.tolist())}
    missing = [anchor for anchor in anchors if anchor not in position]
    if missing:
        raise DataError(
            f"item {missing[0]!r} has no vector; {len(ids)} items have one, e.g. {ids[0]!r}: give one of these"
        )
    return np.array([position[anchor] for anchor in anchors], dtype=np.int64)


def _file(run_dir: Path, stage: str, name: str) -> Path:
    artifact = load_artifact(run_dir, stage)
    if artifact is None:
        raise ArtifactError(
            f"the neighbours need the output of '{stage}', and {run_dir / stage} holds none: "
            f"run  kellm run --out {run_dir} --until export"
        )
    return artifact.file(name)
