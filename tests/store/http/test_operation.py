"""The endpoint as it is run: readiness, metrics, faults, Redis."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kellm_features.errors import ConfigError
from kellm_features.store.catalog import utc_now
from kellm_features.store.http import Limits, create_app
from kellm_features.store.http_formats import ARROW, JSON, RAW
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import REDIS_TYPE, SQLITE_TYPE

from .server import (
    DIM,
    ITEMS,
    LIMITS,
    Store,
    arrow_ids,
    json_ids,
    metrics_of,
    serving,
    write_repo,
)


def test_readiness_and_views_follow_the_store(tmp_path: Path) -> None:
    store = Store(write_repo(tmp_path, f"  type: {SQLITE_TYPE}\n  path: online.db\n"))
    with serving({ITEM_EMBEDDING.name: EmbeddingReader.from_repo(tmp_path)}) as server:
        for _ in range(2):
            assert server.ask("GET", "/health")[0] == 200
            status, _, body = server.ask("GET", "/ready")
            assert status == 503
            assert "nothing is published" in json.loads(body)["error"]
            status, message = server.error(json_ids(1))
            assert status == 503
            assert "nothing is published" in message
            (view,) = json.loads(server.ask("GET", "/v1/views")[2])["views"]
            assert view["version"] is view["dim"] is None
            assert "nothing is published" in view["error"]
        first = store.publish("v1", [1], seed=1)
        assert server.ask("GET", "/ready")[0] == 200
        assert server.post(json_ids(1))[2] == first[1].tobytes()
        second = store.publish("v2", [1], seed=2)
        status, headers, body = server.post(json_ids(1))
        assert (headers["kellm-version"], body) == ("v2", second[1].tobytes())
        assert json.loads(server.ask("GET", "/ready")[2])["versions"] == {ITEM_EMBEDDING.name: "v2"}
        store.change(lambda catalog: catalog.rollback(utc_now()))
        assert server.post(json_ids(1))[2] == first[1].tobytes()


def test_string_ids(tmp_path: Path) -> None:
    store = Store(write_repo(tmp_path, f"  type: {SQLITE_TYPE}\n  path: online.db\n"))
    vectors = store.publish("v1", ["a", "ü/1", "7"], seed=1)
    with serving({ITEM_EMBEDDING.name: EmbeddingReader.from_repo(tmp_path)}, limits=LIMITS) as server:
        asked = ["ü/1", "b", "7"]
        expected = np.stack([vectors["ü/1"], np.full(DIM, np.nan, np.float32), vectors["7"]])
        bodies = {
            (JSON, json_ids(*asked)),
            (ARROW, arrow_ids(pa.array(asked))),
            (ARROW, arrow_ids(pa.array(asked, pa.large_string()))),
        }
        for kind, body in bodies:
            answer = np.frombuffer(server.post(body, RAW, kind)[2], "<f4").reshape(-1, DIM)
            assert np.array_equal(answer, expected, equal_nan=True)
        table = pa.ipc.open_stream(server.post(json_ids(*asked), ARROW)[2]).read_all()
        assert table["id"].to_pylist() == asked
        assert json.loads(server.ask("GET", f"{ITEMS}?id=%C3%BC%2F1")[2])["found"] == [True]
        assert server.error(json_ids(7))[0] == 400
        assert server.error(json_ids("x" * 11))[0] == 413
        assert server.post(json_ids("x" * 10))[0] == 200
        assert server.error(np.arange(3).tobytes(), kind=RAW)[0] == 415
        assert server.error(arrow_ids(pa.array(["a"]).dictionary_encode()), kind=ARROW)[0] == 400
        assert server.error(arrow_ids(pa.array(["a"] * 9, pa.string_view())), kind=ARROW)[0] == 400


def test_metrics_count(store: Store, vectors: dict[int, np.ndarray]) -> None:
    view = ITEM_EMBEDDING.name
    with serving({view: EmbeddingReader.from_repo(store.repo)}) as server:
        answers = [server.post(json_ids(1, 2, 999)) for _ in range(3)]
        server.post(b"{")
        server.post(json_ids(1), path="/v1/views/made-up/embeddings")
        told = metrics_of(server)
    assert told["kellm_serve_requests_total", "embeddings", "200", view] == 3
    assert told["kellm_serve_requests_total", "embeddings", "400", view] == 1
    assert told["kellm_serve_requests_total", "embeddings", "404", ""] == 1
    assert told["kellm_serve_ids_total", view] == 9
    assert told["kellm_serve_missing_ids_total", view] == 3
    assert told["kellm_serve_request_seconds_count", "embeddings", view] == 4
    assert told["kellm_serve_request_seconds_bucket", "embeddings", "+Inf", view] == 4
    assert 0 < told["kellm_serve_request_seconds_sum", "embeddings", view] < 60
    assert told["kellm_serve_response_bytes_total", "embeddings", view] >= sum(len(answer[2]) for answer in answers)
    assert told["kellm_serve_version_info", "v1", view] == 1
    assert told["kellm_serve_view_up", view] == 1
    assert told["process_resident_memory_bytes",] > 0
    assert not any("made-up" in key for key in told)


class Odd:
    """A reader that misbehaves: what no real store can be made to do at will."""

    view = ITEM_EMBEDDING.name
    id_type = "int64"

    def __init__(self, *, hang: bool = False) -> None:
        self._hang = hang
        self.asked = threading.Event()
        self.go = threading.Event()
        self.closed = False

    async def get_async(self, ids: Any, *, on_missing: str = "flag") -> Any:
        self.asked.set()
        if self._hang:
            await asyncio.to_thread(self.go.wait, 20)
        raise RuntimeError("a fault with a secret in it")

    def active(self) -> str:
        if self._hang:
            self.go.wait(20)
        return "v1"

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        """Nothing is held for an event loop."""


def test_a_fault_is_told_without_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    reader = Odd()
    with serving({reader.view: reader}) as server:
        status, message = server.error(json_ids(1))
        assert status == 500
        assert "secret" not in message
        assert metrics_of(server)["kellm_serve_requests_total", "embeddings", "500", reader.view] == 1
    assert "a fault with a secret in it" in caplog.text
    assert reader.closed


def test_a_store_that_hangs_is_given_up() -> None:
    reader = Odd(hang=True)
    with serving({reader.view: reader}, limits=Limits(store_timeout_s=0.2)) as server:
        for status, told in (server.error(json_ids(1)), (server.ask("GET", "/ready")[0], "0.2 s")):
            assert status == 503
            assert "0.2 s" in told
        assert server.ask("GET", "/health")[0] == 200
        reader.go.set()


def test_a_full_server_says_so() -> None:
    reader = Odd(hang=True)
    with serving({reader.view: reader}, limits=Limits(max_in_flight=1)) as server:
        first = threading.Thread(target=server.post, args=(json_ids(1),))
        first.start()
        assert reader.asked.wait(20)
        status, headers, body = server.post(json_ids(1))
        assert (status, headers["retry-after"]) == (503, "1")
        assert "come back" in json.loads(body)["error"]
        reader.go.set()
        first.join()
        assert server.post(json_ids(1))[0] == 500  # there is room again


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="no view"):
        create_app({}, token=None)
    with pytest.raises(ConfigError, match="token is empty"):
        create_app({"v": Odd()}, token=" ")


@pytest.fixture
def redis_server(
    tmp_path: Path, free_port: Callable[[], int], start_server: Callable[..., Any]
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A Redis with a password on a free loopback port, nothing persisted."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", "hush"]
    with start_server(command, port, tmp_path) as process:
        yield port, process


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.parametrize("layout", ["stock", "packed"])
def test_on_redis(tmp_path: Path, redis_server: tuple[int, subprocess.Popen[bytes]], layout: str) -> None:
    port, process = redis_server
    yaml = f'  type: {REDIS_TYPE}\n  connection_string: "127.0.0.1:{port},password=hush"\n  layout: {layout}\n'
    store = Store(write_repo(tmp_path / "repo", yaml), layout)
    first = store.publish("v1", [1, 2], seed=1)
    readers = {ITEM_EMBEDDING.name: EmbeddingReader.from_repo(store.repo)}
    with serving(readers, limits=Limits(store_timeout_s=1.0)) as server:
        status, headers, body = server.post(json_ids(2, 1, 3))
        answer = np.frombuffer(body, "<f4").reshape(-1, DIM)
        assert (status, headers["kellm-version"], headers["kellm-found"]) == (200, "v1", "2")
        assert np.array_equal(answer[:2], np.stack([first[2], first[1]]))
        assert np.isnan(answer[2]).all()
        second = store.publish("v2", [1, 2], seed=2)
        _, headers, body = server.post(json_ids(2))
        assert (headers["kellm-version"], body) == ("v2", second[2].tobytes())
        process.terminate()
        process.wait()
        assert server.ask("GET", "/health")[0] == 200
        assert metrics_of(server)["kellm_serve_view_up", ITEM_EMBEDDING.name] == 0
        for status, _, told in (server.post(json_ids(1)), server.ask("GET", "/ready")):
            assert status == 503
            assert b"did not answer" in told
            assert b"hush" not in told
