"""`kellm swing --interactions`: files in, a folder of pairs out, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest

from kellm_features.errors import ConfigError, DataError
from kellm_features.settings import SparkSettings
from kellm_spark.storage import MANIFEST, Folder
from kellm_spark.swing import PRESETS, SwingOptions
from kellm_spark.swing.job import SwingJob, run_swing_job

from .oracle import assert_same, brute_force, graph, in_order, top

pytestmark = pytest.mark.spark

EDGES = graph(21, 40, 30, 0.3)
P = PRESETS["pai-rec"]
WANTED = top(brute_force(set(EDGES), P.alpha, P.alpha1, P.beta), 5)


def table(edges: list[tuple[Any, Any]]) -> pd.DataFrame:
    return pd.DataFrame(edges, columns=["user_id", "item_id"])


def run(source: Path, out: Path, mode: str = "auto", **more: Any) -> dict[str, Any]:
    options = SwingOptions(side="item", parameters=P, top_k=5, mode=mode)
    return run_swing_job(SwingJob(str(source), str(out), options, **more), SparkSettings())


def pairs(out: Path) -> list[tuple[Any, ...]]:
    return in_order(tuple(row.values()) for row in ds.dataset(out, format="parquet").to_table().to_pylist())


def contents(out: Path) -> list[str]:
    return [sha256(part.read_bytes()).hexdigest() for part in sorted(out.glob("part-*"))]


def test_parquet_to_sorted_pairs_and_a_manifest(spark, tmp_path: Path) -> None:
    table([*EDGES, *EDGES[:9]]).to_parquet(tmp_path / "in.parquet")
    told = run(tmp_path / "in.parquet", tmp_path / "out")
    rows = [tuple(row.values()) for row in ds.dataset(tmp_path / "out", format="parquet").to_table().to_pylist()]
    assert rows == in_order(rows)
    assert_same(rows, WANTED)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == told
    assert (told["rows_in"], told["dropped"], told["pairs"]) == (len(EDGES) + 9, {"duplicates": 9}, len(WANTED))
    first = [j for _, j, _, _, rank in WANTED if rank == 1]
    hub = max(set(first), key=lambda j: (first.count(j), j))
    assert told["hubness"] == {
        "anchors": len(first),
        "distinct_top1": len(set(first)),
        "max_top1": first.count(hub),
        "hub": hub,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out"]


def test_csv_ids_are_numbers_only_where_all_are_written_as_such(spark, tmp_path: Path) -> None:
    table(EDGES).to_csv(tmp_path / "in.csv", index=False)
    run(tmp_path / "in.csv", tmp_path / "numbers")
    assert_same(pairs(tmp_path / "numbers"), WANTED)
    table([(u, f"{i + 100:04d}") for u, i in EDGES]).to_csv(tmp_path / "zeros.csv", index=False)
    run(tmp_path / "zeros.csv", tmp_path / "zeros")
    assert_same(pairs(tmp_path / "zeros"), [(f"{i + 100:04d}", f"{j + 100:04d}", *rest) for i, j, *rest in WANTED])


@pytest.mark.parametrize("mode", ["csr", "block"])
@pytest.mark.parametrize("cut", ["before", "split"])
def test_later_rows_leave_no_trace(spark, tmp_path: Path, mode: str, cut: str) -> None:
    """Byte for byte: deleted, or permuted and moved to the front."""
    now = table(EDGES).assign(timestamp=999, split="train")
    later = table([(u, j) for u, (_, j) in zip(range(50), reversed(EDGES), strict=False)]).assign(
        timestamp=1000, split="test"
    )
    mixed = later.assign(item_id=later.item_id.to_numpy()[::-1], user_id=later.user_id * 3)
    more = {"before": "1000"} if cut == "before" else {}
    found = []
    for name, rows in {"all": pd.concat([now, later]), "none": now, "mixed": pd.concat([mixed, now[::-1]])}.items():
        rows = rows.drop(columns="split" if cut == "before" else "timestamp")
        rows.to_parquet(tmp_path / f"{name}.parquet", row_group_size=77)
        told = run(tmp_path / f"{name}.parquet", tmp_path / name, mode, **more)
        reason = "not before the cut" if cut == "before" else "not in split train"
        assert told["dropped"] == ({reason: len(later)} if name != "none" else {})
        found.append(contents(tmp_path / name))
    assert found[0]
    assert found[0] == found[1] == found[2]
    assert_same(pairs(tmp_path / "all"), WANTED)


def test_a_split_can_be_named_and_carries_its_hash(spark, tmp_path: Path) -> None:
    rows = table(EDGES).assign(split=["valid" if k % 2 else "train" for k in range(len(EDGES))])
    rows.to_parquet(tmp_path / "in.parquet")
    (tmp_path / "manifest.json").write_text('{"split_hash": "abc"}')
    told = run(tmp_path / "in.parquet", tmp_path / "all", split="all")
    assert (told["split"], told["split_hash"], told["pairs"]) == ("all", "abc", len(WANTED))
    told = run(tmp_path / "in.parquet", tmp_path / "valid", split="valid")
    assert told["rows_in"] - told["dropped"]["not in split valid"] == len(EDGES) // 2
    with pytest.raises(ConfigError, match="--split tset: no row has it; seen: train, valid"):
        run(tmp_path / "in.parquet", tmp_path / "tset", split="tset")
    table(EDGES).to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ConfigError, match="--split valid needs a column 'split'; seen: user_id, item_id"):
        run(tmp_path / "plain.parquet", tmp_path / "plain", split="valid")


def test_an_output_is_replaced_on_request_only(spark, tmp_path: Path) -> None:
    table(EDGES).to_parquet(tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "out")
    before = contents(tmp_path / "out")
    table(EDGES[::2]).to_parquet(tmp_path / "half.parquet")
    with pytest.raises(DataError, match=r"out exists; remove it, name another, or add --overwrite"):
        run(tmp_path / "half.parquet", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        run(tmp_path / "nowhere.parquet", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    run(tmp_path / "half.parquet", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.parquet", "in.parquet", "out"]


def test_a_kill_shows_nothing_and_loses_nothing(spark, tmp_path: Path) -> None:
    """What each moment of a kill leaves behind, made by hand, and what the next run makes of it."""
    out = tmp_path / "out"
    (tmp_path / ".out.unfinished").mkdir()  # while writing
    (tmp_path / ".out.unfinished" / "part-0.parquet").write_text("half a file")
    Folder(spark, str(out), overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.replaced").mkdir()  # between the renames: the old output is back
    (tmp_path / ".out.replaced" / "part-0.parquet").write_text("old")
    with pytest.raises(DataError, match="exists"):
        Folder(spark, str(out), overwrite=False)
    assert (out / "part-0.parquet").read_text() == "old"


def test_a_rename_that_fails_is_told(spark, tmp_path: Path) -> None:
    """Hadoop's file systems answer False where they may not rename."""
    folder = Folder(spark, str(tmp_path / "out"), overwrite=False)
    folder._files = SimpleNamespace(exists=lambda _: False, delete=lambda *_: True, rename=lambda *_: False)
    with pytest.raises(DataError, match=r"\.out\.unfinished could not be renamed to .*/out"):
        folder.publish()


def test_no_pair_is_an_error_and_writes_nothing(spark, tmp_path: Path) -> None:
    table([(u, u) for u in range(5)] + [(0, 0)]).to_parquet(tmp_path / "in.parquet")
    with pytest.raises(
        DataError, match=r"no item pair: no two items share two users in 5 .*\(left out: 1 duplicates\)"
    ):
        run(tmp_path / "in.parquet", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def kellm(*words: str) -> subprocess.CompletedProcess[str]:
    code = "from kellm_features.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    table(EDGES).to_parquet(tmp_path / "in.parquet")
    words = ["--interactions", str(tmp_path / "in.parquet"), "--side", "user", "--out", str(tmp_path / "out")]
    done = kellm(
        "swing", *words, "--preset", "flink", "--beta", "0.5", "--top-k", "3", "--set", "spark.master=local[2]"
    )
    assert done.returncode == 0, done.stderr
    wanted = top(brute_force({(i, u) for u, i in EDGES}, 0, 15, 0.5), 3)
    assert_same(pairs(tmp_path / "out"), wanted)
    assert f"{len(wanted):,}" in done.stdout
    assert "interactions" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--interactions", "in.parquet"], "--interactions needs --side (item or user) and --out"),
        (["--interactions", "in.parquet", "--side", "item"], "--interactions needs --side (item or user) and --out"),
        (["--side", "item", "--top-k", "3"], "--side, --top-k: only with --interactions"),
        (["--interactions", "x", "--side", "item", "--out", "y", "--alpha", "-1"], "swing alpha is -1.0"),
        (["--interactions", "x", "--side", "item", "--out", "y", "--max-witnesses", "1"], "swing max_witnesses is 1"),
    ],
)
def test_bad_requests_end_in_one_line(words: list[str], told: str) -> None:
    done = kellm("swing", *words)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
