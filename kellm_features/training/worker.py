"""One rank of a training: `torchrun --nproc-per-node 2 -m kellm_features.training.worker JOB.json`."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.api import get_env_variable_or_raise

from kellm_features.errors import DataError, KellmError
from kellm_features.stages import StageReport
from kellm_features.training.device import take_gpu
from kellm_features.training.launch import Job, report, report_failure
from kellm_features.training.ranks import Ranks, backend
from kellm_features.training.stage import train

_LOOK_EVERY_S = 0.5
_WAIT = timedelta(days=1)
"""How long a rank waits in a collective. The first one validates, writes examples and saves while the others wait in
one, for longer than PyTorch's 10 (nccl) or 30 minutes (gloo) where data are large; a day ends what is stuck for good. A
rank that has ended is the launcher's to notice, at once and whatever this is."""


def run_job(path: str) -> None:
    """Train as the rank that the environment names (`RANK`, `WORLD_SIZE`, …, as torchrun sets them).

    Beside the job file the first rank leaves report.json, and a rank that fails says why in failed-RANK.json, also
    where it fails before it has met the others.

    Args:
        path: a `Job` as JSON.

    Raises:
        KellmError: whatever was wrong with the job or its inputs.
    """
    folder = Path(path).parent
    try:
        job = Job.read(Path(path))
        _end_with_launcher(job.launcher)
        done = _train_with_others(job)
        if done is not None:
            report(folder, done)
    except BaseException as error:
        report_failure(folder, int(get_env_variable_or_raise("RANK")), error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_with_others(job: Job) -> StageReport | None:
    """Meet the other ranks and train; the first rank's report, None on the others."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("kellm_features").setLevel(job.log_level)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = take_gpu(job.settings.train, dist.get_node_local_rank(fallback_rank=0))
    dist.init_process_group(backend(device), timeout=_WAIT, device_id=device if device.type == "cuda" else None)
    ranks = Ranks.joined(device)
    job.out.mkdir(parents=True, exist_ok=True)
    done = train(job.settings, job.find, job.out, job.checkpoints, ranks=ranks, resume_from=job.resume_from)
    return done if ranks.first else None


def _end_with_launcher(launcher: int | None = None) -> None:
    """End when the launcher is gone: killed, it stops no rank, and ranks would go on beside those of a next run.

    Args:
        launcher: its process; None: this one's parent, which may have gone while this one started.

    Raises:
        DataError: the launcher is no parent of this process.
    """
    parent = os.getppid()
    if launcher not in (None, parent):
        raise DataError(
            f"the job is of launcher {launcher}, which has ended or is another than {parent}, this rank's parent: "
            "start the stage again, or set the job's 'launcher' to null"
        )

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
