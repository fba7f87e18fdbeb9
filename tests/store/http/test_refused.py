"""What the endpoint refuses: malformed, too large, without a token; and that nothing breaks it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kellm_features.store.http import Limits
from kellm_features.store.http_formats import ARROW, JSON, RAW, RequestError, read_ids
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.reader import EmbeddingReader

from .server import (
    BEARER,
    BODIES,
    ITEMS,
    LIMITS,
    TOKEN,
    Server,
    Store,
    arrow_ids,
    json_ids,
    serving,
)

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
