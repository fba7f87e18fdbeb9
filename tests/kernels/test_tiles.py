"""Tables of measured tiles: read, refused, taken by the launches; and the tool that measures them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kellm_kernels import info_nce, tiles, use_tiles
from kellm_kernels.plan import Device, forced, plan_adapter, plan_contrast
from kellm_kernels.tiles import COLUMNS, TABLE, Kernel, Tile, find_tile, read_tiles

from .oracle import needs_triton

ROW: dict[str, Any] = {
    "gpu": "sm_90", "kernel": "contrast_rows", "itemsize": 2, "symmetric": False, "embedding": 128, "rows": 4096,
    "m": 64, "n": 32, "k": 0, "warps": 4, "stages": 3, "ms": 0.02, "plan_ms": 0.03, "device": "H100", "torch": "2.11",
    "triton": "3.6", "commit": "abc", "date": "2026-11-22",
}  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL = Kernel("sm_90", "contrast_rows", 2, False, 128)


@pytest.fixture(autouse=True)
def nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_taken", {})


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Any]:
    """A function that writes a table of changes to `ROW`."""

    def write(*changes: dict[str, Any], columns: tuple[str, ...] = tuple(COLUMNS)) -> Path:
        path = tmp_path / "tiles.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(ROW | change for change in changes)
        return path

    return write


def test_the_tile_of_the_nearest_batch(written: Any) -> None:
    use_tiles(written({"rows": 1024, "n": 32}, {"rows": 65536, "n": 64}, {"rows": 1024, "n": 128}))
    assert [find_tile(KERNEL, rows) for rows in (1, 1024, 8191, 8193, 10**6)] == [
        Tile(64, n, 0, 4, 3)
        for n in (128, 128, 128, 64, 64)  # 8,192 is as far from 1,024 as from 65,536; the last row of 1,024 counts
    ]
    assert find_tile(KERNEL._replace(gpu="sm_80"), 1024) is None
    assert find_tile(KERNEL._replace(symmetric=True), 1024) is None


def test_plans_take_what_was_measured(written: Any) -> None:
    h100 = Device(132, 227 << 10, "sm_90")
    shape: dict[str, Any] = {"itemsize": 2, "symmetric": False, "device": h100}
    before = plan_contrast(4096, 4096, 0, 128, **shape)
    weights = {"kernel": "adapter_weights", "m": 32, "n": 64, "k": 128}
    use_tiles(written({"warps": 8}, weights))
    after = plan_contrast(4096, 4096, 0, 128, **shape)
    assert after.rows == Tile(64, 32, 0, 8, 3)
    assert after.columns == before.columns
    adapter = plan_adapter(8192, 768, 512, 128, itemsize=2, device=h100)
    assert adapter.backward == Tile(32, 64, 128, 4, 3)
    with forced({"contrast_rows": Tile(128, 64, 0, 8, 2)}):
        assert plan_contrast(4096, 4096, 0, 128, **shape).rows == Tile(128, 64, 0, 8, 2)
    assert plan_contrast(4096, 4096, 0, 128, **shape).rows == after.rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"m": 48}, "line 2: Tile.*m=48.* is no tile; m, n and k are powers of two from 16 on"),
        ({"warps": 3}, "warps=3"),
        ({"stages": 0}, "stages 1 to 8"),
        ({"rows": 0}, "for 0 rows"),
        ({"n": "many"}, "line 2: .*'many' cannot be read; write the table anew"),
        ({"symmetric": "perhaps"}, "'perhaps' cannot be read"),
    ],
)
def test_what_is_no_tile_is_refused(change: dict[str, Any], words: str, written: Any) -> None:
    with pytest.raises(ValueError, match=words):
        use_tiles(written(change))
    assert find_tile(KERNEL, 4096) is None


def test_a_table_without_a_column_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match=r"no column rows, date; `python -m kellm_kernels.tune` writes them all"):
        use_tiles(written({}, columns=tuple(name for name in COLUMNS if name not in ("rows", "date"))))


def test_the_packages_own_table_reads() -> None:
    for kernel, by_rows in read_tiles(TABLE).items():
        assert kernel.gpu.startswith(("sm_", "gfx")), kernel
        assert by_rows


@needs_triton
def test_the_tool_writes_a_table_that_launches_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kellm_kernels import fused, tune

    small = {"contrast_rows": [Tile(16, 32, 0, 4, 1)], "adapter_forward": [Tile(16, 16, 16, 4, 1)]}
    case = tune.Case(24, 16, 8, 40, symmetric=False)
    clock = iter([2.0, 1.0, 1.0, 2.0])  # contrast_rows: the candidate is faster; adapter_forward: the plan's own is
    found = list(tune.best_tiles(case, device=DEVICE, candidates=small, timer=lambda _launch: next(clock)))
    assert [(row["kernel"], row["rows"], row["ms"], row["plan_ms"]) for row in found] == [
        ("contrast_rows", 40, 1.0, 2.0),
        ("adapter_forward", 80, 1.0, 1.0),
    ]
    assert [row[name] for row in found[:1] for name in Tile._fields] == [16, 32, 0, 4, 1]
    path = tmp_path / "tiles.csv"
    for row in found:
        tune.append_row(path, row | {"device": "interpreter"})
    use_tiles(path)
    options: list[dict[str, Any]] = []
    with fused.watched(lambda _kernel, _grid, _arguments, given: options.append(given)):
        vectors = torch.randn(2, 40, 8, dtype=torch.bfloat16, device=DEVICE)
        info_nce(vectors[0], vectors[1], impl="triton")
    assert (options[0]["BLOCK_M"], options[0]["BLOCK_N"]) == (16, 32)


@needs_triton
def test_the_command_measures_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kellm_kernels import fused, tune

    path = tmp_path / "mine.csv"
    asked = ["--dims", "24,16,8", "--batches", "20", "40", "--directions", "1", "2", "--commit", "abc"]
    monkeypatch.setattr("sys.argv", ["tune", "--out", str(path), *asked])
    monkeypatch.setattr(tune, "CANDIDATES", {"contrast_columns": [Tile(16, 16, 0, 4, 1)]})
    tune.main()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rows"], row["symmetric"]) for row in rows] == [
        ("20", "False"), ("40", "False"), ("20", "True"), ("40", "True"),
    ]  # fmt: skip
    assert {(row["gpu"], row["commit"]) for row in rows} == {(fused.device_of(DEVICE).gpu, "abc")}
    assert DEVICE.type == "cuda" or {row["device"] for row in rows} == {"interpreter"}
    assert all(0 < float(row["ms"]) <= float(row["plan_ms"]) for row in rows)
    assert len(read_tiles(path)) == 2
    assert capsys.readouterr().out.count("kernel=contrast_columns") == 4


@needs_triton
def test_a_tile_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kellm_kernels import fused, tune

    launch = fused._launch

    def wrong(kernel: Any, grid: tuple[int, ...], *arguments: Any, **given: Any) -> None:
        launch(kernel, grid, *arguments, **given)
        if given.get("BLOCK_M") == 16:
            arguments[11].fill_(3.0)  # the similarities of own pairs

    monkeypatch.setattr(fused, "_launch", wrong)
    timed: list[Any] = []
    rows = tune.best_tiles(
        tune.Case(24, 16, 8, 40, symmetric=False),
        device=DEVICE,
        candidates={"contrast_rows": [Tile(16, 32, 0, 4, 1)]},
        timer=lambda again: float(timed.append(again) or 1.0),
    )
    assert [row["m"] for row in rows] != [16]
    assert len(timed) == 1  # the plan's own


@needs_triton
def test_a_tile_that_has_no_room_for_options_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from kellm_kernels import fused, tune

    launch = fused._launch

    def small(kernel: Any, grid: tuple[int, ...], *arguments: Any, **given: Any) -> None:
        if given.get("BLOCK_M") == 16 and given["ANCHOR_IDS"]:
            raise OutOfResources(120 << 10, 99 << 10, "shared memory")
        launch(kernel, grid, *arguments, **given)

    monkeypatch.setattr(fused, "_launch", small)
    clock = iter([3.0, 1.0, 2.0])
    (row,) = tune.best_tiles(
        tune.Case(24, 16, 8, 40, symmetric=False),
        device=DEVICE,
        candidates={"contrast_rows": [Tile(16, 32, 0, 4, 1), Tile(32, 16, 0, 4, 1)]},
        timer=lambda _launch: next(clock),
    )
    assert (row["m"], row["ms"], row["plan_ms"]) == (32, 2.0, 3.0)
