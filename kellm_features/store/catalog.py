"""The catalog of a store: which versions it holds and which one is served.

The catalog lies in the online store itself, beside the rows that it speaks of, so that every reader, on whatever
machine, agrees on it. It changes by compare-and-set alone: a transition is a function `Catalog -> Catalog`, and a
store swaps the result in only if nobody else was quicker.

A version goes writing → published → (active ⇄ published) → pruning → gone. Its rows never change once it is
published; what is served changes by naming another version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kellm_features.errors import StoreError
from kellm_features.store.layout import IdType

Layout = Literal["stock", "packed"]
State = Literal["writing", "published", "pruning"]


class Frozen(BaseModel):
    """Base of the records: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ViewVersion(Frozen):
    """The rows of one view in one version: where they lie, offline and online."""

    number: int
    """Of the online namespace `VIEW_vNUMBER`. Versions whose rows of a view are equal share one."""
    file: str
    """The offline partition: relative to the repository, or absolute or a URI where Spark published it."""
    rows: int
    """Ids that the view serves."""
    event: datetime
    """`event_timestamp` of every row: since when the version holds."""
    created: datetime
    """`created_timestamp` of every row."""
    content: str
    """SHA-256 of the rows without their timestamps; empty where Spark published them."""
    layout: Layout = "stock"
    dim: int = 0
    """Length of the vectors; 0 in a view without any."""
    ttl_s: float = 0.0
    """The feature view's ttl, 0 for none: an older row is not served."""


class Version(Frozen):
    """One version: a set of rows per view, published whole."""

    name: str
    state: State
    id_type: IdType
    started_at: datetime
    published_at: datetime | None = None
    views: dict[str, ViewVersion]
    split_hash: str | None = None
    """The split that its embeddings were trained on, where it is known."""
    again: bool = False
    """Partitions of this name were there before it began: it was published once and pruned, and they are history."""
    verification: dict[str, Any] | None = None
    """What the gates found, as JSON (verify.Verification), with the version that they compared with."""


class Activation(Frozen):
    """One entry of what was served when."""

    version: str
    since: datetime


class Catalog(Frozen):
    """All that a store knows of its versions."""

    format: Literal[1] = 1
    revision: int = 0
    """Counts changes; the token that a reader compares."""
    stamp: str = ""
    """Drawn anew with each change: two processes may make the same change at the same microsecond."""
    next_number: int = 1
    active: str | None = None
    history: tuple[Activation, ...] = ()
    """What can be rolled back to, the active version last."""
    retired: dict[str, datetime] = {}
    """When a version stopped being active, for the grace period of pruning."""
    versions: tuple[Version, ...] = ()
    """In the order of their publishing."""

    def find(self, name: str) -> Version | None:
        """The version of that name."""
        return next((version for version in self.versions if version.name == name), None)

    def get(self, name: str) -> Version:
        """The version of that name.

        Raises:
            StoreError: there is none.
        """
        version = self.find(name)
        if version is None:
            known = ", ".join(version.name for version in self.versions) or "none: run  kellm publish"
            raise StoreError(f"the store holds no version {name!r}; it holds {known}")
        return version

    def active_version(self) -> Version:
        """The version that is served.

        Raises:
            StoreError: none is.
        """
        if self.active is None:
            ready = [version.name for version in self.versions if version.state == "published"]
            raise StoreError(
                f"no version is served: version {ready[-1]} is published and waits for  kellm promote {ready[-1]}"
                if ready
                else "nothing is published: run  kellm publish  and  kellm promote"
            )
        return self.get(self.active)

    def latest(self) -> Version | None:
        """The version that was published last."""
        done = [version for version in self.versions if version.state == "published"]
        return max(done, key=lambda version: version.published_at or version.started_at, default=None)

    def begin(self, version: Version) -> Catalog:
        """With a version that is being written; one of the same name that was not finished is taken over."""
        others = tuple(known for known in self.versions if known.name != version.name)
        numbers = [view.number for view in version.views.values()]
        return self._next(versions=(*others, version), next_number=max(self.next_number, *(n + 1 for n in numbers)))

    def finish(self, name: str, now: datetime) -> Catalog:
        """With that version published."""
        return self._with(self.get(name).model_copy(update={"state": "published", "published_at": now}))

    def verified(self, name: str, verification: dict[str, Any]) -> Catalog:
        """With the gates' findings on that version."""
        return self._with(self.get(name).model_copy(update={"verification": verification}))

    def promote(self, name: str, now: datetime) -> Catalog:
        """With that version served. Promoting the active version changes nothing.

        Raises:
            StoreError: no such version, or it is not published whole.
        """
        version = self.get(name)
        if version.state != "published":
            remedy = "run  kellm publish  again" if version.state == "writing" else "it is being pruned"
            raise StoreError(f"version {name} is not published to its end (state {version.state}): {remedy}")
        if self.active == name:
            return self
        retired = {k: v for k, v in self.retired.items() if k != name}
        if self.active is not None:
            retired[self.active] = now
        # A version stands in the history once: promoted again, it moves to the end.
        before = tuple(entry for entry in self.history if entry.version != name)
        return self._next(active=name, retired=retired, history=(*before, Activation(version=name, since=now)))

    def rollback(self, now: datetime) -> Catalog:
        """With the version served that was active before this one.

        Raises:
            StoreError: nothing is served, or nothing was before.
        """
        active = self.active_version()
        earlier = [entry for entry in self.history if entry.version != active.name and self._ready(entry.version)]
        if not earlier:
            raise StoreError(
                f"there is no version to roll back to: {active.name} is the only one that was served and is still held"
            )
        target = earlier[-1].version
        kept = tuple(entry for entry in self.history if entry.version not in (active.name, target))
        retired = {k: v for k, v in self.retired.items() if k != target} | {active.name: now}
        return self._next(active=target, retired=retired, history=(*kept, Activation(version=target, since=now)))

    def condemn(self, names: set[str]) -> Catalog:
        """With those versions marked for deletion: none of them can be promoted any more."""
        versions = tuple(
            version.model_copy(update={"state": "pruning"}) if version.name in names else version
            for version in self.versions
        )
        return self._next(versions=versions, history=tuple(e for e in self.history if e.version not in names))

    def forget(self, names: set[str]) -> Catalog:
        """Without those versions."""
        return self._next(
            versions=tuple(version for version in self.versions if version.name not in names),
            retired={name: when for name, when in self.retired.items() if name not in names},
        )

    def _ready(self, name: str) -> bool:
        version = self.find(name)
        return version is not None and version.state == "published"

    def _with(self, changed: Version) -> Catalog:
        return self._next(versions=tuple(changed if v.name == changed.name else v for v in self.versions))

    def _next(self, **update: Any) -> Catalog:
        return self.model_copy(update={"revision": self.revision + 1, **update})

    def token(self) -> bytes:
        """What a reader compares to know that its view of the catalog still holds.

        The revision alone would not do: a failover may lose the last change, and the next one has its number again.
        """
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"{self.revision}-{digest[:16]}".encode()


Transition = Callable[[Catalog], Catalog]


def utc_now() -> datetime:
    """The present, in whole microseconds of UTC."""
    return datetime.now(UTC)


def parse_catalog(body: str | bytes | None, where: str) -> Catalog:
    """The catalog as it lies in a store; an empty one where there is none.

    Raises:
        StoreError: it was written by another version of kellm, or is damaged.
    """
    if body is None:
        return Catalog()
    try:
        return Catalog.model_validate_json(body)
    except ValidationError as error:
        raise StoreError(
            f"the catalog in {where} is not one of this version of kellm ({error.error_count()} errors, first: "
            f"{error.errors()[0]['msg']}): use the kellm that wrote it, or restore it from a backup"
        ) from error
