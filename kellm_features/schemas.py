"""The columns of every artefact, declared once.

Ids are whatever the platform uses: `int64` or `string`, the same throughout one run (`ID`). Encodings are
fixed-size float32 lists; embeddings are plain float32 lists, which is what Feast's `Array(Float32)` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kellm_features.errors import DataError, SchemaError

ID = "id"
"""Marks an id column: int64 or string, never null."""
VECTOR = "vector"
"""Marks a float32 vector column: every row of the same length, never null."""
TIMESTAMP = pa.timestamp("us", tz="UTC")
SECTION = pa.struct([pa.field("name", pa.string()), pa.field("text", pa.string())])


@dataclass(frozen=True)
class Column:
    """One column: its name, Arrow type (or the markers `ID`, `VECTOR`), and whether null is allowed."""

    name: str
    type: pa.DataType | str
    nullable: bool = False


@dataclass(frozen=True)
class TableSchema:
    """The columns of one table, in order. `open=True` lets further columns follow."""

    name: str
    columns: tuple[Column, ...]
    open: bool = False

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [column.name for column in self.columns]

    def arrow(self, id_type: pa.DataType | None = None, dim: int | None = None) -> pa.Schema:
        """The Arrow schema to write with.

        Args:
            id_type: `pa.int64()` (default) or `pa.string()`.
            dim: length of a fixed-size vector; None writes a plain list.
        """

        def concrete(column: Column) -> pa.DataType:
            if column.type == ID:
                return id_type or pa.int64()
            if column.type == VECTOR:
                return pa.list_(pa.float32(), dim) if dim else pa.list_(pa.float32())
            return column.type

        return pa.schema([pa.field(c.name, concrete(c), nullable=c.nullable) for c in self.columns])

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raise `SchemaError` unless `schema` has these columns with these types.

        Args:
            schema: the Arrow schema seen.
            where: the file or table, for the message.
        """
        missing = [name for name in self.names if name not in schema.names]
        if missing:
            raise SchemaError(
                f"{where}: column {', '.join(map(repr, missing))} is missing; "
                f"seen: {', '.join(schema.names) or 'no columns'}; '{self.name}' needs: {', '.join(self.names)}"
            )
        extra = [name for name in schema.names if name not in self.names]
        if extra and not self.open:
            raise SchemaError(f"{where}: unexpected column {', '.join(map(repr, extra))} in '{self.name}'")
        for column in self.columns:
            seen = schema.field(column.name).type
            if not _matches(column.type, seen):
                wanted = {ID: "int64 or string", VECTOR: "list of float32"}.get(
                    column.type if isinstance(column.type, str) else "", str(column.type)
                )
                raise SchemaError(f"{where}: column '{column.name}' has type {seen}, '{self.name}' needs {wanted}")


def _matches(wanted: pa.DataType | str, seen: pa.DataType) -> bool:
    if wanted == ID:
        return bool(pa.types.is_int64(seen) or pa.types.is_string(seen) or pa.types.is_large_string(seen))
    if wanted == VECTOR:
        is_list = pa.types.is_list(seen) or pa.types.is_fixed_size_list(seen) or pa.types.is_large_list(seen)
        return bool(is_list and pa.types.is_float32(seen.value_type))
    assert isinstance(wanted, pa.DataType)
    if pa.types.is_string(wanted):
        return bool(pa.types.is_string(seen) or pa.types.is_large_string(seen))
    if pa.types.is_timestamp(wanted):  # Spark writes naive or UTC microseconds; the instant is what counts
        return bool(pa.types.is_timestamp(seen))
    if pa.types.is_map(wanted):
        return bool(
            pa.types.is_map(seen)
            and _matches(wanted.key_type, seen.key_type)
            and _matches(wanted.item_type, seen.item_type)
        )
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(seen) and _matches(wanted.value_type, seen.value_type))
    if pa.types.is_struct(wanted):
        return bool(
            pa.types.is_struct(seen)
            and [f.name for f in wanted] == [f.name for f in seen]
            and all(_matches(w.type, s.type) for w, s in zip(wanted, seen, strict=True))
        )
    return bool(wanted == seen)


INTERACTIONS = TableSchema(
    "interactions",
    (
        Column("user_id", ID),
        Column("item_id", ID),
        Column("rating", pa.float32(), nullable=True),
        Column("liked", pa.bool_()),
        Column("event_timestamp", TIMESTAMP),
        Column("split", pa.string()),
    ),
)
ITEMS = TableSchema(
    "items",
    (
        Column("item_id", ID),
        Column("title", pa.string()),
        Column("year", pa.int32(), nullable=True),
        Column("genres", pa.list_(pa.string())),
    ),
    open=True,
)
USERS = TableSchema(
    "users",
    (
        Column("user_id", ID),
        Column("gender", pa.string(), nullable=True),
        Column("age", pa.string(), nullable=True),
        Column("occupation", pa.string(), nullable=True),
    ),
    open=True,
)
PAIRS = TableSchema(
    "pairs",
    (
        Column("anchor_id", ID),
        Column("neighbor_id", ID),
        Column("score", pa.float64()),
        Column("common", pa.int32()),
        Column("rank", pa.int32()),
    ),
)
PAGES = TableSchema(
    "pages",
    (
        Column("wiki_page_id", pa.int64()),
        Column("wiki_title", pa.string()),
        Column("display_title", pa.string(), nullable=True),
        Column("redirect_to", pa.string(), nullable=True),
        Column("is_disambiguation", pa.bool_()),
        Column("lead", pa.string()),
        Column("sections", pa.list_(SECTION)),
        Column("categories", pa.list_(pa.string())),
        Column("evidence", pa.list_(pa.string())),
        Column("year", pa.int32(), nullable=True),
    ),
)
LINKS = TableSchema(
    "links",
    (
        Column("item_id", ID),
        Column("wiki_page_id", pa.int64(), nullable=True),
        Column("wiki_title", pa.string(), nullable=True),
        Column("link_score", pa.float64()),
        Column("method", pa.string(), nullable=True),
        Column("runner_up", pa.string(), nullable=True),
        Column("reason", pa.string(), nullable=True),
    ),
)


def _texts(key: str) -> tuple[Column, ...]:
    return (
        Column(key, ID),
        Column("description", pa.string()),
        Column("description_source", pa.string()),
        Column("prompt_hash", pa.string()),
        Column("model_id", pa.string()),
        Column("grounding", pa.float32(), nullable=True),
        Column("prompt_tokens", pa.int32()),
        Column("completion_tokens", pa.int32()),
        Column("factors", pa.map_(pa.string(), pa.string()), nullable=True),
    )


def _encodings(key: str) -> tuple[Column, ...]:
    return (
        Column(key, ID),
        Column("encoding", VECTOR),
        Column("text_hash", pa.string()),
        Column("encoder_id", pa.string()),
    )


def _embeddings(key: str) -> tuple[Column, ...]:
    return (
        Column(key, ID),
        Column("embedding", VECTOR),
        Column("embedding_version", pa.string()),
        Column("model_id", pa.string()),
        Column("content_hash", pa.string()),
        Column("event_timestamp", TIMESTAMP),
        Column("created_timestamp", TIMESTAMP),
    )


ITEM_DESCRIPTIONS = TableSchema("item_descriptions", _texts("item_id"))
USER_DESCRIPTIONS = TableSchema("user_descriptions", _texts("user_id"))
DEAD_LETTERS = TableSchema(
    "dead_letters",
    (
        Column("side", pa.string()),
        Column("id", pa.string()),
        Column("prompt_hash", pa.string()),
        Column("model_id", pa.string()),
        Column("reason", pa.string()),
    ),
)
ITEM_ENCODINGS = TableSchema("item_encodings", _encodings("item_id"))
USER_ENCODINGS = TableSchema("user_encodings", _encodings("user_id"))
ITEM_EMBEDDINGS = TableSchema("item_embeddings", _embeddings("item_id"))
USER_EMBEDDINGS = TableSchema("user_embeddings", _embeddings("user_id"))


def id_type_of(schema: pa.Schema, column: str) -> pa.DataType:
    """`pa.int64()` or `pa.string()`: the id type a table was written with."""
    return pa.int64() if pa.types.is_int64(schema.field(column).type) else pa.string()


def read_table(path: Path, schema: TableSchema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file or directory and check it against its schema.

    Raises:
        DataError: no such file, or not Parquet.
        SchemaError: a column is missing or has another type.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: '{schema.name}' is read from there")
    try:
        table = pq.read_table(path, columns=list(columns) if columns else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not readable Parquet ({error}): '{schema.name}' is read from there") from error
    if columns is None:
        schema.check(table.schema, str(path))
    return table


def write_table(table: pa.Table, path: Path, schema: TableSchema) -> None:
    """Check a table against its schema and write it as one zstd Parquet file.

    Raises:
        SchemaError: a column is missing, has another type, or is null where the schema forbids it.
    """
    schema.check(table.schema, str(path))
    for column in schema.columns:
        if not column.nullable and table.column(column.name).null_count:
            raise SchemaError(
                f"{path}: column '{column.name}' of '{schema.name}' holds "
                f"{table.column(column.name).null_count} nulls and may hold none"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **parquet_options(table.schema))


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How tables of this project are encoded: zstd, and vectors of float32 as they are.

    A vector is noise to a compressor, a dictionary and a range of values, which would take most of the time of
    writing and of reading.
    """
    vectors = [field.name for field in schema if _is_vector(field.type)]
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    leaves = [name for name in _leaves(schema) if name.partition(".")[0] not in vectors]
    return {
        "compression": {name: "zstd" if name in leaves else "none" for name in _leaves(schema)},
        "use_dictionary": plain,
        "write_statistics": leaves,
    }


def _is_vector(type_: pa.DataType) -> bool:
    nested = pa.types.is_list(type_) or pa.types.is_fixed_size_list(type_)
    return bool(nested and pa.types.is_float32(type_.value_type))


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns' paths in Parquet's own naming."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(place).path for place in range(len(parquet))]
