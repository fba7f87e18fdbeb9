"""Versions in SQLite: one table per namespace in Feast's columns, and the catalog in a table of its own.

The database is in WAL mode: a request reads catalog and rows in one snapshot, whatever is written beside it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from kellm_features.errors import StoreError
from kellm_features.store import wire
from kellm_features.store.backends import Id, Namespace, Rows
from kellm_features.store.catalog import Catalog, parse_catalog
from kellm_features.store.repo import OnlineConfig

IDS_PER_QUERY = 30_000
"""SQLite takes 32,766 parameters in one statement."""
WRITE_ROWS = 2000
"""Rows of a transaction."""
BUSY_S = 30.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INHERITED: list[sqlite3.Connection] = []
"""Connections of the parent process, kept from the garbage collector: SQLite forbids a fork even to close them."""


class SqliteBackend:
    """The online store of a repository whose feature_store.yaml names SQLite."""

    def __init__(self, config: OnlineConfig) -> None:
        if config.path is None:
            raise StoreError("an online store on SQLite needs online_store.path")
        self.where = config.where
        self._path = config.path
        self._project = config.project
        self._local = threading.local()

    def catalog(self) -> Catalog:
        """The catalog; an empty one where nothing was ever published."""
        if not self._path.exists():
            return Catalog()
        with self._guarded() as db:
            return parse_catalog(self._body(db), self.where)

    def token(self) -> bytes | None:
        """What the catalog's state is told by; None where there is no catalog."""
        if not self._path.exists():
            return None
        with self._guarded() as db:
            return self._token(db)

    def swap(self, before: Catalog, after: Catalog) -> bool:
        """Replace the catalog if it still is `before`; whether it was."""
        expected = None if before.revision == 0 else before.model_dump_json()
        with self._guarded(create=True) as db, _transaction(db):
            db.execute("CREATE TABLE IF NOT EXISTS kellm_catalog (project TEXT PRIMARY KEY, token BLOB, body TEXT)")
            if self._body(db) != expected:
                return False
            row = (self._project, after.token(), after.model_dump_json())
            db.execute("INSERT OR REPLACE INTO kellm_catalog VALUES (?, ?, ?)", row)
        return True

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Nothing to do: the database is a file of this machine, and the repository's own lock is enough."""
        yield

    def write(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        """Write rows that are not there yet; how many were not.

        In small transactions: a promotion beside it waits for the one under way.
        """
        return sum(
            self._write(namespace, batch.slice(start, WRITE_ROWS), event_us)
            for start in range(0, len(batch), WRITE_ROWS)
        )

    def _write(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        spec = namespace.spec
        table = _quoted(f"{self._project}_{namespace.name}")
        keys = self._keys(namespace).encode(batch.column(spec.join_key).to_pylist())
        event = (_EPOCH + timedelta(microseconds=event_us)).isoformat(timespec="microseconds")
        rows = []
        for name, kind in spec.features:
            column = batch.column(name)
            texts = column.to_pylist() if kind == "string" else [None] * len(batch)
            values = wire.encode_column(column, kind)
            rows += [(k, name, value, text, event) for k, value, text in zip(keys, values, texts, strict=True)]
        with self._guarded(create=True) as db, _transaction(db):
            # `datetime` and not Feast's `timestamp`: that one is read in the time zone of the process. Both are
            # converted by its client, and this one keeps the microseconds.
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {table} (entity_key BLOB, feature_name TEXT, value BLOB, value_text TEXT, "
                f"vector_value BLOB, event_ts datetime, created_ts datetime, PRIMARY KEY (entity_key, feature_name))"
            )
            written = db.executemany(
                f"INSERT INTO {table} (entity_key, feature_name, value, value_text, event_ts) VALUES (?, ?, ?, ?, ?) "
                f"ON CONFLICT DO UPDATE SET value = excluded.value, value_text = excluded.value_text, "
                f"event_ts = excluded.event_ts WHERE excluded.event_ts > event_ts",
                rows,
            ).rowcount
        return written // len(spec.features)

    def fetch(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """Embeddings and the token, read in one snapshot."""
        if not self._path.exists():
            return Rows(None, [None] * len(ids), [None] * len(ids))
        table = _quoted(f"{self._project}_{namespace.name}")
        keys = self._keys(namespace).encode(ids)
        feature = namespace.spec.features[0][0]
        found: dict[bytes, tuple[bytes, str]] = {}
        with self._guarded() as db, _transaction(db, "DEFERRED"):
            token = self._token(db)
            if token is None:
                return Rows(None, [None] * len(ids), [None] * len(ids))
            try:
                for start in range(0, len(keys), IDS_PER_QUERY):
                    part = keys[start : start + IDS_PER_QUERY]
                    query = (
                        f"SELECT entity_key, value, event_ts FROM {table} "
                        f"WHERE feature_name = ? AND entity_key IN ({','.join('?' * len(part))})"
                    )
                    found.update((row[0], row[1:]) for row in db.execute(query, (feature, *part)))
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):  # pruned since the caller looked: the token tells
                    raise
        moments = {time: datetime.fromisoformat(time).timestamp() for time in {row[1] for row in found.values()}}
        rows = [found.get(key) for key in keys]
        return Rows(token, [row and row[0] for row in rows], [row and moments[row[1]] for row in rows])

    async def fetch_async(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """The same without blocking the event loop."""
        return await asyncio.to_thread(self.fetch, namespace, ids)

    def vectors(self, namespace: Namespace) -> tuple[list[bytes], list[bytes]]:
        """All entity keys of a namespace of embeddings, and as many serialized vectors."""
        table = _quoted(f"{self._project}_{namespace.name}")
        with self._guarded() as db:
            feature = namespace.spec.features[0][0]
            rows = db.execute(f"SELECT entity_key, value FROM {table} WHERE feature_name = ?", (feature,)).fetchall()
        return [key for key, _ in rows], [value for _, value in rows]

    def drop(self, namespace: Namespace) -> int:
        """Drop the namespace's table."""
        table = _quoted(f"{self._project}_{namespace.name}")
        with self._guarded() as db, _transaction(db):
            try:
                (rows,) = db.execute(f"SELECT count(DISTINCT entity_key) FROM {table}").fetchone()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return 0
                raise
            db.execute(f"DROP TABLE {table}")
        return int(rows)

    def clear(self) -> None:
        """Delete the catalog."""
        with self._guarded(create=True) as db, _transaction(db):
            db.execute("DROP TABLE IF EXISTS kellm_catalog")

    def close(self) -> None:
        """Close this thread's connection."""
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is not None:
            if self._local.pid == os.getpid():
                db.close()
            else:
                _INHERITED.append(db)
        self._local.db = None

    async def aclose(self) -> None:
        """Nothing to do: threads that waited for an event loop close theirs as they end."""

    def _keys(self, namespace: Namespace) -> wire.EntityKeys:
        return wire.EntityKeys(namespace.spec.join_key, namespace.id_type)

    def _body(self, db: sqlite3.Connection) -> str | None:
        body = self._catalog_column(db, "body")
        return None if body is None else str(body)

    def _token(self, db: sqlite3.Connection) -> bytes | None:
        token = self._catalog_column(db, "token")
        return None if token is None else bytes(token)

    def _catalog_column(self, db: sqlite3.Connection, column: str) -> Any:
        try:
            row = db.execute(f"SELECT {column} FROM kellm_catalog WHERE project = ?", (self._project,)).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None
            raise
        return row[0] if row else None

    @contextmanager
    def _guarded(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            yield self._connected(create)
        except sqlite3.Error as error:
            raise StoreError(
                f"the online store {self.where} failed ({type(error).__name__}: {error}): free some disk where it is "
                f"full, and try again"
            ) from error

    def _connected(self, create: bool) -> sqlite3.Connection:
        """This thread's connection; a fork opens its own, and so does everybody where the file was replaced."""
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None or self._local.pid != os.getpid() or self._local.inode != file_inode(self._path):
            self.close()
            if create:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # what is told to be published survives a power cut
            self._local.db, self._local.pid, self._local.inode = db, os.getpid(), file_inode(self._path)
        return db


def file_inode(path: Path) -> int:
    """The file's identity; 0 where there is none. A restored backup or a teardown changes it under a live reader."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


@contextmanager
def _transaction(db: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    db.execute(f"BEGIN {mode}")
    try:
        yield
        db.commit()
    except BaseException:
        db.rollback()
        raise


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
