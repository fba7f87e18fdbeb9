"""The stock `feast` commands in a repository made from the template, with string ids."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from kellm_features.store.fetch import fetch_embeddings
from kellm_features.store.layout import Publication
from kellm_features.store.partitions import read_release
from kellm_features.store.publish import INPUTS, _write_partitions
from kellm_features.store.scaffold import write_feature_repo

T1 = datetime(2026, 3, 1, 12, tzinfo=UTC)
T2 = datetime(2026, 3, 8, 12, tzinfo=UTC)
WARNINGS = (
    "ignore::DeprecationWarning",  # feast and its dependencies call what newer releases deprecate
    "ignore::FutureWarning",
    "ignore::ResourceWarning",  # feast leaves SQLite connections to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",  # the same, reported from the collector
)
pytestmark = [pytest.mark.feast, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]
FEAST = [sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli(prog_name='feast')"]


def feast(repo: Path, *arguments: str) -> str:
    done = subprocess.run([*FEAST, *arguments], cwd=repo, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@contextlib.contextmanager
def serving(repo: Path) -> Iterator[int]:
    """`feast serve` on a free port of the loopback interface; ended with its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*FEAST, "serve", "--host", "127.0.0.1", "--port", str(port)],
        cwd=repo,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def post(port: int, path: str, body: object, timeout_s: float = 90) -> dict:
    """Ask until the server listens."""
    until = time.monotonic() + timeout_s
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, text
            return json.loads(text)
        except OSError:
            assert time.monotonic() < until, "feast serve does not listen"
            time.sleep(0.3)
        finally:
            connection.close()


def test_stock_commands(tmp_path: Path, make_run) -> None:
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo, project="films", id_type="string")
    runs = {
        version: make_run(tmp_path / version, version, when, seed, items=items, key=lambda i: f"tt{i:04d}")
        for version, when, seed, items in (("v1", T1, 1, range(1, 51)), ("v2", T2, 2, range(2, 52)))
    }

    def release(version: str):
        return read_release({view: tmp_path / version / stage / file for view, (stage, file) in INPUTS.items()})

    def check(version: str, ids: list[str], missing: list[str]) -> None:
        got = fetch_embeddings(repo, [*ids, *missing])
        vectors = runs[version].vectors()
        np.testing.assert_array_equal(got.values[: len(ids)], np.stack([vectors[i] for i in ids]))
        assert got.found.tolist() == [True] * len(ids) + [False] * len(missing)
        assert got.version == [version] * len(ids) + [None] * len(missing)

    # A fresh clone: nothing is published, no file exists.
    told = feast(repo, "apply")
    assert "Traceback" not in told

    (repo / "data").mkdir(exist_ok=True)
    views = _write_partitions(repo, release("v1"), None, None)
    feast(repo, "materialize", "2026-02-01T00:00:00", "2026-03-02T00:00:00")
    check("v1", ["tt0001", "tt0050"], ["tt0051"])

    first = Publication(version="v1", published_at=T1, dim=8, views=views)
    _write_partitions(repo, release("v2"), first, None)
    told = feast(repo, "materialize-incremental", "2026-03-09T00:00:00")
    assert "2026-03-02 00:00:00+00:00" in told  # it goes on where `materialize` ended
    check("v2", ["tt0002", "tt0051"], ["tt0001"])

    with serving(repo) as port:
        listed = feast(repo, "feature-views", "list")
        for name in views:
            assert name in listed
        body = {"features": ["item_knowledge_embedding:embedding"], "entities": {"item_id": ["tt0002", "tt0001"]}}
        answer = post(port, "/get-online-features", body)
    place = answer["metadata"]["feature_names"].index("embedding")
    served = answer["results"][place]
    np.testing.assert_array_equal(np.array(served["values"][0], dtype=np.float32), runs["v2"].vectors()["tt0002"])
    assert served["values"][1] is None
