"""Publishing from an engine that has workers of its own: what its driver does, and what each worker gets.

The driver holds the leases, writes the offline partition with the engine's own means, hands `RowWriter` to the workers
and adds up what they tell. A worker needs Arrow and the Redis client, neither Feast nor the repository. Rows that are
there already are not written again, so that a task, or a whole publish, can be run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa

from kellm_features.errors import StoreError
from kellm_features.store.backends import Namespace, OnlineBackend, open_backend
from kellm_features.store.catalog import Version, ViewVersion, utc_now
from kellm_features.store.definitions import apply_definitions
from kellm_features.store.layout import DATA, IdType
from kellm_features.store.partitions import check_version
from kellm_features.store.publish import (
    EPOCH,
    SPECS,
    begin_version,
    finish_version,
    online_namespace,
    partition_path,
    sole_publisher,
)
from kellm_features.store.repo import OnlineConfig, read_online_config

COUNTS = pa.schema([("rows", pa.int64()), ("written", pa.int64())])
"""What a worker tells of each batch: rows seen, and how many of them were not there yet."""


@dataclass(frozen=True)
class RowWriter:
    """Writes batches of one view to its namespace; goes to the workers, with the store's address and password."""

    config: OnlineConfig
    namespace: Namespace
    event_us: int

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Batches with the join key and all features in, batches of `COUNTS` out."""
        backend = open_backend(self.config)
        try:
            for batch in batches:
                written = backend.write(self.namespace, batch, self.event_us) if len(batch) else 0
                yield pa.RecordBatch.from_pydict({"rows": [len(batch)], "written": [written]}, schema=COUNTS)
        finally:
            backend.close()


@dataclass(frozen=True)
class Table:
    """What the driver knows of one view's rows before they are written."""

    rows: int
    dim: int


class Publishing:
    """A version that is being published by workers."""

    def __init__(
        self, config: OnlineConfig, backend: OnlineBackend, version: Version, previous: Version | None
    ) -> None:
        """See `publishing`."""
        self.version = version
        self._config = config
        self._backend = backend
        self._previous = previous

    def folder(self, view: str) -> str:
        """Where the view's partition belongs: a folder of Parquet files in the columns of `ViewSpec.arrow`."""
        return partition_path(self._config.repo, self.version.views[view].file)

    def replaced(self, view: str) -> str | None:
        """The partition of the version published last: ids that it has and this one lacks are to be withdrawn."""
        held = self._previous.views.get(view) if self._previous else None
        return partition_path(self._config.repo, held.file) if held else None

    def writer(self, view: str) -> RowWriter:
        """What the workers apply to the view's rows."""
        held = self.version.views[view]
        namespace = online_namespace(self._config.project, self.version, view)
        return RowWriter(self._config, namespace, (held.event - EPOCH) // _MICROSECOND)

    def finish(self, rows: Mapping[str, int]) -> Version:
        """Note the version as published.

        Args:
            rows: view -> rows that the workers saw.

        Raises:
            StoreError: it is another number than was announced.
        """
        for view, held in self.version.views.items():
            if rows.get(view) != held.rows:
                raise StoreError(
                    f"{rows.get(view, 0):,} rows of {view} were written and {held.rows:,} were announced: its table "
                    f"changed while it was read; publish again"
                )
        return finish_version(self._backend, self.version)


_MICROSECOND = timedelta(microseconds=1)


@contextmanager
def publishing(
    repo: Path,
    tables: Mapping[str, Table],
    *,
    version: str,
    id_type: IdType,
    created: datetime,
    data: str | None = None,
) -> Iterator[Publishing]:
    """Publish a version whose rows lie with an engine of workers.

    Args:
        repo: the Feast repository; its online store must be a Redis, which workers elsewhere can reach.
        tables: embedding view -> its size.
        version: the version's name.
        id_type: type of the ids.
        created: timestamp of the rows, in UTC; moved behind that of the versions before it where it is not.
        data: folder or URI of the offline partitions; None takes `data/` of the repository.

    Raises:
        StoreError: see `publish.publish_release`; or the version was published already, or the store is SQLite.
    """
    check_version(version)
    config = read_online_config(repo)
    if config.kind != "redis":
        raise StoreError(
            f"{config.where} is a file of this machine, which workers on others cannot reach: set online_store.type "
            f"to kellm_features.store.redis.KellmRedisOnlineStore, or run  kellm publish"
        )
    backend = open_backend(config)
    try:
        with sole_publisher(config.repo), backend.lease():
            catalog = backend.catalog()
            known = catalog.find(version)
            if known is not None and known.state != "writing":
                raise StoreError(
                    f"version {version} is {known.state} already, and a version never changes: choose a name"
                )
            applied = apply_definitions(config.repo, list(tables), id_type)
            views = {}
            for place, (view, table) in enumerate(tables.items()):
                begun = known.views.get(view) if known else None
                earlier = [v.views[view].event for v in catalog.versions if view in v.views and v.name != version]
                event = max([created, *(moment + _MICROSECOND for moment in earlier)])
                views[view] = ViewVersion(
                    number=begun.number if begun else catalog.next_number + place,
                    file=f"{data.rstrip('/') if data else DATA}/{view}/{version}.parquet",
                    rows=table.rows,
                    event=begun.event if begun else event,
                    created=begun.created if begun else event,
                    content="",
                    layout=config.layout if SPECS[view].holds_embeddings else "stock",
                    dim=table.dim,
                    ttl_s=applied.ttl_s.get(view, 0.0),
                )
            planned = Version(name=version, state="writing", id_type=id_type, started_at=utc_now(), views=views)
            begin_version(backend, planned, catalog)
            yield Publishing(config, backend, planned, catalog.latest())
    finally:
        backend.close()
