"""Time and peak memory of the adapter with InfoNCE against its peers; appends rows to benchmarks/data.

python benchmarks/bench_adapter_info_nce.py [--quick] [--wheels DIR] [--resume]

Runs from a checkout alone (torch, and Triton on CUDA); peers that are not installed are left out by name. A variant is
timed only after its loss and gradients on every input of a small pool agreed with float64. Each round runs every
variant once, in a new order, on the next inputs; each sits out once it has had its share of the seconds.

A group is one op, number of directions, dims and B. Groups run in order of weight, and every variant of a group has a
row: its times, or one with an `error`. Rows are written as they come, so a kill loses nothing, and `--resume` leaves
out groups that are whole in the file, for the same device, versions and commit. A group that was cut off is measured
again, and has rows of both runs then: the last row of the same op, directions, dims, B, impl, mode and method counts,
and an error without a method is void once rows of its variant follow.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

# Beside this folder, which is on the path already: not installed where only a checkout is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from bench_place import add_wheels, append_rows, device_name, git_commit, one_line, require_columns, triton_version
from bench_timing import (
    Ceilings,
    OutOfTimeError,
    Row,
    Variant,
    ceilings,
    check_time,
    graph_row,
    methods_of,
    prepare,
    release,
    timed_rows,
)
from bench_variants import IMPLS, OPS, NotHereError, Problem, Shape, true_values

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    "date op directions impl mode method B D H E columns dtype device torch triton commit p20_ms p50_ms p80_ms cpu_ms "
    "peak_mib floor_ms share_of_floor copy_gb_s matmul_tflop_s loss_error grad_error rounds error"
).split()
PLACE = ("dtype", "device", "torch", "triton", "commit")
DIMS = ((768, 512, 128), (384, 256, 64))  # encoder, hidden, embedding
BOTH_WAYS_FIRST = (16384, 65536)  # B where a loss of both directions is compared
POOL = 3  # inputs of a group
LARGE, GROUP_S, LARGE_GROUP_S = 262144, 60.0, 150.0  # what a group is taken to need, from LARGE rows on the latter

Dims = tuple[int, int, int]
Group = tuple[str, int, Dims, int]  # op, directions, D H E, B


def main() -> None:
    """Measure what the options name, append rows and print the ratios."""
    options = parse()
    require_columns(options.out, FIELDS)
    for folder in options.wheels:
        add_wheels(folder)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limits = ceilings(device, dtype, quick=options.quick)
    device_label = device_name(device)
    print(f"{device_label}: copy {limits.bytes_s / 1e9:.0f} GB/s, {dtype} product {limits.flops_s / 1e12:.2f} TFLOP/s")
    fixed: Row = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_label,
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": options.commit,
        "copy_gb_s": round(limits.bytes_s / 1e9, 1),
        "matmul_tflop_s": round(limits.flops_s / 1e12, 4),
    }
    done = finished(options.out, fixed, options.impls, device) if options.resume else set()
    rows: list[Row] = []
    for op, directions, dims, batch in groups(options.ops, options.directions, options.dims, options.batches):
        started = time.monotonic()
        name = f"{op}, {directions} direction(s), {'-'.join(map(str, dims))}, B {batch}"
        if (op, directions, dims, batch) in done:
            print(f"{name}: in the file already")
            continue
        if started + (LARGE_GROUP_S if batch >= LARGE else GROUP_S) > options.deadline:
            print(f"{name}: not run, too little of the {options.budget_s:g} s is left")
            continue
        print(name, flush=True)
        problem = Problem(op, Shape(batch, *dims), directions, device, dtype, POOL)
        try:
            for row in measure(problem, limits, options):
                rows.append(fixed | row)
                append_rows(options.out, FIELDS, rows[-1:])  # at once: a run that is cut off keeps what it has
        except OutOfTimeError:
            print(f"{name}: cut off, the {options.budget_s:g} s are over")
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    print("", f"{len(rows)} rows appended to {options.out}\n", sep="\n")
    print_ratios(rows)


def parse() -> argparse.Namespace:
    """The command line, defaults filled in by device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--wheels", type=Path, action="append", default=[], help="folder of wheels of peers to use")
    parser.add_argument("--dims", type=dims_of, nargs="+", help="D,H,E of encoder, hidden layer and embedding")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes B")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--directions", type=int, nargs="+", choices=(1, 2), help="1: anchor to positive; 2: both")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--rounds", type=int, help="at most this many rounds a group")
    parser.add_argument("--seconds", type=float, help="aimed at for the rounds of one group and method")
    parser.add_argument("--budget-s", type=float, help="seconds to end within; 0 for no limit")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: does everything run?")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.dims = options.dims or ([(64, 48, 32)] if options.quick else list(DIMS) if cuda else [DIMS[0]])
    options.seconds = options.seconds or (8.0 if cuda else 30.0)
    options.rounds = options.rounds or (2 if options.quick else 100 if cuda else 15)
    if not options.batches:
        large = [256, 1024, 4096, 16384, 65536, 262144] if cuda else [256, 1024, 4096]
        options.batches = [72] if options.quick else large
    options.directions = options.directions or ([1, 2] if cuda else [1])
    if options.budget_s is None:
        options.budget_s = 540.0 if cuda else 0.0  # looked at between calls, of which one may still compile
    options.deadline = time.monotonic() + options.budget_s if options.budget_s else math.inf
    if options.out is None:
        folder = Path(tempfile.mkdtemp()) if options.quick else ROOT / "benchmarks" / "data"
        options.out = folder / ("adapter_info_nce.csv" if cuda else "adapter_info_nce_cpu.csv")
    options.commit = options.commit or git_commit()
    return options


def dims_of(text: str) -> Dims:
    """`768,512,128` -> (768, 512, 128)."""
    try:
        encoder, hidden, embedding = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not D,H,E: 768,512,128 is") from error
    return encoder, hidden, embedding


def groups(
    ops: Sequence[str], directions: Sequence[int], dims: Sequence[Dims], batches: Sequence[int]
) -> Iterator[Group]:
    """Groups in order of weight: where the time ends, the least wanted is what is missing."""
    for op in ops:
        for count in directions:
            for size in dims:
                for batch in sorted(batches, key=lambda b: count == 2 and b not in BOTH_WAYS_FIRST):
                    yield op, count, size, batch


def finished(path: Path, fixed: Row, impls: Sequence[str], device: torch.device) -> set[Group]:
    """The groups of which the file has every variant at this place: timed by each method, or in error."""
    seen: dict[Group, set[tuple[str, str]]] = defaultdict(set)
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["mode"] == "both" and all(row[name] == str(fixed[name]) for name in PLACE):
                    dims = int(row["D"]), int(row["H"]), int(row["E"])
                    seen[row["op"], int(row["directions"]), dims, int(row["B"])].add((row["impl"], row["method"]))

    def whole(rows: int, found: set[tuple[str, str]]) -> bool:
        wanted = ({(impl, method) for method in methods_of(impl, rows, device)} for impl in impls)
        return all((impl, "") in found or each <= found for impl, each in zip(impls, wanted, strict=True))

    return {group for group, found in seen.items() if whole(group[-1], found)}


def measure(problem: Problem, limits: Ceilings, options: argparse.Namespace) -> Iterator[Row]:
    """Rows of one problem: every variant prepared and checked, then timed in turns.

    Raises:
        OutOfTimeError: the deadline has passed; not all rows were given.
    """
    shape = problem.shape
    base: Row = {
        "op": problem.op,
        "directions": problem.directions,
        "B": shape.rows,
        "D": shape.encoder,
        "H": shape.hidden,
        "E": shape.embedding,
        "columns": shape.rows,
    }
    torch.compiler.reset()  # every problem compiles afresh; a stale cache would meet the recompile limit
    truths = [true_values(problem, index) for index in range(len(problem.pool))]
    variants: list[Variant] = []
    for impl in options.impls:
        check_time(options.deadline)
        failed = ""
        try:
            variant = Variant(impl, problem)
            prepare(variant, truths)
            variants.append(variant)
        except NotHereError as reason:
            failed = f"not run: {reason}"
        except Exception as error:  # a peer may fail in any way, out of memory first: its row says so, the others go on
            failed = one_line(error)
        if failed:
            print(f"  {impl}: {failed}")
            yield base | {"impl": impl, "mode": "both", "error": failed}
        release(problem)
    for row in timed_rows(variants, limits, options):
        yield base | row
    # Last the one most likely to fail, as it handles RNG states: a broken capture may trouble the next.
    for variant in sorted(variants, key=lambda variant: variant.impl == "st_cached_mnrl"):
        if "graph" in methods_of(variant.impl, shape.rows, problem.device):
            check_time(options.deadline)
            yield base | graph_row(variant, truths, limits, options.rounds)
            release(problem)


def print_ratios(rows: list[Row]) -> None:
    """Each variant's time and memory relative to ours: the Triton kernels where they ran, else the reference."""
    done: dict[tuple[object, ...], Row] = {
        (row["op"], row["directions"], row["D"], row["B"], row["method"], row["impl"]): row
        for row in rows
        if row["mode"] == "both" and not row.get("error")
    }
    table = ["op directions D B method impl p50_ms time/ours cpu/ours peak_mib peak/ours of_floor".split()]
    for (*group, impl), row in done.items():
        mine = [done[*group, name] for name in ("ours_triton", "ours_torch") if (*group, name) in done]
        ratios = [ratio(row, mine[0] if mine else None, key) for key in ("p50_ms", "cpu_ms", "peak_mib")]
        cells = [*group, impl, f"{row['p50_ms']:.3f}", *ratios[:2], row["peak_mib"], ratios[2]]
        table.append([str(cell) for cell in [*cells, f"{row['share_of_floor']:.0%}"]])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def ratio(row: Row, ours: Row | None, key: str) -> str:
    """`row` over `ours`, or a dash where either has none."""
    mine, theirs = row.get(key), ours.get(key) if ours else None
    if not isinstance(mine, float) or not isinstance(theirs, float) or theirs <= 0:
        return "-"
    return f"{mine / theirs:.2f}"


if __name__ == "__main__":
    main()
