"""Spark in processes of its own on loopback: a standalone cluster, drivers, a Connect server. They end with a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil
import pyspark

SPARK_HOME = Path(pyspark.__file__).parent
BIN = SPARK_HOME / "bin"
MARK = "KELLM_TEST_PROCESSES"
"""In the environment of all that is started here, and so of what that starts, wherever it moves in the process tree."""
JAVA_OPTIONS = (
    "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",  # start quickly and stay small: these processes live for seconds
    "-XX:-UsePerfData",  # else a killed JVM leaves a file in the system's temporary folder
    "-Djava.net.preferIPv4Stack=true",
)

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = 60) -> T:
    """What `look` sees, as soon as that is not None."""
    deadline = time.monotonic() + timeout_s
    while (seen := look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in {timeout_s} s")
        time.sleep(0.05)
    return seen


class Started:
    """A process whose output goes to a file."""

    def __init__(self, name: str, command: list[str | Path], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        """What it has said so far, on stdout and stderr."""
        return self._log.read_text(errors="replace")

    def says(self, pattern: str, timeout_s: float = 60) -> str:
        """The first group of `pattern` in its output, as soon as it is there."""

        def look() -> str | None:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.log)
            assert found or not ended, f"{self.name} ended with {self.process.returncode}:\n{self.log[-4000:]}"
            return found[1] if found else None

        return wait_for(f"/{pattern}/ from {self.name}", look, timeout_s)

    def finish(self, timeout_s: float = 240) -> str:
        """Its output, once it has ended well."""
        code = self.process.wait(timeout_s)
        assert code == 0, f"{self.name} ended with {code}:\n{self.log[-4000:]}"
        return self.log


class Processes:
    """Starts processes that keep to `folder`; leaving the context ends them and all that they started.

    Args:
        folder: theirs alone; logs, shuffle files, work folders and temporary files go there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Started] = []
        (folder / "tmp").mkdir()
        # A session of the test process, where there is one, has left its own variables.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_"))}
        self._environment = {
            **inherited,
            MARK: str(folder),
            "SPARK_HOME": str(SPARK_HOME),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_LOCAL_DIRS": str(folder / "tmp"),
            "PYSPARK_PYTHON": sys.executable,
            "JDK_JAVA_OPTIONS": " ".join([*JAVA_OPTIONS, f'"-Djava.io.tmpdir={folder / "tmp"}"']),
            "TMPDIR": str(folder / "tmp"),
            "no_proxy": "127.0.0.1",  # gRPC would ask a proxy for loopback too
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for started in self._started:  # first: a worker that lives would start its executors again
            started.process.kill()
            started.process.wait()
        wait_for("end of all processes", lambda: not self._kill_all() or None, timeout_s=20)

    def start(self, name: str, *command: str | Path, **environment: str) -> Started:
        started = Started(name, list(command), {**self._environment, **environment}, self.folder)
        self._started.append(started)
        return started

    def submit(self, name: str, master: str, *words: str | Path) -> Started:
        """spark-submit, with drivers and executors small enough for a shared machine."""
        conf = {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.driver.memory": "512m",
            "spark.executor.memory": "500m",
            "spark.sql.shuffle.partitions": "4",
            "spark.sql.warehouse.dir": (self.folder / "warehouse").as_uri(),
        }
        options = [word for key, value in conf.items() for word in ("--conf", f"{key}={value}")]
        return self.start(name, BIN / "spark-submit", "--master", master, *options, *words)

    def running(self) -> list[psutil.Process]:
        """All that was started here, directly or not, and lives."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # ended meanwhile, or another user's
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _kill_all(self) -> list[psutil.Process]:
        found = self.running()
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        return found


class Cluster(Processes):
    """A standalone master and two workers of one core each."""

    master: str
    """Where drivers find it, `spark://…`."""

    def computing(self) -> psutil.Process | None:
        """A Python worker of an executor that has loaded Numba and uses a core right now."""
        running = self.running()
        daemons = {p.pid for p in running if "pyspark.daemon" in _command(p)}
        spent = {p: _cpu_s(p) for p in running if _parent(p) in daemons and _maps(p, "numba")}
        time.sleep(0.2)
        # On a crowded machine it gets a small part of a core; one that waits for a task gets none.
        return next((p for p, before in spent.items() if _cpu_s(p) > before), None)

    def executor_of(self, worker: psutil.Process) -> psutil.Process:
        """The JVM that runs this Python worker's tasks."""
        return next(p for p in worker.parents() if "CoarseGrainedExecutorBackend" in _command(p))


@contextmanager
def standalone(folder: Path) -> Iterator[Cluster]:
    """A running cluster, both of its workers registered."""
    with Cluster(folder) as cluster:
        spark_class = BIN / "spark-class"
        memory = {"SPARK_DAEMON_MEMORY": "200m"}
        listen = ("--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
        master = cluster.start("master", spark_class, "org.apache.spark.deploy.master.Master", *listen, **memory)
        cluster.master = master.says(r"Starting Spark master at (spark://127\.0\.0\.1:\d+)")
        for name in ("worker-1", "worker-2"):
            size = ("--cores", "1", "--memory", "700m", "--work-dir", folder / name)
            worker = "org.apache.spark.deploy.worker.Worker"
            cluster.start(name, spark_class, worker, *listen, *size, cluster.master, **memory)
        master.says(r"(?s)(Registering worker .*Registering worker )")
        yield cluster


@contextmanager
def connect_server(processes: Processes, master: str) -> Iterator[str]:
    """A Spark Connect server; gives its address, `sc://…`."""
    server = processes.submit(
        "connect-server",
        master,
        *("--conf", "spark.connect.grpc.binding.address=127.0.0.1", "--conf", "spark.connect.grpc.binding.port=0"),
        *("--class", "org.apache.spark.sql.connect.service.SparkConnectServer"),
    )
    try:
        yield "sc://" + server.says(r"Spark Connect server started at: (127\.0\.0\.1:\d+)")
    finally:
        server.process.terminate()  # it ends its application, so that the executors go
        server.process.wait(30)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def _maps(process: psutil.Process, name: str) -> bool:
    with suppress(psutil.Error):
        return any(name in region.path for region in process.memory_maps())
    return False


def _cpu_s(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        used = process.cpu_times()
        return used.user + used.system
    return 0.0
