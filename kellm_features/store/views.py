"""Factories of the Feast objects: entities, feature views and feature services.

A repository's `definitions.py` calls `knowledge_objects` and nothing else; a team with a Feast repository of its
own takes the single factories. Every schema is explicit, so that `feast apply` works before anything is published.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Array, FeastType, Float32, Float64, Int64, String

from kellm_features.errors import StoreError
from kellm_features.store.layout import (
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    ITEM_EMBEDDING,
    ITEM_VIEWS,
    JOIN_KEYS,
    USER_EMBEDDING,
    USER_VIEWS,
    EntityName,
    IdType,
    Kind,
    ViewSpec,
)

FOREVER = timedelta(0)
"""An embedding holds until the next version replaces it. Stock Feast ignores a ttl online anyway."""


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


def item_knowledge_views(data: Path, item: Entity, id_type: IdType = "int64") -> list[FeatureView]:
    """The views keyed by `item_id`: embedding, description, Wikipedia link and SWING neighbours.

    Args:
        data: the folder that holds one folder of Parquet partitions per view.
        item: the entity; one of your own works where its join key is `item_id`.
        id_type: type of `item_id` and of the neighbours' ids.
    """
    return [_view(spec, data, item, id_type) for spec in ITEM_VIEWS]


def user_knowledge_views(data: Path, user: Entity, id_type: IdType = "int64") -> list[FeatureView]:
    """The views keyed by `user_id`: embedding and SWING neighbours. Arguments as in `item_knowledge_views`."""
    return [_view(spec, data, user, id_type) for spec in USER_VIEWS]


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


def knowledge_objects(data: Path, id_type: IdType = "int64") -> dict[str, Entity | FeatureView | FeatureService]:
    """All Feast objects of a repository by name, for `globals().update(...)` in its `definitions.py`.

    Args:
        data: the repository's data folder. Sources get its absolute path: the duckdb offline store resolves a
            relative one against the working directory of the process, not against the repository.
        id_type: type of item and user ids.
    """
    item, user = item_entity(id_type), user_entity(id_type)
    views = {view.name: view for view in item_knowledge_views(data, item, id_type)}
    views |= {view.name: view for view in user_knowledge_views(data, user, id_type)}
    ranker = ranker_service(views[ITEM_EMBEDDING.name], views[USER_EMBEDDING.name])
    return {item.name: item, user.name: user, **views, ranker.name: ranker}


def _entity(name: EntityName, id_type: IdType, description: str) -> Entity:
    types = {"int64": ValueType.INT64, "string": ValueType.STRING}
    if id_type not in types:
        raise StoreError(f"id_type is {id_type!r}; accepted: 'int64' or 'string'")
    return Entity(name=name, join_keys=[JOIN_KEYS[name]], value_type=types[id_type], description=description)


def _view(spec: ViewSpec, data: Path, entity: Entity, id_type: IdType) -> FeatureView:
    source = FileSource(
        name=f"{spec.name}_versions",
        path=str(data.resolve() / spec.name),
        file_format=ParquetFormat(),
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column=CREATED_TIMESTAMP,
        description=f"Append-only partitions of {spec.name}, one per published version.",
    )
    fields = [Field(name=spec.join_key, dtype=_id_dtype(id_type))]
    fields += [Field(name=name, dtype=_dtype(kind, id_type)) for name, kind in spec.features]
    return FeatureView(
        name=spec.name,
        entities=[entity],
        ttl=FOREVER,
        schema=fields,
        source=source,
        description=spec.description,
    )


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
