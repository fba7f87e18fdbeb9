"""Training on ranks: what two of them learn is what one process learns, and a rank that dies is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from pyspark.sql import SparkSession
from safetensors.torch import load_file

from kellm_features.errors import ConfigError, DataError
from kellm_features.stages import StageContext, StageReport
from kellm_features.training import launch, stage, worker
from kellm_features.training.launch import Job, RankFailedError
from kellm_features.training.ranks import Ranks
from kellm_features.training.worker import _end_with_launcher, run_job

from .conftest import make_world
from .rank_cases import CASES, RESUMED, train

Contexts = Callable[..., StageContext]
HERE = Path(__file__).parent


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=lambda told, at=name: f"{at}: {told}")


def assert_same_curves(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for part in ("steps", "epochs"):
        for row, wanted in zip(ours[part], theirs[part], strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The world, and what two gloo ranks learn of it in each case: one launch for all, as starting them takes long."""
    world = tmp_path_factory.mktemp("ranks")
    make_world(world)
    out = world / "found.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(HERE / "rank_cases.py"), str(world), str(out)], check=True, timeout=600)
    return world, torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_process_learns(two_ranks: tuple[Path, dict[str, Any]], case: str) -> None:
    world, found = two_ranks
    alone = train(world, case, Ranks())
    assert_same(found[case]["weights"], alone["weights"])
    assert_same_curves(found[case]["history"], alone["history"])


@pytest.mark.slow
def test_ranks_that_go_on_learn_the_same_bits(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    _, found = two_ranks
    whole, resumed = found[RESUMED], found[f"{RESUMED}, resumed"]
    assert whole["history"] == resumed["history"]
    assert len(whole["history"]["epochs"]) == 3
    assert whole["weights"].keys() == resumed["weights"].keys()
    for name, tensor in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name


def stage_outputs(ctx: StageContext) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = {}
    for file in ("adapter.safetensors", "backbone.safetensors"):
        weights |= {f"{file}/{name}": tensor for name, tensor in load_file(ctx.out / file).items()}
    return weights, json.loads((ctx.out / "curves.json").read_text())


def check_launcher(context: Contexts, launcher: str, ranks: int = 2) -> None:
    small = {"dropout": 0.0, "epochs": 1, "patience": 0, "schedule": "joint"}
    alone = context("train", **small)
    stage.run(alone)
    weights, curves = stage_outputs(alone)
    for file in [*alone.out.iterdir(), *alone.work.glob("checkpoints-*/*")]:
        file.unlink()
    together = context("train", **small, ranks=ranks, launcher=launcher)
    report = stage.run(together)
    assert report.notes["training"]["ranks"] == ranks  # as the first of them saw it
    assert (together.work / "ranks" / "report.json").exists()  # and told
    found, found_curves = stage_outputs(together)
    assert_same(found, weights)
    assert_same_curves(found_curves, curves)
    assert report.notes["test"] == json.loads((together.out / "metrics.json").read_text())["test"]
    assert [path.name for path in together.work.glob("checkpoints-*/*")] == ["epoch-0001.pt"]


def test_the_stage_on_ranks_of_the_elastic_launcher(context: Contexts) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in numbers]
    check_launcher(context, "torchrun")
    assert [signal.getsignal(number) for number in numbers] == handlers


@pytest.mark.spark
@pytest.mark.parametrize("ranks", [1, 2])
# TorchDistributor leaves the pipe that it reads its launcher's output from to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_the_stage_on_ranks_of_sparks_torch_distributor(context: Contexts, spark: SparkSession, ranks: int) -> None:
    check_launcher(context, "spark", ranks)


def test_a_killed_rank_ends_the_run_and_is_named(context: Contexts) -> None:
    ctx = context("train", ranks=2, epochs=5000, patience=0, schedule="joint", keep_checkpoints=2)

    ended, killed = threading.Event(), threading.Event()

    def kill() -> None:
        while not ended.wait(0.05) and not killed.is_set():
            if not list(ctx.work.glob("checkpoints-*/epoch-*.pt")):
                continue
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has ended
                    if process.environ().get("RANK") == "1":
                        process.kill()
                        killed.set()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        with pytest.raises(RankFailedError, match="rank 1 of 2 was killed by SIGKILL; finished epochs are kept"):
            stage.run(ctx)
    finally:
        ended.set()
        killer.join(timeout=10)
    assert killed.is_set()
    assert not list(ctx.out.iterdir())
    assert list(ctx.work.glob("checkpoints-*/epoch-*.pt"))
    assert not [child for child in psutil.Process().children() if "training.worker" in " ".join(child.cmdline())]


def test_who_is_blamed(tmp_path: Path) -> None:
    def blamed(codes: dict[int, int]) -> str:
        return launch._blame(tmp_path, codes, 3)

    assert blamed({2: 1}).startswith("rank 2 of 3 ended with code 1, see its output")
    launch.report_failure(tmp_path, 0, RuntimeError("Connection closed by peer\nand more"))
    # Rank 0 lost rank 1, which was killed; rank 2 was told to stop.
    assert blamed({0: 1, 1: -9, 2: -15}).startswith("rank 1 of 3 was killed by SIGKILL")
    assert blamed({0: 1, 2: -15}).startswith("rank 0 of 3 failed (RuntimeError: Connection closed by peer)")
    launch.report_failure(tmp_path, 2, DataError("encodings.parquet holds NaN"))
    assert blamed({0: 1, 2: 2}) == "rank 2 of 3: encodings.parquet holds NaN"
    told = "Root Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)"
    assert launch._TORCHRUN_FAILURE.findall(told) == [("1", "-9")]


def test_a_job_file_is_checked(tmp_path: Path, context: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = context("train").settings
    job = Job.of(settings, inputs={"ingest": tmp_path}, out=tmp_path / "out", checkpoints=tmp_path / "kept")
    path = tmp_path / "job.json"
    path.write_text(job.model_dump_json())
    assert Job.read(path) == job
    assert Job.read(path).settings.train == settings.train
    assert job.launcher == os.getpid()
    monkeypatch.chdir(tmp_path)
    board = context("train", tensorboard="board").settings
    moved = Job.of(board, inputs={"ingest": tmp_path}, out=tmp_path / "out", checkpoints=tmp_path / "kept")
    assert moved.settings.train.tensorboard == tmp_path / "board"  # ranks may start in another folder
    with pytest.raises(DataError, match=r"inputs are \['ingest'\]: the folder of 'swing' is needed"):
        job.find("swing", "item_pairs.parquet")
    path.write_text('{"settings": {}}')
    with pytest.raises(DataError, match=r"job.json is not a job of this version"):
        Job.read(path)


def test_a_rank_that_fails_before_it_meets_the_others_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    path = tmp_path / "job.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="is not a job"):
        run_job(str(path))
    assert launch._blame(tmp_path, {1: 1}, 2).startswith(f"rank 1 of 2: {path} is not a job of this version")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    with pytest.raises(DataError, match=rf"the job is of launcher {gone.pid}, which has ended or is another"):
        _end_with_launcher(gone.pid)


def test_ranks_wait_while_the_first_validates(
    tmp_path: Path, context: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than PyTorch's half an hour, in the group that they have joined."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    waits: list[timedelta] = []

    def look(*_: object, **__: object) -> StageReport:
        waits.append(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout)
        return StageReport(rows_in=0, rows_out=0)

    monkeypatch.setattr(worker, "train", look)
    job = Job.of(context("train").settings, inputs={}, out=tmp_path / "out", checkpoints=tmp_path / "kept")
    try:
        worker._train_with_others(job)
    finally:
        dist.destroy_process_group()
    assert waits[0] >= timedelta(hours=12)


def test_more_ranks_than_gpus_are_refused_before_any_starts(context: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    ctx = context("train", ranks=2, device=None)
    with pytest.raises(ConfigError, match=r"train.ranks = 2 on 1 GPUs"):
        stage.run(ctx)
    assert not (ctx.work / "ranks").exists()


@pytest.mark.parametrize(
    ("master", "local"), [("local", True), ("local[2]", True), ("local-cluster[2,1,512]", False), ("spark://h", False)]
)
def test_which_of_sparks_masters_have_no_executors_of_their_own(master: str, local: bool) -> None:
    assert (launch._LOCAL_MASTER.fullmatch(master) is not None) == local


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import time\nfrom kellm_features.training.worker import _end_with_launcher\n"
        "_end_with_launcher()\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    launcher = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    command = [sys.executable, "-c", launcher, sys.executable, str(rank)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        process.kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
