"""Trainings killed with SIGKILL go on to the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .conftest import make_world

WORKER = Path(__file__).parent / "kill_worker.py"


def test_killed_at_any_moment_a_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    make_world(tmp_path)
    subprocess.run([sys.executable, str(WORKER), str(tmp_path), str(tmp_path)], check=True)
    warm, first = "epoch-0000", "epoch-0001"
    assert json.loads((tmp_path / "seen.json").read_text()) == [
        [f"{warm}.tmp"],  # killed before the renaming,
        [f"{warm}.pt"],  # after it,
        [f"{warm}.pt", f"{first}.tmp"],
        [f"{warm}.pt", f"{first}.pt"],
        [f"{warm}.pt", f"{first}.pt", "epoch-0002.pt", "epoch-0003.tmp"],  # and an epoch later
    ]
    found, whole = (learnt(tmp_path / name) for name in ("often", "whole"))
    assert found["history"] == whole["history"]
    assert len(whole["history"]["epochs"]) == 4
    assert found["weights"].keys() == whole["weights"].keys()
    for name, tensor in whole["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name


def learnt(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "learnt.pt", weights_only=True)
    return found
