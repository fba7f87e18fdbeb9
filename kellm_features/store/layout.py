"""What the feature views hold and where their rows lie, told without importing Feast.

Every view reads one folder `data/VIEW/` of append-only Parquet partitions, one file per published version. A
partition is written aside, renamed into place and never changed. The catalog in the online store (catalog.py) lists
the versions and names the one that is served.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

IdType = Literal["int64", "string"]
EntityName = Literal["item", "user"]
Kind = Literal["string", "int64", "float64", "embedding", "ids", "scores"]

EVENT_TIMESTAMP = "event_timestamp"
CREATED_TIMESTAMP = "created_timestamp"
EMBEDDED_AT = "embedded_at"
"""Feature of the embedding views: the row's `event_timestamp` in whole seconds of Unix time, for on-demand views."""
SPLIT_HASH = b"kellm.split_hash"
"""Key in a partition's metadata: the split that its embeddings were trained on."""
IS_DELETED = "is_deleted"
"""Partition column: true on the row that withdraws an id which the version no longer holds."""
TOP_NEIGHBORS = 20
"""Neighbours served per anchor; the offline SWING pairs keep all of theirs."""

DATA = "data"
JOIN_KEYS: dict[EntityName, str] = {"item": "item_id", "user": "user_id"}


@dataclass(frozen=True)
class ViewSpec:
    """One feature view: its entity and its features in order."""

    name: str
    entity: EntityName
    features: tuple[tuple[str, Kind], ...]
    description: str

    @property
    def join_key(self) -> str:
        """`item_id` or `user_id`."""
        return JOIN_KEYS[self.entity]

    @property
    def holds_embeddings(self) -> bool:
        """Whether the view's rows are vectors with a version: what the reader serves and the gates look at."""
        return self.features == _EMBEDDING

    def arrow(self, id_type: IdType) -> pa.Schema:
        """The schema of a partition: join key, features, timestamps, deletion mark."""
        fields = [pa.field(self.join_key, _arrow_type("ids", id_type).value_type, nullable=False)]
        fields += [pa.field(name, _arrow_type(kind, id_type)) for name, kind in self.features]
        fields += [pa.field(name, pa.timestamp("us", tz="UTC"), False) for name in (EVENT_TIMESTAMP, CREATED_TIMESTAMP)]
        return pa.schema([*fields, pa.field(IS_DELETED, pa.bool_(), nullable=False)])


def _arrow_type(kind: Kind, id_type: IdType) -> pa.DataType:
    id_value = pa.int64() if id_type == "int64" else pa.string()
    return {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "embedding": pa.list_(pa.float32()),
        "ids": pa.list_(id_value),
        "scores": pa.list_(pa.float64()),
    }[kind]


_EMBEDDING: tuple[tuple[str, Kind], ...] = (
    ("embedding", "embedding"),
    ("embedding_version", "string"),
    ("model_id", "string"),
    ("content_hash", "string"),
    (EMBEDDED_AT, "int64"),
)
_NEIGHBORS: tuple[tuple[str, Kind], ...] = (("neighbor_ids", "ids"), ("scores", "scores"))

ITEM_EMBEDDING = ViewSpec(
    "item_knowledge_embedding",
    "item",
    _EMBEDDING,
    "Adapted knowledge embedding of an item, with the version it is of.",
)
USER_EMBEDDING = ViewSpec(
    "user_knowledge_embedding",
    "user",
    _EMBEDDING,
    "Adapted knowledge embedding of a user, in the items' space.",
)
ITEM_DESCRIPTION = ViewSpec(
    "item_description",
    "item",
    (
        ("description", "string"),
        ("description_source", "string"),
        ("prompt_hash", "string"),
        ("model_id", "string"),
    ),
    "Generated description of an item; apart from the embedding, so that ranking never fetches text.",
)
ITEM_WIKI_LINK = ViewSpec(
    "item_wiki_link",
    "item",
    (
        ("wiki_page_id", "int64"),
        ("wiki_title", "string"),
        ("link_score", "float64"),
        ("method", "string"),
        ("reason", "string"),
    ),
    "Wikipedia page of an item; a null page is an abstention, and `reason` says why.",
)
ITEM_NEIGHBORS = ViewSpec(
    "item_swing_neighbors",
    "item",
    _NEIGHBORS,
    f"The {TOP_NEIGHBORS} items most similar by SWING, best first.",
)
USER_NEIGHBORS = ViewSpec(
    "user_swing_neighbors",
    "user",
    _NEIGHBORS,
    f"The {TOP_NEIGHBORS} users most similar by SWING, best first.",
)

ITEM_VIEWS = (ITEM_EMBEDDING, ITEM_DESCRIPTION, ITEM_WIKI_LINK, ITEM_NEIGHBORS)
USER_VIEWS = (USER_EMBEDDING, USER_NEIGHBORS)
VIEWS = (*ITEM_VIEWS, *USER_VIEWS)


def write_atomic(path: Path, text: str) -> None:
    """Write a small file through a temporary name and fsync, so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
