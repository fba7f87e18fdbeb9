"""Redis killed, full or deaf, and a full disk: what is served stays, and the next publish completes."""

from __future__ import annotations

import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import redis

from kellm_features.errors import StoreError
from kellm_features.store import publish, rollout
from kellm_features.store.backends.redis import RedisBackend
from kellm_features.store.catalog import Catalog
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import REDIS_TYPE

from .shop import KINDS, Shop, entry, vectors, write_repo

pytestmark = pytest.mark.feast


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
