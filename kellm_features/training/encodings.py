"""Reading encodings into the order of the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from kellm_features.errors import DataError
from kellm_features.schemas import TableSchema, read_table

Ids = npt.NDArray[Any]
"""(N,) int64, or object holding strings."""


@dataclass(frozen=True)
class Encodings:
    """Frozen vectors, one a row."""

    ids: Ids
    vectors: Tensor
    """(N, D) float32, on the CPU."""
    encoder_id: str


def positions(known: Ids, wanted: Ids, what: str, where: str) -> npt.NDArray[np.int64]:
    """The position of each wanted id among the known ones.

    Raises:
        DataError: one of them is unknown.
    """
    found: npt.NDArray[np.int64] = pd.Index(known).get_indexer(pd.Index(wanted)).astype(np.int64)
    if (found < 0).any():
        unknown = pd.unique(np.asarray(wanted)[found < 0])
        raise DataError(
            f"{where}: {what} {shown(unknown[0])} is not in the catalogue ({len(unknown)} such ids): it was made "
            "from other data; run  kellm run --from ingest"
        )
    return found


def shown(value: Any) -> str:
    """An id as a message shows it: 7 or 'abc'."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def id_array(column: pa.ChunkedArray) -> Ids:
    """An id column as NumPy: int64 or object."""
    values: Ids = column.to_numpy()
    return values


def read_encodings(path: Path, schema: TableSchema, order: Ids | None = None) -> Encodings:
    """Read `ITEM_ENCODINGS` or `USER_ENCODINGS`.

    Args:
        path: a Parquet file or folder.
        schema: which of the two.
        order: ids to sort the rows by; the table must hold exactly these. None keeps the table's own order.

    Raises:
        DataError: empty, repeated ids, ragged or not finite vectors, several encoders, ids other than `order`'s.
        SchemaError: a missing column or a wrong type.
    """
    table = read_table(path, schema)
    key = schema.names[0]
    if not table.num_rows:
        raise DataError(f"{path} holds no rows: run  kellm run --from encode")
    ids = id_array(table.column(key))
    repeated = pd.Index(ids)[pd.Index(ids).duplicated()]
    if len(repeated):
        raise DataError(f"{path}: {key} {shown(repeated[0])} stands more than once: run  kellm run --from encode")
    encoders = table.column("encoder_id").unique().to_pylist()
    if len(encoders) != 1:
        raise DataError(f"{path} mixes encodings of {', '.join(map(str, encoders))}: run  kellm run --from encode")
    vectors = _matrix(table.column("encoding").combine_chunks(), path)
    if not np.isfinite(vectors).all():
        bad = ids[~np.isfinite(vectors).all(axis=1)]
        raise DataError(f"{path}: the encoding of {key} {shown(bad[0])} holds NaN or infinity ({len(bad)} such rows)")
    if order is not None:
        at = positions(order, ids, key, str(path))
        if len(ids) < len(order):
            lacking = order[~np.isin(np.arange(len(order)), at)]
            raise DataError(
                f"{path}: {key} {shown(lacking[0])} has no encoding ({len(lacking)} such ids): "
                "run  kellm run --from encode"
            )
        sorted_vectors = np.empty_like(vectors)
        sorted_vectors[at] = vectors
        ids, vectors = order, sorted_vectors
    return Encodings(ids, torch.from_numpy(vectors), str(encoders[0]))


def _matrix(column: pa.Array, path: Path) -> npt.NDArray[np.float32]:
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.full(len(column), column.type.list_size)
    else:
        lengths = np.diff(column.offsets.to_numpy())
    if column.null_count or (lengths != lengths[0]).any() or not lengths[0]:
        raise DataError(f"{path}: encodings have {lengths.min()} to {lengths.max()} numbers: one length is accepted")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.array(flat, dtype=np.float32).reshape(len(column), int(lengths[0]))
