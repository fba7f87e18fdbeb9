"""From a run's artefacts to the Parquet partitions of one published version: pure Arrow, no Feast.

Timestamps are what makes stock Feast serve a version: `materialize` and the point-in-time join take, per id, the row
with the greatest (event_timestamp, created_timestamp). `stamp` therefore keeps those of the export where they are
newer than what the view serves, and takes the present where they are not, as when an older version is published
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kellm_features import schemas
from kellm_features.errors import StoreError
from kellm_features.store.layout import (
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    IS_DELETED,
    ITEM_DESCRIPTION,
    ITEM_EMBEDDING,
    ITEM_NEIGHBORS,
    ITEM_WIKI_LINK,
    JOIN_KEYS,
    TOP_NEIGHBORS,
    USER_EMBEDDING,
    USER_NEIGHBORS,
    VIEWS,
    IdType,
    Partition,
    ViewSpec,
)

VERSION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""A version names files, so that nothing else may stand in it."""


@dataclass(frozen=True)
class Release:
    """The rows of one version, per view, without timestamps and sorted by key."""

    version: str
    id_type: IdType
    dim: int
    event: datetime
    """Timestamps of the export: since when these rows hold, and when they were made."""
    created: datetime
    tables: dict[str, pa.Table]


def read_release(inputs: dict[str, Path]) -> Release:
    """Read and check what the stages made.

    Args:
        inputs: view name -> artefact (`ITEM_EMBEDDINGS`, `USER_EMBEDDINGS`, `ITEM_DESCRIPTIONS`, `LINKS` or `PAIRS`).

    Raises:
        DataError: an artefact is missing, unreadable or of another schema.
        StoreError: a table has no rows or duplicate ids, versions or id types differ, a vector is not finite or has
            another length.
    """
    item, user = ITEM_EMBEDDING.name, USER_EMBEDDING.name
    sources = {
        item: schemas.ITEM_EMBEDDINGS,
        user: schemas.USER_EMBEDDINGS,
        ITEM_DESCRIPTION.name: schemas.ITEM_DESCRIPTIONS,
        ITEM_WIKI_LINK.name: schemas.LINKS,
        ITEM_NEIGHBORS.name: schemas.PAIRS,
        USER_NEIGHBORS.name: schemas.PAIRS,
    }
    raw = {name: schemas.read_table(inputs[name], schema) for name, schema in sources.items()}
    id_type = _common_id_type(raw, inputs)
    versions = {name: _version_of(raw[name], inputs[name]) for name in (item, user)}
    if versions[item] != versions[user]:
        raise StoreError(
            f"{inputs[item]} holds version {versions[item]!r} and {inputs[user]} version {versions[user]!r}: both must "
            f"come from one export; run  kellm run --from export"
        )
    dims = {name: _dimension_of(raw[name], inputs[name]) for name in (item, user)}
    if dims[item] != dims[user]:
        raise StoreError(f"item embeddings have length {dims[item]}, user embeddings {dims[user]}: both must be equal")
    neighbors = {ITEM_NEIGHBORS.name, USER_NEIGHBORS.name}
    tables = {}
    for spec in VIEWS:
        rows = _neighbors(raw[spec.name], spec) if spec.name in neighbors else raw[spec.name]
        rows = _best_links(rows) if spec.name == ITEM_WIKI_LINK.name else rows
        tables[spec.name] = _conform(rows, spec, id_type, inputs[spec.name])
    event = max(_latest(raw[name], EVENT_TIMESTAMP, inputs[name]) for name in (item, user))
    created = max(_latest(raw[name], CREATED_TIMESTAMP, inputs[name]) for name in (item, user))
    return Release(versions[item], id_type, dims[item], event, created, tables)


def live_rows(path: Path, spec: ViewSpec) -> pa.Table:
    """The rows that a partition serves, without timestamps and without those that withdraw an id."""
    table = pq.read_table(path)
    return table.filter(pc.invert(table.column(IS_DELETED))).select([spec.join_key, *(n for n, _ in spec.features)])


def stamp(release: Release, previous: Partition | None, now: datetime) -> tuple[datetime, datetime]:
    """The (event, created) timestamps of a new partition: always greater than the ones that the view serves."""
    if previous is None or (release.event, release.created) > (previous.event, previous.created):
        return release.event, release.created
    return max(now, previous.event + timedelta(microseconds=1)), max(now, previous.created)


def build_partition(
    rows: pa.Table, withdrawn: pa.Array, spec: ViewSpec, id_type: IdType, stamps: tuple[datetime, datetime]
) -> pa.Table:
    """A partition: the version's rows, then one null row for every id that it no longer holds.

    The null row is what makes stock Feast, which only ever upserts, stop serving a vector of an older version.
    """
    schema = spec.arrow(id_type)
    gone = {name: pa.nulls(len(withdrawn), schema.field(name).type) for name, _ in spec.features}
    features = pa.concat_tables([rows, pa.table({spec.join_key: withdrawn, **gone}, schema=rows.schema)])
    count = len(features)
    event, created = (pa.repeat(pa.scalar(value, pa.timestamp("us", tz="UTC")), count) for value in stamps)
    deleted = pa.array(np.arange(count) >= len(rows))
    columns = {name: features.column(name) for name in features.column_names}
    columns |= {EVENT_TIMESTAMP: event, CREATED_TIMESTAMP: created, IS_DELETED: deleted}
    return pa.table(columns, schema=schema).sort_by(spec.join_key)


def _common_id_type(raw: dict[str, pa.Table], inputs: dict[str, Path]) -> IdType:
    seen: dict[str, Path] = {}
    for name, table in raw.items():
        for key in {*JOIN_KEYS.values(), "anchor_id", "neighbor_id"}.intersection(table.column_names):
            seen["int64" if pa.types.is_int64(table.schema.field(key).type) else "string"] = inputs[name]
    if len(seen) > 1:
        raise StoreError(
            f"{seen['int64']} has int64 ids and {seen['string']} has string ids: all ids of one run must be of one "
            f"type; run  kellm run --from ingest"
        )
    return "int64" if "int64" in seen else "string"


def _version_of(table: pa.Table, path: Path) -> str:
    versions = table.column("embedding_version").unique().to_pylist()
    if not versions:
        raise StoreError(f"{path} holds no rows: there is nothing to publish")
    if len(versions) > 1 or versions[0] is None:
        raise StoreError(f"{path} holds the versions {versions[:3]!r}: one table is one version")
    matches = pc.match_substring_regex(pa.array(versions), f"^(?:{VERSION_PATTERN})$")
    if not matches[0].as_py():
        raise StoreError(
            f"{path}: embedding_version is {versions[0]!r}; accepted: up to 100 letters, digits, '.', '_' and '-', "
            f"beginning with a letter or digit"
        )
    return str(versions[0])


def _latest(table: pa.Table, column: str, path: Path) -> datetime:
    """The greatest timestamp: a version becomes valid as a whole, so that all of its rows carry one."""
    values = table.column(column)
    if values.null_count:
        raise StoreError(f"{path}: {column} is null in {values.null_count} rows and may be null in none")
    latest: datetime = pc.max(values).cast(schemas.TIMESTAMP).as_py()
    return latest


def _dimension_of(table: pa.Table, path: Path) -> int:
    vectors = table.column("embedding").combine_chunks()
    lengths = pc.unique(pc.list_value_length(vectors)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise StoreError(
            f"{path}: embeddings have the lengths {sorted(map(str, lengths))[:5]}: all must be equal, not 0"
        )
    values = pc.list_flatten(vectors)
    bad = len(values) - pc.sum(pc.fill_null(pc.is_finite(values), False)).as_py()
    if bad:
        raise StoreError(f"{path}: {bad} embedding values are NaN, infinite or null: run  kellm run --from train")
    return int(lengths[0])


def _conform(table: pa.Table, spec: ViewSpec, id_type: IdType, path: Path) -> pa.Table:
    """The view's columns in their types, sorted by a key that is unique."""
    target = spec.arrow(id_type)
    names = [spec.join_key, *(name for name, _ in spec.features)]
    rows = table.select(names).cast(pa.schema([target.field(name).with_nullable(True) for name in names]))
    keys = rows.column(spec.join_key)
    if keys.null_count:
        raise StoreError(f"{path}: {keys.null_count} rows have no {spec.join_key}")
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = keys.value_counts()
        twice = next(row["values"] for row in counts.to_pylist() if row["counts"] > 1)
        raise StoreError(f"{path}: {spec.join_key} {twice!r} appears more than once; a version has one row per id")
    return rows.sort_by(spec.join_key).combine_chunks()


def _best_links(links: pa.Table) -> pa.Table:
    """One row per item, the link with the highest score: an article may mention several pages, a view serves one."""
    rows = links.sort_by([("item_id", "ascending"), ("link_score", "descending"), ("wiki_page_id", "ascending")])
    ids = rows.column("item_id").combine_chunks()
    if not len(rows):
        return rows
    return rows.filter(pa.concat_arrays([pa.array([True]), pc.not_equal(ids[1:], ids[:-1]).fill_null(True)]))


def _neighbors(pairs: pa.Table, spec: ViewSpec) -> pa.Table:
    """Pairs grouped by anchor: the first `TOP_NEIGHBORS` by rank, as two lists of equal length."""
    rows = pairs.select(["anchor_id", "neighbor_id", "score", "rank"]).sort_by(
        [("anchor_id", "ascending"), ("rank", "ascending")]
    )
    if not len(rows):
        empty = {
            "neighbor_ids": pa.list_(rows.schema.field("neighbor_id").type),
            "scores": pa.list_(pa.float64()),
        }
        return pa.table(
            {spec.join_key: rows.column("anchor_id")} | {name: pa.array([], type_) for name, type_ in empty.items()}
        )
    codes = rows.column("anchor_id").combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.concatenate(([True], codes[1:] != codes[:-1])))
    position = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    kept = rows.filter(pa.array(position < TOP_NEIGHBORS)).combine_chunks()
    lengths = np.minimum(np.diff(np.append(starts, len(codes))), TOP_NEIGHBORS)
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
    lists = {
        name: pa.ListArray.from_arrays(offsets, kept.column(column).combine_chunks())
        for name, column in (("neighbor_ids", "neighbor_id"), ("scores", "score"))
    }
    return pa.table({spec.join_key: rows.column("anchor_id").take(pa.array(starts)), **lists})
