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

from kellm_features.settings import VerifySettings
from kellm_features.store import rollout
from kellm_features.store.scaffold import write_feature_repo

from .marks import FEAST

T1 = datetime(2026, 3, 1, 12, tzinfo=UTC)
T2 = datetime(2026, 3, 8, 12, tzinfo=UTC)
pytestmark = FEAST
COMMAND = [sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli(prog_name='feast')"]


def feast(repo: Path, *arguments: str, fails: bool = False) -> str:
    done = subprocess.run([*COMMAND, *arguments], cwd=repo, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode != 0) == fails, done.stderr[-2000:]
    return done.stdout + done.stderr


@contextlib.contextmanager
def serving(repo: Path) -> Iterator[int]:
    """`feast serve` on a free port of the loopback interface; ended with its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*COMMAND, "serve", "--host", "127.0.0.1", "--port", str(port)],
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
    """`feast apply`, `materialize`, `materialize-incremental` and `serve`, beside what kellm publishes."""
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo, project="films", id_type="string")
    runs = {
        version: make_run(tmp_path / version, version, when, seed, items=items, key=lambda i: f"tt{i:04d}")
        for version, when, seed, items in (("v1", T1, 1, range(1, 51)), ("v2", T2, 2, range(2, 52)))
    }
    told = feast(repo, "apply")  # a fresh clone: nothing is published, no file exists
    assert "Traceback" not in told
    with serving(repo) as port:

        def check(version: str, present: str, missing: str) -> None:
            body = {"features": ["item_knowledge_embedding:embedding"], "entities": {"item_id": [present, missing]}}
            answer = post(port, "/get-online-features", body)
            served = answer["results"][answer["metadata"]["feature_names"].index("embedding")]
            vector = runs[version].vectors()[present]
            np.testing.assert_array_equal(np.array(served["values"][0], dtype=np.float32), vector)
            assert served["values"][1] is None
            assert served["statuses"] == ["PRESENT", "NOT_FOUND"]

        rollout.publish(repo, rollout.run_inputs(tmp_path / "v1"))
        rollout.promote(repo)
        check("v1", "tt0001", "tt0051")
        feast(repo, "materialize", "2026-02-01T00:00:00", "2026-03-02T00:00:00")  # of what is served: changes nothing
        check("v1", "tt0001", "tt0051")

        rollout.publish(repo, rollout.run_inputs(tmp_path / "v2"))
        check("v1", "tt0001", "tt0051")
        told = feast(repo, "materialize-incremental", "2026-03-09T00:00:00", fails=True)  # would mix v2 into v1
        assert "is served in version v1, whose rows are of 2026-03-01T12:00:00+00:00" in told
        check("v1", "tt0001", "tt0051")
        rollout.promote(repo, settings=VerifySettings(max_centroid_drift=2, min_neighbor_overlap=0))
        check("v2", "tt0051", "tt0001")
        feast(repo, "materialize-incremental", "2026-03-09T00:00:00")
        check("v2", "tt0051", "tt0001")
        rollout.rollback(repo)
        check("v1", "tt0001", "tt0051")

        listed = feast(repo, "feature-views", "list")
        for name in rollout.INPUTS:
            assert name in listed
