"""The HTTP endpoint: a real server on loopback, over real online stores."""

from __future__ import annotations

import asyncio
import http.client
import importlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kellm_features.errors import ConfigError
from kellm_features.store.backends import Namespace, open_backend, update
from kellm_features.store.catalog import Catalog, Version, ViewVersion, utc_now
from kellm_features.store.http import Limits, create_app
from kellm_features.store.http_formats import ARROW, JSON, RAW, RequestError, answer_format, read_ids
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import REDIS_TYPE, SQLITE_TYPE, read_online_config

DIM = 6
TOKEN = "correct horse battery staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ITEMS = f"/v1/views/{ITEM_EMBEDDING.name}/embeddings"


@dataclass
class Store:
    """A repository whose online store holds what a test published."""

    repo: Path
    layout: str = "stock"

    def publish(self, name: str, ids: list[Any], seed: int, *, promote: bool = True) -> dict[Any, np.ndarray]:
        """Write a version of the item view, float16 numbers so that both layouts keep them; id -> vector."""
        vectors = np.random.default_rng(seed).standard_normal((len(ids), DIM)).astype(np.float16).astype(np.float32)
        backend = open_backend(read_online_config(self.repo))
        number = backend.catalog().next_number
        id_type = "string" if isinstance(ids[0], str) else "int64"
        now = datetime(2026, 11, 21, 12, tzinfo=UTC)
        namespace = Namespace("shop", ITEM_EMBEDDING, number, id_type, self.layout, DIM)
        rest = pa.RecordBatch.from_pylist([{"item_id": key} for key in ids], ITEM_EMBEDDING.arrow(id_type))
        batch = rest.set_column(rest.schema.get_field_index("embedding"), "embedding", pa.array(list(vectors)))
        backend.write(namespace, batch, int(now.timestamp() * 1e6))
        view = ViewVersion(
            number=number, file="", rows=len(ids), event=now, created=now, content="", layout=self.layout, dim=DIM
        )
        version = Version(
            name=name, state="writing", id_type=id_type, started_at=now, views={ITEM_EMBEDDING.name: view}
        )
        update(backend, lambda catalog: catalog.begin(version).finish(name, now))
        backend.close()
        if promote:
            self.change(lambda catalog: catalog.promote(name, utc_now()))
        return dict(zip(ids, vectors, strict=True))

    def change(self, transition: Callable[[Catalog], Catalog]) -> None:
        backend = open_backend(read_online_config(self.repo))
        update(backend, transition)
        backend.close()


def write_repo(repo: Path, online: str) -> Path:
    repo.mkdir(exist_ok=True)
    (repo / "feature_store.yaml").write_text(f"project: shop\nonline_store:\n{online}")
    return repo


@dataclass
class Server:
    port: int
    headers: dict[str, str]
    cafile: Path | None = None

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self.ask("GET", "/health")
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body. `Content_Type="..."` names a header."""
        if self.cafile:
            context = ssl.create_default_context(cafile=self.cafile)
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {**self.headers, **given})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, body: Any, accept: str = RAW, kind: str = JSON, path: str = ITEMS) -> tuple[int, dict, bytes]:
        return self.ask("POST", path, body, Content_Type=kind, Accept=accept)

    def error(self, *args: Any, **kwargs: Any) -> tuple[int, str]:
        """Status and message of a request that is refused."""
        status, _, body = self.post(*args, **kwargs)
        told = json.loads(body)
        assert list(told) == ["error"]
        return status, told["error"]


@contextmanager
def serving(readers: dict[str, Any], token: str | None = TOKEN, limits: Limits | None = None) -> Iterator[Server]:
    config = uvicorn.Config(
        create_app(readers, token=token, limits=limits), port=0, log_config=None, access_log=False, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Server(port, BEARER if token else {})
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    repo = tmp_path_factory.mktemp("sqlite")
    return Store(write_repo(repo, f"  type: {SQLITE_TYPE}\n  path: online.db\n"))


@pytest.fixture(scope="module")
def vectors(store: Store) -> dict[int, np.ndarray]:
    return store.publish("v1", [1, 2, 3, -(2**63), 2**63 - 1], seed=1)


@pytest.fixture(scope="module")
def server(store: Store, vectors: dict[int, np.ndarray]) -> Iterator[Server]:
    with serving({ITEM_EMBEDDING.name: EmbeddingReader.from_repo(store.repo)}, limits=LIMITS) as server:
        yield server


LIMITS = Limits(max_ids=50, max_json_ids=20, max_body_bytes=4000, max_id_length=10)


def arrow_ids(values: Any, name: str = "id", **options: Any) -> bytes:
    batch = pa.record_batch({name: values})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def json_ids(*ids: Any) -> bytes:
    return json.dumps({"ids": ids}).encode()


ASKED = [3, 999, -(2**63), 3, 2**63 - 1]
BODIES = {
    JSON: json_ids(*ASKED),
    RAW: np.array(ASKED, "<i8").tobytes(),
    ARROW: arrow_ids(pa.array(ASKED)),
}


@pytest.mark.parametrize("kind", BODIES)
def test_every_format_in_and_out_says_the_same(server: Server, vectors: dict[int, np.ndarray], kind: str) -> None:
    nothing = np.full(DIM, np.nan, np.float32)
    expected = np.stack([vectors.get(key, nothing) for key in ASKED])
    found = [key in vectors for key in ASKED]

    status, headers, body = server.post(BODIES[kind], RAW, kind)
    assert status == 200
    assert headers["content-type"] == RAW
    assert np.frombuffer(body, "<f4").reshape(-1, DIM)[found].tobytes() == expected[found].tobytes()
    assert np.isnan(np.frombuffer(body, "<f4").reshape(-1, DIM)[1]).all()
    described = {name: headers[f"kellm-{name}"] for name in ("version", "dim", "count", "found")}
    assert described == {"version": "v1", "dim": str(DIM), "count": "5", "found": "4"}

    status, headers, body = server.post(BODIES[kind], ARROW, kind)
    assert (status, headers["content-type"], headers["kellm-version"]) == (200, ARROW, "v1")
    table = pa.ipc.open_stream(body).read_all()
    table.validate(full=True)
    assert table.schema.metadata == {b"kellm.version": b"v1"}
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), DIM)
    assert table["id"].to_pylist() == ASKED
    assert table["found"].to_pylist() == found
    assert table["embedding"].null_count == table["age_s"].null_count == 1
    assert np.array(table["embedding"].drop_null().to_pylist(), np.float32).tobytes() == expected[found].tobytes()
    age = time.time() - datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
    assert table["age_s"][0].as_py() == pytest.approx(age, abs=60)

    status, headers, body = server.post(BODIES[kind], JSON, kind)
    assert (status, headers["content-type"]) == (200, JSON)
    told = json.loads(body)
    assert {name: told[name] for name in ("version", "dim", "ids", "found")} == {
        "version": "v1",
        "dim": DIM,
        "ids": ASKED,
        "found": found,
    }
    assert told["embeddings"][1] is told["age_s"][1] is None
    rows = [row for row in told["embeddings"] if row]
    assert np.array(rows, np.float32).tobytes() == expected[found].tobytes()


def test_a_get_answers_as_json(server: Server, vectors: dict[int, np.ndarray]) -> None:
    status, headers, body = server.ask("GET", f"{ITEMS}?id=2&id=999&id={-(2**63)}")
    assert status == 200
    assert headers["cache-control"] == "no-store"
    told = json.loads(body)
    assert np.array_equal(np.array(told["embeddings"][0], np.float32), vectors[2])
    assert told["found"] == [True, False, True]
    for query, reason in (("", "no id"), ("?id=1.0", "decimal"), (f"?id={2**63}", "int64"), ("?id=%D9%A1", "decimal")):
        status, _, body = server.ask("GET", ITEMS + query)
        assert status == 400
        assert reason in json.loads(body)["error"]


def test_no_ids_are_no_rows(server: Server) -> None:
    for kind, body in {JSON: json_ids(), RAW: b"", ARROW: arrow_ids(pa.array([], pa.int64()))}.items():
        status, headers, answer = server.post(body, RAW, kind)
        assert (status, answer, headers["kellm-dim"], headers["kellm-version"]) == (200, b"", str(DIM), "v1")
    assert pa.ipc.open_stream(server.post(json_ids(), ARROW)[2]).read_all().num_rows == 0


@pytest.mark.parametrize(
    ("accept", "best"),
    [
        (None, JSON),
        ("*/*", JSON),
        (f"{JSON};q=0.5, {ARROW}", ARROW),
        (f"{RAW};q=0.9, */*;q=0.1", RAW),
        (f"application/*, {JSON};q=0", ARROW),
        (f"text/html, {RAW.upper()} ; charset=x", RAW),
        (f"{RAW};q=nan, {JSON};q=0.1", JSON),
    ],
)
def test_the_accept_header_chooses(accept: str | None, best: str) -> None:
    assert answer_format(accept) == best


def test_an_accept_header_without_our_formats_is_refused(server: Server) -> None:
    status, message = server.error(json_ids(1), "text/html")
    assert status == 406
    assert ARROW in message
    with pytest.raises(RequestError):
        answer_format(f"{RAW};q=0")


MALFORMED = {
    "not json": (JSON, b"{", "not JSON"),
    "nothing": (JSON, b"", "not JSON"),
    "a list": (JSON, b"[1]", "form"),
    "another key": (JSON, b'{"ids": [1], "version": "v1"}', "form"),
    "no list": (JSON, b'{"ids": 1}', "form"),
    "text": (JSON, json_ids(1, "2"), "id number 2 is not an integer"),
    "fraction": (JSON, json_ids(1.0), "id number 1 is not an integer"),
    "truth": (JSON, json_ids(True), "id number 1 is not an integer"),
    "null": (JSON, json_ids(None), "id number 1 is not an integer"),
    "too large": (JSON, json_ids(2**63), "int64"),
    "huge": (JSON, b'{"ids": [' + b"9" * 3000 + b"]}", "int64"),
    "NaN": (JSON, b'{"ids": [NaN]}', "not JSON"),
    "not UTF-8": (JSON, b'{"ids": ["\xff"]}', "not JSON"),
    "odd bytes": (RAW, b"123456789", "9 bytes"),
    "not arrow": (ARROW, b"123456789", "Arrow"),
    "no arrow": (ARROW, b"", "Arrow"),
    "cut arrow": (ARROW, arrow_ids(pa.array([1, 2, 3]))[:-30], "Arrow"),
    "arrow name": (ARROW, arrow_ids(pa.array([1]), name="item_id"), "named id"),
    "arrow text": (ARROW, arrow_ids(pa.array(["1"])), "int64"),
    "arrow fraction": (ARROW, arrow_ids(pa.array([1.0])), "int64"),
    "arrow null": (ARROW, arrow_ids(pa.array([1, None])), "nulls"),
    "arrow nothing": (ARROW, arrow_ids(pa.nulls(10**6)), "int64"),
    "arrow uint64": (ARROW, arrow_ids(pa.array([2**64 - 1], pa.uint64())), "Arrow"),
    "arrow dictionary": (ARROW, arrow_ids(pa.array([1, 1]).dictionary_encode()), "int64"),
    "arrow zstd": (ARROW, arrow_ids(pa.array(range(40)), compression="zstd"), "compressed"),
    "arrow lz4": (ARROW, arrow_ids(pa.array(range(40)), compression="lz4"), "compressed"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_bodies_are_told_why(server: Server, case: str) -> None:
    kind, body, reason = MALFORMED[case]
    status, message = server.error(body, kind=kind)
    assert status == 400
    assert reason in message
    assert len(message) < 400


def test_no_arrow_stream_takes_the_process_down() -> None:
    """pyarrow follows what a message declares, into other memory: 3,000 damaged streams come back as errors."""
    good = arrow_ids(pa.array(["a", "bcd", ""] * 3))
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(3000):
        damaged = np.frombuffer(good, np.uint8).copy()
        for place in rng.integers(0, len(good) // 4, 3) * 4:
            damaged[place : place + 4] = list(int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 64])).to_bytes(4, "little"))
        try:
            read_ids(ARROW, damaged.tobytes(), "string", LIMITS)
        except RequestError:
            refused += 1
    assert refused > 2000


def test_an_arrow_stream_begins_with_its_schema() -> None:
    """pyarrow reads any first message as a schema: another kind of message made it read outside the body."""
    good = bytearray(arrow_ids(pa.array([1])))
    (kind,) = (place for place in range(8, 80) if _first_type(good, place, 3) == "record batch")
    good[kind] = 3
    with pytest.raises(RequestError, match="begin with a schema"):
        read_ids(ARROW, bytes(good), "int64", LIMITS)


def _first_type(stream: bytes, place: int, value: int) -> str:
    changed = bytearray(stream)
    changed[place] = value
    try:
        return str(pa.ipc.MessageReader.open_stream(pa.py_buffer(bytes(changed))).read_next_message().type)
    except (pa.ArrowException, OSError):
        return ""


def test_the_small_arrow_integers_are_read(server: Server, vectors: dict[int, np.ndarray]) -> None:
    for kind in (pa.int8(), pa.uint16(), pa.int32(), pa.uint64()):
        status, _, body = server.post(arrow_ids(pa.array([2], kind)), RAW, ARROW)
        assert (status, body) == (200, vectors[2].tobytes())


def test_a_compressed_bomb_is_not_unpacked() -> None:
    """A stream of 4 kB that unpacks to 256 MB is refused before it takes memory."""
    bomb = arrow_ids(pa.array(np.zeros(2**25, np.int64)), compression="zstd")
    assert len(bomb) < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(RequestError, match="compressed"):
        read_ids(ARROW, bomb, "int64", Limits())
    assert pa.total_allocated_bytes() - before < 2**20


def test_limits(server: Server) -> None:
    assert server.error(json_ids(*range(51))) == (
        413,
        "51 ids are asked for; at most 50 are answered: send them in parts",
    )
    assert server.error(np.arange(51).tobytes(), kind=RAW)[0] == 413
    assert server.error(arrow_ids(pa.array(range(51))), kind=ARROW)[0] == 413
    assert server.post(json_ids(*range(50)))[0] == 200
    status, message = server.error(json_ids(*range(21)), JSON)
    assert status == 413
    assert "JSON (20)" in message
    assert server.ask("GET", f"{ITEMS}?{'&'.join(['id=1'] * 51)}")[0] == 413


def test_a_body_is_counted_as_it_comes(server: Server) -> None:
    """A body without a length, or with a false one, is cut off at the limit; the connection goes on."""
    assert server.error(b" " * 4001)[0] == 413

    def endless() -> Iterator[bytes]:
        for _ in range(3000):
            yield b" " * 1000

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {**BEARER, "Content-Type": JSON}
    connection.request("POST", ITEMS, endless(), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413
    assert "4000 bytes" in json.loads(answer.read())["error"]
    connection.request("POST", ITEMS, json_ids(1), headers)
    assert connection.getresponse().status == 200
    connection.close()


def test_a_slow_body_is_given_up(store: Store, vectors: dict[int, np.ndarray]) -> None:
    readers = {ITEM_EMBEDDING.name: EmbeddingReader.from_repo(store.repo)}
    with (
        serving(readers, None, Limits(body_timeout_s=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as line,
    ):
        head = f"POST {ITEMS} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 12\r\n\r\n"
        line.sendall(head.encode() + b'{"ids"')
        assert b" 408 " in line.recv(1000)


def test_encoded_and_unknown_bodies_are_refused(server: Server) -> None:
    assert server.error(json_ids(1), kind="text/plain")[0] == 415
    status, _, body = server.ask("POST", ITEMS, json_ids(1), Content_Type=JSON, Content_Encoding="gzip")
    assert status == 415
    assert "Content-Encoding" in json.loads(body)["error"]


def test_the_token_guards_vectors_and_metrics(server: Server) -> None:
    bare = Server(server.port, {})
    guarded = [("POST", ITEMS), ("GET", f"{ITEMS}?id=1"), ("GET", "/v1/views"), ("GET", "/metrics")]
    wrong = ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer \xfc"]
    for method, path in guarded:
        for header in (None, *wrong):
            given = {} if header is None else {"Authorization": header}
            status, headers, body = bare.ask(method, path, **given)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), header
            assert "token" in json.loads(body)["error"]
        assert server.ask(method, path)[0] != 401
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert bare.ask("GET", path)[0] == 200


def test_unknown_places_are_not_repeated(server: Server) -> None:
    long = "secret" * 200
    for path in (f"/v1/views/{long}/embeddings", f"/{long}", "/v1/views/%00/embeddings"):
        status, _, body = server.ask("POST", path, json_ids(1), Content_Type=JSON)
        assert status == 404
        assert len(body) < 200
        assert b"secret" not in body
    status, _, body = server.ask("DELETE", ITEMS)
    assert (status, list(json.loads(body))) == (405, ["error"])


def test_views_are_listed(server: Server) -> None:
    assert json.loads(server.ask("GET", "/v1/views")[2]) == {
        "views": [{"name": ITEM_EMBEDDING.name, "id_type": "int64", "version": "v1", "dim": DIM}]
    }


def test_the_openapi_document_names_the_formats(server: Server) -> None:
    told = json.loads(server.ask("GET", "/openapi.json")[2])
    post = told["paths"]["/v1/views/{view}/embeddings"]["post"]
    assert set(post["requestBody"]["content"]) == set(post["responses"]["200"]["content"]) == {JSON, ARROW, RAW}
    assert "422" not in json.dumps(told)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_breaks_the_server(server: Server, data: st.DataObject) -> None:
    """Damaged bodies of every kind are refused or answered, never a 500."""
    kind = data.draw(st.sampled_from([JSON, ARROW, RAW]))
    good = bytearray(arrow_ids(pa.array(range(9))) if kind == ARROW else BODIES[kind])
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        good[place] = data.draw(st.integers(0, 255))
    body = data.draw(st.sampled_from([bytes(good), bytes(good[: data.draw(st.integers(0, len(good)))])]))
    body += data.draw(st.binary(max_size=8))
    status, _, answer = server.post(body, data.draw(st.sampled_from([JSON, ARROW, RAW])), kind)
    assert status in (200, 400, 413), answer[:300]


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


def metrics_of(server: Server) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value."""
    text = server.ask("GET", "/metrics")[2].decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in samples}


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
def redis_server(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A Redis with a password on a free loopback port, nothing persisted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([*command, "--requirepass", "hush"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield port, process
        process.terminate()


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # redis-py's asyncio client leaves its sockets to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same, told by the collector
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


@contextmanager
def commanded(*options: str, token: str = "", cafile: Path | None = None) -> Iterator[tuple[Any, Server]]:
    """`kellm serve` in a process of its own, once it is ready to answer."""
    command = [str(Path(sys.executable).with_name("kellm")), "serve", "--port", "0", *options]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=told, env={**os.environ, "KELLM_SERVE_TOKEN": token}
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            found = re.search(r"at https?://127\.0\.0\.1:(\d+)$", line.strip())
            assert found, (told.seek(0), told.read())
            server = Server(int(found[1]), {"Authorization": f"Bearer {token}"} if token else {}, cafile)
            server.wait()
            yield process, server
        finally:
            process.stdout.close()
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()


def refused(*options: str) -> str:
    """The one line that `kellm serve` ends with where it does not start."""
    command = [str(Path(sys.executable).with_name("kellm")), "serve", *options]
    environment = {name: value for name, value in os.environ.items() if name != "KELLM_SERVE_TOKEN"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    return line


def test_the_command_serves_and_ends_in_good_order(store: Store, vectors: dict[int, np.ndarray]) -> None:
    """On SIGTERM a request in flight is answered to its end, and the exit code is 0."""
    options = ("--repo", str(store.repo), "--view", ITEM_EMBEDDING.name, "--max-ids", "3", "--max-body-mib", "0.5")
    with commanded(*options, token=TOKEN) as (process, server):
        assert server.post(json_ids(1, 2))[2] == vectors[1].tobytes() + vectors[2].tobytes()
        assert server.error(json_ids(1, 2, 3, 4))[0] == 413
        assert server.error(b" " * 600_000)[0] == 413
        assert Server(server.port, {}).ask("GET", "/metrics")[0] == 401
        body = json_ids(1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
            head = [f"POST {ITEMS} HTTP/1.1", "Host: x", f"Content-Type: {JSON}", f"Content-Length: {len(body)}"]
            head += [f"Authorization: {BEARER['Authorization']}", f"Accept: {RAW}", "Expect: 100-continue", "", ""]
            line.sendall("\r\n".join(head).encode())
            assert line.recv(1000).startswith(b"HTTP/1.1 100 ")  # it waits for the body now
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            line.sendall(body)
            answer = b""
            while part := line.recv(10_000):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(vectors[1].tobytes())
        assert process.wait(20) == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_workers_share_port_and_metrics_over_tls(tmp_path: Path, store: Store, vectors: dict[int, np.ndarray]) -> None:
    """Two workers behind HTTPS add up their counts, and keep them when one is killed and replaced."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    options = ("--repo", str(store.repo), "--view", ITEM_EMBEDDING.name, "--workers", "2")
    with commanded(*options, "--tls-cert", str(cert), "--tls-key", str(key), cafile=cert) as (process, server):
        supervisor = psutil.Process(process.pid)
        killed: set[int] = set()

        def workers() -> set[int]:
            """Process ids of the workers; beside them runs multiprocessing's own resource tracker."""
            alive = (child for child in supervisor.children() if child.pid not in killed)
            return {child.pid for child in alive if any("spawn_main" in word for word in child.cmdline())}

        for _ in range(20):
            assert server.post(json_ids(1))[2] == vectors[1].tobytes()
        first = workers()
        assert len(first) == 2
        killed.add(first.pop())
        os.kill(*killed, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not workers() - first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(20):
            server.wait()
            server.post(json_ids(1))
        told = metrics_of(server)
        assert told["kellm_serve_requests_total", "embeddings", "200", ITEM_EMBEDDING.name] == 40
        assert told["kellm_serve_version_info", "v1", ITEM_EMBEDDING.name] == 1
        process.terminate()
        assert process.wait(20) == 0


def test_the_command_refuses_what_is_unsafe_or_wrong(tmp_path: Path, store: Store) -> None:
    repo = str(store.repo)
    assert "KELLM_SERVE_TOKEN" in refused("--repo", repo, "--host", "0.0.0.0")
    assert "KELLM_SERVE_TOKEN" in refused("--repo", repo, "--host", "::")
    assert "feature_store.yaml" in refused("--repo", str(tmp_path))
    assert ITEM_EMBEDDING.name in refused("--repo", repo, "--view", "item_description")
    assert "--tls-cert" in refused("--repo", repo, "--tls-key", "key.pem")
    assert "PEM" in refused("--repo", repo, "--tls-cert", str(store.repo / "feature_store.yaml"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused("--repo", repo, "--port", port)


def test_a_view_that_the_version_lacks_is_not_ready(store: Store, vectors: dict[int, np.ndarray]) -> None:
    readers = {spec.name: EmbeddingReader.from_repo(store.repo, spec.name) for spec in (ITEM_EMBEDDING, USER_EMBEDDING)}
    with serving(readers) as server:
        status, _, body = server.ask("GET", "/ready")
        told = json.loads(body)
        assert status == 503
        assert USER_EMBEDDING.name in told["error"]
        assert told["versions"] == {ITEM_EMBEDDING.name: "v1", USER_EMBEDDING.name: None}
        assert server.error(json_ids(1), path=f"/v1/views/{USER_EMBEDDING.name}/embeddings")[0] == 503
        assert server.post(json_ids(1))[0] == 200


def test_the_load_generator_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counts of mixed and wrong answers are 0 in the published rows: here they are not."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    load = importlib.import_module("load_http")
    ids = np.array([5, 3000], "<i8")
    rows = np.array([[2, 5, 0, 0.5], [2, 3000 % load.ID_BASE, 3000 // load.ID_BASE, 0.5]], "<f4")
    headers = {"kellm-dim": "4", "kellm-version": "v2"}

    def counts(answer: np.ndarray, version: str = "v2") -> tuple[int, int]:
        seen = load.Seen()
        load.check(headers | {"kellm-version": version}, ids.tobytes(), answer.tobytes(), seen)
        return seen.mixed, seen.wrong

    assert counts(rows) == (0, 0)
    assert counts(rows, "v1") == (1, 0)
    assert counts(rows[::-1]) == (0, 1)
    assert counts(rows[:1]) == (0, 1)
    other = rows.copy()
    other[1, 0] = 1
    assert counts(other) == (1, 0)
    other[1, 0] = np.nan
    assert counts(other) == (1, 0)
