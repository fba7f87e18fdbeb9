"""`kellm serve`: starting, stopping, workers, TLS; and its load generator."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kellm_features.store.http_formats import JSON, RAW
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.reader import EmbeddingReader

from .server import (
    BEARER,
    ITEMS,
    TOKEN,
    Server,
    Store,
    json_ids,
    metrics_of,
    serving,
)


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
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks"))
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
