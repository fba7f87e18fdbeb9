"""A view's offline partitions, read in two passes: keys and times of all rows, then the vectors of some.

Vectors are all but the whole of a partition. The second pass decodes row groups that hold wanted rows, one small
batch at a time, straight into one matrix: memory is that matrix and a batch, whatever the partitions' size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kellm_features.errors import StoreError, first_line
from kellm_features.store.layout import CREATED_TIMESTAMP, EVENT_TIMESTAMP, IS_DELETED, SPLIT_HASH, ViewSpec

EMBEDDING = "embedding"
BUFFER_BYTES = 1 << 20
"""Read-ahead in a Parquet column; without it PyArrow holds a row group's whole compressed column at once."""
BATCH_BYTES = 8 << 20
"""Vectors decoded at a time. 100 MB took 1.8 times the CPU seconds of 12 MB."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class OfflinePartition:
    """A file of one version, open: it stays readable where `prune` removes its name meanwhile."""

    version: str
    path: Path
    file: pq.ParquetFile
    id_type: pa.DataType
    """int64 or large_string."""
    split_hash: str | None
    """The split that the embeddings were trained on, where the file tells."""


@dataclass(frozen=True)
class OfflineRows:
    """Rows of the partitions that hold some wanted id, in the order of the files."""

    code: Ints
    """Place of the row's id among the wanted ids."""
    event: Ints
    """`event_timestamp` in µs since 1970."""
    created: Ints
    """`created_timestamp` in µs since 1970."""
    deleted: NDArray[np.bool_]
    """Whether the row withdraws its id."""
    partition: Ints
    """Place of the row's partition in the list."""
    place: Ints
    """Place of the row in its partition."""


def open_partitions(
    folder: Path, spec: ViewSpec, version: str | None, open_files: ExitStack
) -> Sequence[OfflinePartition]:
    """The partitions of all versions, by name, or of one; only their footers are read.

    Raises:
        StoreError: there is none, or not this version; a file cannot be read, is no partition of the view, or has ids
            of another type than the others.
    """
    there = {path.stem: path for path in _parquet_in(folder)}
    if not there:
        raise StoreError(f"nothing is published in {folder}: there is no VERSION.parquet; run  kellm publish")
    if version is not None and version not in there:
        raise StoreError(f"{folder} has no version {version!r}; there are: {', '.join(there)}")
    partitions = [
        _open(part, name, spec, open_files)
        for name, path in there.items()
        if version in (None, name)
        for part in (_parquet_in(path) if path.is_dir() else [path])  # Spark writes a folder of parts
    ]
    if not partitions:
        raise StoreError(f"the folders {', '.join(map(str, there.values()))} hold no Parquet: remove or restore them")
    for partition in partitions:
        if partition.id_type != partitions[0].id_type:
            raise StoreError(
                f"{partition.path} has ids of type {partition.id_type}, {partitions[0].path} of "
                f"{partitions[0].id_type}: a repository's ids are of one type; publish into another folder"
            )
    return partitions


def read_rows(partitions: Sequence[OfflinePartition], spec: ViewSpec, ids: pa.Array) -> OfflineRows:
    """The first pass: keys, timestamps and deletion marks, kept where the id is one of `ids`, which are distinct.

    Raises:
        StoreError: a file cannot be read, or one of these columns holds nulls.
    """
    columns = [spec.join_key, EVENT_TIMESTAMP, CREATED_TIMESTAMP, IS_DELETED]
    found = []
    for number, partition in enumerate(partitions):
        with _reading(partition.path):
            table = partition.file.read(columns)
            for name in columns:
                if table.column(name).null_count:
                    raise StoreError(
                        f"{partition.path}: {name} is null in {table.column(name).null_count} rows and may be null in "
                        f"none: restore the file, or publish again"
                    )
            key, *times, deleted = table.columns
            code = codes(key.cast(partition.id_type), ids)
            kept = np.flatnonzero(code >= 0)
            event, created = (microseconds(column)[kept] for column in times)
        number_of_each = np.full(len(kept), number, dtype=np.int64)
        found.append((code[kept], event, created, deleted.to_numpy()[kept], number_of_each, kept))
    return OfflineRows(*(np.concatenate(column) for column in zip(*found, strict=True)))


def read_vectors(partitions: Sequence[OfflinePartition], partition: Ints, place: Ints) -> NDArray[np.float32]:
    """The second pass: (U, E) float32, the vectors of the rows at (partition, place), which must ascend.

    E is that of the latest partition where no row is wanted.

    Raises:
        StoreError: the vectors differ in length, one is null or holds nulls, or a file cannot be read.
    """
    numbers, starts = np.unique(partition, return_index=True)
    firsts = dict(zip(numbers.tolist(), place[starts].tolist(), strict=True)) or _some_vector(partitions)
    lengths = {number: _length(partitions[number], first) for number, first in firsts.items()}
    dim = next(iter(lengths.values()))
    if set(lengths.values()) != {dim}:
        told = ", ".join(f"{length} in {partitions[number].version}" for number, length in lengths.items())
        raise StoreError(
            f"the rows hold vectors of several lengths ({told}), which fit in no one matrix: pin one version, or join "
            f"the events of each version's time apart"
        )
    vectors = np.empty((len(place), dim), dtype=np.float32)
    for number in numbers.tolist():
        mine = slice(*np.searchsorted(partition, [number, number + 1]))
        out = vectors[mine]
        batch_rows = max(1, BATCH_BYTES // (4 * dim))
        for done, lists, local in _batches(partitions[number], place[mine], batch_rows):
            out[done] = _dense(lists, local, dim, partitions[number].path)
    return vectors


def codes(ids: pa.ChunkedArray, distinct: pa.Array) -> Ints:
    """(N,) the place of each id among distinct ones, −1 where it is null or not among them."""
    places = pc.index_in(ids, value_set=distinct)
    numbers: Ints = places.fill_null(-1).to_numpy().astype(np.int64)
    return numbers


def compared_type(id_type: pa.DataType) -> pa.DataType:
    """The type in which ids of this one are compared: int64 or large_string; any other is returned as it is."""
    if pa.types.is_integer(id_type):
        return pa.int64()
    if pa.types.is_string(id_type) or pa.types.is_large_string(id_type) or pa.types.is_string_view(id_type):
        return pa.large_string()  # the ids of all events may take more than 2 GiB
    return id_type


def microseconds(times: pa.ChunkedArray) -> Ints:
    """(N,) µs since 1970 in UTC; a time without a zone is in UTC. Arrow raises where that would round a time."""
    micros: Ints = times.cast(pa.timestamp("us", tz=times.type.tz)).cast(pa.int64()).to_numpy()
    return micros


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} cannot be read ({first_line(error)}): restore it, or publish again") from error


def _parquet_in(folder: Path) -> list[Path]:
    """By name; a name that begins with '.' or '_' is no data, as everywhere in Parquet folders."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith((".", "_")))


def _open(path: Path, version: str, spec: ViewSpec, open_files: ExitStack) -> OfflinePartition:
    with _reading(path):
        file = open_files.enter_context(pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False))
        types = {field.name: field.type for field in file.schema_arrow}
        split = (file.schema_arrow.metadata or {}).get(SPLIT_HASH)
    for name, wanted in (
        (spec.join_key, "int64 or string"),
        (EMBEDDING, "list of float"),
        (EVENT_TIMESTAMP, "timestamp"),
        (CREATED_TIMESTAMP, "timestamp"),
        (IS_DELETED, "bool"),
    ):
        seen = types.get(name)
        if seen is None or not _is_a(seen, wanted):
            raise StoreError(
                f"{path} is no partition of {spec.name}: column {name} is {seen or 'missing'}, accepted: {wanted}; "
                f"move the file elsewhere"
            )
    split_hash = split.decode() if split else None
    return OfflinePartition(version, path, file, compared_type(types[spec.join_key]), split_hash)


def _is_a(seen: pa.DataType, wanted: str) -> bool:
    if wanted == "list of float":
        is_list = pa.types.is_list(seen) or pa.types.is_large_list(seen) or pa.types.is_fixed_size_list(seen)
        return is_list and bool(seen.value_type == pa.float32())
    if wanted == "timestamp":
        return bool(pa.types.is_timestamp(seen))
    return bool(seen == pa.bool_()) if wanted == "bool" else compared_type(seen) in (pa.int64(), pa.large_string())


def _some_vector(partitions: Sequence[OfflinePartition]) -> dict[int, int]:
    """Partition -> place of a vector in it, of the last that has any."""
    for number in range(len(partitions) - 1, -1, -1):
        with _reading(partitions[number].path):
            deleted = partitions[number].file.read([IS_DELETED]).column(0).to_numpy()
        if not deleted.all():
            return {number: int(deleted.argmin())}
    raise StoreError(f"{partitions[-1].path} holds no vector, only withdrawn ids: run  kellm publish")


def _length(partition: OfflinePartition, place: int) -> int:
    _, lists, local = next(_batches(partition, np.array([place]), 64))
    length = pc.list_value_length(lists)[int(local[0])].as_py()
    if not length:
        raise _no_vector(partition.path)
    return int(length)


def _batches(partition: OfflinePartition, places: Ints, batch_rows: int) -> Iterator[tuple[slice, pa.Array, Ints]]:
    """Of each batch that holds wanted rows: which of them, the batch, and their places in it."""
    metadata = partition.file.metadata
    start = 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        done, wanted = np.searchsorted(places, [start, end]).tolist()
        batches = partition.file.iter_batches(batch_rows, row_groups=[group], columns=[EMBEDDING])  # reads nothing yet
        while done < wanted:
            with _reading(partition.path):
                lists = next(batches).column(0)
            until = int(np.searchsorted(places, start + len(lists)))
            if until > done:
                yield slice(done, until), lists, places[done:until] - start
            start, done = start + len(lists), until
        start = end


def _dense(lists: pa.Array, local: Ints, dim: int, path: Path) -> NDArray[np.float32]:
    """The (N, E) vectors at `local`; withdrawn ids between them hold no values."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    other = lengths[(lengths != dim) & (lengths != 0)]
    if len(other):
        raise StoreError(f"{path} holds vectors of the lengths {dim} and {other[0]}: restore it, or publish again")
    if not lengths[local].all():
        raise _no_vector(path)
    flat = lists.flatten()
    if flat.null_count:
        raise StoreError(f"{path} holds {flat.null_count} nulls within vectors: restore it, or publish again")
    dense: NDArray[np.float32] = flat.to_numpy().reshape(-1, dim)[(np.cumsum(lengths > 0) - 1)[local]]
    return dense


def _no_vector(path: Path) -> StoreError:
    return StoreError(f"{path} has rows that hold no vector and withdraw no id: restore it, or publish again")
