"""The same repository on a real Redis: publish, fetch, withdraw."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kellm_features.store.fetch import fetch_embeddings
from kellm_features.store.publish import run as publish
from kellm_features.store.scaffold import write_feature_repo

WARNINGS = (
    "ignore::DeprecationWarning",  # feast, ibis and their dependencies call what newer releases deprecate
    "ignore::FutureWarning",
    "ignore::ResourceWarning",  # feast leaves connections to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",  # the same, reported from the collector
)
pytestmark = [
    pytest.mark.feast,
    pytest.mark.redis,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
    *(pytest.mark.filterwarnings(warning) for warning in WARNINGS),
]


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Redis of our own on a free loopback port, nothing persisted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = tmp_path_factory.mktemp("redis")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield port
        server.terminate()


def test_publish_and_fetch_on_redis(tmp_path: Path, make_run, redis_port: int) -> None:
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo)
    yaml = (repo / "feature_store.yaml").read_text()
    sqlite = "  type: feast.infra.online_stores.sqlite.SqliteOnlineStore\n  path: data/online.db\n"
    assert sqlite in yaml
    redis = f'  type: redis\n  connection_string: "127.0.0.1:{redis_port}"\n'
    (repo / "feature_store.yaml").write_text(yaml.replace(sqlite, redis))

    first = make_run(tmp_path / "run1", "v1")
    publish(first.context(repo))
    fetched = fetch_embeddings(repo, [1, 50, 999])
    assert fetched.found.tolist() == [True, True, False]  # stock Feast on Redis calls the missing one PRESENT
    assert np.array_equal(fetched.values[:2], np.stack([first.vectors()[1], first.vectors()[50]]))
    assert np.isnan(fetched.values[2]).all()
    assert fetched.version == ["v1", "v1", None]

    when = pd.Timestamp("2026-03-08T12:00:00Z").to_pydatetime()
    second = make_run(tmp_path / "run2", "v2", when, 2, items=[*range(1, 50), 51])  # without item 50
    publish(second.context(repo))
    fetched = fetch_embeddings(repo, [1, 50, 51])
    assert fetched.found.tolist() == [True, False, True]
    assert np.array_equal(fetched.values[[0, 2]], np.stack([second.vectors()[1], second.vectors()[51]]))
