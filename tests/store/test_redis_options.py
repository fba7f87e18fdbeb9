"""Redis as production runs it (password, TLS, Sentinel, Cluster, restarts); readers in threads, loops and forks."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from kellm_features.errors import KellmError, StoreError
from kellm_features.store import rollout
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import read_online_config

from .marks import FEAST, KINDS

pytestmark = [*FEAST, pytest.mark.redis]
LAYOUTS = ("stock", "packed")
ITEM = "item_knowledge_embedding"
PASSWORD = "open=sesame-3"
IDS = list(range(2, 51))


def online(connection: str, layout: str = "stock", more: str = "") -> str:
    kind = "type: kellm_features.store.redis.KellmRedisOnlineStore"
    return f"{kind}\nconnection_string: '{connection}'\nlayout: {layout}\n{more}"


def live_through(repo: Path, layout: str, make_run: Callable[..., Any]) -> None:
    """Publish, promote, read, read in a loop, read with Feast's client, roll back and prune."""
    from feast import FeatureStore

    folder = repo.parent
    runs = {f"v{n}": make_run(folder / f"run{n}", f"v{n}", seed=n, items=range(n, 50 + n)) for n in (1, 2)}
    dtype = np.float16 if layout == "packed" else np.float32
    wanted = {
        v: np.stack([run.vectors()[key] for key in IDS]).astype(dtype).astype(np.float32) for v, run in runs.items()
    }
    store = FeatureStore(str(repo))

    async def read_async() -> Any:
        got = await reader.get_async([*IDS, 999])
        await reader.aclose()
        return got

    with EmbeddingReader.from_repo(repo) as reader:

        def check(version: str) -> None:
            for got in (reader.get([*IDS, 999]), asyncio.run(read_async())):
                assert got.version == version
                np.testing.assert_array_equal(got.values[:-1], wanted[version])
                assert got.found.tolist() == [True] * len(IDS) + [False]
            told = store.get_online_features([f"{ITEM}:embedding", f"{ITEM}:model_id"], {"item_id": [7, 999]}).to_dict()
            assert told["embedding"] == [wanted[version][IDS.index(7)].tolist(), None]
            assert told["model_id"] == ["adapter", None]

        rollout.publish(repo, rollout.run_inputs(runs["v1"].folder))
        rollout.promote(repo)  # through the gates, which read samples back
        check("v1")
        rollout.publish(repo, rollout.run_inputs(runs["v2"].folder))
        check("v1")
        rollout.promote(repo, "v2", force=True)
        check("v2")
        rollout.rollback(repo)
        check("v1")
        rollout.promote(repo, "v2", force=True)
        assert rollout.prune(repo, 1, grace_s=0) == ["v1"]
        check("v2")
    with pytest.raises(StoreError, match="holds no version 'v1'"):
        EmbeddingReader.from_repo(repo, version="v1")
    asyncio.run(store.close())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_password(layout: str, tmp_path: Path, make_repo, make_run, start_redis) -> None:
    with start_redis("--requirepass", PASSWORD) as port:
        repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{port},password={PASSWORD}", layout))
        live_through(repo, layout, make_run)
        assert rollout.status(repo).where == f"Redis 127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("given", "secret", "told"),
    [
        ("password=wrong-word", "wrong-word", "AuthenticationError"),
        ("db=0", PASSWORD, "AuthenticationError|NOAUTH"),
        ("password=half,other-half", "other-half", "part 3 of online_store.connection_string is neither"),
    ],
    ids=["wrong", "missing", "with a comma"],
)
def test_a_wrong_password(given: str, secret: str, told: str, tmp_path: Path, make_repo, make_run, start_redis) -> None:
    """Each way into the store says what is wrong, and nobody prints a password."""
    from feast import FeatureStore

    run = make_run(tmp_path / "run")
    with start_redis("--requirepass", PASSWORD) as port:
        repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{port},{given}"))
        reader, store = EmbeddingReader.from_repo(repo), FeatureStore(str(repo))
        ways: list[Callable[[], Any]] = [
            lambda: reader.get([1]),
            lambda: asyncio.run(reader.get_async([1])),
            lambda: rollout.status(repo),
            lambda: rollout.publish(repo, rollout.run_inputs(run.folder)),
            lambda: store.get_online_features([f"{ITEM}:embedding"], {"item_id": [1]}),
        ]
        for way in ways:
            with pytest.raises(StoreError, match=told) as caught:
                way()
            message = str(caught.value)
            assert "\n" not in message
            assert secret not in message
            assert secret not in read_online_config(repo).where


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key and a certificate of 127.0.0.1 that it signed itself."""
    folder = tmp_path_factory.mktemp("tls")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=redis"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    try:
        subprocess.run([*request, *names], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder


@pytest.fixture(scope="module")
def tls_port(certificate: Path, start_redis, free_port) -> Iterator[int]:
    version = subprocess.run(["redis-server", "--tls-port", "0", "--version"], capture_output=True, check=False)
    port = free_port()
    files = {"--tls-cert-file": "cert.pem", "--tls-key-file": "key.pem", "--tls-ca-cert-file": "cert.pem"}
    options = [part for name, file in files.items() for part in (name, str(certificate / file))]
    try:
        with start_redis("--port", "0", "--tls-port", "{port}", "--tls-auth-clients", "no", *options, port=port):
            yield port
    except AssertionError:
        pytest.skip(f"this redis-server is built without TLS: {version.stdout!r}")


def test_tls(tmp_path: Path, make_repo, make_run, certificate: Path, tls_port: int) -> None:
    repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{tls_port},ssl=true,ssl_ca_certs={certificate}/cert.pem"))
    live_through(repo, "stock", make_run)


def test_tls_with_an_authority_that_did_not_sign(tmp_path: Path, make_repo, tls_port: int) -> None:
    """The server's certificate is checked unless the connection string says otherwise."""
    repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{tls_port},ssl=true"))
    for way in (lambda: rollout.status(repo), lambda: EmbeddingReader.from_repo(repo).get([1])):
        with pytest.raises(StoreError, match=r"did not answer .*certificate"):
            way()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cluster(layout: str, tmp_path: Path, make_repo, make_run, start_redis, free_port) -> None:
    with start_redis("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as port:
        with redis.Redis(port=port) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            wait_for(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        more = "redis_type: redis_cluster\n"
        repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{port}", layout, more))
        live_through(repo, layout, make_run)


def test_sentinel(tmp_path: Path, make_repo, make_run, start_redis, start_server, free_port) -> None:
    """And the master's death under a living reader, which finds the new one by itself: redis-py asks the sentinels."""
    sentinel = free_port()
    config = tmp_path / "sentinel.conf"
    with start_redis() as master, start_redis("--replicaof", "127.0.0.1", str(master)) as replica:
        with redis.Redis(port=replica) as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up")
        config.write_text(
            f"port {sentinel}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor films 127.0.0.1 {master} 1\n"
            f"sentinel down-after-milliseconds films 1000\nsentinel failover-timeout films 5000\n"
        )
        more = "redis_type: redis_sentinel\nsentinel_master: films\n"
        repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{sentinel}", "packed", more))
        command = ["redis-server", str(config), "--sentinel"]
        with start_server(command, sentinel, tmp_path), redis.Redis(port=sentinel) as control:
            live_through(repo, "packed", make_run)
            with EmbeddingReader.from_repo(repo) as reader:
                before = reader.get(IDS)
                with redis.Redis(port=master) as old, redis.Redis(port=replica) as new:
                    wait_for(lambda: len(control.sentinel_slaves("films")) == 1)
                    wait_for(lambda: offset(old) == offset(new))
                    old.shutdown(nosave=True, now=True)
                    after = wait_for(lambda: answered(reader), 60)
                    assert new.info("replication")["role"] == "master"
                assert after.version == before.version == "v2"
                np.testing.assert_array_equal(after.values, before.values)
                rollout.publish(repo, rollout.run_inputs(repo.parent / "run1"), version="v3")
                rollout.promote(repo, "v3", force=True)
                assert reader.get(IDS).version == "v3"


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def offset(client: redis.Redis) -> int:
    return int(client.info("replication")["master_repl_offset"])


def answered(reader: EmbeddingReader) -> Any:
    try:
        return reader.get(IDS)
    except StoreError:
        return None


def test_key_ttl_seconds_is_refused(tmp_path: Path, make_repo) -> None:
    """Feast expires the whole hash of an entity with it, in which the published rows lie too."""
    from feast import FeatureStore

    repo = make_repo(tmp_path / "repo", online("127.0.0.1:1", more="key_ttl_seconds: 60\n"))
    with pytest.raises(Exception, match="key_ttl_seconds is 60, and a row of any view"):
        FeatureStore(str(repo))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_restart(layout: str, tmp_path: Path, make_repo, make_run, start_redis, free_port) -> None:
    """While Redis is away the reader says so; it answers as soon as Redis does, in loops too."""
    port, folder = free_port(), tmp_path / "redis"
    folder.mkdir()
    options = ("--appendonly", "yes", "--dir", str(folder))
    repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{port}", layout))
    with asyncio.Runner() as loop, EmbeddingReader.from_repo(repo) as reader:
        with start_redis(*options, port=port):
            rollout.publish(repo, rollout.run_inputs(make_run(tmp_path / "run").folder))
            rollout.promote(repo)
            first = reader.get(IDS)
            np.testing.assert_array_equal(loop.run(reader.get_async(IDS)).values, first.values)
            with redis.Redis(port=port) as client:  # every connection is cut, the reader's too
                client.client_kill_filter(_type="normal", skipme=True)
            assert reader.get(IDS).found.all()
            assert loop.run(reader.get_async(IDS)).found.all()
            time.sleep(1.1)  # what is appended reaches the disk once a second
        for _ in range(2):
            with pytest.raises(StoreError, match=r"did not answer .* check that it runs"):
                reader.get(IDS)
            with pytest.raises(StoreError, match=r"did not answer .* check that it runs"):
                loop.run(reader.get_async(IDS))
        with start_redis(*options, port=port):
            with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.05), 100)) as client:
                client.ping()  # it listens before it has read its log
            np.testing.assert_array_equal(reader.get(IDS).values, first.values)
            np.testing.assert_array_equal(loop.run(reader.get_async(IDS)).values, first.values)
            loop.run(reader.aclose())


@pytest.fixture(scope="module", params=KINDS)
def shop(request: pytest.FixtureRequest, make_shop) -> Any:
    return make_shop(request.param)


def test_one_reader_in_16_threads(shop) -> None:
    """While the version is switched to and fro each answer is whole."""
    shop.promote("v1")
    wanted = {version: shop.vectors(version, IDS) for version in ("v1", "v2")}

    def request(rng: random.Random) -> str:
        places = rng.choices(range(len(IDS)), k=10)
        got = reader.get([IDS[place] for place in places])
        assert (got.values == wanted[got.version][places]).all()
        assert got.found.all()
        return got.version

    with EmbeddingReader.from_repo(shop.repo) as reader:
        shop.promote_under_load(request, threads=16, turns=60)


def test_a_reader_in_a_fork(shop) -> None:
    """As under a server that loads the application before it forks: all of them read at once, none hears another."""
    shop.promote("v1")
    wanted = shop.vectors("v1", IDS)
    children = []
    with EmbeddingReader.from_repo(shop.repo) as reader:
        assert reader.get(IDS).found.all()
        for _ in range(3):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    same = all((reader.get(IDS).values == wanted).all() for _ in range(100))
                    reader.close()
                    same = same and bool((asyncio.run(reader.get_async(IDS)).values == wanted).all())
                    status = 0 if same else 2
                finally:
                    os._exit(status)
            children.append(child)
        for _ in range(100):
            np.testing.assert_array_equal(reader.get(IDS).values, wanted)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        np.testing.assert_array_equal(reader.get(IDS).values, wanted)
    shop.promote("v2")  # and the store can be written


def test_one_reader_in_several_loops(shop) -> None:
    """Loops one after the other, loops at the same time in threads, many requests at once in each."""
    shop.promote("v1")
    wanted = shop.vectors("v1", IDS)

    async def many() -> None:
        for got in await asyncio.gather(*(reader.get_async(IDS) for _ in range(20))):
            assert got.version == "v1"
            np.testing.assert_array_equal(got.values, wanted)
        await reader.aclose()

    wrong: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(many())
        except BaseException as error:  # told below: an exception in a thread fails no test
            wrong.append(error)

    with EmbeddingReader.from_repo(shop.repo) as reader:
        for _ in range(3):
            asyncio.run(many())
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_cancelled_request_leaves_the_connection_clean(shop) -> None:
    """A timeout in the middle of an answer: the next request must not get that answer."""
    shop.promote("v1")

    async def cut() -> None:
        for turn in range(30):
            task = asyncio.create_task(reader.get_async(IDS[:10]))
            for _ in range(turn % 6):
                await asyncio.sleep(0)
            task.cancel()
            place = turn % 30
            got = await reader.get_async(IDS[place : place + 3])
            np.testing.assert_array_equal(got.values, shop.vectors("v1", IDS[place : place + 3]))
            await asyncio.gather(task, return_exceptions=True)
        await reader.aclose()

    with EmbeddingReader.from_repo(shop.repo) as reader:
        asyncio.run(cut())


def test_errors_are_ours(tmp_path: Path, make_repo, free_port) -> None:
    """Nobody has to know of redis-py's exceptions, or of a signal that a closed socket sends."""
    repo = make_repo(tmp_path / "repo", online(f"127.0.0.1:{free_port()}", more="redis_type: redis_cluster\n"))
    with pytest.raises(KellmError, match="did not answer"):
        rollout.status(repo)
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
