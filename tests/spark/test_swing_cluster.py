"""SWING where it will live: on a standalone cluster whose processes may die, and behind a Spark Connect server."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_spark.swing import PRESETS

from .cluster import Cluster, Started, connect_server, standalone, wait_for
from .oracle import Row, assert_same, brute_force, dense_scores, graph, in_order, top

pytestmark = [pytest.mark.spark, pytest.mark.slow]

DRIVER = Path(__file__).parents[2] / "spark_jobs/swing_pairs.py"
MODES = ["csr", "block"]
COLUMNS = ["anchor_id", "neighbor_id", "score", "common", "rank"]
P = PRESETS["pai-rec"]
TOP_K = 10
SMALL = graph(8, 120, 60, 0.3)
LARGE = (2400, 600, 0.2)
"""Users, items, share of cells: several tasks of about a second, so that there is something to kill."""

CLIENT = """
import json, sys
from pyspark.sql import SparkSession
from kellm_spark.swing import swing_pairs

spark = SparkSession.builder.getOrCreate()
frame = spark.read.parquet(sys.argv[1])
found = {m: swing_pairs(frame, side="user", top_k=int(sys.argv[2]), mode=m).collect() for m in sys.argv[3:]}
print("FOUND " + json.dumps({"client": type(spark).__module__, **found}))
spark.stop()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with standalone(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
    assert not cluster.running()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph whose double sum plain Python can do."""
    return write(tmp_path_factory.mktemp("small"), np.array(SMALL))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("large"), np.argwhere(large_matrix()))


def large_matrix() -> np.ndarray:
    users, items, share = LARGE
    return np.random.default_rng(9).random((users, items)) < share


def write(folder: Path, edges: np.ndarray) -> Path:
    pq.write_table(pa.table({"user_id": edges[:, 0], "item_id": edges[:, 1]}), folder / "interactions.parquet")
    return folder / "interactions.parquet"


def truth_of_users() -> list[Row]:
    return top(brute_force({(i, u) for u, i in SMALL}, P.alpha, P.alpha1, P.beta), TOP_K)


def submit(cluster: Cluster, name: str, master: str, interactions: Path, *options: str) -> tuple[Started, Path]:
    """The driver as a platform starts it: its process, and the folder that it writes."""
    out = cluster.folder / "out" / name
    words = ("--interactions", interactions, "--out", out, "--side", "item", "--top-k", str(TOP_K), *options)
    return cluster.submit(name, master, DRIVER, *words), out


def parts(out: Path) -> list[Path]:
    """In the order of their numbers; the rest of a name is a random UUID."""
    return sorted(out.glob("part-*.parquet"))


def digests(out: Path) -> list[str]:
    return [sha256(part.read_bytes()).hexdigest() for part in parts(out)]


def rows(out: Path) -> list[Row]:
    """What was written, by anchor and rank."""
    table = pa.concat_tables(pq.read_table(part) for part in parts(out))
    return in_order(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))


def test_a_client_of_spark_connect_finds_what_brute_force_finds(cluster: Cluster, small: Path) -> None:
    """Four parties: the client, the Connect server that is the driver, two executors on the cluster."""
    with connect_server(cluster, cluster.master) as remote:
        told = cluster.start(
            "client", sys.executable, "-c", CLIENT, small, str(TOP_K), *MODES, SPARK_REMOTE=remote
        ).finish()
    found = json.loads(re.search("FOUND (.*)", told)[1])
    assert found.pop("client").startswith("pyspark.sql.connect")
    wanted = truth_of_users()
    for mode in MODES:
        assert_same(in_order(found[mode]), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_killed_processes_leave_no_trace_in_the_output(cluster: Cluster, large: Path, mode: str) -> None:
    """A Python worker is killed while it computes, then a whole executor; Spark runs their tasks again."""
    driver, out = submit(cluster, f"killed-{mode}", cluster.master, large, "--mode", mode)
    kill_until(driver, r"(Lost task \d+\.0 in stage .*Python worker exited unexpectedly)", cluster, "worker")
    kill_until(driver, r"(Lost executor \d+ on 127\.0\.0\.1)", cluster, "executor")
    driver.finish()
    driver, quiet = submit(cluster, f"quiet-{mode}", "local[2]", large, "--mode", mode)
    driver.finish()
    assert digests(out) == digests(quiet)
    some = range(0, LARGE[1], 60)
    wanted = top(dense_scores(large_matrix().astype(float), P.alpha, P.alpha1, P.beta, some), TOP_K)
    assert_same([row for row in rows(out) if row[0] in some], wanted)


def kill_until(driver: Started, pattern: str, cluster: Cluster, victim: str) -> None:
    """Kill what computes until the driver tells of it: a task may end just before its process does."""

    def computing() -> psutil.Process | None:
        assert driver.process.poll() is None, f"nothing left to kill:\n{driver.log[-4000:]}"
        return cluster.computing()

    for _ in range(3):  # a task that is lost four times ends the job
        worker = wait_for("Python worker at work", computing, timeout_s=120)
        with suppress(TimeoutError, psutil.NoSuchProcess):
            (worker if victim == "worker" else cluster.executor_of(worker)).kill()
            driver.says(pattern, timeout_s=10)
            return
    pytest.fail(f"three kills, and no {pattern}:\n{driver.log[-4000:]}")
