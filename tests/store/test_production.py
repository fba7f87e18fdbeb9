"""docs/production as it stands: Redis with TLS and users, Spark, a SQL registry, and every block of its README."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

DOCS = Path(__file__).parents[2] / "docs" / "production"
README = (DOCS / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
(ACL,) = re.findall(r"```redis\n(.*?)```", README, flags=re.DOTALL)
PUBLISH, JOIN, READER, ONLINE = PYTHON
APPLY, SPARK, MONITOR = BASH

pytestmark = [pytest.mark.feast, pytest.mark.slow]
T1 = datetime(2026, 3, 1, 12, tzinfo=UTC)
T2 = datetime(2026, 3, 8, 12, tzinfo=UTC)


@dataclass
class Site:
    """A folder with `feature_repo` in it, and the environment of the processes that use it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, **changed: str) -> str:
        environment = {**os.environ, **self.environment, **changed}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def feast(self, line: str) -> str:
        """One line of the README's shell."""
        name, *arguments = line.split()
        assert name == "feast"
        return self.run(sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli(prog_name='feast')", *arguments)

    def spark_submit(self, line: str) -> str:
        """One line of the README's shell: the driver, in a session that it starts itself."""
        name, driver, *arguments = line.split()
        assert name == "spark-submit"
        return self.run(sys.executable, str(DOCS.parents[1] / driver), *arguments, "--set", "spark.master=local[2]")

    def python(self, block: str, **changed: str) -> str:
        return self.run(sys.executable, "-P", "-c", block, **changed)


@pytest.fixture(scope="module")
def redis_address(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], start_server: Callable[..., Any]
) -> Iterator[tuple[str, Path]]:
    """A Redis that speaks TLS only and knows the README's users; its address and certificate."""
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    certificate = ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=redis", "-days", "2"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True)
    users = ACL.replace("${REDIS_PASSWORD}", "publisher-word").replace("${READER_PASSWORD}", "reader-word")
    (folder / "redis.conf").write_text(
        f"port 0\ntls-port {port}\nbind 127.0.0.1\ntls-cert-file cert.pem\ntls-key-file key.pem\n"
        f"tls-ca-cert-file cert.pem\ntls-auth-clients no\nsave ''\nmaxmemory-policy noeviction\n{users}"
    )
    with start_server(["redis-server", "redis.conf"], port, folder):
        yield f"127.0.0.1:{port}", folder / "cert.pem"


@pytest.fixture(scope="module")
def postgres_url(free_port: Callable[[], int]) -> Iterator[str]:
    """A PostgreSQL of our own on a free loopback port, `{user}` left open; not below pytest's folder, which is 0700."""
    port, root = free_port(), os.geteuid() == 0
    user = {"user": "postgres"} if root else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory() as folder:
        if root:
            shutil.chown(folder, "postgres")
        subprocess.run(["initdb", "-D", "db", "-U", "owner"], cwd=folder, check=True, capture_output=True, **user)
        command = ["postgres", "-D", "db", "-p", str(port), "-h", "127.0.0.1", "-k", folder]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, **user) as server:
            yield f"postgresql+psycopg://{{user}}@127.0.0.1:{port}/postgres"
            server.terminate()


@pytest.mark.skipif(shutil.which("postgres") is None, reason="PostgreSQL is not installed")
@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg is not installed")
def test_the_registry_on_postgres(tmp_path: Path, postgres_url: str) -> None:
    """Applied by its owner, read by a user that may only SELECT, as the README says."""
    import psycopg

    shutil.copytree(DOCS, tmp_path / "feature_repo")
    owner = postgres_url.format(user="owner")
    site = Site(tmp_path, {"FEAST_REGISTRY_URL": owner, "SPARK_MASTER": "local[2]"})
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = psycopg.connect(owner.replace("+psycopg", ""), autocommit=True)
            break
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with connection:
        site.feast(APPLY)
        connection.execute("CREATE ROLE server LOGIN")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO server")
        block = "from feast import FeatureStore; print(FeatureStore('feature_repo').get_feature_service('shop_ranker'))"
        told = site.python(block, FEAST_REGISTRY_URL=postgres_url.format(user="server"))
    assert "item_user_affinity" in told


@pytest.mark.redis
@pytest.mark.spark
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is missing")
@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_the_recipe(tmp_path: Path, make_run, redis_address: tuple[str, Path]) -> None:
    shutil.copytree(DOCS, tmp_path / "feature_repo")
    site = Site(
        tmp_path,
        {
            "FEAST_REGISTRY_URL": f"sqlite:///{tmp_path}/registry.db",  # Postgres by another URL
            "REDIS_ADDRESS": redis_address[0],
            "REDIS_CA_FILE": str(redis_address[1]),
            "REDIS_USER": "publisher",
            "REDIS_PASSWORD": "publisher-word",
            "SPARK_MASTER": "local[2]",
        },
    )
    reader = {"REDIS_USER": "reader", "REDIS_PASSWORD": "reader-word"}
    site.feast(APPLY)

    runs = {}
    for version, when, seed in (("v1", T1, 1), ("v2", T2, 2)):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        runs[version] = make_run(tmp_path / "runs" / "nightly", version, when, seed)
        # Vectors drawn anew share nothing with those before, which the gates are there to say.
        block = PUBLISH.replace("version.name)", "version.name, force=True)") if version == "v2" else PUBLISH
        assert f"serving {version}\n" in site.python(block)

    told = site.python(READER, **reader)
    assert "v2 [True, True, False] (3, 8)\n" in told

    def dot(version: str, item: int, user: int) -> float:
        return float(runs[version].vectors()[item].astype(float) @ runs[version].vectors("user")[user].astype(float))

    told = site.python(ONLINE, **reader)
    (served,) = re.findall(r"^\[(.*)\]$", told, flags=re.MULTILINE)
    assert float(served) == pytest.approx(dot("v2", 1, 2), rel=1e-6)

    hour = timedelta(hours=1)
    impressions = pd.DataFrame(
        {
            "item_id": [1, 1, 1, 3, 999],
            "user_id": [2, 2, 2, 4, 2],
            "event_timestamp": [T1 - hour, T1 + hour, T2 + hour, T2 - hour, T2 + hour],
        }
    )
    impressions.to_parquet(tmp_path / "impressions.parquet")
    site.python(JOIN)
    rows = pd.read_parquet(tmp_path / "training.parquet").sort_values(["item_id", "event_timestamp"])
    assert rows["item_id"].tolist() == [1, 1, 1, 3, 999]
    vectors = rows["item_knowledge_embedding__embedding"].tolist()
    expected = [None, runs["v1"].vectors()[1], runs["v2"].vectors()[1], runs["v1"].vectors()[3], None]
    for got, wanted in zip(vectors, expected, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(np.array(got, np.float32), wanted)
    lengths = {v: (runs[v].vectors(), runs[v].vectors("user")) for v in runs}
    pairs = [("v1", 1, 2), ("v2", 1, 2), ("v1", 3, 4)]
    cosines = [
        dot(v, i, u) / (np.linalg.norm(lengths[v][0][i].astype(float)) * np.linalg.norm(lengths[v][1][u].astype(float)))
        for v, i, u in pairs
    ]
    np.testing.assert_allclose(rows["item_user_affinity__cosine"], [np.nan, *cosines, np.nan], rtol=1e-6)
    week_less_hour = (timedelta(days=7) - hour).total_seconds()
    np.testing.assert_allclose(rows["item_embedding_age__age_s"], [np.nan, 3600, 3600, week_less_hour, np.nan])

    made = np.random.default_rng(3).standard_normal((60, 8)).astype(np.float32)
    pd.DataFrame({"item_id": range(1, 61), "embedding": made.tolist()}).to_parquet(tmp_path / "items.parquet")
    assert "published table-1: 60 of item_knowledge_embedding" in site.spark_submit(SPARK)
    assert "v2 [True, True, False]" in site.python(READER, **reader)  # until it is promoted
    impressions["event_timestamp"] = datetime.now(UTC) + hour
    impressions.to_parquet(tmp_path / "impressions.parquet")
    site.python(JOIN)
    rows = pd.read_parquet(tmp_path / "training.parquet").set_index("item_id")
    np.testing.assert_allclose(rows.loc[3, "item_knowledge_embedding__embedding"], made[2], rtol=1e-6)

    told = site.feast(MONITOR)
    assert "Feature views computed: 6\n" in told
    metrics = pd.read_parquet(
        tmp_path / "feature_repo" / "feast_monitoring" / "feast_monitoring_feature_metrics.parquet"
    )
    norms = metrics.query("feature_view_name == 'item_knowledge_embedding' and feature_name == 'embedding'")
    both = np.concatenate([np.stack(list(run.vectors().values())) for run in runs.values()]).astype(float)
    (baseline,) = norms.query("granularity == 'baseline'")["mean"]
    assert baseline == pytest.approx(np.linalg.norm(both, axis=1).mean())
