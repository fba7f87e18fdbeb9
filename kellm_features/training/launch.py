"""Start the ranks of a training: here by PyTorch's elastic agent, or on a cluster by Spark's TorchDistributor."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kellm_features.errors import DataError, KellmError, MissingExtraError, first_line
from kellm_features.settings import Settings
from kellm_features.stages import StageReport
from kellm_features.training.device import named_device, require_gpus

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_STAGE_REPORT = TypeAdapter(StageReport)
# torchrun's summary of a failure, the only word of it that Spark hands on: "rank : 1 (local_rank: 1)", "exitcode : -9".
_TORCHRUN_FAILURE = re.compile(r"\brank\s*:\s*(\d+) \(local_rank.*?\bexitcode\s*:\s*(-?\d+)", re.DOTALL)

_AGENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_LOCAL_MASTER = re.compile(r"local(\[.*\])?")


class RankFailedError(KellmError):
    """A rank raised an error or was killed, or the first one left no report; finished epochs' checkpoints stay."""


class Job(BaseModel):
    """What every rank is told, as JSON; all paths must be the same, and readable, wherever a rank runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    """Sections run, data, history and train; swing's `top_k` bounds train's. Others are not looked at."""
    inputs: dict[str, Path]
    """Folders of the stages ingest, swing and encode."""
    out: Path
    """Where the first rank writes what the stage writes."""
    checkpoints: Path
    resume_from: int | None = None
    """The epoch to go on from; None: the newest."""
    threads: int | None = None
    """Of PyTorch, in each rank; None: as it likes."""
    log_level: int = logging.WARNING
    launcher: int | None = None
    """The process that starts the ranks, as their parent; None: another one does, here or elsewhere."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        *,
        inputs: Mapping[str, Path],
        out: Path,
        checkpoints: Path,
        resume_from: int | None = None,
    ) -> Job:
        """A job for ranks that may start in other folders."""
        here = settings.train.launcher == "torchrun"
        needed = {name: getattr(settings, name) for name in ("run", "data", "history", "swing", "train")}
        if (board := settings.train.tensorboard) is not None:
            needed["train"] = settings.train.model_copy(update={"tensorboard": board.resolve()})
        return cls(
            settings=Settings(**needed),
            inputs={name: path.resolve() for name, path in inputs.items()},
            out=out.resolve(),
            checkpoints=checkpoints.resolve(),
            resume_from=resume_from,
            threads=max(1, torch.get_num_threads() // settings.train.ranks) if here else None,
            log_level=logging.getLogger("kellm_features").getEffectiveLevel(),
            launcher=os.getpid() if here else None,
        )

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job of a file.

        Raises:
            DataError: no such file, or no job.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} is not a job of this version of kellm ({first_line(error)})") from error

    def find(self, stage: str, name: str) -> Path:
        """Where an input is.

        Raises:
            DataError: the job does not name the stage.
        """
        if stage not in self.inputs:
            raise DataError(f"the job's inputs are {sorted(self.inputs)}: the folder of '{stage}' is needed as well")
        return self.inputs[stage] / name


class _Failure(BaseModel):
    """What a rank wrote before it ended."""

    rank: int
    message: str
    on_purpose: bool
    """A `KellmError`, and not, say, the loss of a rank that was killed."""


def report(folder: Path, done: StageReport) -> None:
    """The first rank's last word, beside the job file."""
    (folder / _REPORT).write_bytes(_STAGE_REPORT.dump_json(done))


def report_failure(folder: Path, rank: int, error: BaseException) -> None:
    """A rank's last word: why it ends."""
    message = str(error) if isinstance(error, KellmError) else f"{type(error).__name__}: {first_line(error)}"
    failure = _Failure(rank=rank, message=message, on_purpose=isinstance(error, KellmError))
    (folder / f"failed-{rank}.json").write_text(failure.model_dump_json(), encoding="utf-8")


def run_ranks(job: Job, folder: Path, settings: Settings) -> StageReport:
    """Run a job on `train.ranks` ranks and return what the first of them reports.

    Args:
        job: what they do.
        folder: for the job file and the ranks' reports; emptied.
        settings: the launcher's: train and spark.

    Raises:
        ConfigError: a device that is not there, or fewer GPUs than ranks.
        RankFailedError: a rank raised an error or was killed; the others are stopped.
        MissingExtraError: `launcher = "spark"` without pyspark.
    """
    if settings.train.launcher == "torchrun":
        require_gpus(settings.train)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder.resolve() / "job.json"
    path.write_text(job.model_dump_json(), encoding="utf-8")
    launch = _by_spark if settings.train.launcher == "spark" else _by_torchrun
    launch(path, settings)
    done = folder / _REPORT
    if not done.exists():
        raise RankFailedError(f"all ranks ended, and the first of them left no {done}: see their output")
    outcome: StageReport = _STAGE_REPORT.validate_json(done.read_bytes())
    return outcome


def _by_torchrun(path: Path, settings: Settings) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=settings.train.ranks,
        run_id=path.parent.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,  # a killed training goes on from its checkpoints, by whoever looked at why it was killed
    )
    with _own_signals():
        try:
            elastic_launch(config, sys.executable)("-m", "kellm_features.training.worker", str(path))
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise RankFailedError(_blame(path.parent, codes, settings.train.ranks)) from error


def _by_spark(path: Path, settings: Settings) -> None:
    try:
        from pyspark.ml.torch.distributor import TorchDistributor
    except ImportError as error:
        raise MissingExtraError("spark", "pyspark", "train.launcher = 'spark'") from error
    from kellm_features.training.worker import run_job
    from kellm_spark.session import get_session

    session = get_session(settings.spark)
    train, named = settings.train, named_device(settings.train)
    distributor = TorchDistributor(
        num_processes=train.ranks,
        # `local-cluster[…]` has executors of its own.
        local_mode=_LOCAL_MASTER.fullmatch(session.conf.get("spark.master") or "local") is not None,
        use_gpu=torch.cuda.is_available() if named is None else named.type == "cuda",
    )
    try:
        with redirect_stdout(sys.stderr):  # it prints the ranks' lines, and stdout is for results
            distributor.run(run_job, str(path))
    except Exception as error:  # RuntimeError here, several kinds of Spark's own from a cluster
        codes = {int(rank): int(code) for rank, code in _TORCHRUN_FAILURE.findall(str(error))}
        raise RankFailedError(_blame(path.parent, codes, train.ranks)) from error


def _blame(folder: Path, exit_codes: Mapping[int, int], ranks: int) -> str:
    """Which rank failed first, and why: those that fail with it lost a peer, or were told to stop."""
    told = sorted(folder.glob("failed-*.json"), key=lambda file: file.stat().st_mtime_ns)
    failures = [_Failure.model_validate_json(file.read_bytes()) for file in told]
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0 and code != -signal.SIGTERM}
    kept = "finished epochs are kept: run the stage again to go on from the last one"
    for failure in failures:
        if failure.on_purpose:
            return f"rank {failure.rank} of {ranks}: {failure.message}"
    for rank, number in killed.items():
        return f"rank {rank} of {ranks} was killed by {signal.Signals(number).name}; {kept}"
    for failure in failures:
        return f"rank {failure.rank} of {ranks} failed ({failure.message}); {kept}"
    codes = ", ".join(f"rank {rank} of {ranks} ended with code {code}" for rank, code in exit_codes.items())
    return f"{codes or f'one of {ranks} ranks failed'}, see its output; {kept}"


@contextmanager
def _own_signals() -> Iterator[None]:
    """The elastic agent takes signals over and keeps them: give them back, and Ctrl-C its own name."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    taken = {number: signal.getsignal(number) for number in _AGENTS_SIGNALS}
    try:
        yield
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise
    finally:
        try:
            for number, handler in taken.items():
                signal.signal(number, handler)
        except ValueError:  # not the main thread, where the agent took none
            logger.debug("signal handlers stay: this is not the main thread")
