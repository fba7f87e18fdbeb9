"""The Spark session of all jobs: an embedded local one, or the one that spark-submit made."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kellm_features.errors import ConfigError, DataError, KellmError, MissingExtraError, StoreError
from kellm_features.java import find_java
from kellm_features.progress import Advance, track
from kellm_features.settings import SparkSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

RUNTIME_CONF = {
    # Timestamps mean the same on every machine.
    "spark.sql.session.timeZone": "UTC",
    # A dump's page may hold megabytes: the default of 10,000 rows makes Arrow batches of gigabytes.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "512",
}
"""Set on every session, ours or not; both may be set while it runs."""

FRUGAL_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Half the CPU of a small job went to Java's optimizing compiler and parallel collector: 22 s became 12 without."""

_scratch: Path | None = None


def get_session(settings: SparkSettings) -> SparkSession:
    """The running Spark session, or a new one.

    Under spark-submit, or where a session is already up, that session is taken and `settings` is ignored. Otherwise
    a session starts inside this process: no UI, no console progress, scratch files in the system's temporary folder.

    Args:
        settings: master, driver memory and further Spark configuration (which wins over the defaults here).

    Raises:
        MissingExtraError: pyspark is not installed.
        KellmError: no Java, or one that is too old.
        ConfigError: Spark did not start with these settings.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise MissingExtraError("spark", "pyspark", "a Spark stage") from error
    # Workers must run this interpreter, where this package is importable; a cluster's own choice is kept.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if submitted() or SparkSession.getActiveSession() is not None:
        session = SparkSession.builder.getOrCreate()
    else:
        java = find_java()
        if java.remedy:
            raise KellmError(f"Spark needs Java: {java.seen}; {java.remedy}")
        builder = SparkSession.builder.appName("kellm")
        for key, value in {**_local_conf(settings), **settings.conf}.items():
            builder = builder.config(key, value)
        try:
            session = builder.getOrCreate()
            session.conf.get("spark.sql.shuffle.partitions")  # SQL settings are parsed on their first use
        except Exception as error:  # py4j's errors and pyspark's share no base
            told = spark_reason(error)  # asks the JVM, so before that ends
            stop_session()
            raise ConfigError(
                f"Spark did not start with spark.master={settings.master!r}, spark.driver_memory="
                f"{settings.driver_memory!r}, spark.conf={settings.conf!r}: {told}; "
                "mend the [spark] section of kellm.toml"
            ) from error
        logger.info("Spark %s on %s", session.version, settings.master)
    for key, value in RUNTIME_CONF.items():
        if key not in settings.conf:
            session.conf.set(key, value)
    return session


def submitted() -> bool:
    """Whether Spark was started by others: by spark-submit, or as a Spark Connect server."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_REMOTE" in os.environ


@contextmanager
def arrow_batches(session: SparkSession, rows: int) -> Iterator[None]:
    """Larger Arrow batches for narrow rows: the default is meant for pages."""
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = session.conf.get(key) or ""
    session.conf.set(key, rows)
    try:
        yield
    finally:
        session.conf.set(key, before)


def scratch_folder() -> Path:
    """A folder of this process that lasts until `stop_session`, which is also called when the process ends."""
    global _scratch
    if _scratch is None:
        _scratch = Path(tempfile.mkdtemp(prefix="kellm-spark-"))
        atexit.register(stop_session)
    return _scratch


def stop_session() -> None:
    """Stop the embedded session and end its Java process; nothing happens where none was started."""
    global _scratch
    if "pyspark" in sys.modules and "PYSPARK_GATEWAY_PORT" not in os.environ:
        from pyspark import SparkContext
        from pyspark.sql import SparkSession

        session = getattr(SparkSession, "_instantiatedSession", None) or SparkSession.getActiveSession()
        if session is not None:
            session.stop()
        gateway = getattr(SparkContext, "_gateway", None)
        if gateway is not None:
            # `stop` leaves the JVM running until this process ends: 400 MB that the next stage may need.
            gateway.shutdown()
            process = getattr(gateway, "proc", None)
            if process is not None:
                with suppress(OSError):
                    process.stdin.close()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            SparkContext._gateway = None
            SparkContext._jvm = None
    if _scratch is not None:
        shutil.rmtree(_scratch, ignore_errors=True)
        _scratch = None


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn what a worker raised about the data into this project's error, in one line.

    Python workers hand back a trace as text; an error of ours raised inside one is found in it by its name.
    """
    from pyspark.errors import PySparkException

    try:
        yield
    except PySparkException as error:
        found = re.search(r"kellm_features\.errors\.(Data|Schema|Store)Error: (.+)", str(error))
        if found:
            raise (StoreError if found.group(1) == "Store" else DataError)(found.group(2).strip()) from error
        raise


def submit(job: Callable[[SparkSession], object]) -> int:
    """Run a job for a spark-submit driver.

    Args:
        job: reads, transforms and writes with the session it is given.

    Returns:
        The exit code: 0, or 2 after one line on stderr for an error that the caller can mend.
    """
    try:
        session = get_session(SparkSettings())
        from pyspark.errors import AnalysisException

        try:
            with data_errors():
                job(session)
        except AnalysisException as error:  # no such path, or an output that exists
            raise DataError(spark_reason(error)) from error
    except KellmError as error:
        sys.stderr.write(f"{error}\n")
        return KellmError.exit_code
    finally:
        stop_session()
    return 0


@contextmanager
def follow(session: SparkSession, label: str, tasks: int) -> Iterator[None]:
    """Show the progress of the Spark stage that has this many tasks. Spark Connect tells none: nothing is shown."""
    context = getattr(session, "_sc", None)
    if context is None:
        yield
        return
    tracker, done = context.statusTracker(), threading.Event()

    def poll(advance: Advance) -> None:
        shown = 0
        while not done.wait(0.5):
            stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
            completed = max((s.numCompletedTasks for s in stages if s is not None and s.numTasks == tasks), default=0)
            if completed > shown:
                advance(completed - shown)
                shown = completed

    with track(label, tasks, "tasks") as advance:
        thread = threading.Thread(target=poll, args=(advance,), daemon=True, name="kellm-follow")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def spark_reason(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("An error occurred while calling", "at "))]
    return (told or lines or [type(error).__name__])[0].removeprefix(": ")


def _local_conf(settings: SparkSettings) -> dict[str, str]:
    scratch = scratch_folder()
    log_config = Path(__file__).with_name("log4j2.properties").as_uri()
    conf = {
        "spark.master": settings.master,
        "spark.driver.memory": settings.driver_memory,
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={log_config} {FRUGAL_JAVA}",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # Spark would make ./spark-warehouse and leave shuffle files behind after a kill.
        "spark.sql.warehouse.dir": (scratch / "warehouse").as_uri(),
        "spark.local.dir": str(scratch),
        # A laptop's tables are small: 200 (the default) means 200 tasks of no rows after every join.
        "spark.sql.shuffle.partitions": "8",
        # With so few there is nothing to coalesce, and coalescing looks at bytes: it makes one task of long work.
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        "spark.sql.parquet.compression.codec": "zstd",
        # Else pyspark notes the caller's line at every column, and logs failures as JSON on top of raising them.
        "spark.python.sql.dataFrameDebugging.enabled": "false",
    }
    if settings.master.startswith("local"):
        # No name look-up, and nothing listens beyond this machine.
        conf |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    # One task per core already: threads inside a worker only fight each other.
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        conf[f"spark.executorEnv.{name}"] = "1"
    return conf
