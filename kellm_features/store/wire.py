"""Bytes of Feast's own online layout, from and to Arrow, without Feast and without protobuf objects.

Feast stores a row under the bytes of its entity key, and each feature as a serialized `Value` message. Building
those messages one by one is what makes stock materialization slow; a column of equal-length vectors is one header
and a buffer. The formats: feast/protos/feast/types/{Value,EntityKey}.proto and feast/infra/key_encoding_utils.py,
entity key serialization 3. The tests hold every byte against Feast's own functions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kellm_features.errors import StoreError
from kellm_features.store.layout import IdType, Kind

_STRING_TYPE, _INT64_TYPE = 2, 4
"""feast.types.ValueType.Enum"""
Id = int | str


class EntityKeys:
    """Serialized entity keys of one join key: what Feast's Redis and SQLite stores find a row by."""

    def __init__(self, join_key: str, id_type: IdType, suffix: bytes = b"") -> None:
        name = join_key.encode()
        self.prefix = struct.pack("<III", 1, _STRING_TYPE, len(name)) + name
        """What all keys of the entity begin with."""
        self.id_type = id_type
        self.suffix = suffix
        self._head = self.prefix + struct.pack("<I", _STRING_TYPE if id_type == "string" else _INT64_TYPE)

    def encode(self, ids: Sequence[Id]) -> list[bytes]:
        """The keys of N ids, `suffix` at the end of each."""
        if self.id_type == "int64":
            head, tail = self._head + struct.pack("<I", 8), self.suffix
            data = np.asarray(ids, dtype="<i8").tobytes()
            return [head + data[at : at + 8] + tail for at in range(0, len(data), 8)]
        encoded = [str(key).encode() for key in ids]
        return [self._head + struct.pack("<I", len(key)) + key + self.suffix for key in encoded]

    def decode(self, key: bytes) -> Id:
        """The id in a key of this entity."""
        at = len(self._head)
        value = key[at + 4 : len(key) - len(self.suffix)]
        return value.decode() if self.id_type == "string" else int(struct.unpack("<q", value)[0])


def encode_timestamp(micros: int) -> bytes:
    """A `google.protobuf.Timestamp` of microseconds since 1970."""
    seconds, rest = divmod(micros, 1_000_000)
    out = b""
    if seconds:
        out += b"\x08" + _varint(seconds % 2**64)
    if rest:
        out += b"\x10" + _varint(rest * 1000)
    return out


def decode_timestamp(data: bytes) -> float:
    """Seconds since 1970 of a `google.protobuf.Timestamp`."""
    fields = {1: 0, 2: 0}
    at = 0
    while at < len(data):
        field = data[at] >> 3
        fields[field], at = _read_varint(data, at + 1)
    seconds = fields[1] - 2**64 if fields[1] >= 2**63 else fields[1]
    return seconds + fields[2] / 1e9


def encode_column(column: pa.Array | pa.ChunkedArray, kind: Kind) -> list[bytes]:
    """Each row of a feature's column as a serialized `Value`; null is an empty message."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty one
        array = pa.array([], array.type)
    values = _ENCODERS[kind](array)
    if array.null_count:
        valid = pc.is_valid(array).to_numpy(zero_copy_only=False)
        values = [value if there else b"" for value, there in zip(values, valid, strict=True)]
    return values


def vector_header(dim: int) -> bytes:
    """What precedes the 4·dim bytes of float32 in a serialized `Value` of a vector."""
    inner = b"\x0a" + _varint(4 * dim)
    return b"\x82\x01" + _varint(len(inner) + 4 * dim) + inner


def decode_vectors(values: Sequence[bytes | None], dim: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Serialized vectors as one matrix.

    Args:
        values: N serialized `Value`s; None or empty where there is none.
        dim: E.

    Returns:
        (N, E) float32 with NaN rows where missing, and (N,) bool.

    Raises:
        StoreError: a value is not a vector of that length.
    """
    header = vector_header(dim)
    size = len(header) + 4 * dim
    vectors = vectors_of(values, size, dim, len(header), "<f4", header).astype(np.float32)
    return with_missing(values, vectors)


def vectors_of(
    values: Sequence[bytes | None], size: int, dim: int, start: int, dtype: str, header: bytes = b""
) -> NDArray[Any]:
    """The vectors that stand from byte `start` on in those values that are there.

    Returns:
        (M, E) of `dtype`, a view of the joined values: unaligned, and copied once by whatever is made of it.

    Raises:
        StoreError: a value is not `size` bytes long, or begins with another header.
    """
    there = [value for value in values if value]
    rows = np.frombuffer(b"".join(there), dtype=np.uint8)
    if not set(map(len, there)) <= {size} or not _begin(rows.reshape(-1, size), header):
        seen = next((len(value) for value in there if len(value) != size), size)
        raise StoreError(
            f"a row holds {seen} bytes that are no vector of length {dim} ({size} bytes): something other than kellm "
            f"wrote to the store; publish the embeddings anew, under another version"
        )
    row = np.dtype({"names": ["vector"], "formats": [(dtype, (dim,))], "offsets": [start], "itemsize": size})
    vectors: NDArray[Any] = rows.view(row)["vector"]
    return vectors


def with_missing(
    values: Sequence[bytes | None], vectors: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Vectors of the values that are there, with NaN rows for the others, and (N,) whether it is there."""
    if len(vectors) == len(values):
        return vectors, np.ones(len(values), dtype=np.bool_)
    found = np.fromiter(map(bool, values), dtype=np.bool_, count=len(values))
    full = np.full((len(values), vectors.shape[1]), np.nan, dtype=np.float32)
    full[found] = vectors
    return full, found


def _begin(rows: NDArray[np.uint8], header: bytes) -> bool:
    return bool((rows[:, : len(header)] == np.frombuffer(header, dtype=np.uint8)).all())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varints(values: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
    """All values as varints, one after the other, and the (N + 1,) offsets of each."""
    bits = values.astype(np.uint64)
    groups = (bits[:, None] >> np.arange(0, 70, 7, dtype=np.uint64)) & np.uint64(0x7F)
    lengths = np.maximum(1, 10 - np.argmax(groups[:, ::-1] != 0, axis=1))
    lengths[bits == 0] = 1
    place = np.arange(10)
    groups |= np.where(place < lengths[:, None] - 1, np.uint64(0x80), np.uint64(0))
    data = groups[place < lengths[:, None]].astype(np.uint8).tobytes()
    return data, np.concatenate(([0], np.cumsum(lengths)))


def _strings(array: pa.Array) -> list[bytes]:
    texts = array.to_pylist()
    known = {text: b"" if text is None else b"\x12" + _delimited(text.encode()) for text in set(texts)}
    return [known[text] for text in texts]  # most columns of texts hold a few, or one


def _ints(array: pa.Array) -> list[bytes]:
    data, ends = _varints(array.fill_null(0).to_numpy(zero_copy_only=False))
    return [b"\x20" + data[ends[i] : ends[i + 1]] for i in range(len(array))]


def _doubles(array: pa.Array) -> list[bytes]:
    data = array.fill_null(0).to_numpy(zero_copy_only=False).astype("<f8").tobytes()
    return [b"\x29" + data[at : at + 8] for at in range(0, len(data), 8)]


def _vectors(array: pa.Array) -> list[bytes]:
    return _packed_lists(array, 16, "<f4")


def _scores(array: pa.Array) -> list[bytes]:
    return _packed_lists(array, 15, "<f8")


def _packed_lists(array: pa.Array, field: int, dtype: str) -> list[bytes]:
    """Lists of fixed-width numbers as a packed repeated field within field `field`."""
    starts, stops, flat = _list_parts(array)
    width = np.dtype(dtype).itemsize
    data = memoryview(np.ascontiguousarray(flat.to_numpy(zero_copy_only=False).astype(dtype, copy=False)).tobytes())
    tag = _varint(field << 3 | 2)
    headers: dict[int, bytes] = {}
    out = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        size = (stop - start) * width
        header = headers.get(size)
        if header is None:
            inner = b"\x0a" + _varint(size) if size else b""
            header = headers[size] = tag + _varint(len(inner) + size) + inner
        out.append(header + data[start * width : stop * width])
    return out


def _id_lists(array: pa.Array) -> list[bytes]:
    starts, stops, flat = _list_parts(array)
    if pa.types.is_string(flat.type):
        texts = [b"\x0a" + _delimited(text.encode()) for text in flat.to_pylist()]
        rows = zip(starts.tolist(), stops.tolist(), strict=True)
        return [b"\x62" + _delimited(b"".join(texts[start:stop])) for start, stop in rows]
    data, ends = _varints(flat.to_numpy(zero_copy_only=False))
    out = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        body = data[ends[start] : ends[stop]]
        out.append(b"\x72" + _delimited(b"\x0a" + _delimited(body) if body else b""))
    return out


def _list_parts(array: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64], pa.Array]:
    """Where each row's elements begin and end in one flat array; a null row is empty."""
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    stops = np.cumsum(lengths)
    return stops - lengths, stops, pc.list_flatten(array)


def _delimited(data: bytes) -> bytes:
    return _varint(len(data)) + data


_ENCODERS: dict[Kind, Callable[[pa.Array], list[bytes]]] = {
    "string": _strings,
    "int64": _ints,
    "float64": _doubles,
    "embedding": _vectors,
    "ids": _id_lists,
    "scores": _scores,
}
