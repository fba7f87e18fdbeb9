"""Publishers that are killed, starved or not alone: what is served stays whole, and the next publish completes.

Publishers run as processes of their own, forked from one that has everything imported (this file, run as a script):
a kill is a SIGKILL, a full disk is RLIMIT_FSIZE, Redis is a redis-server. Every kill is at a line of the store's
code, taken from a list that a first publish made, or at a random time.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
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
from kellm_features.errors import KellmError, StoreError
from kellm_features.store import definitions, publish, rollout
from kellm_features.store.backends import open_backend, update
from kellm_features.store.backends.redis import LEASE_S, RedisBackend
from kellm_features.store.catalog import Catalog, utc_now
from kellm_features.store.layout import ITEM_DESCRIPTION, ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import REDIS_TYPE, read_online_config
from kellm_features.store.scaffold import write_feature_repo

pytestmark = pytest.mark.feast
needs_redis = (pytest.mark.redis, pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server here"))

ITEMS, USERS, DIM = 1100, 40, 8
"""More items than Redis takes in one round trip."""
T0 = datetime(2026, 3, 1, 12, tzinfo=UTC)
SEED = 20260301
STORE = str(Path(rollout.__file__).parent)
KINDS = ("sqlite", *(pytest.param(layout, marks=needs_redis) for layout in ("stock", "packed")))


# What a release is made of, and where it is published.


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
        held = {view.namespace(name) for v in self.catalog().versions for name, view in v.views.items()}
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


# Processes.


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


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """`spawn(call=..., repo=..., ...)` starts a publisher; see `work` below for what it can be told."""
    folder = tmp_path_factory.mktemp("jobs")
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        started = 0

        def start(**job: Any) -> Job:
            nonlocal started
            started += 1
            out = folder / f"{started}.json"
            nursery.stdin.write(json.dumps(job | {"out": str(out)}) + "\n")
            nursery.stdin.flush()
            return Job(int(nursery.stdout.readline()), out)

        yield start
        nursery.stdin.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


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


@pytest.fixture
def open_shop(request: pytest.FixtureRequest, tmp_path: Path, spawn: Callable[..., Job]) -> Callable[..., Shop]:
    """`open_shop(kind)`: a repository with v1 published and promoted, on SQLite or on an empty Redis."""

    def open_(kind: str) -> Shop:
        server = None
        online = ""
        if kind != "sqlite":
            server = request.getfixturevalue("server")
            with server.client() as client:
                client.flushall()
                client.config_set("maxmemory", "0")
            online = f"  type: {REDIS_TYPE}\n  connection_string: 127.0.0.1:{server.port}\n  layout: {kind}\n"
        write_repo(tmp_path / "repo", online)
        shop = Shop(tmp_path / "repo", tmp_path / "releases", spawn, server)
        shop.publish("v1", promote=True)
        return shop

    return open_


# Kills.


def entry(function: Callable[..., Any], times: int = 1) -> list[Any]:
    """The n-th call of a function of the store, as a place."""
    code = function.__code__
    return [f"{code.co_filename[len(STORE) :]}:{code.co_firstlineno} call", times]


def line(file: str, text: str) -> list[Any]:
    """The one line of a file of the store that holds a text and calls something of Python's own, as a place."""
    (number,) = [n for n, held in enumerate(Path(STORE, file).read_text().splitlines(), 1) if text in held]
    return [f"/{file}:{number} c_call", 1]


def places_of(shop: Shop, call: str, version: str = "", **job: Any) -> list[list[Any]]:
    """Every line of the store's code at which such a run calls anything, with the number of times that it does."""
    told = shop.run(call, version, watch=True, **job)
    return [[place, times] for place, times in told["places"].items()]


def sample(places: list[list[Any]], count: int, rng: random.Random) -> list[list[Any]]:
    """Lines spread over the run, each with the one of its times at which to act."""
    step = len(places) / count
    chosen = [places[int((i + rng.random()) * step)] for i in range(count)]
    return [[place, rng.randint(1, times)] for place, times in chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_a_publisher_killed_anywhere_leaves_the_active_version_and_is_completed(
    open_shop: Callable[..., Shop], kind: str
) -> None:
    shop, rng = open_shop(kind), random.Random(SEED)
    shop.release("v2")
    before = time.monotonic()
    shop.publish("v2")
    took_s = time.monotonic() - before
    places = places_of(shop, "publish", "v3")
    rollout.promote(shop.repo, "v3", force=True)
    exact, anytime = {"sqlite": (14, 6), "stock": (10, 4), "packed": (4, 2)}[kind]
    kills = [{"at": place, "then": "kill"} for place in sample(places, exact, rng)] + [{}] * anytime
    served, states, killed = "v3", set(), 0
    for number, kill in enumerate(kills, start=4):
        version = f"v{number}"
        shop.release(version)
        job = shop.start("publish", version, **kill)
        if not kill:
            time.sleep(rng.random() * took_s)
            job.kill()
        killed += not job.result()
        state = shop.state(version)
        states.add(state)
        shop.assert_serves(served)
        if state == "published":
            shop.assert_serves(version, pinned=True)
        else:
            with pytest.raises(StoreError, match=r"not published to its end|holds no version"):
                EmbeddingReader.from_repo(shop.repo, version=version)
            with pytest.raises(StoreError, match=r"not published to its end|holds no version"):
                rollout.promote(shop.repo, version, force=True)
        shop.publish(version, promote=True)
        shop.assert_serves(version)
        shop.assert_serves(served, pinned=True)
        shop.assert_tidy()
        served = version
        if number % 5 == 0:
            rollout.prune(shop.repo, 1, grace_s=0)
            shop.assert_serves(served)
    assert killed >= exact - 1  # a line that the first publish came by may be spared a later one
    assert {"absent", "unfinished"} <= states
    assert len({(view.number, name) for v in shop.catalog().versions for name, view in v.views.items()}) == len(
        shop.namespaces()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_prune_goes_on_and_spares_what_is_shared(open_shop: Callable[..., Shop], kind: str) -> None:
    shop, rng = open_shop(kind), random.Random(SEED)
    shop.publish("v2", promote=True)
    descriptions = {version.views[ITEM_DESCRIPTION.name].number for version in shop.catalog().versions}
    assert len(descriptions) == 1  # equal rows are held once
    places = places_of(shop, "prune")  # and v1 is gone
    for number, kill in enumerate(sample(places, 5, rng), start=3):
        version = f"v{number}"
        shop.publish(version, promote=True)
        assert shop.run("prune", at=kill, then="kill") == {}
        shop.assert_serves(version)
        doomed = shop.state(f"v{number - 1}")
        assert doomed in ("published", "pruning", "absent")
        if doomed == "pruning":
            with pytest.raises(StoreError, match="it is being pruned"):
                rollout.promote(shop.repo, f"v{number - 1}", force=True)
        rollout.prune(shop.repo, 1, grace_s=0)
        assert [line.name for line in rollout.status(shop.repo).versions] == [version]
        shop.assert_serves(version)
        shop.assert_tidy()
    assert {version.views[ITEM_DESCRIPTION.name].number for version in shop.catalog().versions} == descriptions
    assert shop.rows_of(f"{ITEM_DESCRIPTION.name}_v{descriptions.pop()}") == ITEMS


def test_prune_spares_the_active_version_and_what_was_active_lately(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop("sqlite")
    shop.publish("v2", promote=True)
    assert rollout.prune(shop.repo, 1, grace_s=600) == []  # requests may still be reading v1
    rollout.rollback(shop.repo)
    shop.publish("v3")
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v2"]
    shop.assert_serves("v1")
    shop.assert_serves("v3", pinned=True)
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_an_unfinished_version_leaves_nothing_of_it(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    before = shop.partitions()
    # The partition lies aside, complete and not yet renamed; its rows are not written.
    assert shop.run("publish", "v2", at=line("partitions.py", "os.fsync("), then="kill") == {}
    assert any(path.name.endswith(".new") for path in shop.repo.rglob("*"))
    assert rollout.prune(shop.repo, 1) == ["v2"]
    shop.assert_tidy()
    assert shop.partitions() == before
    assert shop.run("publish", "v2", at=entry(Catalog.finish), then="kill") == {}
    assert shop.state("v2") == "unfinished"
    assert rollout.prune(shop.repo, 1) == ["v2"]
    shop.assert_tidy()
    assert shop.partitions() == before
    shop.assert_serves("v1")


def test_partitions_of_a_pruned_version_outlive_an_unfinished_second_publish_of_it(
    open_shop: Callable[..., Shop],
) -> None:
    """They are history to train on, and v2 shares one of them."""
    shop = open_shop("sqlite")
    shop.publish("v2", promote=True)
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v1"]
    before = shop.partitions()
    assert {f"{view}/v1.parquet" for view in (ITEM_EMBEDDING.name, ITEM_DESCRIPTION.name)} <= before
    for _ in range(2):  # the second attempt takes the first one over
        assert shop.run("publish", "v1", at=entry(publish._write_rows), then="kill") == {}
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v1"]
    assert shop.partitions() == before
    shop.publish("v1")
    shop.assert_serves("v1", pinned=True)
    shop.assert_serves("v2")


def test_a_publisher_killed_while_feast_applies_is_completed(tmp_path: Path, spawn: Callable[..., Job]) -> None:
    """The first publish of all; what Feast's own process still does then is waited for or does no harm."""
    shop = Shop(tmp_path / "repo", tmp_path / "releases", spawn)
    job = shop.start("publish", "v1")
    deadline = time.monotonic() + 60
    while not (shop.repo / "data" / "registry.db").exists():  # in the middle of it
        assert time.monotonic() < deadline
        time.sleep(0.002)
    job.kill()
    assert rollout.status(shop.repo).versions == ()
    shop.publish("v1", promote=True)
    shop.assert_serves("v1")


# Two publishers.


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_publishers_one_wins_and_the_other_says_who(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    first = shop.start("publish", "v2", at=entry(publish._write_rows), then="pause")
    first.wait_paused()
    told = shop.run("publish", "v3")["error"]
    assert re.search(rf"another publish into .*repo is running \(process {first.pid} since .* UTC\): wait", told)
    assert "is running" in shop.run("prune")["error"]
    shop.assert_serves("v1")
    assert shop.state("v2") == "unfinished"
    rollout.promote(shop.repo, "v1")  # what is served can be changed meanwhile
    first.resume()
    assert first.result() == {"done": "v2"}
    shop.publish("v3")
    for version in ("v2", "v3"):
        shop.assert_serves(version, pinned=True)
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_repositories_of_one_redis_take_turns(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    shutil.copytree(shop.repo, shop.folder / "second")
    second = {"repo": str(shop.folder / "second")}
    first = shop.start("publish", "v2", at=entry(publish._write_rows), then="pause")
    first.wait_paused()
    told = shop.run("publish", "v3", **second)["error"]
    host = re.escape(socket.gethostname())
    assert re.search(rf"into Redis 127.0.0.1:\d+ is running \({host} process {first.pid} since [\d:]+ UTC\)", told)
    first.kill()  # a dead publisher's claim on this machine ends with it
    before = time.monotonic()
    assert shop.run("publish", "v3", **second) == {"done": "v3"}
    assert time.monotonic() - before < LEASE_S
    shop.publish("v2")
    for version in ("v2", "v3"):
        shop.assert_serves(version, pinned=True)
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("stands", [publish._plan, publish._write_rows], ids=["planning", "writing"])
def test_a_publisher_that_slept_through_its_claim_publishes_nothing(
    open_shop: Callable[..., Shop], kind: str, stands: Callable[..., Any]
) -> None:
    """A laptop lid, a paused container: another took over, under the same name with other rows."""
    shop = open_shop(kind)
    shutil.copytree(shop.repo, shop.folder / "second")
    sleeper = shop.start("publish", "v2", at=entry(stands), then="pause")
    sleeper.wait_paused()
    with shop.redis() as client:
        assert client.delete("kellm:{kellm}:lease") == 1  # as its time does
    other = shop.start(
        "publish", "v2", seed=1, repo=str(shop.folder / "second"), at=entry(Catalog.finish), then="pause"
    )
    other.wait_paused()
    sleeper.resume()
    assert re.search(r"version v2 .*another publish", sleeper.result()["error"])
    assert shop.state("v2") == "unfinished"
    other.resume()
    assert other.result() == {"done": "v2"}
    shop.assert_serves("v2", seed=1, pinned=True)
    shop.assert_serves("v1")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_claim_in_the_name_of_this_very_process_is_taken_over(open_shop: Callable[..., Shop], kind: str) -> None:
    """Process ids repeat: in a container that is restarted the next publisher has the dead one's."""
    shop = open_shop(kind)
    left = f"{socket.gethostname()} process {os.getpid()} since 00:00:00 UTC 0123456789abcdef"
    with shop.redis() as client:
        client.set("kellm:{kellm}:lease", left, px=LEASE_S * 1000)
    with shop.backend() as backend, shop.backend() as rival:
        with backend.lease(), pytest.raises(StoreError, match=f"process {os.getpid()}"), rival.lease():
            pass
        with rival.lease():
            pass


@pytest.mark.parametrize("kind", KINDS)
def test_promotions_and_rollbacks_of_four_processes_are_all_counted(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    names = ["v1", "v2", "v3", "v4"]
    for name in names[1:]:
        shop.publish(name)
    start = shop.catalog()
    jobs = [shop.start("race", names=names, times=25, luck=luck) for luck in range(4)]
    made = sorted(change for job in jobs for change in job.result()["done"])
    end = shop.catalog()
    # Every change was made on top of the one before it: no two of one revision, none missing.
    assert [revision for revision, _, _ in made] == list(range(start.revision + 1, end.revision + 1))
    assert len(made) > 25
    served = [entry.version for entry in start.history]
    for _, name, active in made:
        if name is None:
            served.pop()
        else:
            served = [other for other in served if other != name] + [name]
        assert active == served[-1]
    assert [entry.version for entry in end.history] == served
    assert end.active == served[-1]
    assert set(end.retired) == {"v1", *(active for _, _, active in made)} - {end.active}
    times = [entry.since for entry in end.history]
    assert times == sorted(times)
    shop.assert_serves(served[-1])


# Stores that fail.


@pytest.mark.parametrize("kind", KINDS[1:])
def test_redis_killed_during_a_publish(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    assert shop.server
    write = RedisBackend._write_packed if kind == "packed" else RedisBackend._write_stock
    reader = EmbeddingReader.from_repo(shop.repo)
    served = "v1"
    places = [entry(publish._plan), entry(publish._write_partitions), entry(write, 2), entry(Catalog.finish)]
    for number, place in enumerate(places, start=2):
        version = f"v{number}"
        told = shop.run("publish", version, at=place, then=shop.server.process.pid)["error"]
        assert re.match(r"StoreError: Redis 127.0.0.1:\d+ did not answer \(ConnectionError: .*check that it runs", told)
        shop.server.process.wait()
        with pytest.raises(StoreError, match=r"did not answer"):
            reader.get([1])
        with pytest.raises(StoreError, match=r"did not answer"):
            rollout.status(shop.repo)
        shop.server.start()
        np.testing.assert_array_equal(reader.get([1, 2]).values, vectors(served, [1, 2]))
        shop.assert_serves(served)
        assert shop.state(version) == ("absent" if number == 2 else "unfinished")
        shop.publish(version, promote=True)
        shop.assert_serves(version)
        shop.assert_tidy()
        assert reader.get([1]).version == version
        served = version
    reader.close()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_full_redis_refuses_a_publish_and_nothing_else(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    shop.publish("v2", promote=True)
    with shop.redis() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 100_000)
    told = shop.run("publish", "v3")["error"]
    assert re.match(r"StoreError: Redis 127.0.0.1:\d+ is full \(.*maxmemory.*kellm prune", told)
    assert shop.state("v3") == "unfinished"
    shop.assert_serves("v2")
    with shop.redis() as client:
        client.config_set("maxmemory", 1_000_000)  # below what is used
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("any", "thing")
    assert rollout.rollback(shop.repo).name == "v1"
    shop.assert_serves("v1")
    rollout.promote(shop.repo, "v2", force=True)
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v1", "v3"]
    shop.assert_serves("v2")
    with shop.redis() as client:
        client.config_set("maxmemory", 0)
    shop.publish("v3", promote=True)
    shop.assert_serves("v3")
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_rollback_whose_answer_is_lost_is_done_once(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    assert shop.server
    for version in ("v2", "v3"):
        shop.publish(version, promote=True)
    revision = shop.catalog().revision
    with deaf_proxy(shop.server.port, b"EVAL") as (port, cuts):
        write_repo(shop.folder / "far", f"  type: {REDIS_TYPE}\n  connection_string: 127.0.0.1:{port}\n")
        assert rollout.rollback(shop.folder / "far").name == "v2"
    assert cuts == [1]
    assert shop.catalog().revision == revision + 1
    shop.assert_serves("v2")


@contextmanager
def deaf_proxy(server_port: int, word: bytes) -> Iterator[tuple[int, list[int]]]:
    """A way to a server that cuts the connection once, after a request with that word was answered."""
    cuts: list[int] = []

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", server_port)) as behind:
            ends = {client: behind, behind: client}
            asked = False
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(1 << 16)
                    asked = asked or (end is client and word in data)
                    if not data:
                        return
                    if end is behind and asked and not cuts:
                        cuts.append(1)
                        return
                    ends[end].sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # closed
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], cuts
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("what", ["partition", "rows"])
def test_a_full_disk_refuses_a_publish(open_shop: Callable[..., Shop], what: str) -> None:
    shop = open_shop("sqlite")
    assert 36_000 < (shop.repo / "data" / ITEM_EMBEDDING.name / "v1.parquet").stat().st_size < 200_000
    limit = {"partition": 36_000, "rows": 200_000}[what]  # the index of SQLite's log takes 32,768
    told = shop.run("publish", "v2", fsize=limit)["error"]
    expected = {
        "partition": r"item_knowledge_embedding/v2.parquet cannot be written \(.*[Ff]ile too large.*make room",
        "rows": r"the online store .*online.db failed \(OperationalError: .*free some disk",
    }[what]
    assert re.search(expected, told)
    assert told.startswith("StoreError")
    assert shop.state("v2") == "unfinished"
    shop.assert_serves("v1")
    if what == "partition":
        assert not (shop.repo / "data" / ITEM_EMBEDDING.name / "v2.parquet").exists()
        shop.assert_no_staging()
    shop.publish("v2", promote=True)
    shop.assert_serves("v2")
    shop.assert_tidy()


# Publishing again.


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_a_version_again_repairs_it_and_never_changes_it(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    partition = shop.repo / "data" / ITEM_EMBEDDING.name / "v1.parquet"
    written = (partition.read_bytes(), partition.stat().st_mtime_ns)
    namespace = f"{ITEM_EMBEDDING.name}_v{shop.catalog().get('v1').views[ITEM_EMBEDDING.name].number}"
    shop.lose_rows(namespace)
    with EmbeddingReader.from_repo(shop.repo) as reader:
        assert 0 < reader.get(range(1, ITEMS + 1)).found.sum() < ITEMS
    before = shop.catalog()
    told = shop.run("publish", "v1", seed=1)["error"]
    assert "was published on" in told
    assert f"with other rows of {ITEM_EMBEDDING.name}, {USER_EMBEDDING.name}, and a version never changes" in told
    with EmbeddingReader.from_repo(shop.repo) as reader:
        assert 0 < reader.get(range(1, ITEMS + 1)).found.sum() < ITEMS
    shop.publish("v1")
    shop.assert_serves("v1")
    assert shop.catalog() == before
    assert (partition.read_bytes(), partition.stat().st_mtime_ns) == written


# What a process does: this file as a script.


def main() -> None:
    """Fork one process a line of stdin; answer its id."""
    import gc

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead do not stay as zombies, which look alive
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            work(json.loads(line))
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def work(job: dict[str, Any]) -> None:
    """One call.

    `watch` lists the places that it comes by. `at` is a place and the time at which to `then`: "kill" (itself),
    "pause", or the id of a process to kill. `fsize` is the largest file that it may write.
    """
    out = Path(job["out"])
    places: dict[str, int] = {}
    at, times = job.get("at", ("", 0))

    def act() -> None:
        then = job["then"]
        if then == "pause":
            out.with_suffix(".paused").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid() if then == "kill" else then, signal.SIGKILL)

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event in ("call", "c_call") and code.co_filename.startswith(STORE):
            place = f"{code.co_filename[len(STORE) :]}:{frame.f_lineno} {event}"
            places[place] = places.get(place, 0) + 1
            if place == at and places[place] == times:
                act()

    if "fsize" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"], job["fsize"]))
    call: Callable[[], Any] = {
        "publish": lambda: rollout.publish(job["repo"], {k: Path(v) for k, v in job["inputs"].items()}).name,
        "prune": lambda: rollout.prune(job["repo"], 1, grace_s=0),
        "race": lambda: race(job),
    }[job["call"]]
    if at or job.get("watch"):
        sys.setprofile(profile)
    try:
        answer = {"done": call()}
    except KellmError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    finally:
        sys.setprofile(None)
    if job.get("watch"):
        answer["places"] = places
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(answer))
    partial.rename(out)


def race(job: dict[str, Any]) -> list[tuple[int, str | None, str | None]]:
    """Promote and roll back at random; the changes made: revision, what was promoted (None: a rollback), active."""
    rng = random.Random(job["luck"])
    made = []
    backend = open_backend(read_online_config(job["repo"]))
    for _ in range(job["times"]):
        name = rng.choice([*job["names"], None])
        revision = 0

        def change(catalog: Catalog, name: str | None = name) -> Catalog:
            nonlocal revision
            revision = catalog.revision
            return catalog.rollback(utc_now()) if name is None else catalog.promote(name, utc_now())

        try:
            after = update(backend, change)
        except StoreError:  # nothing left to roll back to
            continue
        if after.revision > revision:
            made.append((after.revision, name, after.active))
    backend.close()
    return made


if __name__ == "__main__":
    main()
