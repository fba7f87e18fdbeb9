"""kill -9 at any moment: no finished text is asked for again, none is lost, none is doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kellm_features.artifacts import load_artifact
from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.generate import TABLES
from kellm_features.schemas import read_table

from .llm_server import LlmServer

FILMS = 300
KILLS = 20
WAIT_S = 60


class Runs:
    """Runs of the stage in processes of their own."""

    def __init__(self, worker: subprocess.Popen[str], server: LlmServer, folder: Path) -> None:
        self._worker = worker
        self._server = server
        self.run = folder / "run"
        self.done, self.error = folder / "done", folder / "error"

    def start(self, *overrides: str, **more: Any) -> int:
        """The process id of a run."""
        for file in (self.done, self.error):
            file.unlink(missing_ok=True)
        base = [
            "generate.engine=openai", "generate.model=test-model", "generate.limit=1000", "generate.max_tokens=64",
            f"generate.server.base_url={self._server.base_url}", "generate.server.concurrency=4",
            "generate.side=item",
        ]  # fmt: skip
        job = {"run": str(self.run), "films": FILMS, "overrides": [*base, *overrides], **more}
        assert self._worker.stdin
        assert self._worker.stdout
        self._worker.stdin.write(json.dumps(job) + "\n")
        self._worker.stdin.flush()
        return int(self._worker.stdout.readline())

    def finish(self, *overrides: str, **more: Any) -> None:
        """Run to the end."""
        pid = self.start(*overrides, **more)
        until = time.monotonic() + WAIT_S
        while psutil.pid_exists(pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert self.done.exists(), self.error.read_text() if self.error.exists() else "it did not end"

    def stored(self) -> set[str]:
        """First words of the answers on disk, read as lines of JSON."""
        logs = (self.run / "work" / "generate" / "completions" / "item").glob("*.jsonl")
        whole = (line for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith("\n"))
        return {json.loads(line)["text"][:9] for line in whole}

    def rows(self) -> list[dict[str, Any]]:
        name, schema = TABLES["item"]
        return read_table(self.run / "generate" / name, schema).to_pylist()


@pytest.fixture
def server() -> Iterator[LlmServer]:
    with LlmServer(delay_s=0.05) as started:
        yield started


@pytest.fixture
def open_runs(tmp_path: Path, server: LlmServer) -> Iterator[Callable[[str], Runs]]:
    script = Path(__file__).with_name("kill_worker.py")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], **pipes) as worker:

        def open_(name: str) -> Runs:
            (tmp_path / name).mkdir()
            return Runs(worker, server, tmp_path / name)

        yield open_
        worker.kill()


def asked(server: LlmServer) -> list[str]:
    """Titles in the order in which the server was asked: "Film 0001"."""
    return [request.user.partition("The title is: ")[2][:9] for request in server.requests]


@pytest.mark.slow
def test_killed_twenty_times(open_runs: Callable[[str], Runs], server: LlmServer) -> None:
    runs, chance = open_runs("killed"), random.Random(20261122)
    for _ in range(KILLS):
        before = len(server.requests)
        kept = runs.stored()
        pid = runs.start()
        until = time.monotonic() + WAIT_S
        while len(server.requests) == before and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        while psutil.pid_exists(pid):
            time.sleep(0.005)
        again = kept & set(asked(server)[before:])
        assert not again, f"{len(again)} finished texts were asked for again"
        assert kept <= runs.stored()
        assert load_artifact(runs.run, "generate") is None  # nothing half-made is to be seen
    before, kept = len(server.requests), runs.stored()
    assert 0 < len(kept) < FILMS, "the kills came too early or too late to show anything"
    runs.finish()
    rest = asked(server)[before:]
    assert set(rest) == {f"Film {n:04}" for n in range(1, FILMS + 1)} - kept
    assert max(Counter(rest).values()) == 1

    whole = open_runs("whole")
    whole.finish()
    assert [row["item_id"] for row in runs.rows()] == list(range(1, FILMS + 1))
    assert runs.rows() == whole.rows()
    assert {row["description_source"] for row in runs.rows()} == {"llm"}
    assert len(CompletionStore(runs.run / "work" / "generate" / "completions" / "item")) == FILMS


def test_one_changed_item_in_a_hundred_is_one_request_in_a_hundred(
    open_runs: Callable[[str], Runs], server: LlmServer
) -> None:
    server.delay_s = 0.0
    runs = open_runs("changed")
    runs.finish()
    assert len(server.requests) == FILMS
    before = {row["item_id"]: row for row in runs.rows()}
    (runs.run / "wiki" / "manifest.json").unlink()  # a new dump
    runs.finish(changed=[7, 77, 177])
    assert sorted(asked(server)[FILMS:]) == ["Film 0007", "Film 0077", "Film 0177"]
    after = {row["item_id"]: row for row in runs.rows()}
    assert {key for key in before if before[key] != after[key]} == {7, 77, 177}


def test_a_server_that_fails_now_and_then_loses_nothing(open_runs: Callable[[str], Runs], tmp_path: Path) -> None:
    faults = ["429,every=7,retry_after=0.01", "500,every=11", "garbage,every=13", "400,contains=Film 0042 "]
    with LlmServer(faults) as flaky:
        runs = open_runs("flaky")
        runs.finish(f"generate.server.base_url={flaky.base_url}", films=60)
        rows = runs.rows()
        assert [row["item_id"] for row in rows] == list(range(1, 61))
        assert {row["item_id"] for row in rows if row["description_source"] != "llm"} == {42}
        manifest = load_artifact(runs.run, "generate").manifest
        assert manifest.notes["dead_letters"] == 1
        before = len(flaky.requests)
        runs.finish(f"generate.server.base_url={flaky.base_url}", films=60)
        assert set(asked(flaky)[before:]) == {"Film 0042"}  # a failed request is asked again, and no other
