"""Publishers to kill, a Redis to kill, and a repository for both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kellm_features.store.repo import REDIS_TYPE

from .shop import (
    Job,
    RedisServer,
    Shop,
    write_repo,
)


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """`spawn(call=..., repo=..., ...)` starts a publisher; see `work` in worker.py for what it can be told."""
    folder = tmp_path_factory.mktemp("jobs")
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        started = 0

        def start(**job: Any) -> Job:
            nonlocal started
            started += 1
            out = folder / f"{started}.json"
            nursery.stdin.write(json.dumps(job | {"out": str(out)}) + "\n")
            nursery.stdin.flush()
            return Job(int(nursery.stdout.readline()), out)

        yield start
        nursery.stdin.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def open_shop(request: pytest.FixtureRequest, tmp_path: Path, spawn: Callable[..., Job]) -> Callable[..., Shop]:
    """`open_shop(kind)`: a repository with v1 published and promoted, on SQLite or on an empty Redis."""

    def open_(kind: str) -> Shop:
        server = None
        online = ""
        if kind != "sqlite":
            server = request.getfixturevalue("server")
            with server.client() as client:
                client.flushall()
                client.config_set("maxmemory", "0")
            online = f"  type: {REDIS_TYPE}\n  connection_string: 127.0.0.1:{server.port}\n  layout: {kind}\n"
        write_repo(tmp_path / "repo", online)
        shop = Shop(tmp_path / "repo", tmp_path / "releases", spawn, server)
        shop.publish("v1", promote=True)
        return shop

    return open_
