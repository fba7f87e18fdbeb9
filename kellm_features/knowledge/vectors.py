"""Vectors by the hash of their text: of the stage's last run, and of runs that were killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


class VectorStore:
    """An append-only folder of Parquet parts, text hash → vector, of one encoder.

    Each part is written whole under a temporary name and then renamed: a kill loses the part in the making and no
    other. An unreadable part is set aside: its texts are encoded again. Encoders do not share a part, and one that
    comes back after another finds its own again.
    """

    def __init__(self, folder: Path, encoder_id: str, dim: int, finished: Iterable[Path] = ()) -> None:
        """Open, or begin, the store in a folder that outlives the run.

        Args:
            folder: may be shared with other encoders.
            encoder_id: whose vectors these are.
            dim: their length.
            finished: encodings tables of earlier runs. What they hold needs no part any longer.
        """
        self.dim = dim
        self._known: dict[str, npt.NDArray[np.float32]] = {}
        self._folder = folder / hashlib.sha256(encoder_id.encode()).hexdigest()[:24]
        for path in finished:
            self._known |= _read(path, encoder_id)
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for part in sorted(self._folder.glob("*.parquet")):
            try:
                vectors = _read(part, encoder_id)
            except (pa.ArrowException, OSError, KeyError, ValueError):
                part.replace(part.with_suffix(".unreadable"))
                continue
            if vectors.keys() <= self._known.keys():
                part.unlink(missing_ok=True)
            self._known |= vectors

    def __contains__(self, text_hash: str) -> bool:
        return text_hash in self._known

    def append(self, hashes: Sequence[str], vectors: npt.NDArray[np.float32]) -> None:
        """Keep finished vectors, shape (len(hashes), dim); they are on disk when this returns."""
        name = hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:24]
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        table = pa.table({"text_hash": pa.array(hashes, pa.string()), "encoding": to_arrow(vectors, self.dim)})
        pq.write_table(table, temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(self._folder / f"{name}.parquet")
        self._known |= dict(zip(hashes, vectors, strict=True))

    def gather(self, hashes: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors in the order of their texts' hashes: float32, shape (len(hashes), dim)."""
        if not hashes:
            return np.zeros((0, self.dim), np.float32)
        return np.stack([self._known[text_hash] for text_hash in hashes])


def to_arrow(vectors: npt.NDArray[np.float32], dim: int) -> pa.FixedSizeListArray:
    """A column of vectors from a matrix of shape (rows, dim)."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1)), dim)


def _read(path: Path, encoder_id: str) -> dict[str, npt.NDArray[np.float32]]:
    """Vectors of a part, or of an encodings table's rows that this encoder made."""
    table = pq.read_table(path)
    vectors = table["encoding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
    made_by = table["encoder_id"].to_pylist() if "encoder_id" in table.column_names else [encoder_id] * table.num_rows
    rows = zip(table["text_hash"].to_pylist(), made_by, vectors, strict=True)
    return {text_hash: vector for text_hash, made, vector in rows if made == encoder_id}
