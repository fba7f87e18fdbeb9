"""What the gates need to know of an embedding view's partition, read in two passes with bounded memory.

`read_keys` reads ids alone; `scan` streams the vectors once, in float32, and keeps of them a few numbers per row and
the rows that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from kellm_features.errors import StoreError
from kellm_features.store.layout import IS_DELETED, ViewSpec

Dtype = Literal["float32", "float16"]

EMBEDDING = "embedding"
BATCH_ROWS = 8192
"""Rows decoded at a time: 12 MiB of 384 float32, and twice that while norms are taken in float64."""
READ_BUFFER = 1 << 20
"""Bytes read ahead of the decoder. With pyarrow's defaults a row group's columns are loaded whole: at 200,000 x 384
they take 340 MiB more."""


@dataclass(frozen=True)
class Numbering:
    """The ids of some partitions in ascending order, so that an id is a place in `ids`, the same for all of them."""

    ids: pa.Array
    codes: tuple[NDArray[np.int64], ...]
    """Per partition and row the place of its id."""

    def mask(self, codes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(U,) true at the codes."""
        found = np.zeros(len(self.ids), dtype=np.bool_)
        found[codes] = True
        return found

    def keys(self, codes: NDArray[np.int64]) -> list[int | str]:
        """Ids as an online store takes them."""
        keys: list[int | str] = self.ids.take(pa.array(codes)).to_pylist()
        return keys


@dataclass(frozen=True)
class Scan:
    """One partition's vectors, told in a few numbers per row (R rows, those that withdraw an id included)."""

    dim: int
    """Length of most vectors of the first rows; 0 where there is none."""
    lengths: NDArray[np.int32]
    """(R,) length of the row's vector; -1 where it is null or the row withdraws an id."""
    norms: NDArray[np.float64]
    """(R,) Euclidean norm; NaN where the vector is null, of another length or not finite."""
    hashes: NDArray[np.uint64]
    """(R,) equal for equal vectors, else different but for chance (2^-33 for a pair); 0 where `norms` is NaN."""
    averaged: int
    """Finite vectors in the rows whose mean was asked for."""
    mean: NDArray[np.float64]
    """(dim,) their mean."""
    unit_sum: NDArray[np.float64]
    """(dim,) sum of all finite vectors that are not zero, each divided by its norm."""
    picked: NDArray[np.float32]
    """(K, dim) the vectors that were asked for; NaN where they are not finite or of another length."""


def read_keys(path: Path | str, spec: ViewSpec) -> tuple[pa.ChunkedArray, NDArray[np.bool_]]:
    """The id of every row of a partition, and whether the row withdraws it.

    Raises:
        StoreError: the partition is missing, unreadable, not of this view, or has rows without an id.
    """
    keys, deleted = [], [np.zeros(0, dtype=np.bool_)]
    type_: pa.DataType | None = None
    for batch in _batches(path, spec, [spec.join_key, IS_DELETED]):
        type_ = batch.schema.field(0).type
        keys.append(batch.column(0))
        deleted.append(batch.column(1).fill_null(False).to_numpy(zero_copy_only=False))
    table = pa.chunked_array(keys, type_ or pa.null())
    if table.null_count:
        raise StoreError(f"{path}: {table.null_count} rows have no {spec.join_key}; write the partition again")
    return table, np.concatenate(deleted)


def number_ids(columns: Sequence[pa.ChunkedArray], paths: Sequence[Path | str]) -> Numbering:
    """Give every id of the partitions a place.

    Raises:
        StoreError: the ids of two partitions are of different types.
    """
    types = {column.type for column in columns if len(column)}
    if len(types) > 1:
        raise StoreError(
            f"{paths[0]} has {columns[0].type} ids and {paths[1]} has {columns[1].type} ids: versions of one view "
            f"share one id type; publish into another repository"
        )
    type_ = next(iter(types), pa.int64())
    wide = pa.large_string() if pa.types.is_string(type_) else type_  # a string array ends at 2 GiB of text
    chunks = [chunk.cast(wide) for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, wide).combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    place = np.empty(len(order), dtype=np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    codes = place[encoded.indices.to_numpy()]
    ends = np.cumsum([len(column) for column in columns])
    return Numbering(encoded.dictionary.take(order), tuple(np.split(codes, ends[:-1])))


def scan(
    path: Path | str,
    spec: ViewSpec,
    *,
    averaged: NDArray[np.bool_],
    places: NDArray[np.int64],
    dtype: Dtype = "float32",
) -> Scan:
    """Read a partition's vectors once.

    Args:
        path: the partition.
        spec: its view.
        averaged: (R,) the rows whose mean is wanted.
        places: (R,) where a row's vector goes in `picked`, 0 to K - 1; -1: not wanted.
        dtype: what the online store keeps; values are rounded to it first, so that what is told is what is served.

    Raises:
        StoreError: the partition is unreadable or its embeddings are no lists of float32.
    """
    size, count = len(places), int(places.max(initial=-1)) + 1
    lengths = np.full(size, -1, dtype=np.int32)
    norms, hashes = np.full(size, np.nan), np.zeros(size, dtype=np.uint64)
    dim, at, taken = 0, 0, 0
    total, unit_sum, weights = np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.uint64)
    picked = np.zeros((count, 0), dtype=np.float32)
    for batch in _batches(path, spec, [EMBEDDING, IS_DELETED]):
        lists = batch.column(0)
        given = pc.list_value_length(lists).fill_null(-1).to_numpy(zero_copy_only=False)
        given = np.where(batch.column(1).fill_null(False).to_numpy(zero_copy_only=False), -1, given)
        lengths[at : at + len(given)] = given
        if not dim and (given > 0).any():
            dim = int(np.bincount(given[given > 0]).argmax())
            total, unit_sum = np.zeros(dim), np.zeros(dim)
            picked = np.full((count, dim), np.nan, dtype=np.float32)
            weights = _hash_weights(dim)
        rows = np.flatnonzero(given == dim) if dim else np.zeros(0, dtype=np.int64)
        values = _matrix(lists, rows, dim, dtype)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            rows, values = rows[finite], values[finite]
        rows = rows + at
        exact = values.astype(np.float64)
        norms[rows] = np.sqrt(np.einsum("nd,nd->n", exact, exact))
        if len(rows):
            hashes[rows] = values.view(np.uint32).astype(np.uint64) @ weights
            wanted = averaged[rows]
            total += wanted.astype(np.float64) @ exact
            taken += int(wanted.sum())
            positive = norms[rows] > 0
            unit_sum += np.divide(1.0, norms[rows], out=np.zeros(len(rows)), where=positive) @ exact
            chosen = places[rows] >= 0
            picked[places[rows][chosen]] = values[chosen]
        at += len(given)
    return Scan(dim, lengths, norms, hashes, taken, total / max(taken, 1), unit_sum, picked)


def _batches(path: Path | str, spec: ViewSpec, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The columns of a partition, a file or a folder of files, in the order given, `BATCH_ROWS` at a time."""
    try:
        filesystem, names = _files(path)
        for name in names:
            with filesystem.open_input_file(name) as source:
                file = pq.ParquetFile(source, buffer_size=READ_BUFFER, pre_buffer=False)
                _check_columns(name, file.schema_arrow, spec)
                for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                    yield batch.select(columns)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise StoreError(
            f"partition {path} cannot be read ({type(error).__name__}: {reason}): restore it, or publish the version "
            f"again"
        ) from error


def _files(path: Path | str) -> tuple[FileSystem, list[str]]:
    """The file itself, or the Parquet files of a folder by name (Spark writes folders, and markers beside the rows)."""
    remote = "://" in str(path)
    filesystem, name = FileSystem.from_uri(str(path)) if remote else (LocalFileSystem(), str(path))
    if filesystem.get_file_info(name).is_file:
        return filesystem, [name]
    found = filesystem.get_file_info(FileSelector(name))
    names = sorted(
        info.path for info in found if info.extension == "parquet" and not info.base_name.startswith(("_", "."))
    )
    if not names:
        raise FileNotFoundError(f"no Parquet file in {name}")
    return filesystem, names


def _check_columns(name: str, schema: pa.Schema, spec: ViewSpec) -> None:
    lacking = [column for column in (spec.join_key, EMBEDDING, IS_DELETED) if column not in schema.names]
    if lacking:
        raise StoreError(f"{name} lacks the columns {lacking}: it is no partition of {spec.name}")
    type_ = schema.field(EMBEDDING).type
    lists = pa.types.is_list(type_) or pa.types.is_large_list(type_)
    if not lists or type_.value_type != pa.float32():
        raise StoreError(f"{name}: column {EMBEDDING} is {type_}; a partition of {spec.name} holds list<float32>")


def _matrix(lists: pa.Array, rows: NDArray[np.int64], dim: int, dtype: Dtype) -> NDArray[np.float32]:
    """(len(rows), dim): the vectors as they are served; a null component is NaN."""
    if not len(rows):
        return np.zeros((0, dim), dtype=np.float32)
    kept = lists if len(rows) == len(lists) else lists.take(pa.array(rows))
    flat = pc.list_flatten(kept)
    values: NDArray[np.float32] = flat.to_numpy(zero_copy_only=not flat.null_count).reshape(-1, dim)
    return as_served(values, dtype)


def as_served(values: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float32]:
    """Values as they come back from an online store of that dtype: a float16 ends at 65504, beyond is infinite."""
    if dtype == "float32":
        return values
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _hash_weights(dim: int) -> NDArray[np.uint64]:
    """Odd 64-bit factors of a multilinear hash of a vector's bits (Lemire & Kaser 2014, "Strongly universal string
    hashing is fast"); fixed, so that a share of duplicates can be repeated.
    """
    return np.random.default_rng(0x6B656C6C6D).integers(0, 2**63, dim, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
