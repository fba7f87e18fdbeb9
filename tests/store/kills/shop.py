"""A repository that publishers are killed in, and the processes that publish into it."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from kellm_features import schemas
from kellm_features.store import definitions, rollout
from kellm_features.store.backends import open_backend
from kellm_features.store.catalog import Catalog
from kellm_features.store.layout import ITEM_DESCRIPTION, ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import read_online_config
from kellm_features.store.scaffold import write_feature_repo

needs_redis = (pytest.mark.redis, pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server here"))

ITEMS, USERS, DIM = 1100, 40, 8
"""More items than Redis takes in one round trip."""
T0 = datetime(2026, 3, 1, 12, tzinfo=UTC)
SEED = 20260301
STORE = str(Path(rollout.__file__).parent)
KINDS = ("sqlite", *(pytest.param(layout, marks=needs_redis) for layout in ("stock", "packed")))


def make_release(folder: Path, version: str, *, seed: int = 0, items: range = range(1, ITEMS + 1)) -> dict[str, Path]:
    """Artefacts whose vectors tell version, seed and id; descriptions are the same in all versions."""

    def table(key: str, ids: range) -> pa.Table:
        when = pa.array([T0 + timedelta(days=int(version.lstrip("v")))] * len(ids), schemas.TIMESTAMP)
        flat = pa.array(vectors(version, ids, seed).ravel())
        return pa.table(
            {
                key: list(ids),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, DIM),
                "embedding_version": [version] * len(ids),
                "model_id": ["adapter"] * len(ids),
                "content_hash": [f"{version}-{i}" for i in ids],
                "event_timestamp": when,
                "created_timestamp": when,
            }
        )

    texts = pa.table(
        {
            "item_id": list(items),
            "description": [f"About {i}." for i in items],
            "description_source": ["template"] * len(items),
            "prompt_hash": ["p"] * len(items),
            "model_id": ["template-1"] * len(items),
            "grounding": pa.nulls(len(items), pa.float32()),
            "prompt_tokens": pa.array([0] * len(items), pa.int32()),
            "completion_tokens": pa.array([0] * len(items), pa.int32()),
            "factors": pa.nulls(len(items), pa.map_(pa.string(), pa.string())),
        }
    )
    written = {
        ITEM_EMBEDDING.name: (table("item_id", items), schemas.ITEM_EMBEDDINGS),
        USER_EMBEDDING.name: (table("user_id", range(1, USERS + 1)), schemas.USER_EMBEDDINGS),
        ITEM_DESCRIPTION.name: (texts, schemas.ITEM_DESCRIPTIONS),
    }
    paths = {view: folder / f"{version}-{seed}" / f"{view}.parquet" for view in written}
    for view, (rows, schema) in written.items():
        schemas.write_table(rows, paths[view], schema)
    return paths


def vectors(version: str, ids: Any, seed: int = 0) -> np.ndarray:
    """(N, DIM) float32 that both layouts keep to the bit: a version's row of an id is no other row."""
    ids = np.asarray(ids)
    mixed = (ids[:, None] * 31 + np.arange(DIM) * 7 + int(version.lstrip("v")) * 101 + seed * 577) % 1999
    return (mixed - 999).astype(np.float16).astype(np.float32)


@dataclass
class Shop:
    """A repository, its online store and the publishers of it."""

    repo: Path
    folder: Path
    spawn: Callable[..., Job]
    server: RedisServer | None = None
    releases: dict[tuple[str, int], dict[str, Path]] = field(default_factory=dict)

    def release(self, version: str, seed: int = 0) -> dict[str, str]:
        if (version, seed) not in self.releases:
            self.releases[version, seed] = make_release(self.folder, version, seed=seed)
        return {view: str(path) for view, path in self.releases[version, seed].items()}

    def start(self, call: str, version: str = "", seed: int = 0, **job: Any) -> Job:
        inputs = self.release(version, seed) if call == "publish" else {}
        return self.spawn(call=call, inputs=inputs, **{"repo": str(self.repo), **job})

    def run(self, call: str, version: str = "", seed: int = 0, **job: Any) -> dict[str, Any]:
        return self.start(call, version, seed, **job).result()

    def publish(self, version: str, *, promote: bool = False) -> None:
        assert self.run("publish", version) == {"done": version}
        if promote:
            rollout.promote(self.repo, version, force=True)

    def catalog(self) -> Catalog:
        with self.backend() as backend:
            return backend.catalog()

    @contextmanager
    def backend(self) -> Iterator[Any]:
        backend = open_backend(read_online_config(self.repo))
        try:
            yield backend
        finally:
            backend.close()

    def state(self, version: str) -> str:
        """What `kellm status` says of a version."""
        return next((line.state for line in rollout.status(self.repo).versions if line.name == version), "absent")

    def assert_serves(self, version: str, *, seed: int = 0, pinned: bool = False) -> None:
        """All rows of a version and no other, to the bit."""
        assert pinned or rollout.status(self.repo).active == version
        for view, count in ((ITEM_EMBEDDING.name, ITEMS), (USER_EMBEDDING.name, USERS)):
            ids = np.arange(1, count + 1)
            with EmbeddingReader.from_repo(self.repo, view, version=version if pinned else None) as reader:
                got = reader.get(np.append(ids, 10**9))
            assert got.version == version
            assert got.found.tolist() == [True] * count + [False]
            np.testing.assert_array_equal(got.values[:-1], vectors(version, ids, seed))
            assert np.isnan(got.values[-1]).all()

    def assert_tidy(self) -> None:
        """Nothing lies about that the catalog does not know of."""
        held = {f"{name}_v{view.number}" for v in self.catalog().versions for name, view in v.views.items()}
        assert self.namespaces() == held
        self.assert_no_staging()

    def assert_no_staging(self) -> None:
        assert [path.name for path in self.repo.rglob("*") if path.suffix in (".new", ".tmp")] == []

    def partitions(self) -> set[str]:
        return {str(path.relative_to(self.repo / "data")) for path in self.repo.rglob("*.parquet")}

    @contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        assert self.server
        with self.server.client() as client:
            yield client

    def rows_of(self, namespace: str) -> int:
        """Rows of a namespace in Feast's layout, counted without kellm."""
        if self.server is None:
            with closing(sqlite3.connect(self.repo / "data" / "online.db")) as db:
                return db.execute(f"SELECT count(DISTINCT entity_key) FROM kellm_{namespace}").fetchone()[0]
        with self.redis() as client:
            keys = [key for key in client.scan_iter(count=1000) if not key.startswith(b"kellm:")]
            return sum(client.hexists(key, f"_ts:{namespace}") for key in keys)

    def lose_rows(self, namespace: str) -> None:
        """Delete some rows behind kellm's back: the first 100 that the store names."""
        if self.server is None:
            with closing(sqlite3.connect(self.repo / "data" / "online.db", isolation_level=None)) as db:
                some = f"SELECT DISTINCT entity_key FROM kellm_{namespace} LIMIT 100"
                db.execute(f"DELETE FROM kellm_{namespace} WHERE entity_key IN ({some})")
            return
        with self.redis() as client:
            packed = list(client.scan_iter(match=f"kellm:kellm:{namespace}:*", count=1000))
            hashes = [key for key in client.scan_iter(count=1000) if not key.startswith(b"kellm:")]
            client.delete(*(packed or [key for key in hashes if client.hexists(key, f"_ts:{namespace}")])[:100])

    def namespaces(self) -> set[str]:
        """Namespaces that have rows online, found without kellm."""
        if self.server is None:
            with closing(sqlite3.connect(self.repo / "data" / "online.db")) as db:
                tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return {name.removeprefix("kellm_") for name in tables if name != "kellm_catalog"}
        with self.redis() as client, client.pipeline(transaction=False) as asked:
            keys = list(client.scan_iter(count=1000))
            for key in keys:
                if not key.startswith(b"kellm:"):
                    asked.hkeys(key)
            times = {name.decode() for fields in asked.execute() for name in fields if name.startswith(b"_ts:")}
        packed = {key.split(b":")[2].decode() for key in keys if key.startswith(b"kellm:kellm:")}
        return packed | {name.removeprefix("_ts:") for name in times}


@dataclass
class Job:
    """A publisher in a process of its own."""

    pid: int
    out: Path

    def wait(self, timeout_s: float = 60.0) -> None:
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            assert select.select([handle], [], [], timeout_s)[0], f"process {self.pid} did not end"
        finally:
            os.close(handle)

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.wait()

    def result(self) -> dict[str, Any]:
        """`{"done": ...}`, `{"error": ...}`, or nothing where it was killed."""
        self.wait()
        return json.loads(self.out.read_text()) if self.out.exists() else {}

    def wait_paused(self) -> None:
        """Until it stands at the line where it was to pause."""
        deadline = time.monotonic() + 30
        while not self.out.with_suffix(".paused").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class RedisServer:
    """A redis-server on a free port of loopback that writes every command to disk before it answers."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.folder = folder
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.exceptions.RedisError:  # not there yet, or still reading its log
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, retry=None)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def write_repo(repo: Path, online: str = "") -> None:
    """A repository whose definitions count as applied: `feast apply` costs seconds and has its own tests."""
    write_feature_repo(repo)
    if online:
        yaml = (repo / "feature_store.yaml").read_text()
        changed = re.sub(r"(?m)^online_store:\n(  .*\n)+", f"online_store:\n{online}", yaml)
        assert changed != yaml
        (repo / "feature_store.yaml").write_text(changed)
    applied = definitions.Applied(
        definitions=definitions._hash_definitions(repo),
        id_types=dict.fromkeys((ITEM_EMBEDDING.name, USER_EMBEDDING.name, ITEM_DESCRIPTION.name), "int64"),
        ttl_s={},
    )
    (repo / "data").mkdir(exist_ok=True)
    (repo / "data" / definitions.APPLIED).write_text(applied.model_dump_json())


def entry(function: Callable[..., Any], times: int = 1) -> list[Any]:
    """The n-th call of a function of the store, as a place."""
    code = function.__code__
    return [f"{code.co_filename[len(STORE) :]}:{code.co_firstlineno} call", times]


def line(file: str, text: str) -> list[Any]:
    """The one line of a file of the store that holds a text and calls something of Python's own, as a place."""
    (number,) = [n for n, held in enumerate(Path(STORE, file).read_text().splitlines(), 1) if text in held]
    return [f"/{file}:{number} c_call", 1]
