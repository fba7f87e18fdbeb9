"""The embedding reader: what a ranking service holds, one version per answer.

It asks the online store directly and turns raw rows into one matrix: no entity rows, no protobuf objects, no pandas.
Every request carries the question which version is served; where the answer is another than last time, the request
is asked again of that version, so that no answer ever mixes two and a promotion is seen by the next request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kellm_features.errors import StoreError
from kellm_features.store import packed, wire
from kellm_features.store.backends import Id, Namespace, OnlineBackend, Rows, open_backend
from kellm_features.store.catalog import Catalog
from kellm_features.store.layout import ITEM_EMBEDDING, VIEWS, IdType, ViewSpec
from kellm_features.store.repo import OnlineConfig, read_online_config

OnMissing = Literal["flag", "raise"]
Ids = Sequence[Id] | NDArray[np.integer[Any]]
EMBEDDING_VIEWS = {spec.name: spec for spec in VIEWS if spec.holds_embeddings}
_SHOWN = 5


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N ids, in the order asked for, all of one version."""

    values: NDArray[np.float32]
    """(N, E) float32; a missing one is a row of NaN, never of zeros."""
    found: NDArray[np.bool_]
    """(N,) whether the version holds the id and its row is not older than the view's ttl."""
    age_s: NDArray[np.float64]
    """(N,) seconds since the row's event_timestamp; NaN where there is no row. A row past its ttl keeps its age."""
    version: str
    """The version that all rows are of."""

    def __len__(self) -> int:
        return len(self.found)


@dataclass(frozen=True)
class _Plan:
    """Where the rows of a request lie, as of one state of the catalog."""

    token: bytes
    version: str
    namespace: Namespace
    ttl_s: float


class EmbeddingReader:
    """Reads the embeddings of one view. Safe to share between threads, and to use after a fork."""

    def __init__(self, config: OnlineConfig, spec: ViewSpec, *, version: str | None = None) -> None:
        """See `from_repo`."""
        self._backend: OnlineBackend = open_backend(config)
        self._project = config.project
        self._spec = spec
        self._pinned = version
        self._plan: _Plan | None = None
        if version is not None:
            self._refresh()

    @classmethod
    def from_repo(
        cls, repo: Path | str, view: str = ITEM_EMBEDDING.name, *, version: str | None = None
    ) -> EmbeddingReader:
        """A reader of what the repository's feature_store.yaml names as its online store.

        Args:
            repo: the Feast repository. Only its feature_store.yaml is read; Feast itself is not imported.
            view: `item_knowledge_embedding` or `user_knowledge_embedding`.
            version: None follows what is promoted; a name reads that version and no other.

        Raises:
            StoreError: no repository there, no such view, an online store that kellm cannot switch versions in, or
                the store does not hold the version named.
            MissingExtraError: the Redis client is not installed.
        """
        if view not in EMBEDDING_VIEWS:
            raise StoreError(f"view {view!r} holds no embeddings; those that do: {', '.join(EMBEDDING_VIEWS)}")
        return cls(read_online_config(repo), EMBEDDING_VIEWS[view], version=version)

    @property
    def view(self) -> str:
        """The feature view's name."""
        return self._spec.name

    @property
    def id_type(self) -> IdType:
        """Type of the ids: "int64" or "string"."""
        return self._current().namespace.id_type

    @property
    def dim(self) -> int:
        """E, the length of the vectors served now."""
        return self._refresh().namespace.dim

    def active(self) -> str:
        """The version that is served now.

        Raises:
            StoreError: none is, or the store does not answer.
        """
        return self._refresh().version

    def get(self, ids: Ids, *, on_missing: OnMissing = "flag") -> Embeddings:
        """The embeddings of N ids, all of one version.

        Args:
            ids: N ids of the view's type, repeats allowed; a NumPy array of integers is taken as it is.
            on_missing: "flag" marks missing ids in `found`; "raise" raises.

        Raises:
            StoreError: nothing is promoted, the store does not answer, an id is not of the view's type, or (with
                "raise") an id is missing or past its ttl.
        """
        plan = self._current()
        keys = _checked(ids, plan.namespace)
        rows = self._backend.fetch(plan.namespace, keys)
        if rows.token != plan.token:
            plan = self._refresh()
            rows = self._backend.fetch(plan.namespace, keys)
        return self._assemble(plan, keys, rows, on_missing)

    async def get_async(self, ids: Ids, *, on_missing: OnMissing = "flag") -> Embeddings:
        """The same for an event loop. On SQLite and on a Redis Cluster it waits in a thread."""
        known = self._plan
        plan = known if known is not None else await asyncio.to_thread(self._refresh)
        keys = _checked(ids, plan.namespace)
        rows = await self._backend.fetch_async(plan.namespace, keys)
        if rows.token != plan.token:
            plan = await asyncio.to_thread(self._refresh)
            rows = await self._backend.fetch_async(plan.namespace, keys)
        return self._assemble(plan, keys, rows, on_missing)

    def close(self) -> None:
        """Give the connections back; the reader opens them again when it is asked again."""
        self._backend.close()

    async def aclose(self) -> None:
        """Give back those of the running event loop, at its end."""
        await self._backend.aclose()

    def __enter__(self) -> EmbeddingReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _current(self) -> _Plan:
        return self._plan or self._refresh()

    def _refresh(self) -> _Plan:
        """Look the served version up. Threads may do so at once: each plan is right for the moment it was made."""
        self._plan = plan = _plan_of(self._backend.catalog(), self._project, self._spec, self._pinned)
        return plan

    def _assemble(self, plan: _Plan, keys: Sequence[Id], rows: Rows, on_missing: OnMissing) -> Embeddings:
        decode = packed.decode_rows if plan.namespace.layout == "packed" else wire.decode_vectors
        values, found = decode(rows.values, plan.namespace.dim)
        times = np.array(rows.times, dtype=np.float64)  # None becomes NaN
        age_s = time.time() - times
        if plan.ttl_s:
            expired = age_s > plan.ttl_s
            values[expired] = np.nan
            found = found & ~expired
        if on_missing == "raise" and not found.all():
            _raise_missing(keys, found, plan)
        return Embeddings(values, found, age_s, plan.version)


def namespace_of(catalog: Catalog, project: str, spec: ViewSpec, version: str | None = None) -> Namespace:
    """Where the rows of a view lie in the active version, or in the one named.

    Raises:
        StoreError: nothing is served, no such version, or it is not published to its end.
    """
    return _plan_of(catalog, project, spec, version).namespace


def _plan_of(catalog: Catalog, project: str, spec: ViewSpec, pinned: str | None) -> _Plan:
    version = catalog.active_version() if pinned is None else catalog.get(pinned)
    if version.state != "published":
        raise StoreError(f"version {version.name} is not published to its end (state {version.state})")
    view = version.views.get(spec.name)
    if view is None:
        raise StoreError(
            f"version {version.name} holds no {spec.name}; it holds {', '.join(version.views)}: publish a version "
            f"with that view, or read another"
        )
    namespace = Namespace(project, spec, view.number, version.id_type, view.layout, view.dim)
    return _Plan(catalog.token(), version.name, namespace, view.ttl_s)


def _checked(ids: Ids, namespace: Namespace) -> Sequence[Id]:
    """The ids in the view's type; an error names the first that is not."""
    if namespace.id_type == "string":
        keys = list(ids)
        if all(type(key) is str for key in keys):
            return keys
        wrong: object = next(key for key in keys if type(key) is not str)
        raise StoreError(f"id {wrong!r} is not a string, and ids of {namespace.spec.name} are strings")
    array = np.asarray(ids)
    if array.size == 0:
        return []
    if array.ndim == 1 and array.dtype.kind in "iu" and not (array.dtype == np.uint64 and array.max() >= 2**63):
        plain: list[Id] = array.tolist()
        return plain
    if array.ndim != 1:
        raise StoreError(f"ids are one row of int64; an array of shape {array.shape} was given")
    wrong = next((key for key in ids if type(key) is bool or not isinstance(key, int | np.integer)), None)
    if wrong is None:
        wrong = next(key for key in ids if not -(2**63) <= int(key) < 2**63)
    raise StoreError(f"id {wrong!r} is not an int64, and ids of {namespace.spec.name} are")


def _raise_missing(keys: Sequence[Id], found: NDArray[np.bool_], plan: _Plan) -> None:
    missing = [keys[place] for place in np.flatnonzero(~found)[:_SHOWN]]
    more = int((~found).sum()) - len(missing)
    raise StoreError(
        f"{plan.namespace.spec.name} of version {plan.version} lacks {', '.join(map(repr, missing))}"
        f"{f' and {more:,} more' if more else ''}: publish a version that holds them, or read with on_missing='flag'"
    )
