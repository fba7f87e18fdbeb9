"""`kellm generate-spark` under kill -9: what was stored is never asked for again, nothing is lost, nothing doubled."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from kellm_features.knowledge.completions import CompletionStore
from kellm_features.settings import load_settings

from ..knowledge.llm_server import MODEL, LlmServer  # noqa: TID252 - tests are no package with a name of its own
from .cluster import wait_for
from .films import Films

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ITEMS = 150
TASKS = 2
CONCURRENCY = 3
COMMAND = "import kellm_features.cli.generate_spark; from kellm_features.cli import main; main()"


def settings_of(server: LlmServer) -> list[str]:
    told = [f"base_url={server.base_url}", f"concurrency={CONCURRENCY}"]
    return ["generate.engine=openai", f"generate.model={MODEL}", *(f"generate.server.{pair}" for pair in told)]


def start(films: Films, server: LlmServer) -> subprocess.Popen[bytes]:
    words = [word for pair in settings_of(server) for word in ("--set", pair)]
    words += ["--set", f'spark.master="local[{TASKS}]"', "--set", 'spark.driver_memory="600m"', "--shards", "6"]
    words += ["--items", "ingest/items.parquet", "--links", "link", "--pages", "wiki", "--out", "texts"]
    command = [sys.executable, "-c", COMMAND, "generate-spark", "--side", "item", *words]
    with (films.root / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=films.root, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], moment: Callable[[], bool], log: Path) -> None:
    """kill -9 of the driver, its JVM, and the Python workers, as when their machine loses power."""

    def look() -> bool | None:
        assert process.poll() is None, f"it ended before the kill:\n{log.read_text()[-4000:]}"
        return moment() or None

    wait_for("moment to kill", look, timeout_s=120)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(tree, timeout=20)[1]


def stored(films: Films) -> int:
    return sum(
        len(CompletionStore(folder)) for folder in (films.root / "texts.work").glob("shard-*") if folder.is_dir()
    )


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    films = Films(tmp_path, items=ITEMS).write()
    draw = random.Random(4)
    lost = 0
    with LlmServer(delay_s=0.06) as server:
        for _ in range(2):
            asked, kept = len(server.requests), stored(films)
            enough = server.statuses[200] + draw.randrange(5, 40)
            kill_when(start(films, server), lambda enough=enough: server.statuses[200] >= enough, films.root / "log")
            wait_for("idle server", lambda: server.in_flight == 0 or None)
            in_flight = len(server.requests) - asked - (stored(films) - kept)
            assert 0 <= in_flight <= TASKS * CONCURRENCY
            assert stored(films) > kept
            lost += in_flight
        assert not (tmp_path / "texts").exists()
        staging = tmp_path / ".texts.unfinished"
        kill_when(start(films, server), staging.exists, films.root / "log")
        # Each prompt that was not stored was asked once more, and no other.
        assert stored(films) == ITEMS
        assert len(server.requests) == ITEMS + lost
        assert start(films, server).wait(timeout=120) == 0, (films.root / "log").read_text()[-4000:]
        assert len(server.requests) == ITEMS + lost
        assert len(server.asked) == ITEMS

        stage = films.stage(load_settings(None, [*settings_of(server), "generate.limit=1000"]))
    found = ds.dataset(tmp_path / "texts", format="parquet").to_table().to_pylist()
    assert found == pq.read_table(stage / "item_descriptions.parquet").to_pylist()
    assert {row["description_source"] for row in found} == {"llm"}
    leftovers = {path.name for path in tmp_path.iterdir()} - {"ingest", "link", "wiki", "stage", "stage-work", "log"}
    assert leftovers == {"texts", "texts.work"}
