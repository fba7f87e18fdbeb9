"""From a run's artefacts to the Parquet partitions of one published version: pure Arrow, no Feast.

Timestamps are what orders versions offline: a point-in-time join takes, per id, the row with the greatest
(event_timestamp, created_timestamp). `stamp` therefore keeps those of the export where they are newer than what was
published before, and takes the present where they are not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kellm_features import schemas
from kellm_features.errors import DataError, StoreError
from kellm_features.store.layout import (
    CREATED_TIMESTAMP,
    EMBEDDED_AT,
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
    ViewSpec,
)

VERSION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""A version names files, so that nothing else may stand in it."""
ROW_GROUP = 16_384
"""Rows of a partition that are held in memory at a time: 25 MB of 384-d vectors."""
READ_AHEAD = 1 << 20
"""Bytes of a compressed column that are held in memory at a time."""


@dataclass(frozen=True)
class Release:
    """The rows of one version, per view, without timestamps and sorted by key. A view may be absent."""

    version: str
    id_type: IdType
    dim: int
    event: datetime
    """Timestamps of the export: since when these rows hold, and when they were made."""
    created: datetime
    tables: dict[str, pa.Table]
    """View -> its rows without timestamps, sorted by key; a view may be absent."""
    split_hash: str | None = None
    """The split that the embeddings were trained on."""


SCHEMAS = {
    ITEM_EMBEDDING.name: schemas.ITEM_EMBEDDINGS,
    USER_EMBEDDING.name: schemas.USER_EMBEDDINGS,
    ITEM_DESCRIPTION.name: schemas.ITEM_DESCRIPTIONS,
    ITEM_WIKI_LINK.name: schemas.LINKS,
    ITEM_NEIGHBORS.name: schemas.PAIRS,
    USER_NEIGHBORS.name: schemas.PAIRS,
}
"""View -> schema of the artefact that it is made from."""
_NEIGHBOR_VIEWS = (ITEM_NEIGHBORS.name, USER_NEIGHBORS.name)


def read_release(inputs: Mapping[str, Path], version: str | None = None, *, split_hash: str | None = None) -> Release:
    """Read and check what the stages made.

    Args:
        inputs: view name -> artefact, one of the embedding views at least.
        version: another name than the one that the embeddings carry.
        split_hash: of the split that the embeddings were trained on, to be carried along.

    Raises:
        DataError: an artefact is missing, unreadable or of another schema.
        StoreError: no embeddings, no such view, a table has no rows or duplicate ids, versions, id types or lengths
            differ, a vector is not finite, or the version's name is not accepted.
    """
    unknown = [name for name in inputs if name not in SCHEMAS]
    vectors = [spec.name for spec in VIEWS if spec.holds_embeddings and spec.name in inputs]
    if unknown or not vectors:
        raise StoreError(
            f"a version was to be made of {', '.join(inputs) or 'nothing'}: it needs {ITEM_EMBEDDING.name} or "
            f"{USER_EMBEDDING.name}, and may hold {', '.join(SCHEMAS)}"
        )
    if version is not None:
        check_version(version)
    raw = {name: _read(inputs[name], SCHEMAS[name]) for name in SCHEMAS if name in inputs}
    id_type = _common_id_type(raw, inputs)
    versions = {name: _version_of(raw[name], inputs[name]) for name in vectors}
    if len(set(versions.values())) > 1:
        told = " and ".join(f"{inputs[name]} holds version {versions[name]!r}" for name in vectors)
        raise StoreError(f"{told}: both must come from one export; run  kellm run --from export")
    dims = {name: _dimension_of(raw[name], inputs[name]) for name in vectors}
    if len(set(dims.values())) > 1:
        told = " and ".join(f"{name} has length {dims[name]}" for name in vectors)
        raise StoreError(f"{told}: both must be equal; run  kellm run --from train")
    event = max(_latest(raw[name], EVENT_TIMESTAMP, inputs[name]) for name in vectors)
    created = max(_latest(raw[name], CREATED_TIMESTAMP, inputs[name]) for name in vectors)
    name = version or versions[vectors[0]]
    tables = {}
    for spec in VIEWS:
        if spec.name not in raw:
            continue
        rows = raw.pop(spec.name)  # tables of vectors are large: the raw one goes as soon as it can
        rows = _neighbors(rows, spec) if spec.name in _NEIGHBOR_VIEWS else rows
        rows = _best_links(rows) if spec.name == ITEM_WIKI_LINK.name else rows
        if version is not None and spec.holds_embeddings:
            place = rows.schema.get_field_index("embedding_version")
            rows = rows.set_column(place, rows.schema.field(place), pa.repeat(pa.scalar(name), len(rows)))
        tables[spec.name] = _conform(rows, spec, id_type, inputs[spec.name])
    return Release(name, id_type, dims[vectors[0]], event, created, tables, split_hash)


def check_version(name: str) -> None:
    """Refuse a version's name that could not name a file.

    Raises:
        StoreError: it holds something other than letters, digits, '.', '_' and '-'.
    """
    if not re.fullmatch(VERSION_PATTERN, name):
        raise StoreError(
            f"the version's name is {name!r}; accepted: up to 100 letters, digits, '.', '_' and '-', beginning with a "
            f"letter or digit"
        )


def content_hash(rows: pa.Table) -> str:
    """SHA-256 of a view's rows: equal rows in equal order have equal hashes under one version of Arrow."""
    sha = hashlib.sha256()
    with pa.ipc.new_stream(pa.PythonFile(_HashSink(sha), mode="w"), rows.schema.remove_metadata()) as stream:
        for start in range(0, len(rows), ROW_GROUP):
            for batch in rows.slice(start, ROW_GROUP).combine_chunks().to_batches():  # however the table is chunked
                stream.write_batch(batch)
    return sha.hexdigest()


class _HashSink:
    """A file that only hashes what is written to it."""

    closed = False

    def __init__(self, sha: hashlib._Hash) -> None:
        self._sha = sha
        self._size = 0

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""


def live_batches(path: Path, spec: ViewSpec) -> Iterator[pa.RecordBatch]:
    """The rows that a partition serves, without timestamps and without those that withdraw an id, in pieces."""
    names = [spec.join_key, *(name for name, _ in spec.features)]
    # Without both options Arrow loads whole column chunks, however small the batches.
    with pq.ParquetFile(path, buffer_size=READ_AHEAD, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=ROW_GROUP, columns=[*names, IS_DELETED]):
            gone = batch.column(IS_DELETED)
            live = batch.filter(pc.invert(gone)) if pc.any(gone).as_py() else batch
            if len(live):
                yield live.select(names)


def served_batches(rows: pa.Table, spec: ViewSpec, event: datetime) -> Iterator[pa.RecordBatch]:
    """A view's rows as its partition serves them, in pieces: join key and all features."""
    for batch in rows.to_batches(max_chunksize=ROW_GROUP):
        if EMBEDDED_AT in dict(spec.features):
            batch = batch.append_column(
                EMBEDDED_AT, pa.repeat(pa.scalar(int(event.timestamp()), pa.int64()), len(batch))
            )
        yield batch


def same_rows(path: Path, spec: ViewSpec, rows: pa.Table) -> bool:
    """Whether a partition serves just these rows. For content hashes of another version of Arrow."""
    start = 0
    for batch in live_batches(path, spec):
        live = pa.table(batch).select(rows.column_names)
        if not live.cast(rows.schema).equals(rows.slice(start, len(live))):
            return False
        start += len(live)
    return start == len(rows)


def stamp(release: Release, previous: Iterable[tuple[datetime, datetime]], now: datetime) -> tuple[datetime, datetime]:
    """The (event, created) timestamps of a new partition: always greater than those of the ones before it."""
    latest = max(previous, default=None)
    if latest is None or (release.event, release.created) > latest:
        return release.event, release.created
    return max(now, latest[0] + timedelta(microseconds=1)), max(now, latest[1])


def withdrawn_ids(partitions: Iterable[Path], spec: ViewSpec, rows: pa.Table) -> pa.Array:
    """Ids in any of the partitions that the rows lack."""
    type_ = rows.schema.field(spec.join_key).type
    keys = [pq.read_table(path, columns=[spec.join_key]).column(0).cast(type_) for path in partitions]
    known = pc.unique(pa.chunked_array([chunk for key in keys for chunk in key.chunks], type_))
    return known.filter(pc.invert(pc.is_in(known, value_set=rows.column(spec.join_key))))


def aside_of(path: Path) -> Path:
    """Where a partition is written before it is renamed into place; a killed publish leaves it there."""
    return path.with_name(f".{path.name}.new")


def write_partition(table: pa.Table, path: Path) -> None:
    """Write a partition aside and rename it into place, on disk for good."""
    aside = aside_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(aside, table.schema, **schemas.parquet_options(table.schema)) as writer:
            writer.write_table(table, row_group_size=ROW_GROUP)
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def build_partition(
    rows: pa.Table, withdrawn: pa.Array, spec: ViewSpec, id_type: IdType, stamps: tuple[datetime, datetime]
) -> pa.Table:
    """A partition: the version's rows, then one null row for every id that it no longer holds.

    The null row is what makes stock Feast, which only ever upserts, stop serving a vector of an older version.
    """
    schema = spec.arrow(id_type)
    gone = {
        name: pa.nulls(len(withdrawn), field.type) for name, field in zip(rows.schema.names, rows.schema, strict=True)
    }
    gone[spec.join_key] = withdrawn
    features = pa.concat_tables([rows, pa.table(gone, schema=rows.schema)])
    count = len(features)
    event, created = (pa.repeat(pa.scalar(value, pa.timestamp("us", tz="UTC")), count) for value in stamps)
    deleted = pa.array(np.arange(count) >= len(rows))
    columns = {name: features.column(name) for name in features.column_names}
    columns |= {EVENT_TIMESTAMP: event, CREATED_TIMESTAMP: created, IS_DELETED: deleted}
    if EMBEDDED_AT in schema.names:
        seconds = pa.array(np.full(count, int(stamps[0].timestamp()), dtype=np.int64))
        columns[EMBEDDED_AT] = pc.if_else(deleted, pa.scalar(None, pa.int64()), seconds)
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    return table.sort_by(spec.join_key) if len(withdrawn) else table  # the rows are sorted already


def _read(path: Path, schema: schemas.TableSchema) -> pa.Table:
    """An artefact, decoded in pieces: Arrow's way to read a file at once takes four times the memory of its rows.

    Raises:
        DataError: see `schemas.read_table`.
    """
    if not path.is_file():  # a folder of Spark's, in which each file is small
        return schemas.read_table(path, schema)
    try:
        with pq.ParquetFile(path, buffer_size=READ_AHEAD, pre_buffer=False) as file:
            table = pa.Table.from_batches(file.iter_batches(batch_size=ROW_GROUP), file.schema_arrow)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not readable Parquet ({error}): '{schema.name}' is read from there") from error
    schema.check(table.schema, str(path))
    return table


def _common_id_type(raw: dict[str, pa.Table], inputs: Mapping[str, Path]) -> IdType:
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
    check_version(str(versions[0]))
    return str(versions[0])


def _latest(table: pa.Table, column: str, path: Path) -> datetime:
    """The greatest timestamp: a version becomes valid as a whole, so that all of its rows carry one."""
    values = table.column(column)
    if values.null_count:
        raise StoreError(f"{path}: {column} is null in {values.null_count} rows and may be null in none")
    latest: datetime = pc.max(values).cast(schemas.TIMESTAMP).as_py()
    return latest


def _dimension_of(table: pa.Table, path: Path) -> int:
    vectors = table.column("embedding")
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
    names = [spec.join_key, *(name for name, _ in spec.features if name != EMBEDDED_AT)]
    rows = table.select(names).cast(pa.schema([target.field(name).with_nullable(True) for name in names]))
    keys = rows.column(spec.join_key)
    if keys.null_count:
        raise StoreError(f"{path}: {keys.null_count} rows have no {spec.join_key}")
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = keys.value_counts()
        twice = next(row["values"] for row in counts.to_pylist() if row["counts"] > 1)
        raise StoreError(f"{path}: {spec.join_key} {twice!r} appears more than once; a version has one row per id")
    ordered = keys.combine_chunks()
    if not pc.all(pc.less(ordered[:-1], ordered[1:])).as_py() and len(rows) > 1:
        rows = rows.sort_by(spec.join_key)
    return rows


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
