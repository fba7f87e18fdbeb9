"""`kellm evaluate` from files to tables: a small world, every suite, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from kellm_features.evaluation.results import ResultRow, read_results
from kellm_features.evaluation.score import GROUNDS
from kellm_features.settings import EvaluateSettings

pytestmark = [pytest.mark.spark, pytest.mark.slow]
USERS, ITEMS, EVENTS, TASTES = 240, 60, 24, 3
SETTINGS = (
    'evaluate.backbones=["deepfm"]',
    'evaluate.cold_backbones=["deepfm"]',
    "evaluate.folds=2",
    "evaluate.cold_folds=1",
    "evaluate.trials=1",
    "evaluate.epochs=1",
    "evaluate.batch_size=32",
    "evaluate.samples=100",
    "evaluate.jobs=2",
    "train.hidden=16",
    "train.dim=8",
    "history.max_events=8",
)


def write_data(folder: Path) -> None:
    """A release in MovieLens-1M's layout: three tastes, told by genre, and titles of films that have a page."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    genres = ["Comedy", "Drama", "Western"]
    item_taste, user_taste = rng.integers(0, TASTES, ITEMS), rng.integers(0, TASTES, USERS)
    titles = ["Toy Story (1995)", "Fargo (1996)", "Star Wars (1977)"] + [f"Film {i} (1990)" for i in range(ITEMS - 3)]
    movies = [f"{i + 1}::{title}::{genres[item_taste[i]]}" for i, title in enumerate(titles)]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")
    users = [f"{u + 1}::{'FM'[u % 2]}::25::{u % 20}::12345" for u in range(USERS)]
    (folder / "users.dat").write_text("\n".join(users) + "\n")
    rows = []
    for user in range(USERS):
        for second, item in enumerate(rng.choice(ITEMS, EVENTS, replace=False)):
            liked = rng.random() < (0.85 if item_taste[item] == user_taste[user] else 0.25)
            rows.append(f"{user + 1}::{item + 1}::{5 if liked else 2}::{1_000_000_000 + 1000 * second + user}")
    (folder / "ratings.dat").write_text("\n".join(rows) + "\n")
    texts = {str(i + 1): f"A {genres[item_taste[i]].lower()} about {i}." for i in range(ITEMS)}
    (folder.parent / "texts.json").write_text(json.dumps(texts))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    given = ["--data", str(folder / "data"), "--descriptions", str(folder / "texts.json"), "--out", str(out)]
    start = [sys.executable, "-c", "from kellm_features.cli import main; main()", "evaluate"]
    return [*start, *given, *options, *more]


def cells(out: Path) -> dict[str, int]:
    """Finished trainings, and when each was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and an evaluation of all suites that was killed in its trainings and called again."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_data(folder / "data")
    out = folder / "out"
    log = folder / "first.log"
    with log.open("w") as errors:
        first = subprocess.Popen(command(folder, out), start_new_session=True, stderr=errors)
        while len(cells(out)) < 5:
            assert first.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    kept = cells(out)
    assert not (out / "results.csv").exists()
    done = subprocess.run(command(folder, out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert kept.items() <= cells(out).items()  # nothing that was finished was trained again
    (folder / "told.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[ResultRow]:
    return read_results(folder / "out" / "results.csv")


def test_every_suite_has_rows(rows: list[ResultRow]) -> None:
    assert {row.suite for row in rows} == {"ctr", "time", "cold", "contrastive", "retrieval", "replication"}
    arms = {row.arm for row in rows if row.suite == "ctr"}
    assert arms == {
        *("item-mean", "rating-statistics", "id-5", "id-30", "title", "closed-book", "page", "digest", "knowledge"),
        *("profile", "printed", "affinity", "kellmrec", "random-pairs", "shuffled", "noise"),
    }
    forms = {row.arm for row in rows if row.suite == "contrastive" and row.metric == "recall@20"}
    assert {"none", "printed-both", "pretrain", "alternating", "random"} <= forms


def test_values_are_those_of_the_predictions(folder: Path, rows: list[ResultRow]) -> None:
    """AUC of both folds from the Parquet files, by scikit-learn, averaged by examples."""
    areas, sizes = [], []
    for path in sorted((folder / "out" / "cells").glob("*/cell.json")):
        facts = json.loads(path.read_text())
        if facts["arm"] == "id-30" and facts["fold"] in ("B0", "B1") and facts["backbone"] == "deepfm":
            table = pq.read_table(path.with_name("predictions.parquet"))
            areas.append(roc_auc_score(table["label"].to_numpy(), table["score"].to_numpy()))
            sizes.append(table.num_rows)
    assert len(areas) == 2
    told = next(r for r in rows if (r.suite, r.arm, r.metric, r.slice) == ("ctr", "id-30", "auc", "all"))
    assert told.value == pytest.approx(np.average(areas, weights=sizes))
    assert told.examples == sum(sizes)


def test_differences_are_of_the_values(rows: list[ResultRow]) -> None:
    values = {(r.suite, r.split, r.backbone, r.arm, r.metric, r.slice): r.value for r in rows}
    compared = [r for r in rows if r.delta is not None]
    assert compared
    for row in compared:
        reference = values[row.suite, row.split, row.backbone, row.reference, row.metric, row.slice]
        assert row.value - reference == pytest.approx(row.delta)


def test_claims_can_be_significant_after_holm(rows: list[ResultRow]) -> None:
    """Of draws comes no p below 2 / (draws + 1): the largest family of claims must leave room, by the default draws."""
    families = Counter(
        (r.suite, r.split, r.backbone, r.metric, r.slice, r.reference if r.reference in GROUNDS else "")
        for r in rows
        if r.p is not None
    )
    assert max(families.values()) * 2 / (EvaluateSettings().samples + 1) < 0.05


def test_tastes_are_found_by_comparing_texts_and_by_nothing_else(rows: list[ResultRow]) -> None:
    """What is liked is told by an item's text and the texts of what was liked; no item is liked by more than others."""
    found = {row.arm: row.value for row in rows if (row.suite, row.metric, row.slice) == ("ctr", "auc", "all")}
    assert found["affinity"] > 0.6 > max(found[arm] for arm in ("shuffled", "noise", "item-mean"))


def test_what_is_left_behind(folder: Path) -> None:
    out = folder / "out"
    assert "Ladder" in (folder / "told.txt").read_text()
    assert (out / "tables" / "tables.md").exists()
    page = (out / "evaluation.html").read_text()
    assert "ID, matched history" in page
    assert (out / "pictures" / "ladder.svg").exists()


def test_again_trains_nothing(folder: Path) -> None:
    out = folder / "out"
    before, told = cells(out), (out / "results.csv").read_bytes()
    subprocess.run(command(folder, out, "--suite", "ctr"), capture_output=True, check=True)
    assert cells(out) == before
    assert (out / "results.csv").read_bytes() == told


def test_pairs_of_another_split_are_refused(folder: Path) -> None:
    path = folder / "out" / "folds" / "B0" / "item_pairs_swing.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        np.savez(path, **{**dict(file), "split_hash": np.array("0" * 64)})
    try:
        more = ("--suite", "ctr", "--set", "train.dim=12")  # other trainings, so that pairs are read
        done = subprocess.run(command(folder, folder / "out", *more), capture_output=True, text=True, check=False)
    finally:
        path.write_bytes(whole)
    assert done.returncode == 2
    assert "split 000000000000" in done.stderr
