"""The command line as a person meets it: one line, exit code 2, nothing written."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from kellm_features.cli.link import link
from kellm_features.cli.wiki import wiki
from kellm_features.stages import STAGE_NAMES
from kellm_spark.linking import DOMAINS


def kellm(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kellm_features.cli import main; main()", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200", **env}
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ingest", "--set", "train.dimm=3"], "unknown key 'train.dimm'"),
        (["ingest", "--config", "none.toml"], "none.toml does not exist"),
        (["run", "--from", "nowhere"], "there is no stage 'nowhere'; the stages are: ingest, swing"),
        (["run", "--from", "train", "--until", "swing"], "--from train comes after --until swing"),
        (["train"], "'train' needs the output of 'ingest'"),
        (["swing"], "'swing' needs the output of 'ingest'"),
        (
            ["ingest", "--set", "data.format=movielens-1m", "--set", "data.path=nowhere"],
            "nowhere/ratings.dat cannot be read",
        ),
        (["link", "--domain", "books"], "--domain: only with --catalogue; a stage takes --set link.key=value"),
        (["link", "--catalogue", "items.csv", "--out", "links"], "--catalogue needs --wiki"),
        (["fetch", "50", "--repo", "nowhere"], "nowhere"),
    ],
)
def test_bad_requests_end_in_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    done = kellm(tmp_path, *words)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "runs"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    done = kellm(tmp_path, "--debug", "ingest", "--set", "train.dimm=3")
    assert "Traceback" in done.stderr


def test_ingest_runs_skips_and_plans(tmp_path: Path) -> None:
    first = kellm(tmp_path, "ingest", "--out", "run")
    assert first.returncode == 0, first.stderr
    assert "100,000" in first.stdout
    assert "skipped: unchanged" in kellm(tmp_path, "ingest", "--out", "run").stdout
    plan = kellm(tmp_path, "run", "--out", "run", "--dry-run", "--until", "swing").stdout.splitlines()
    assert [line.split()[:2] for line in plan[2:]] == [["ingest", "skip"], ["swing", "run"]]


def test_every_stage_is_a_command(tmp_path: Path) -> None:
    told = kellm(tmp_path, "--help").stdout
    for name in (*STAGE_NAMES, "run", "quickstart", "fetch", "doctor", "init"):
        assert f"  {name} " in told


def test_the_commands_offer_every_domain_that_the_jobs_know() -> None:
    """Told twice, as help must not wait for the jobs' packages."""

    def offered(command: Callable[..., Any]) -> tuple[str, ...]:
        return get_args(inspect.signature(command, eval_str=True).parameters["domain"].annotation.__origin__)

    assert offered(link) == tuple(DOMAINS)
    assert offered(wiki) == tuple(name for name, kinds in DOMAINS.items() if kinds)  # articles need all pages


def test_init_writes_what_the_other_commands_read(tmp_path: Path) -> None:
    done = kellm(tmp_path, "init", "mine")
    assert done.returncode == 0
    assert "under [data] in mine/kellm.toml" in done.stdout
    folder = tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == {"kellm.toml", "feature_repo"}
    done = kellm(folder, "ingest")
    assert done.returncode == 2
    assert "data.format is 'table'" in done.stderr
    assert kellm(tmp_path, "init", "mine").returncode == 2
    assert "exists and is left as it is" in kellm(tmp_path, "init", "mine").stderr


def test_doctor_names_what_is_missing(tmp_path: Path) -> None:
    done = kellm(tmp_path, "doctor")
    assert done.returncode == 0, done.stdout
    assert "Java" in done.stdout
    without = kellm(tmp_path, "doctor", PATH="/nonexistent", JAVA_HOME="")
    assert without.returncode == 2
    assert "missing" in without.stdout
    assert "openjdk-17-jre-headless" in without.stdout


def test_brackets_in_titles_are_no_markup() -> None:
    code = "from kellm_features.cli.app import stdout; stdout.print('[REC] (2007), kellm-features[feast]')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[REC] (2007), kellm-features[feast]"
