"""Measure tiles on the GPU at hand, and write the fastest of each kernel as a table for `use_tiles`.

    python -m kellm_kernels.tune --out tiles.csv

A step of `adapter_info_nce` is run with every candidate of one kernel at a time; its loss and gradients have to be
those of the plan's own tiles, and then that kernel's launch alone is timed, again and again from a cold L2. The fastest
has to run with every option of the loss too, since these need more of a processor. Rows are written as they come.
Candidates that do not compile, do not fit or run out of memory are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from kellm_kernels import adapter_info_nce, fused
from kellm_kernels.plan import forced, padded
from kellm_kernels.tiles import COLUMNS, Tile

CONTRAST = [
    Tile(m, n, 0, warps, stages)
    for (m, n, warps), stages in product(
        [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)], (2, 3)
    )
]
ADAPTER_FORWARD = [
    Tile(m, n, k, warps, stages)
    for (m, n, k, warps), stages in product(
        [(32, 32, 64, 4), (32, 64, 64, 4), (64, 32, 64, 4), (64, 64, 64, 8), (64, 128, 64, 8), (128, 64, 64, 8)], (2, 3)
    )
]
ADAPTER_WEIGHTS = [
    Tile(m, n, k, warps, stages)
    for (m, n, k, warps), stages in product(
        [(32, 64, 128, 8), (64, 32, 128, 8), (64, 64, 128, 8), (64, 64, 256, 8), (128, 64, 64, 8)], (2, 3)
    )
]
CANDIDATES: Mapping[str, Sequence[Tile]] = {
    "contrast_rows": CONTRAST,
    "contrast_columns": CONTRAST,
    "adapter_forward": ADAPTER_FORWARD,
    "adapter_weights": ADAPTER_WEIGHTS,
}
BOTH_TOWERS = ("adapter_forward", "adapter_weights")  # whose rows are 2B
TOLERANCE = 2e-2  # of gradients, by norm: bfloat16's own rounding takes another way with another tile


class Case(NamedTuple):
    """One step to measure."""

    encoding: int
    hidden: int
    embedding: int
    rows: int
    symmetric: bool


class Launches(list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]):
    """A kernel's launches in one step: kernel, grid, arguments, options."""

    def again(self) -> None:
        """Launch it once more."""
        for kernel, grid, arguments, options in self:
            kernel[grid](*arguments, **options)

    @property
    def tile(self) -> Tile:
        """What it was launched with."""
        options = self[0][3]
        m, n, k = ("BLOCK_R", "BLOCK_H", "BLOCK_D") if "BLOCK_R" in options else ("BLOCK_M", "BLOCK_N", "")
        return Tile(options[m], options[n], options.get(k, 0), options["num_warps"], options["num_stages"])


Timer = Callable[[Callable[[], None]], float]


def best_tiles(
    case: Case,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    candidates: Mapping[str, Sequence[Tile]],
    timer: Timer,
) -> Iterator[dict[str, Any]]:
    """A row for each kernel: its fastest tile, and the time of the plan's own.

    Args:
        case: the shapes.
        device: where; in the interpreter the CPU.
        dtype: of encodings and products.
        candidates: tiles by kernel.
        timer: milliseconds of a launch.
    """
    step, full = (_step(case, device, dtype, every_option=every) for every in (False, True))
    wanted, launches = _recorded(step)
    for name, tiles in candidates.items():
        plan_ms = timer(launches[name].again)
        timed = [(plan_ms, launches[name].tile)]
        for tile in tiles:
            with contextlib.suppress(TritonError, RuntimeError), forced({name: tile}):
                got, now = _recorded(step)
                if _alike(got, wanted):
                    timed.append((timer(now[name].again), tile))
        ms, fastest = next(found for found in sorted(timed) if found == timed[0] or _runs(full, name, found[1]))
        yield {
            "gpu": fused.device_of(device).gpu,
            "kernel": name,
            "itemsize": dtype.itemsize,
            "symmetric": case.symmetric and name not in BOTH_TOWERS,
            "embedding": padded(case.embedding),
            "rows": case.rows * (2 if name in BOTH_TOWERS else 1),
            **fastest._asdict(),
            "ms": round(ms, 5),
            "plan_ms": round(plan_ms, 5),
        }


def _runs(step: Callable[[], list[Tensor]], name: str, tile: Tile) -> bool:
    """Whether a step can be taken with this tile."""
    with contextlib.suppress(TritonError, RuntimeError), forced({name: tile}):
        step()
        return True
    return False


def _step(
    case: Case, device: torch.device, dtype: torch.dtype, *, every_option: bool = False
) -> Callable[[], list[Tensor]]:
    """Forward and backward on random encodings, weights being float32: the loss and the weights' gradients."""
    generator = torch.Generator(device).manual_seed(case.rows)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    x = drawn(case.rows, case.encoding)
    x_pos = (0.4 * x + 0.9 * drawn(case.rows, case.encoding)).to(dtype)
    x = x.to(dtype)
    weights = [
        drawn(case.hidden, case.encoding, scale=case.encoding**-0.5),
        drawn(case.hidden, scale=0.01),
        drawn(case.embedding, case.hidden, scale=case.hidden**-0.5),
        drawn(case.embedding, scale=0.01),
    ]
    leaves = [weight.requires_grad_() for weight in weights]

    options: dict[str, Any] = {"symmetric": case.symmetric}
    if every_option:
        ids = torch.arange(case.rows, device=device)
        options |= {
            "x_neg": x[:1], "anchor_ids": ids, "positive_ids": ids + case.rows, "negative_ids": ids[:1] - 1,
            "log_q": drawn(case.rows + 1), "sample_weight": drawn(case.rows).abs(), "margin": 0.5,
            "temperature": torch.tensor(0.1, device=device, requires_grad=True), "reduction": "none",
        }  # fmt: skip
        leaves = [*leaves, options["temperature"]]

    def step() -> list[Tensor]:
        with torch.autocast(device.type, dtype=dtype):
            loss = adapter_info_nce(x, x_pos, *weights, impl="triton", **options)[0]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    return step


def _recorded(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], dict[str, Launches]]:
    """What a step gives, and its launches by the kernel's name."""
    launches: dict[str, Launches] = defaultdict(Launches)

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        launches[kernel.fn.__name__].append((kernel, grid, arguments, options))

    with fused.watched(record):
        return step(), launches


def _alike(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """No result is further from the other's than rounding explains; NaN is."""
    return all(float((a - b).norm()) <= TOLERANCE * float(b.norm()) for a, b in zip(got, wanted, strict=True))


def gpu_milliseconds(launch: Callable[[], None]) -> float:
    """Median time of a launch on the GPU, L2 flushed before each."""
    return float(triton.testing.do_bench(launch, warmup=10, rep=60, return_mode="median"))


def wall_milliseconds(launch: Callable[[], None]) -> float:
    """Time of one launch by the clock, for the interpreter."""
    start = time.perf_counter()
    launch()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure what the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to append to")
    parser.add_argument("--dims", nargs="+", default=["768,512,128", "384,256,64"], help="encoding,hidden,embedding")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--directions", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--budget-s", type=float, default=0.0, help="start no case after this; 0 for no limit")
    parser.add_argument("--commit", default="unknown", help="of the kernels")
    options = parser.parse_args()
    interpreted = fused.INTERPRETED
    if not interpreted and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here to measure on; TRITON_INTERPRET=1 would show that it runs")
    device = torch.device("cpu" if interpreted else "cuda")
    place = {
        "device": "interpreter" if interpreted else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": options.commit,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }
    started = time.monotonic()
    for directions, dims, rows in product(options.directions, options.dims, options.batches):
        if options.budget_s and time.monotonic() - started > options.budget_s:
            _say(f"not measured, the budget of {options.budget_s:g} s is spent: {dims}, B {rows}")
            continue
        encoding, hidden, embedding = (int(dim) for dim in dims.split(","))
        case = Case(encoding, hidden, embedding, rows, directions == 2)
        timer = wall_milliseconds if interpreted else gpu_milliseconds
        for row in best_tiles(case, device=device, candidates=CANDIDATES, timer=timer):
            append_row(options.out, row | place)
            _say(" ".join(f"{name}={row[name]}" for name in row))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table, with a header where it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
