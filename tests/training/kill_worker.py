"""Trainings that are killed, for test_kills.py: `kill_worker.py WORLD FOLDER` writes to FOLDER what they learnt.

Each life of the training is a process of its own, forked after the imports, which take longer than the training.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kellm_features.settings import Settings
from kellm_features.training import stage, state

SETTINGS: dict[str, Any] = {
    "hidden": 16,
    "dim": 8,
    "batch_size": 64,
    "field_dim": 4,
    "warmup_steps": 10,
    "epochs": 4,
    "patience": 0,
    "top_k": 5,
    "device": "cpu",
}
IN_A_SAVE = (1, 2, 1, 2, 3)
"""Lives that end at their n-th flush: odd ones are of a file's bytes, even ones of the folder after its renaming."""
AT_RANDOM = 5
"""Lives that end after a random time, wherever they are then."""


def train(world: Path, folder: Path) -> dict[str, Any]:
    """Weights and history."""
    settings = Settings.model_validate({"run": {"seed": 7}, "train": SETTINGS})
    data, encodings, samplers = stage.load_inputs(settings, lambda name, file: world / name / file)
    vectors = {side: encoding.vectors for side, encoding in encodings.items()}
    trainer = stage.fit(data, vectors, samplers, settings.train, seed=7, checkpoint=folder)
    return {"weights": trainer.model.state_dict(), "history": vars(trainer.history)}


def killed_at_flush(number: int) -> None:
    """Let this process die at its n-th flush to the disk."""
    real: Callable[[int], None] = os.fsync
    left = number

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    state.os.fsync = fsync


def live(world: Path, folder: Path, *, flush: int = 0, seconds: float | None = None) -> bool:
    """One life; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        killed_at_flush(flush)
        torch.save(train(world, folder), folder / "learnt.pt")
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("a training failed by itself")
    return os.WIFSIGNALED(status)


def main() -> None:
    torch.set_num_threads(1)
    world, folder = Path(sys.argv[1]), Path(sys.argv[2])
    whole, often = folder / "whole", folder / "often"
    live(world, whole)
    started = time.monotonic()
    live(world, folder / "timed")
    longest = time.monotonic() - started
    seen = []
    for number in IN_A_SAVE:
        assert live(world, often, flush=number)
        seen.append(sorted(file.name for file in often.iterdir()))
    rng = random.Random(3)
    for _ in range(AT_RANDOM):
        live(world, often, seconds=rng.uniform(0, longest))
    live(world, often)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
