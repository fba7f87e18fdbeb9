"""The packed layout: one Redis string per id, with a float16 vector.

A value is: event time (int64, microseconds since 1970, little-endian), the E components (float16, little-endian),
then the remaining features in the view's order, each as a length (uint32) and a serialized Feast `Value`.

A float16 has 11 significant bits: a component of a unit vector loses at most 2^-11 of itself, and a cosine between
two 384-d vectors about 1e-5 (docs/serving.md has the measurement).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kellm_features.errors import StoreError
from kellm_features.store.wire import vector_header, vectors_of, with_missing

_TIME = 8
_INFINITE = 0x7C00
"""Bits of a float16's infinity; those of a NaN are greater."""


def key_prefix(project: str, namespace: str) -> bytes:
    """What the keys of one version of one view begin with."""
    return f"kellm:{project}:{namespace}:".encode()


def encode_ids(ids: Sequence[int | str]) -> list[bytes]:
    """Ids as they stand at the end of a key: decimal digits, or the text itself."""
    return [b"%d" % key if isinstance(key, int) else str(key).encode() for key in ids]


def encode_rows(vectors: pa.Array | pa.ChunkedArray, event_us: int, tails: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Rows as packed values.

    Args:
        vectors: N lists of equal length, none of them null.
        event_us: microseconds since 1970.
        tails: per further feature its N serialized `Value`s.

    Raises:
        StoreError: a component does not fit in a float16.
    """
    array = vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors
    flat = pc.list_flatten(array).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        halves = flat.astype("<f2")
    if (halves.view("<u2") & 0x7FFF).max(initial=0) >= _INFINITE:  # NumPy tests halves one by one
        worst = float(np.abs(flat).max())
        raise StoreError(
            f"an embedding holds {worst:g}, and float16 ends at 65504: normalize the embeddings, or set "
            f"online_store.layout to stock"
        )
    data = halves.tobytes()
    size = len(data) // max(len(array), 1)
    time = struct.pack("<q", event_us)
    if not tails:
        return [time + data[at : at + size] for at in range(0, len(data), size or 1)]
    rows = zip(*tails, strict=True)
    return [
        time + data[i * size : (i + 1) * size] + b"".join(struct.pack("<I", len(value)) + value for value in row)
        for i, row in enumerate(rows)
    ]


def decode_rows(values: Sequence[bytes | None], dim: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The (N, E) float32 vectors of packed values, NaN rows where missing, and (N,) bool found.

    Raises:
        StoreError: a value is too short for that length.
    """
    size = _TIME + 2 * dim
    lengths = {len(value) for value in values if value}
    if len(lengths) == 1:  # tails of one length, as those of an export are: the vectors stand at equal distances
        size = max(size, *lengths)
    else:
        values = [value[:size] if value else None for value in values]
    return with_missing(values, _widened(vectors_of(values, size, dim, _TIME, "<i2")))


def _widened(halves: NDArray[np.int16]) -> NDArray[np.float32]:
    """Finite float16, given as their bits, as float32: bit-equal to NumPy's cast and many times faster.

    The exponent and the fraction move to their places in a float32, whose exponent counts from 127 and not from 15.
    """
    wide = np.empty(halves.shape, dtype=np.float32)
    bits = wide.view(np.int32)
    np.left_shift(halves, 13, out=bits, dtype=np.int32)
    bits &= ~0x70000000  # copies of the sign
    wide *= np.float32(2.0 ** (127 - 15))
    return wide


def event_times(values: Sequence[bytes | None]) -> list[float | None]:
    """Seconds since 1970 of packed values."""
    return [int.from_bytes(value[:_TIME], "little", signed=True) / 1e6 if value else None for value in values]


def as_feast_values(value: bytes, dim: int) -> tuple[bytes, list[bytes]]:
    """A packed value as Feast's layout has it: the serialized vector, and the serialized further features."""
    end = _TIME + 2 * dim
    vector = np.frombuffer(value[_TIME:end], dtype="<f2").astype("<f4").tobytes()
    tail, at = [], end
    while at < len(value):
        (size,) = struct.unpack_from("<I", value, at)
        tail.append(value[at + 4 : at + 4 + size])
        at += 4 + size
    return vector_header(dim) + vector, tail
