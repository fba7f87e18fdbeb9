"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports Triton: without a GPU its kernels are tested in the interpreter.
if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from kellm_features.settings import SparkSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """One Spark session for the whole run: starting it costs 10 s, so it starts with the first test that asks."""
    from kellm_spark.session import get_session, stop_session

    yield get_session(
        SparkSettings(
            master="local[2]",  # two workers: enough for partitions to meet out of order
            driver_memory="1g",  # test tables are small, and the suite shares its machine
            conf={
                "spark.sql.shuffle.partitions": "3",  # few tasks, and an odd number: blocks never line up with them
                "spark.default.parallelism": "2",  # on any machine the same
                "spark.sql.adaptive.enabled": "false",  # plans do not depend on the sizes of test tables
            },
        )
    )
    stop_session()
