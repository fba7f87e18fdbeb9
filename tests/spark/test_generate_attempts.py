"""Several attempts at one shard: at the same time, after many others, in one worker. No Spark is needed for these."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark import TaskContext
from pyspark.resource import ResourceInformation

from kellm_features.errors import ConfigError, DataError, EngineError
from kellm_features.knowledge.completions import MOST_LOGS, CompletionStore
from kellm_features.knowledge.engines import Completion
from kellm_features.knowledge.inputs import domain_of
from kellm_features.settings import load_settings
from kellm_spark.descriptions import shards
from kellm_spark.descriptions.shards import ShardTask, write_shard
from kellm_spark.descriptions.work import Work, work_folder

from ..knowledge.llm_server import MODEL, LlmServer  # noqa: TID252 - tests are no package with a name of its own

ROWS = [{"shard": 3, "item_id": i, "title": f"Film {i}", "year": 1990, "genres": [], "pages": []} for i in range(12)]
ATTEMPT = """
import json, sys
from pathlib import Path
from kellm_features.knowledge.inputs import domain_of
from kellm_features.settings import load_settings
from kellm_spark.descriptions.shards import ShardTask, write_shard
from kellm_spark.descriptions.work import Work

settings = load_settings(None, sys.argv[3:])
task = ShardTask("item", settings, domain_of(settings), Work(Path(sys.argv[1])))
print(json.dumps(write_shard(task, 3, json.loads(sys.argv[2]))))
"""


def overrides(server: LlmServer) -> list[str]:
    told = [f"base_url={server.base_url}", "concurrency=2"]
    return ["generate.engine=openai", f"generate.model={MODEL}", *(f"generate.server.{pair}" for pair in told)]


def task_of(folder: Path, *words: str) -> ShardTask:
    settings = load_settings(None, words)
    work = Work(folder)
    work.begin("item", 5)
    return ShardTask("item", settings, domain_of(settings), work)


def test_two_attempts_at_the_same_time_spoil_nothing(tmp_path: Path) -> None:
    with LlmServer(delay_s=0.05) as server:
        task = task_of(tmp_path, *overrides(server))
        command = [sys.executable, "-c", ATTEMPT, str(tmp_path), json.dumps(ROWS), *overrides(server)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        told = [json.loads(attempt.communicate(timeout=60)[0]) for attempt in both]
        assert [attempt.returncode for attempt in both] == [0, 0]
        assert told[0][0] == told[1][0]
        assert {figures["rows"] for _, figures in told} == {len(ROWS)}
        assert len(server.requests) <= 2 * len(ROWS)
        asked = len(server.requests)
        key, figures = write_shard(task, 3, ROWS)
        assert (key, figures["run"], len(server.requests)) == (told[0][0], {}, asked)
    assert pq.read_table(task.work.table(3))["item_id"].to_pylist() == [row["item_id"] for row in ROWS]
    assert len(task.work.store(3)) == len(ROWS)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_logs_of_a_running_attempt_are_left_alone_and_merged_by_the_next_run(tmp_path: Path) -> None:
    work = Work(tmp_path)
    running = work.store(3)
    running.add("first", Completion("1"))
    for number in range(MOST_LOGS):
        with work.store(3) as store:
            store.add(f"earlier {number}", Completion("x"))
    with work.store(3) as late:  # more logs than a store of its own would leave
        assert len(late) == MOST_LOGS + 1
    running.add("second", Completion("2"))
    running.close()
    assert work.store(3)["second"].text == "2"
    work.tidy()
    logs = list(tmp_path.glob("shard-00003/*.jsonl"))
    assert len(logs) == MOST_LOGS + 1
    for log in logs:
        os.utime(log, (1e9, 1e9))  # written long ago
    running = work.store(3)
    running.add("third", Completion("3"))
    work.tidy()
    running.add("fourth", Completion("4"))
    running.close()
    assert len(list(tmp_path.glob("shard-00003/*.jsonl"))) == 2
    assert len(CompletionStore(tmp_path / "shard-00003")) == MOST_LOGS + 4


def test_an_engine_is_loaded_once_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    real = shards.load_engine
    monkeypatch.setattr(shards, "load_engine", lambda name, settings: loaded.append(name) or real(name, settings))
    shards._engine.cache_clear()
    task = task_of(tmp_path, "generate.engine=template", "generate.batch_size=3")
    for shard in range(4):
        write_shard(task, shard, ROWS)
    assert loaded == ["template"]
    write_shard(
        task_of(tmp_path, "generate.engine=template", "generate.batch_size=4", "generate.max_tokens=9"), 0, ROWS
    )
    assert loaded == ["template", "template"]
    shards._engine.cache_clear()


def test_an_engine_sees_the_gpu_that_spark_gave_to_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskContext, "_taskContext", None)  # making one makes this process a worker, till it is undone
    context = TaskContext()
    context._resources = {"gpu": ResourceInformation("gpu", ["GPU-3"])}
    monkeypatch.setattr(TaskContext, "get", lambda: context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = []
    monkeypatch.setattr(shards, "load_engine", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    shards._engine.cache_clear()
    shards._engine("vllm", "{}")
    context._resources = {}  # a cluster without the conf: what the executor was told stays
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    shards._engine("transformers", "{}")
    shards._engine.cache_clear()
    assert seen == ["GPU-3", "0,1"]


def test_a_shard_is_done_again_when_anything_that_shapes_it_changed(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"one")
    words = ["generate.engine=transformers", f"generate.model={model}"]
    task = task_of(tmp_path / "work", *words)
    key = task.key(ROWS)
    assert task.key([dict(row) for row in ROWS]) == key
    assert task_of(tmp_path / "work", *words, "generate.batch_size=2").key(ROWS) == key  # changes no text
    others = {key, task.key(ROWS[1:]), task.key([{**ROWS[0], "title": "Film 0!"}, *ROWS[1:]])}
    for more in ("generate.max_tokens=97", "generate.factors=true", "generate.domain=books", "generate.page_tokens=99"):
        others.add(task_of(tmp_path / "work", *words, more).key(ROWS))
    model.write_bytes(b"another")
    others.add(task.key(ROWS))
    assert len(others) == 8


def test_a_dead_server_ends_a_worker_whose_shards_have_few_rows(tmp_path: Path) -> None:
    def attempt(shard: int, server: LlmServer, run: str) -> dict[str, object]:
        once = ("generate.max_failures=10", "generate.server.concurrency=1", "generate.server.max_attempts=1")
        task = task_of(tmp_path, *overrides(server), *once)
        return write_shard(dataclasses.replace(task, run=run), shard, ROWS[:4])[1]

    with LlmServer(["500"]) as server:
        assert [attempt(shard, server, "a")["dead_letters"] for shard in (0, 1)] == [4, 4]
        with pytest.raises(EngineError, match="10 requests in a row failed"):
            attempt(2, server, "a")
        assert 10 <= len(server.requests) <= 11  # the next may be on its way when the tenth fails
        assert attempt(0, server, "b")["dead_letters"] == 4  # the next run counts from the beginning
    with LlmServer(port=server.port) as server:
        assert attempt(1, server, "b")["dead_letters"] == 0
    with LlmServer(["500"], port=server.port) as server:
        assert [attempt(shard, server, "b")["dead_letters"] for shard in (3, 4)] == [4, 4]  # an answer came between


def test_a_table_that_is_torn_or_of_others_counts_as_none(tmp_path: Path) -> None:
    task = task_of(tmp_path, "generate.engine=template")
    key, figures = write_shard(task, 3, ROWS)
    assert figures["run"]
    assert task.work.finished(3, "other") is None
    table = task.work.table(3)
    table.write_bytes(table.read_bytes()[:-10])
    assert task.work.finished(3, key) is None
    assert write_shard(task, 3, ROWS)[1]["run"]
    assert write_shard(task, 3, ROWS)[1]["run"] == {}


def test_an_executor_that_does_not_see_the_work_folder_says_so(tmp_path: Path) -> None:
    settings = load_settings(None, ["generate.engine=template"])
    with pytest.raises(DataError, match="has to be on a file system that the driver and all executors see"):
        write_shard(ShardTask("item", settings, domain_of(settings), Work(tmp_path / "none")), 3, ROWS)


def test_where_the_work_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert work_folder("out/", None) == tmp_path / "out.work"
    assert work_folder("file:///a b/out", None) == Path("/a b/out.work")
    assert work_folder("file:/a%20b/out", None) == Path("/a%20b/out.work")  # where Hadoop finds the output
    assert work_folder("s3://bucket/out", "shared/work") == tmp_path / "shared" / "work"
    with pytest.raises(ConfigError, match=r"hdfs://host/out\.work is not a path"):
        work_folder("hdfs://host/out", None)
    for name in "[]{}*?\\":
        with pytest.raises(ConfigError, match="which Spark reads as a pattern"):
            work_folder(f"a{name}b", None)
