"""One rank of a training: `torchrun --nproc-per-node 2 -m kellm_features.training.worker JOB.json`."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kellm_features.errors import KellmError
from kellm_features.training.launch import Job, report, report_failure
from kellm_features.training.ranks import Ranks, backend
from kellm_features.training.stage import train
from kellm_features.training.trainer import training_device

_LOOK_EVERY_S = 0.5


def run_job(path: str) -> None:
    """Train as the rank that the environment names (`RANK`, `WORLD_SIZE`, …, as torchrun sets them).

    Beside the job file the first rank leaves report.json, and a rank that fails says why in failed-RANK.json.

    Args:
        path: a `Job` as JSON.

    Raises:
        KellmError: whatever was wrong with the job or its inputs.
    """
    _end_with_launcher()
    folder = Path(path).parent
    job = Job.read(Path(path))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("kellm_features").setLevel(job.log_level)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    device = training_device(job.settings.train)
    dist.init_process_group(backend(device), device_id=device if device.type == "cuda" else None)
    ranks = Ranks.joined(device)
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        done = train(job.settings, job.find, job.out, job.checkpoints, ranks=ranks, resume_from=job.resume_from)
        if ranks.first:
            report(folder, done)
    except BaseException as error:
        report_failure(folder, ranks.rank, error)
        raise
    finally:
        dist.destroy_process_group()


def _end_with_launcher() -> None:
    """End when the launcher is gone: killed, it stops no rank, and ranks would go on beside those of a next run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, name="kellm-launcher-watch", daemon=True).start()


def main() -> None:
    """Run the job that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: torchrun --nproc-per-node RANKS -m kellm_features.training.worker JOB.json")
    try:
        run_job(sys.argv[1])
    except KellmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
