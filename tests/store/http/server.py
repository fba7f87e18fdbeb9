"""A server of the endpoint on loopback, over a store that tests publish into."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from kellm_features.store.backends import Namespace, open_backend, update
from kellm_features.store.catalog import Catalog, Version, ViewVersion, utc_now
from kellm_features.store.http import Limits, create_app
from kellm_features.store.http_formats import ARROW, JSON, RAW
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.repo import read_online_config

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


LIMITS = Limits(max_ids=50, max_json_ids=20, max_body_bytes=4000, max_id_length=10)


def arrow_ids(values: Any, name: str = "id", **options: Any) -> bytes:
    batch = pa.record_batch({name: values})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def json_ids(*ids: Any) -> bytes:
    return json.dumps({"ids": ids}).encode()


def metrics_of(server: Server) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value."""
    text = server.ask("GET", "/metrics")[2].decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in samples}


ASKED = [3, 999, -(2**63), 3, 2**63 - 1]
BODIES = {
    JSON: json_ids(*ASKED),
    RAW: np.array(ASKED, "<i8").tobytes(),
    ARROW: arrow_ids(pa.array(ASKED)),
}
