"""Reading tables and writing folders of Parquet wherever Spark can, seen whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kellm_features.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CSV = (".csv", ".csv.gz", ".csv.bz2")
MANIFEST = "_manifest.json"
"""What a job says of the rows beside it: the underscore keeps it out of the table."""
ROWS_PER_FILE = 4_000_000
"""A file of pairs of this size is about 40 MB."""
SAME_BYTES = {"parquet.writer.version": "v2", "parquet.enable.dictionary": "false"}
"""Same rows, same bytes. A column chunk lists its encodings in the order of Java's identity hashes, another in every
process: these leave one encoding a column. (Delta encoding makes sorted ids smaller than a dictionary does.)"""


def read_table(session: SparkSession, path: str, ids: tuple[str, ...] = (), separator: str = ",") -> DataFrame:
    """A Parquet file or folder, or a CSV file with a header.

    Args:
        session: reads it.
        path: wherever Spark can read.
        ids: columns of a CSV file that stay strings unless every value is an integer as integers are written: 007 and
            7 are two ids.
        separator: between the fields of a CSV file.
    """
    from pyspark.sql import functions as sf
    from pyspark.sql import types as st

    if not path.lower().endswith(CSV):
        return session.read.parquet(path)
    reader = session.read.options(header=True, sep=separator, escape='"')  # a quote inside quotes is doubled
    guessed = reader.csv(path, inferSchema=True)
    names = [name for name in ids if name in guessed.columns]
    if not names:
        return guessed
    schema = st.StructType(
        [st.StructField(f.name, st.StringType() if f.name in names else f.dataType) for f in guessed.schema.fields]
    )
    frame = reader.csv(path, schema=schema, inferSchema=False)
    told = frame.agg(*(sf.min(sf.col(name).rlike(r"^(0|-?[1-9]\d{0,17})$")).alias(name) for name in names)).first()
    assert told is not None
    return frame.withColumns({name: sf.col(name).cast("bigint") for name in names if told[name]})


def write_sorted(frame: DataFrame, path: str, order: list[str], most_rows: int) -> None:
    """Write a folder of Parquet files, each sorted, all rows of one key in one file.

    Args:
        frame: rows to write.
        path: folder that does not exist yet.
        order: sort columns; the first one decides the file.
        most_rows: an upper bound of the rows; decides the number of files (a single one is sorted as a whole).
    """
    files = 1 + most_rows // ROWS_PER_FILE
    writer = frame.repartition(files, order[0]).sortWithinPartitions(*order).write
    writer.options(**SAME_BYTES, compression="zstd").parquet(path)


class Folder:
    """An output folder in any file system of Hadoop's that appears, or is replaced, when it is complete.

    Files go to a hidden folder beside it, which is renamed at the end; one that a kill left behind is cleared by the
    next run. Spark Connect lends no file system: there Spark's own protocol has to do, whose last act is `_SUCCESS`.
    """

    def __init__(self, session: SparkSession, path: str, *, overwrite: bool) -> None:
        """Raises DataError where the folder exists and may not be overwritten."""
        self.path = path.rstrip("/")
        jvm: Any = getattr(session, "_jvm", None)
        self.remote = jvm is None
        self.staging = self.path
        """Where to write."""
        if self.remote:
            if overwrite:
                raise DataError(f"{path}: overwriting needs a session in this process, not Spark Connect; remove it")
            return
        hadoop = jvm.org.apache.hadoop.fs
        self._make = hadoop.Path
        self._out = hadoop.Path(self.path)
        self._files = self._out.getFileSystem(session._jsc.hadoopConfiguration())
        self._replaced = self._beside("replaced")
        if self._files.exists(self._replaced) and not self._files.exists(self._out):
            self._rename(self._replaced, self._out)  # a kill came between the two renames of `publish`
        if self._files.exists(self._out) and not overwrite:
            raise DataError(f"{path} exists; remove it, name another, or add --overwrite")
        self.staging = self._beside("unfinished").toString()
        self.discard()

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Put a small file beside the rows; one that begins with _ is no part of the table. Not under Connect."""
        if self.remote:
            return
        stream = self._files.create(self._make(f"{self.staging}/{name}"))
        try:
            stream.write(bytearray(json.dumps(value, indent=2, default=str).encode()))
        finally:
            stream.close()

    def publish(self) -> None:
        """Make what was written visible under its name."""
        if self.remote:
            return
        self._files.delete(self._replaced, True)
        if self._files.exists(self._out):
            self._rename(self._out, self._replaced)
        self._rename(self._make(self.staging), self._out)
        self._files.delete(self._replaced, True)

    def discard(self) -> None:
        """Remove what was written."""
        if not self.remote:
            self._files.delete(self._make(self.staging), True)

    def _rename(self, old: Any, new: Any) -> None:
        if not self._files.rename(old, new):  # Hadoop says so instead of raising
            raise DataError(f"{old} could not be renamed to {new}; look at the permissions of the folder they are in")

    def _beside(self, role: str) -> Any:
        name = f".{self._out.getName()}.{role}"
        parent = self._out.getParent()
        return self._make(parent, name) if parent is not None else self._make(name)


def split_hash_of(interactions: str) -> str | None:
    """The hash of the split that interactions come from; None where they are no artefact of this project."""
    try:
        found = json.loads(Path(interactions).with_name("manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = found.get("split_hash") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None
