"""Tiles that were measured: the fastest by GPU, kernel, embedding and batch, one row each in `tiles.csv`.

`plan` looks here first, and has starting points of its own for what no row is of. Nothing is measured while training:
`python -m kellm_kernels.tune` writes such a table on the GPU at hand, and `use_tiles` takes it.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import NamedTuple

COLUMNS = (
    "gpu kernel itemsize symmetric embedding rows m n k warps stages ms plan_ms device torch triton commit date"
).split()
TABLE = Path(__file__).with_name("tiles.csv")
"""The package's own."""

_MIN_BLOCK = 16  # of a dimension of tl.dot
_WARPS = (1, 2, 4, 8, 16)
_MAX_STAGES = 8


class Tile(NamedTuple):
    """Sizes of the blocks that a program holds, and how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Kernel(NamedTuple):
    """What a tile is for."""

    gpu: str
    """`sm_90`, `gfx942`"""
    name: str
    """The kernel's."""
    itemsize: int
    """Bytes of an element of the vectors."""
    symmetric: bool
    """Both directions of the loss; no matter to the adapter's kernels."""
    embedding: int
    """E, padded to a power of two."""


Tiles = Mapping[Kernel, Mapping[int, Tile]]
"""By kernel and batch."""

_taken: dict[Kernel, dict[int, Tile]] = {}


def find_tile(kernel: Kernel, rows: int) -> Tile | None:
    """The tile of the batch nearest to `rows`, by ratio; None where this kernel was not measured."""
    by_rows = _taken.get(kernel) or _own().get(kernel)
    if not by_rows:
        return None
    measured = sorted(by_rows)
    for smaller, larger in pairwise(measured):
        if rows * rows < smaller * larger:  # a comparison, so that `torch.compile` may leave rows open
            return by_rows[smaller]
    return by_rows[measured[-1]]


def use_tiles(path: str | PathLike[str]) -> None:
    """Take the tiles of a table that `python -m kellm_kernels.tune` wrote, before the package's own.

    Args:
        path: of the CSV. What it has of a kernel replaces all that was known of that kernel.

    Raises:
        ValueError: a column is missing, or a row has no tile.
    """
    _taken.update(read_tiles(Path(path)))


def read_tiles(path: Path) -> dict[Kernel, dict[int, Tile]]:
    """Tiles of a CSV with `COLUMNS`; of two rows alike the last counts.

    Raises:
        ValueError: as `use_tiles`.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; `python -m kellm_kernels.tune` writes them all")
        return _by_kernel(path, reader)


def _by_kernel(path: Path, rows: Iterable[Mapping[str, str]]) -> dict[Kernel, dict[int, Tile]]:
    found: dict[Kernel, dict[int, Tile]] = defaultdict(dict)
    for line, row in enumerate(rows, start=2):
        try:
            tile = Tile(*(int(row[name]) for name in Tile._fields))
            flags = {"True": True, "False": False}
            kernel = Kernel(
                row["gpu"], row["kernel"], int(row["itemsize"]), flags[row["symmetric"]], int(row["embedding"])
            )
            batch = int(row["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {line}: {error} cannot be read; write the table anew") from error
        sizes = [tile.m, tile.n] + ([tile.k] if tile.k else [])
        whole = all(size >= _MIN_BLOCK and size & (size - 1) == 0 for size in sizes)
        if not whole or tile.warps not in _WARPS or not 1 <= tile.stages <= _MAX_STAGES or batch < 1:
            raise ValueError(
                f"{path}, line {line}: {tile} for {batch} rows is no tile; m, n and k are powers of two from "
                f"{_MIN_BLOCK} on (k may be 0), warps one of {_WARPS}, stages 1 to {_MAX_STAGES}"
            )
        found[kernel][batch] = tile
    return dict(found)


@cache
def _own() -> Tiles:
    return read_tiles(TABLE)
