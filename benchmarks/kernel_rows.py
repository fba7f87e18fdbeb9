"""Rows of bench_adapter_info_nce.py as pages tell them: grouped by problem and device, one chosen for each figure.

Of rows with the same problem, implementation, mode and method the last one counts, and a failure to run counts against
all methods until a later row.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

GPU_ROWS, CPU_ROWS = "adapter_info_nce", "adapter_info_nce_cpu"
LABELS = {
    "ours_triton": "ours, Triton",
    "ours_torch": "ours, PyTorch",
    "eager": "PyTorch, eager",
    "chunked": "PyTorch, by blocks of rows",
    "compile": "torch.compile",
    "compile_reduce_overhead": "torch.compile, reduce-overhead",
    "st_mnrl": "sentence-transformers",
    "st_cached_mnrl": "sentence-transformers, cached",
    "inf_cl": "Inf-CL",
    "memeff": "memeff",
}
OURS = ("ours_triton", "ours_torch")
METHODS = {"wall": "wall clock", "graph": "replay of a CUDA graph", "events": "CUDA events"}
OPTIONAL = ("peak_mib", "grad_error")
ROUNDED = (*OPTIONAL, "share_of_floor")
"""Columns where a small number may have come to 0."""
REMEDY = "mend the row, or take it out and measure it again with benchmarks/bench_adapter_info_nce.py"


class Group(NamedTuple):
    """What rows of one table have in common."""

    op: str
    directions: int
    encoder: int
    hidden: int
    embedding: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Timing:
    """One row: figures, or the error that stands in their place."""

    group: Group
    impl: str
    mode: str
    method: str
    """`wall`, `events` or `graph`; empty where an implementation failed before it was timed."""
    batch: int
    date: str
    torch: str
    triton: str
    commit: str
    error: str
    p50_ms: float
    share_of_floor: float
    bytes_s: float
    """Of a copy on this device, in the same run."""
    flops_s: float
    """Of a matrix product, in the same run."""
    peak_mib: float | None
    grad_error: float | None


class Timings:
    """Forward and backward of one group, the last row of each kind."""

    def __init__(self, group: Group, rows: Iterable[Timing]) -> None:
        self.group = group
        self._last: dict[tuple[str, int], dict[str, Timing]] = {}
        for row in rows:
            if row.group == group and row.mode == "both":
                found = self._last.setdefault((row.impl, row.batch), {})
                if not row.method or "" in found:
                    found.clear()
                found[row.method] = row

    @cached_property
    def rows(self) -> list[Timing]:
        """All that count."""
        return [row for found in self._last.values() for row in found.values()]

    @cached_property
    def batches(self) -> list[int]:
        """B, ascending."""
        return sorted({row.batch for row in self.rows})

    @cached_property
    def auto(self) -> str:
        """What `impl="auto"` takes there: Triton where it ran, else PyTorch."""
        triton = any(row.impl == "ours_triton" and not row.error for row in self.rows)
        return "ours_triton" if triton else "ours_torch"

    @cached_property
    def impls(self) -> list[str]:
        """Implementations, what `auto` takes first; without those that do not run here, or not this problem."""
        known = [self.auto, *(impl for impl in LABELS if impl != self.auto)]
        seen = {row.impl for row in self.rows if not row.error.startswith("not run:")}
        return [impl for impl in known if impl in seen] + sorted(seen.difference(known))

    @cached_property
    def on_gpu(self) -> bool:
        """Whether device time was measured, and not only a clock's."""
        return any(row.method in ("graph", "events") for row in self.rows)

    def method(self, batch: int) -> str:
        """How the main figures were taken: on a GPU the time of the device, elsewhere the clock's.

        The benchmark replays CUDA graphs where launches weigh; for a larger B there are CUDA events.
        """
        known = {row.method for row in self.rows if row.batch == batch}
        return next((method for method in ("graph", "events") if method in known), "wall")

    def main(self, impl: str, batch: int) -> Timing | None:
        """The row of the main figure; of CUDA events for what has no graph, as `compile_reduce_overhead`: it is one."""
        method = self.method(batch)
        return self.last(impl, batch, method) or (self.last(impl, batch, "events") if method == "graph" else None)

    def last(self, impl: str, batch: int, method: str) -> Timing | None:
        """The row of a method, or that of a failure before any was tried."""
        found = self._last.get((impl, batch), {})
        return found.get(method) or found.get("")

    def known(self, impl: str, batch: int, field: str) -> float | None:
        """The greatest value of `peak_mib` or `grad_error` that a method has."""
        values = (getattr(row, field) for row in self._last.get((impl, batch), {}).values())
        return max((value for value in values if value is not None), default=None)


def label(impl: str) -> str:
    """An implementation in words."""
    return LABELS.get(impl, impl)


def groups(rows: Sequence[Timing]) -> list[Group]:
    """The groups of some rows: the whole op first, one direction first, then in the order of the rows."""
    whole = dict.fromkeys(row.group for row in rows if row.mode == "both")
    return sorted(whole, key=lambda group: (group.op, group.directions))


def read_rows(path: Path) -> list[Timing]:
    """The rows of a file.

    Raises:
        ValueError: no such file, a column is missing, or a value cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path.name} is not in {path.parent}; run benchmarks/bench_adapter_info_nce.py first")
    with path.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        return [_timing(row, f"{path.name}, line {reader.line_num}") for row in reader]


def _timing(row: Mapping[str, str | None], where: str) -> Timing:
    def text(column: str) -> str:
        value = row.get(column)
        if value is None:
            raise ValueError(f"{where}: no column {column}; {REMEDY}")
        return value

    def number(column: str) -> float:
        try:
            value = float(text(column))
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf or (value == 0 and column not in ROUNDED):
            raise ValueError(f"{where}: {column} is {row[column]!r}, not a positive number; {REMEDY}")
        return value

    def count(column: str) -> int:
        value = number(column)
        if not value.is_integer():
            raise ValueError(f"{where}: {column} is {row[column]!r}, not a whole number; {REMEDY}")
        return int(value)

    error, method = text("error"), text("method")
    if method not in METHODS and not (error and not method):
        raise ValueError(f"{where}: method is {method!r}; accepted: {', '.join(METHODS)}; {REMEDY}")
    peak, gradients = (None if error or not row.get(column) else number(column) for column in OPTIONAL)
    return Timing(
        group=Group(text("op"), count("directions"), count("D"), count("H"), count("E"), text("dtype"), text("device")),
        impl=text("impl"),
        mode=text("mode"),
        method=method,
        batch=count("B"),
        date=text("date"),
        torch=text("torch"),
        triton=text("triton"),
        commit=text("commit"),
        error=error,
        p50_ms=math.nan if error else number("p50_ms"),
        share_of_floor=math.nan if error else number("share_of_floor"),
        bytes_s=number("copy_gb_s") * 1e9,
        flops_s=number("matmul_tflop_s") * 1e12,
        peak_mib=peak,
        grad_error=gradients,
    )
