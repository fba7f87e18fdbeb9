"""Factories of the Feast objects: entities, feature views and feature services.

A repository's `definitions.py` calls `knowledge_objects` and nothing else; a team with a Feast repository of its
own takes the single factories. Every schema is explicit, so that `feast apply` works before anything is published.
The on-demand views have a module of their own, on_demand.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from feast import Entity, FeatureService, FeatureView, Field, FileSource, OnDemandFeatureView, ValueType
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.types import Array, FeastType, Float32, Float64, Int64, String

from kellm_features.errors import StoreError
from kellm_features.store.layout import (
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    ITEM_DESCRIPTION,
    ITEM_EMBEDDING,
    ITEM_NEIGHBORS,
    ITEM_VIEWS,
    ITEM_WIKI_LINK,
    JOIN_KEYS,
    USER_EMBEDDING,
    USER_NEIGHBORS,
    USER_VIEWS,
    EntityName,
    IdType,
    Kind,
    ViewSpec,
)
from kellm_features.store.on_demand import item_embedding_age_view, item_user_affinity_view

SourceKind = Literal["file", "spark"]
"""What reads the partitions offline: "file" is duckdb's Parquet, "spark" the Spark offline store's."""

FOREVER = timedelta(0)
"""No ttl: an embedding holds until the next version replaces it."""

VERSION_TAG = "kellm.embedding_version"
"""Tag of a feature service: the one version of the embeddings that its consumer works with. Absent: any version."""
SERVES_TAG = "kellm.serves"
"""Tag of a view: what its rows are, for `feast feature-views list --tags kellm.serves:embedding`."""
_SERVES = {
    ITEM_EMBEDDING.name: "embedding",
    USER_EMBEDDING.name: "embedding",
    ITEM_DESCRIPTION.name: "description",
    ITEM_WIKI_LINK.name: "wiki_link",
    ITEM_NEIGHBORS.name: "neighbors",
    USER_NEIGHBORS.name: "neighbors",
}


def item_entity(id_type: IdType = "int64") -> Entity:
    """The entity `item`, joined by `item_id`.

    Raises:
        StoreError: `id_type` is neither "int64" nor "string".
    """
    return _entity("item", id_type, "An item of the catalogue.")


def user_entity(id_type: IdType = "int64") -> Entity:
    """The entity `user`, joined by `user_id`.

    Raises:
        StoreError: `id_type` is neither "int64" nor "string".
    """
    return _entity("user", id_type, "A user with interactions.")


def item_knowledge_views(
    data: Path | str,
    item: Entity,
    id_type: IdType = "int64",
    *,
    ttl: timedelta = FOREVER,
    source: SourceKind = "file",
) -> list[FeatureView]:
    """The views keyed by `item_id`: embedding, description, Wikipedia link and SWING neighbours.

    Args:
        data: the folder that holds one folder of Parquet partitions per view; a URI such as "s3a://bucket/data" is
            kept as it is.
        item: the entity; one of your own works where its join key is `item_id`.
        id_type: type of `item_id` and of the neighbours' ids.
        ttl: how long a row counts after its event time, in a historical join and in this library's online stores;
            zero is for ever. Rows that do not change keep their event time from version to version, so that a ttl
            takes away what is merely stable, such as links, along with what is late.
        source: "file" for the duckdb offline store, "spark" for Feast's Spark offline store.

    Raises:
        StoreError: `id_type`, `ttl` or `source` is not accepted.
    """
    return [_view(spec, data, item, id_type, ttl, source) for spec in ITEM_VIEWS]


def user_knowledge_views(
    data: Path | str,
    user: Entity,
    id_type: IdType = "int64",
    *,
    ttl: timedelta = FOREVER,
    source: SourceKind = "file",
) -> list[FeatureView]:
    """The views keyed by `user_id`: embedding and SWING neighbours. Arguments as in `item_knowledge_views`."""
    return [_view(spec, data, user, id_type, ttl, source) for spec in USER_VIEWS]


def ranker_service(item_embedding: FeatureView, user_embedding: FeatureView) -> FeatureService:
    """The feature service `ranker_v1`: what a ranking model fetches per request.

    Both views name their vector `embedding`, so that a request for both sets `full_feature_names=True`.
    """
    features = ["embedding", "embedding_version"]
    return FeatureService(
        name="ranker_v1",
        features=[item_embedding[features], user_embedding[features]],
        description="Item and user knowledge embeddings for a ranking model; fetch with full_feature_names=True.",
    )


def consumer_service(
    name: str,
    views: Sequence[FeatureView | OnDemandFeatureView],
    *,
    version: str | None = None,
    description: str = "",
    owner: str = "",
    tags: Mapping[str, str] | None = None,
) -> FeatureService:
    """The feature service of one consumer, tagged with the version of the embeddings that it was trained on.

    Args:
        name: of the service; put your model's version in it, as in "ranker_v2".
        views: what it fetches; `view[["embedding"]]` takes some features of a view.
        version: the embedding version that the consumer needs, such as "v20261121T183917Z-3f26f88d": this library's
            online stores refuse to answer the service from another one. None accepts any version.
        description: for people.
        owner: whom to ask, such as an address.
        tags: further tags.

    Raises:
        StoreError: the name or the version is empty, no view is given, or `tags` sets the version in another way.
    """
    if not name or version == "":
        raise StoreError(f"a feature service was named {name!r} with version {version!r}: give neither as empty text")
    if not views:
        raise StoreError(f"the feature service {name!r} has no views: pass at least one")
    if VERSION_TAG in (tags or {}):
        raise StoreError(f"tags of the feature service {name!r} hold {VERSION_TAG}: pass version=... instead")
    needed = {} if version is None else {VERSION_TAG: version}
    return FeatureService(
        name=name, features=list(views), description=description, owner=owner, tags={**(tags or {}), **needed}
    )


def knowledge_objects(
    data: Path | str, id_type: IdType = "int64", *, ttl: timedelta = FOREVER, source: SourceKind = "file"
) -> dict[str, Entity | FeatureView | OnDemandFeatureView | FeatureService]:
    """All Feast objects of a repository by name, for `globals().update(...)` in its `definitions.py`.

    Args:
        data: the repository's data folder. Sources get its absolute path: the duckdb offline store resolves a
            relative one against the working directory of the process, not against the repository.
        id_type: type of item and user ids.
        ttl: as in `item_knowledge_views`.
        source: as in `item_knowledge_views`.

    Raises:
        StoreError: as in `item_knowledge_views`.
    """
    item, user = item_entity(id_type), user_entity(id_type)
    views = {view.name: view for view in item_knowledge_views(data, item, id_type, ttl=ttl, source=source)}
    views |= {view.name: view for view in user_knowledge_views(data, user, id_type, ttl=ttl, source=source)}
    items, users = views[ITEM_EMBEDDING.name], views[USER_EMBEDDING.name]
    on_demand = {view.name: view for view in (item_user_affinity_view(items, users), item_embedding_age_view(items))}
    ranker = ranker_service(items, users)
    return {item.name: item, user.name: user, **views, **on_demand, ranker.name: ranker}


def _entity(name: EntityName, id_type: IdType, description: str) -> Entity:
    types = {"int64": ValueType.INT64, "string": ValueType.STRING}
    if id_type not in types:
        raise StoreError(f"id_type is {id_type!r}; accepted: 'int64' or 'string'")
    return Entity(name=name, join_keys=[JOIN_KEYS[name]], value_type=types[id_type], description=description)


def _view(
    spec: ViewSpec, data: Path | str, entity: Entity, id_type: IdType, ttl: timedelta, source: SourceKind
) -> FeatureView:
    if ttl < FOREVER:
        raise StoreError(f"ttl is {ttl}; accepted: a positive timedelta, or zero for no limit")
    fields = [Field(name=spec.join_key, dtype=_id_dtype(id_type))]
    fields += [Field(name=name, dtype=_dtype(kind, id_type)) for name, kind in spec.features]
    return FeatureView(
        name=spec.name,
        entities=[entity],
        ttl=ttl,
        schema=fields,
        source=_source(spec, data, source),
        description=spec.description,
        tags={SERVES_TAG: _SERVES[spec.name]},
    )


def _source(spec: ViewSpec, data: Path | str, kind: SourceKind) -> DataSource:
    folder = str(data).rstrip("/") if "://" in str(data) else str(Path(data).resolve())
    told: dict[str, Any] = {
        "name": f"{spec.name}_versions",
        "path": f"{folder}/{spec.name}",
        "timestamp_field": EVENT_TIMESTAMP,
        "created_timestamp_column": CREATED_TIMESTAMP,
        "description": f"Append-only partitions of {spec.name}, one per published version.",
    }
    if kind == "file":
        return FileSource(file_format=ParquetFormat(), **told)
    if kind == "spark":
        from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource

        # A version that Spark published is a folder of files: named by a pattern, it is read like one that is a file.
        return SparkSource(file_format="parquet", **{**told, "path": f"{told['path']}/*.parquet"})
    raise StoreError(f"source is {kind!r}; accepted: 'file' or 'spark'")


def _id_dtype(id_type: IdType) -> FeastType:
    return Int64 if id_type == "int64" else String


def _dtype(kind: Kind, id_type: IdType) -> FeastType:
    dtypes: dict[Kind, FeastType] = {
        "string": String,
        "int64": Int64,
        "float64": Float64,
        "embedding": Array(Float32),
        "ids": Array(_id_dtype(id_type)),
        "scores": Array(Float64),
    }
    return dtypes[kind]
