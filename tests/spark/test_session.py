"""What the session lends to jobs: progress, Arrow batches, a scratch folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kellm_spark import session

pytestmark = pytest.mark.spark


def test_progress_follows_the_stage(spark, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    @contextmanager
    def track(label: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
        assert (label, total, unit) == ("slow", 7, "tasks")
        yield told.append

    def wait(batches):
        for batch in batches:
            time.sleep(0.4)
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
