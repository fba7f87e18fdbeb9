"""Every kernel that is launched compiles for the GPUs that are promised, none of which has to be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .oracle import needs_triton

TARGETS = ("sm_80", "sm_90", "gfx942")
KERNELS = {
    "narrow_weights",
    "adapter_forward",
    "contrast_rows",
    "contrast_finish",
    "contrast_columns",
    "assemble",
    "adapter_weights",
    "add_parts",
    "adapter_encodings",
}

pytestmark = [needs_triton, pytest.mark.slow]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One compiling process a target, side by side; the interpreter's variable would leave nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ahead_of_time.py")
    started = {
        target: subprocess.Popen(
            [sys.executable, str(script), target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for target in TARGETS
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles(target: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    output, complaints = processes[target].communicate()
    assert processes[target].returncode == 0, complaints
    rows: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert not row["products"] or row["matrix_instructions"] > 0, row
        if target == "sm_90":
            assert row["spills"] == 0, row
