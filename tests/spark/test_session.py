"""What the session lends to jobs: progress, Arrow batches, a scratch folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kellm_spark import session

pytestmark = pytest.mark.spark


def test_progress_follows_the_stage(spark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[float] = []
    flag = tmp_path / "told"

    def advance(tasks: float) -> None:
        told.append(tasks)
        flag.touch()

    @contextmanager
    def track(label: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
        assert (label, total, unit) == ("slow", 7, "tasks")
        yield advance

    def wait(batches):
        for batch in batches:
            if batch["id"][0].as_py() >= 3:  # the later tasks end once progress was told
                deadline = time.monotonic() + 60
                while not flag.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
            yield batch

    monkeypatch.setattr(session, "track", track)
    with session.follow(spark, "slow", 7):
        spark.range(0, 7, 1, 7).mapInArrow(wait, "id long").count()
    assert 0 < sum(told) <= 7


def test_larger_batches_are_for_one_block(spark) -> None:
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(key)
    with session.arrow_batches(spark, 12345):
        assert spark.conf.get(key) == "12345"
    assert spark.conf.get(key) == before
