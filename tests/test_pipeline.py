"""The pipeline's decisions, on three toy stages: a -> b -> c, where b reads a file and c reaches outside."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from kellm_features import pipeline
from kellm_features.artifacts import Artifact
from kellm_features.errors import ArtifactError, DataError, MissingExtraError
from kellm_features.settings import Settings, load_settings
from kellm_features.stages import StageContext, StageReport, StageSpec

ran: list[str] = []


def run_a(ctx: StageContext) -> StageReport:
    ran.append("a")
    (ctx.out / "a.txt").write_text(str(ctx.settings.run.seed // 10))
    return StageReport(1, 1, split_hash="split-of-a")


def run_b(ctx: StageContext) -> StageReport:
    ran.append("b")
    if ctx.files["text"].read_text() == "bad":
        raise DataError("the file says bad")
    (ctx.out / "b.txt").write_text(ctx.input("a", "a.txt").read_text() + ctx.files["text"].read_text())
    return StageReport(1, 1, dropped={"none": 0})


def run_c(ctx: StageContext) -> StageReport:
    ran.append("c")
    (ctx.out / "c.txt").write_text(ctx.input("b", "b.txt").read_text())
    return StageReport(1, 1)


def run_slow(ctx: StageContext) -> StageReport:
    (ctx.out / "half.txt").write_text("half")
    (ctx.work / "piece").write_text("kept")
    time.sleep(60)
    return StageReport(1, 1)


FILE = Path("unset")
OUTSIDE: dict[str, str | None] = {"why": None}


def files_of_b(settings: Settings) -> dict[str, Path]:
    return {"text": FILE}


def check_c(settings: Settings, artifact: Artifact) -> str | None:
    return OUTSIDE["why"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    module = ModuleType("toy_stages")
    for function in (run_a, run_b, run_c, run_slow, files_of_b, check_c):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "toy_stages", module)
    stages = (
        StageSpec("a", "toy_stages:run_a", (), ("run",)),
        StageSpec("b", "toy_stages:run_b", ("a",), ("train",), files="toy_stages:files_of_b"),
        StageSpec("c", "toy_stages:run_c", ("b",), (), check="toy_stages:check_c"),
    )
    use(monkeypatch, stages)
    monkeypatch.setitem(globals(), "FILE", tmp_path / "text")
    (tmp_path / "text").write_text("x")
    OUTSIDE["why"] = None
    ran.clear()
    return tmp_path / "run"


def use(monkeypatch: pytest.MonkeyPatch, stages: tuple[StageSpec, ...]) -> None:
    from kellm_features import stages as graph

    for module in (pipeline, graph):
        monkeypatch.setattr(module, "STAGES", stages)
        monkeypatch.setattr(module, "STAGE_NAMES", tuple(stage.name for stage in stages))


def go(run_dir: Path, *overrides: str, first: str | None = None, last: str | None = None) -> list[str]:
    ran.clear()
    pipeline.run_stages(load_settings(None, overrides), run_dir, first=first, last=last)
    return list(ran)


def test_runs_what_is_stale(toy: Path) -> None:
    assert go(toy) == ["a", "b", "c"]
    assert go(toy) == []
    assert go(toy, "train.dim=3") == ["b"]  # b's output is the same bytes: c stays
    assert go(toy, "run.seed=9", "train.dim=3") == ["a"]  # another seed, the same output
    assert go(toy, "run.seed=90", "train.dim=3") == ["a", "b", "c"]
    FILE.write_text("y")
    assert go(toy, "run.seed=90", "train.dim=3") == ["b", "c"]
    (toy / "c" / "c.txt").unlink()
    assert go(toy, "run.seed=90", "train.dim=3") == ["c"]
    OUTSIDE["why"] = "someone else published"
    assert go(toy, "run.seed=90", "train.dim=3") == ["c"]


def test_touching_a_file_changes_nothing(toy: Path) -> None:
    go(toy)
    os.utime(FILE, (1, 1))
    assert go(toy) == []


def test_split_hash_travels(toy: Path) -> None:
    outcomes = pipeline.run_stages(load_settings(), toy)
    assert [outcome.artifact.manifest.split_hash for outcome in outcomes] == ["split-of-a"] * 3


def test_ranges(toy: Path) -> None:
    assert go(toy, last="b") == ["a", "b"]
    assert go(toy, first="c") == ["c"]
    with pytest.raises(ArtifactError, match="comes after"):
        go(toy, first="c", last="a")
    with pytest.raises(ArtifactError, match="there is no stage 'd'; the stages are: a, b, c"):
        go(toy, first="d")


def test_a_stage_before_its_input(toy: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'b' needs the output of 'a'.*--until b"):
        go(toy, first="b")
    assert not toy.exists()  # nothing written


def test_a_stage_on_a_stale_input(toy: Path) -> None:
    go(toy)
    with pytest.raises(ArtifactError, match=r"'c' would build on .*train.dim was 64, is 3\)"):
        go(toy, "train.dim=3", "train.device=cpu", first="c")  # a device shapes no rows and is not told


def test_other_split_is_refused(toy: Path) -> None:
    pipeline.run_stages(load_settings(), toy)
    artifact = pipeline.require_artifact(toy, "a", "b")
    other = Artifact(artifact.path, artifact.manifest.model_copy(update={"split_hash": "another"}))
    with pytest.raises(ArtifactError, match=r"different splits .*leaks"):
        pipeline._one_split("b", {"a": artifact, "x": other})


def test_failure_keeps_what_was_finished(toy: Path) -> None:
    go(toy)
    FILE.write_text("bad")
    with pytest.raises(DataError, match="the file says bad"):
        go(toy)
    FILE.write_text("x")
    assert go(toy) == []


def test_first_failure_leaves_nothing(toy: Path) -> None:
    FILE.unlink()
    with pytest.raises(DataError):
        go(toy, last="b")
    assert sorted(path.name for path in toy.iterdir()) == [".lock", "a"]


def test_missing_package_names_the_extra(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipeline.EXTRA_OF_MODULE, "absent_package", "spark")
    with pytest.raises(MissingExtraError, match=r"pip install 'kellm-features\[spark\]'"):
        pipeline._load("absent_package.sql:SparkSession")


def _run(stages: tuple[StageSpec, ...], run_dir: Path) -> None:
    pipeline.run_stages(load_settings(), run_dir)


def test_second_run_and_kill(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = (StageSpec("a", "toy_stages:run_a", (), ("run",)), StageSpec("b", "toy_stages:run_slow", ("a",), ()))
    use(monkeypatch, slow)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(slow, toy))
    child.start()
    deadline = time.monotonic() + 20
    while not (toy / "work" / "b" / "piece").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ArtifactError, match="another kellm run is working"):
        go(toy)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert go(toy, last="a") == []  # the finished stage is intact, and the lock went with the process
    assert (toy / "work" / "b" / "piece").read_text() == "kept"
    assert not (toy / "b").exists()
