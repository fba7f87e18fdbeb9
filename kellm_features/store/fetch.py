"""Fetching embeddings through the stock Feast client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kellm_features.errors import MissingExtraError, StoreError
from kellm_features.store.layout import ITEM_EMBEDDING, read_published

if TYPE_CHECKING:
    from feast import FeatureStore

IDS_PER_REQUEST = 10_000
"""SQLite allows 32,766 parameters in one statement, and Feast puts every id of a request into one."""


@dataclass(frozen=True)
class FetchedEmbeddings:
    """Embeddings in the order of the ids asked for. A missing one is a row of NaN, never of zeros."""

    ids: list[str | int]
    """N ids in the entity's type."""
    values: NDArray[np.float32]
    """(N, E) float32; E is 0 where nothing is published for any id and no publication tells the length."""
    found: NDArray[np.bool_]
    """(N,)"""
    version: list[str | None]
    """N embedding versions, None where missing."""
    age_s: NDArray[np.float64]
    """(N,) seconds since the row's event_timestamp; NaN where missing."""


def fetch_embeddings(repo: Path, ids: Sequence[str | int], *, view: str = ITEM_EMBEDDING.name) -> FetchedEmbeddings:
    """Embeddings by id, bit-equal to what `FeatureStore(repo).get_online_features` returns.

    Args:
        repo: the Feast repository.
        ids: N ids; text is read as the type of the view's entity, as a command line needs.
        view: a feature view with the features `embedding` and `embedding_version`.

    Raises:
        StoreError: no repository there, nothing applied or published, no such view, an id not of the entity's type.
        MissingExtraError: Feast is not installed.
    """
    store, join_key, is_int = _open(repo, view)
    keys = [_parse_id(value, join_key, is_int) for value in ids]
    features = [f"{view}:embedding", f"{view}:embedding_version"]
    columns: dict[str, list[Any]] = {"embedding": [], "embedding_version": [], "embedding__ts": []}
    for start in range(0, len(keys), IDS_PER_REQUEST):
        rows = [{join_key: key} for key in keys[start : start + IDS_PER_REQUEST]]
        try:
            answer = store.get_online_features(features, rows).to_dict(include_event_timestamps=True)
        except Exception as error:  # whatever the online store raises
            raise StoreError(
                f"the online store of {repo} did not answer ({type(error).__name__}: {error}): run  kellm publish"
            ) from error
        for name, column in columns.items():
            column.extend(answer[name])
    vectors = columns["embedding"]
    found = np.array([vector is not None for vector in vectors], dtype=bool)
    published = read_published(repo)
    if not found.any() and published is None and keys:
        raise StoreError(
            f"nothing is published in {repo}: run  kellm publish  (or, with stock Feast, feast materialize)"
        )
    dim = next((len(vector) for vector in vectors if vector is not None), published.current.dim if published else 0)
    values = np.full((len(keys), dim), np.nan, dtype=np.float32)
    if found.any():
        try:
            values[found] = np.array([vector for vector in vectors if vector is not None], dtype=np.float32)
        except ValueError as error:
            raise StoreError(
                f"{view} in {repo} serves vectors of several lengths, as while a publish runs or after a killed one: "
                f"run  kellm publish"
            ) from error
    event = np.array(columns["embedding__ts"], dtype=np.float64)
    return FetchedEmbeddings(
        ids=keys,
        values=values,
        found=found,
        version=[name if there else None for name, there in zip(columns["embedding_version"], found, strict=True)],
        age_s=np.where(found, time.time() - event, np.nan),
    )


def _open(repo: Path, view: str) -> tuple[FeatureStore, str, bool]:
    """The store, the view's join key, and whether its ids are integers."""
    if not (repo / "feature_store.yaml").is_file():
        raise StoreError(
            f"{repo} holds no feature_store.yaml: name a Feast repository, or run  kellm publish  to make one"
        )
    try:
        from feast import FeatureStore, ValueType
        from feast.errors import FeastObjectNotFoundException
    except ImportError as error:
        raise MissingExtraError("feast", "feast", "fetching embeddings") from error
    store = FeatureStore(repo_path=str(repo))
    try:
        feature_view = store.get_feature_view(view)
        entity = store.get_entity(feature_view.entities[0])
    except (FeastObjectNotFoundException, FileNotFoundError) as error:
        known = sorted(v.name for v in store.list_feature_views() if any(f.name == "embedding" for f in v.features))
        remedy = f"known there: {', '.join(known)}" if known else "run  kellm publish  (or  feast apply  there) first"
        raise StoreError(f"{repo} has no feature view {view!r} applied; {remedy}") from error
    if not {"embedding", "embedding_version"} <= {feature.name for feature in feature_view.features}:
        raise StoreError(f"the feature view {view!r} holds no embeddings; '{ITEM_EMBEDDING.name}' does")
    return store, entity.join_key, entity.value_type in (ValueType.INT64, ValueType.INT32)


def _parse_id(value: str | int, join_key: str, is_int: bool) -> str | int:
    if not is_int:
        return str(value)
    what = join_key.replace("_", " ")
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} {value!r} is not an integer, and ids are int64 here: name an id like 50") from error
    if not -(2**63) <= number < 2**63:
        raise StoreError(f"{what} {number} does not fit in int64")
    return number
