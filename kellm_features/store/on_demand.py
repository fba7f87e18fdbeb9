"""On-demand views: cheap maths on served features, computed by Feast at every read, online and offline.

`item_user_affinity` is how well an item fits a user; `item_embedding_age` is how old an item's embedding is. Neither
stores a row.

Feast keeps the *source text* of a transformation in its registry and runs that text, with `np` and `pd` in scope and
nothing else of this module; beside it Feast stores the function serialised by dill, which it falls back to. So each
transformation is one function that names no helper, and a server can run it without this library. That dill is
Feast's own, in its registry: who can write your registry can run code in every process that reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import cast

import numpy as np
import pandas as pd
from feast import FeatureView, Field, OnDemandFeatureView
from feast.types import Float64

from kellm_features.errors import StoreError
from kellm_features.store.layout import EMBEDDED_AT, ITEM_EMBEDDING, USER_EMBEDDING, ViewSpec

AFFINITY = "item_user_affinity"
AGE = "item_embedding_age"


def item_user_affinity_view(item_embedding: FeatureView, user_embedding: FeatureView) -> OnDemandFeatureView:
    """`item_user_affinity`: `dot` and `cosine` of an item's and a user's embedding, float64.

    Null where either is missing, where the two are of different versions (their spaces differ), and for `cosine`
    where a vector is zero. Both views name their vector `embedding`, so that it must be fetched with
    `full_feature_names=True`; without, Feast would hand over one vector as both, and the view raises instead.

    Raises:
        StoreError: a view is not named as `item_knowledge_views` and `user_knowledge_views` name theirs.
    """
    inputs = ["embedding", "embedding_version"]
    return _on_demand_view(
        AFFINITY,
        item_user_affinity,
        [_source(item_embedding, ITEM_EMBEDDING, inputs), _source(user_embedding, USER_EMBEDDING, inputs)],
        ["dot", "cosine"],
        "Dot product and cosine of an item's and a user's embedding; fetch with full_feature_names=True.",
    )


def item_embedding_age_view(item_embedding: FeatureView) -> OnDemandFeatureView:
    """`item_embedding_age`: `age_s`, float64 seconds since the event time of the item's embedding.

    Online the age is told as of now, in a historical join as of the row's own timestamp, so that a model trains on
    the age that it would have seen. Null where the embedding is missing.

    Raises:
        StoreError: the view is not named as `item_knowledge_views` names it.
    """
    return _on_demand_view(
        AGE,
        item_embedding_age,
        [_source(item_embedding, ITEM_EMBEDDING, [EMBEDDED_AT])],
        ["age_s"],
        "Seconds since the event time of the item's embedding: as of now online, as of each row's timestamp offline.",
    )


def item_user_affinity(inputs: pd.DataFrame) -> pd.DataFrame:
    """The transformation of `item_user_affinity_view`.

    Raises:
        ValueError: the features came under their short names, of which the two views share `embedding`.
    """
    columns = list(inputs.columns)
    # Feast appends the form of a name that it was not asked for: a leading short name is what both vectors fell into.
    if columns.index("embedding") < columns.index("item_knowledge_embedding__embedding"):
        raise ValueError(
            "item_user_affinity reads the embeddings of an item and of a user, which both are named 'embedding': "
            "fetch it with full_feature_names=True"
        )
    item, user = inputs["item_knowledge_embedding__embedding"], inputs["user_knowledge_embedding__embedding"]
    versions = [inputs[f"{view}_knowledge_embedding__embedding_version"] for view in ("item", "user")]
    paired = (item.notna() & user.notna() & (versions[0] == versions[1])).to_numpy(dtype=bool)
    dot, cosine = (np.full(len(inputs), np.nan) for _ in range(2))
    if paired.any():
        items, users = np.stack(item[paired].to_list()), np.stack(user[paired].to_list())
        dot[paired] = np.einsum("ij,ij->i", items, users, dtype=np.float64)
        squares = [np.einsum("ij,ij->i", rows, rows, dtype=np.float64) for rows in (items, users)]
        norms = np.sqrt(squares[0]) * np.sqrt(squares[1])
        cosine[paired] = np.divide(dot[paired], norms, out=np.full(len(norms), np.nan), where=norms > 0)
    return pd.DataFrame({"dot": dot, "cosine": cosine})


def item_embedding_age(inputs: pd.DataFrame) -> pd.DataFrame:
    """The transformation of `item_embedding_age_view`."""
    embedded_at = inputs["item_knowledge_embedding__embedded_at"].astype("float64")
    # A historical join hands over the rows' own timestamps: under this name, or as the first column of instants.
    instants = [name for name in inputs.columns if pd.api.types.is_datetime64_any_dtype(inputs[name])]
    if "event_timestamp" in instants:
        instants.insert(0, "event_timestamp")
    if not instants:
        return pd.DataFrame({"age_s": pd.Timestamp.now(tz="UTC").timestamp() - embedded_at})
    since_1970 = pd.to_datetime(inputs[instants[0]], utc=True) - pd.Timestamp(0, tz="UTC")
    return pd.DataFrame({"age_s": since_1970.dt.total_seconds() - embedded_at})


def _source(view: FeatureView, spec: ViewSpec, features: list[str]) -> FeatureView:
    if view.name != spec.name:
        raise StoreError(
            f"an on-demand view reads {spec.name} and was given the view {view.name!r}: pass the view of that name, "
            f"as the factories of kellm_features.store.views make it"
        )
    return cast(FeatureView, view[features])


def _on_demand_view(
    name: str,
    udf: Callable[[pd.DataFrame], pd.DataFrame],
    sources: list[FeatureView],
    features: list[str],
    description: str,
) -> OnDemandFeatureView:
    # Not Feast's decorator: it would set the function's __module__ to "__main__", and dill would copy what it refers
    # to. Mode "pandas", not "python": that one returns nothing under full_feature_names=True in Feast 0.67.
    return OnDemandFeatureView(
        name=name,
        sources=list(sources),
        schema=[Field(name=feature, dtype=Float64) for feature in features],
        mode="pandas",
        udf=cast(FunctionType, udf),
        udf_string=inspect.getsource(udf),
        description=description,
    )
