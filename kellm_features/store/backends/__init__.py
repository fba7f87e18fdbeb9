"""Online stores as publisher and reader see them: a catalog that is swapped whole, and rows in namespaces.

`open_backend` gives the one that a repository's feature_store.yaml names. Neither Feast nor pandas is imported.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from kellm_features.errors import MissingExtraError, StoreError
from kellm_features.store.catalog import Catalog, Layout, Transition
from kellm_features.store.layout import IdType, ViewSpec
from kellm_features.store.repo import OnlineConfig

Id = int | str
SWAPS = 100
"""Attempts at a compare-and-set before giving up: each lost one means that somebody else succeeded."""


@dataclass(frozen=True)
class Namespace:
    """Where the rows of one view in one version lie online."""

    project: str
    spec: ViewSpec
    number: int
    id_type: IdType
    layout: Layout = "stock"
    dim: int = 0

    @property
    def name(self) -> str:
        """`VIEW_vNUMBER`, as Feast names the versions of a view."""
        return f"{self.spec.name}_v{self.number}"


@dataclass(frozen=True)
class Rows:
    """What a store answered: raw rows of N ids, and the catalog's token at that moment."""

    token: bytes | None
    """None where the store holds no catalog."""
    values: Sequence[bytes | None]
    """N embeddings as stored, None where missing."""
    times: Sequence[float | None]
    """N event times in seconds since 1970."""


class OnlineBackend(Protocol):
    """An online store of versions. All methods raise StoreError where the store does not answer."""

    where: str
    """The store's place for messages, without secrets."""

    def catalog(self) -> Catalog:
        """The catalog; an empty one where nothing was ever published."""

    def token(self) -> bytes | None:
        """What the catalog's state is told by; None where there is no catalog."""

    def swap(self, before: Catalog, after: Catalog) -> bool:
        """Replace the catalog if it still is `before`; whether it was."""

    def lease(self) -> AbstractContextManager[None]:
        """Be the store's only publisher, or say who is."""

    def write(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        """Write rows (join key and features) that are not there yet; how many were not.

        Of two rows of one id in the namespace the later event stays. Returns when the store has answered for all.
        """

    def fetch(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """Embeddings and the token, read together."""

    async def fetch_async(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """The same without blocking the event loop."""

    def drop(self, namespace: Namespace) -> int:
        """Delete a namespace; the number of rows that went."""

    def clear(self) -> None:
        """Delete the catalog."""

    def close(self) -> None:
        """Give the connections back; those of event loops by `aclose`."""

    async def aclose(self) -> None:
        """Give back the connections that `fetch_async` holds for the running event loop."""


def open_backend(config: OnlineConfig) -> OnlineBackend:
    """The online store of a repository; connects when it is first asked.

    Raises:
        MissingExtraError: it is a Redis and the client is not installed.
    """
    if config.kind == "sqlite":
        from kellm_features.store.backends.sqlite import SqliteBackend

        return SqliteBackend(config)
    try:
        from kellm_features.store.backends.redis import RedisBackend
    except ModuleNotFoundError as error:
        raise MissingExtraError("redis", error.name or "redis", "an online store on Redis") from error
    return RedisBackend(config)


def update(backend: OnlineBackend, transition: Transition) -> Catalog:
    """Change the catalog by compare-and-set: the transition sees the newest one, again and again if need be.

    Raises:
        StoreError: what the transition found wrong, or others kept changing the catalog.
    """
    after: Catalog | None = None
    for _ in range(SWAPS):
        before = backend.catalog()
        if before == after:  # the last swap was made after all: its answer was lost, and asked for again
            return before
        wanted = transition(before)
        if wanted == before:
            return before
        after = wanted.model_copy(update={"stamp": uuid.uuid4().hex})
        if backend.swap(before, after):
            return after
    raise StoreError(f"the catalog in {backend.where} changed under {SWAPS} attempts in a row: try again")
