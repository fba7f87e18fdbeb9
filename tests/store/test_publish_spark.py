"""A version straight from Spark's partitions into a real Redis: `publish_embeddings` and its driver."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from kellm_features import EmbeddingReader
from kellm_features.errors import DataError, SchemaError, StoreError
from kellm_features.settings import VerifySettings
from kellm_features.store import rollout
from kellm_features.store.backends import open_backend
from kellm_features.store.join import training_join
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.publish import online_namespace
from kellm_features.store.repo import REDIS_TYPE, SQLITE_TYPE, read_online_config
from kellm_features.store.scaffold import write_feature_repo
from kellm_spark.publish import publish_embeddings

pytestmark = [
    pytest.mark.spark,
    pytest.mark.redis,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]
VIEW = ITEM_EMBEDDING.name
LENIENT = VerifySettings(max_centroid_drift=2, min_neighbor_overlap=0)
ROWS = 300


@pytest.fixture
def repo(tmp_path: Path, redis_port: int, request: pytest.FixtureRequest) -> Path:
    """A repository on Redis, its own project."""
    project = "p" + "".join(filter(str.isalnum, request.node.name))
    write_feature_repo(tmp_path / "repo", project=project)
    path = tmp_path / "repo" / "feature_store.yaml"
    online = f'{REDIS_TYPE}\n  connection_string: "127.0.0.1:{redis_port}"\n  layout: packed\n'
    path.write_text(path.read_text().replace(f"{SQLITE_TYPE}\n  path: data/online.db\n", online))
    return tmp_path / "repo"


def frame(spark: Any, ids: range, seed: int, dim: int = 16) -> tuple[Any, dict[int, np.ndarray]]:
    vectors = np.random.default_rng(seed).standard_normal((len(ids), dim)).astype(np.float32)
    rows = [(i, vector.tolist(), f"c{i}") for i, vector in zip(ids, vectors, strict=True)]
    made = spark.createDataFrame(rows, "item_id bigint, embedding array<float>, content_hash string").repartition(3)
    return made, {i: vector.astype(np.float16).astype(np.float32) for i, vector in zip(ids, vectors, strict=True)}


def check(repo: Path, version: str, vectors: dict[int, np.ndarray]) -> None:
    with EmbeddingReader.from_repo(repo, version=version) as reader:
        got = reader.get(list(vectors), on_missing="raise")
    assert got.version == version
    np.testing.assert_array_equal(got.values, np.stack(list(vectors.values())))


def test_two_versions_from_spark(spark, repo: Path) -> None:
    first, vectors = frame(spark, range(ROWS), 1)
    done = publish_embeddings(spark, {VIEW: first}, repo, version="s1")
    assert (done.state, done.views[VIEW].rows, done.views[VIEW].dim) == ("published", ROWS, 16)
    with pytest.raises(StoreError, match="version s1 is published and waits"):
        EmbeddingReader.from_repo(repo).get([1])
    assert rollout.promote(repo).name == "s1"  # its gates read the offline partition and the online rows
    check(repo, "s1", vectors)

    second, later = frame(spark, range(10, ROWS + 5), 2)
    publish_embeddings(spark, {VIEW: second}, repo, version="s2")
    rollout.promote(repo, "s2", settings=LENIENT)
    check(repo, "s2", later)
    check(repo, "s1", vectors)
    partition = ds.dataset(repo / "data" / VIEW / "s2.parquet").to_table()
    assert partition.schema.equals(ITEM_EMBEDDING.arrow("int64").remove_metadata()) or set(
        partition.column_names
    ) == set(ITEM_EMBEDDING.arrow("int64").names)
    withdrawn = partition.filter(pa.compute.field("is_deleted"))
    assert sorted(withdrawn["item_id"].to_pylist()) == list(range(10))
    assert withdrawn["embedding"].null_count == 10

    now = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5)
    joined = training_join(pa.table({"item_id": [3, 20], "event_timestamp": [now, now]}), repo)
    assert joined.found.tolist() == [False, True]  # item 3 was withdrawn


def test_a_publish_that_was_killed_goes_on(spark, repo: Path, monkeypatch) -> None:
    from kellm_features.store.distributed import Publishing

    made, vectors = frame(spark, range(ROWS), 3)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Publishing, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            publish_embeddings(spark, {VIEW: made}, repo, version="s1")
    assert [(v.name, v.state) for v in rollout.status(repo).versions] == [("s1", "unfinished")]
    # Half of the rows are lost, as when a worker had not come to them; the others must not be written again.
    config = read_online_config(repo)
    backend = open_backend(config)
    version = backend.catalog().get("s1")
    namespace = online_namespace(config.project, version, VIEW)
    before = partition_files(repo)
    lost = [key for key in vectors if key % 2]
    backend._run([(b"DEL", f"kellm:{config.project}:{namespace.name}:{key}".encode()) for key in lost])
    told = []
    original = Publishing.writer
    monkeypatch.setattr(Publishing, "writer", lambda self, view: told.append(view) or original(self, view))
    publish_embeddings(spark, {VIEW: made}, repo, version="s1")
    assert told == [VIEW]
    assert partition_files(repo) == before  # the partition was there
    check(repo, "s1", vectors)
    with pytest.raises(StoreError, match="version s1 is published already, and a version never changes"):
        publish_embeddings(spark, {VIEW: made}, repo, version="s1")
    assert rollout.prune(repo, 1) == []


def partition_files(repo: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (repo / "data" / VIEW / "s1.parquet").iterdir()}


@pytest.mark.parametrize(
    ("rows", "ddl", "error", "message"),
    [
        ([(1, [1.0]), (1, [2.0])], "item_id bigint, embedding array<float>", DataError, r"1 ids appear more than once"),
        ([(None, [1.0])], "item_id bigint, embedding array<float>", DataError, r"1 rows have no item_id"),
        ([(1, [1.0]), (2, [1.0, 2.0])], "item_id bigint, embedding array<float>", DataError, r"have 1 to 2 components"),
        ([(1, None), (2, [1.0])], "item_id bigint, embedding array<float>", DataError, r"1 embeddings are null"),
        ([(1, "x")], "item_id bigint, embedding string", SchemaError, r"embedding is string; accepted: array<float>"),
        ([(1.5, [1.0])], "item_id double, embedding array<float>", SchemaError, r"item_id is double; accepted: bigint"),
        ([(1, [1.0])], "movie bigint, embedding array<float>", SchemaError, r"lacks the column item_id; seen: movie"),
    ],
)
def test_bad_tables_are_refused_before_anything_is_written(spark, repo, rows, ddl, error, message) -> None:
    with pytest.raises(error, match=message):
        publish_embeddings(spark, {VIEW: spark.createDataFrame(rows, ddl)}, repo, version="s1")
    assert rollout.status(repo).versions == ()
    assert not list((repo / "data").rglob("*.parquet")) if (repo / "data").exists() else True


def test_sqlite_is_no_store_for_workers(spark, tmp_path: Path) -> None:
    write_feature_repo(tmp_path / "repo")
    made, _ = frame(spark, range(3), 1)
    with pytest.raises(StoreError, match=r"online\.db is a file of this machine, which workers on others cannot reach"):
        publish_embeddings(spark, {VIEW: made}, tmp_path / "repo", version="s1")


@pytest.mark.slow
def test_the_driver_is_the_command(repo: Path, tmp_path: Path) -> None:
    ids = list(range(20))
    vectors = np.random.default_rng(5).standard_normal((20, 4)).astype(np.float32)
    pq.write_table(pa.table({"item_id": ids, "embedding": vectors.tolist()}), tmp_path / "items.parquet")
    driver = Path(__file__).parents[2] / "spark_jobs" / "publish_embeddings.py"
    options = ["--items", str(tmp_path / "items.parquet"), "--version", "d1", "--repo", str(repo)]
    done = subprocess.run([sys.executable, str(driver), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "published d1: 20 of item_knowledge_embedding; serve it with  kellm promote d1" in done.stdout
    check(repo, "d1", dict(zip(ids, vectors.astype(np.float16).astype(np.float32), strict=True)))
