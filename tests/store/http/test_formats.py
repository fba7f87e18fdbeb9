"""What the endpoint takes and gives: formats, views, its own description."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from kellm_features.store.http_formats import ARROW, JSON, RAW, RequestError, answer_format
from kellm_features.store.layout import ITEM_EMBEDDING

from .server import (
    ASKED,
    BODIES,
    DIM,
    ITEMS,
    Server,
    arrow_ids,
    json_ids,
)


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


def test_views_are_listed(server: Server) -> None:
    assert json.loads(server.ask("GET", "/v1/views")[2]) == {
        "views": [{"name": ITEM_EMBEDDING.name, "id_type": "int64", "version": "v1", "dim": DIM}]
    }


def test_the_openapi_document_names_the_formats(server: Server) -> None:
    told = json.loads(server.ask("GET", "/openapi.json")[2])
    post = told["paths"]["/v1/views/{view}/embeddings"]["post"]
    assert set(post["requestBody"]["content"]) == set(post["responses"]["200"]["content"]) == {JSON, ARROW, RAW}
    assert "422" not in json.dumps(told)
