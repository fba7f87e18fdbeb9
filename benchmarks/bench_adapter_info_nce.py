"""Time and peak memory of the adapter with InfoNCE against its peers; appends rows to benchmarks/data.

python benchmarks/bench_adapter_info_nce.py [--quick] [--wheels DIR]

Runs from a checkout alone (torch, and Triton on CUDA); peers that are not installed are skipped by name. A variant is
timed only after its loss, and up to B = 4096 its gradients, agreed with a float32 truth. Each round runs every variant
once, in a new order, on the next inputs of a small pool. Rows are written as they come: a kill loses nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Beside this folder, which is on the path already: neither is installed where only a checkout is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from bench_place import add_wheels, append_rows, device_name, git_commit, one_line, triton_version
from bench_variants import IMPLS, OPS, NotHereError, Problem, Shape, build, true_gradients, true_loss
from memory import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    "date op directions impl mode method B D H E columns dtype device torch triton commit p20_ms p50_ms p80_ms cpu_ms "
    "peak_mib floor_ms share_of_floor copy_gb_s matmul_tflop_s rounds error"
).split()
MODES = ("forward", "backward", "both")
DIMS = (768, 512, 128)  # encoder, hidden, embedding
SMALL = 4096  # rows up to which launches weigh: CUDA adds wall clock and graph replay, and gradients are checked
CHECKS = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (2e-2, 0.15),
}  # tolerance of the loss, and of the gradients' norm
SLOWEST_CALL_S = 10.0  # a variant slower than this gets its row from no round: it would starve the others
L2_FLUSH_BYTES = 256 << 20  # as triton.testing.do_bench clears it: larger than any L2

Row = dict[str, object]


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: bytes a second of a copy, FLOPs a second of a matrix product."""

    bytes_s: float
    flops_s: float


@dataclass
class Sample:
    """One measured call: milliseconds by mode, and CPU milliseconds of the process where the method has them."""

    ms: dict[str, float]
    cpu_ms: dict[str, float]


class Variant:
    """One implementation, ready to run."""

    def __init__(self, impl: str, problem: Problem) -> None:
        self.impl, self.problem, self.loss = impl, problem, build(impl, problem)
        self.peak_mib: dict[str, float] = {}
        self.seconds = 0.0  # of one warm call

    def clear(self, index: int) -> None:
        """Drop gradients, so that every backward pass writes new ones."""
        for leaf in self.problem.leaves(index):
            leaf.grad = None
        if self.problem.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def forward(self, index: int) -> Tensor:
        """The loss, with its graph."""
        with self.problem.autocast():
            return self.loss(*self.problem.pool[index])

    def both(self, index: int) -> Tensor:
        """Forward and backward."""
        loss = self.forward(index)
        loss.backward()
        return loss


def main() -> None:
    """Measure what the options name, append rows and print the ratios."""
    options = parse()
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
    rows: list[Row] = []
    skipped: set[str] = set()
    started = time.monotonic()
    for directions, op, batch in groups(options):
        shape = Shape(batch, *options.dims)
        name = f"{op}, {directions} direction(s), B {batch}"
        if options.budget_s and time.monotonic() - started > options.budget_s:
            print(f"not run, the budget of {options.budget_s:g} s is spent: {name}")
            continue
        print(name, flush=True)
        problem = Problem(op, shape, directions, device, dtype, options.pool)
        for row in measure(problem, limits, options, skipped):
            rows.append(fixed | row)
            append_rows(options.out, FIELDS, rows[-1:])  # at once: a run that is cut off keeps what it has
    print("", *sorted(skipped), f"{len(rows)} rows appended to {options.out}\n", sep="\n")
    print_ratios(rows)


def parse() -> argparse.Namespace:
    """The command line, defaults filled in by device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--wheels", type=Path, action="append", default=[], help="folder of wheels of peers to use")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes B")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--directions", type=int, nargs="+", choices=(1, 2), help="1: anchor to positive; 2: both")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--rounds", type=int, help="at most this many rounds a shape")
    parser.add_argument("--seconds", type=float, help="aimed at for the rounds of one shape, op and method")
    parser.add_argument("--budget-s", type=float, help="start no shape after this; 0 for no limit")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: does everything run?")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.dims = (64, 48, 32) if options.quick else DIMS
    options.pool = 2 if options.quick else 3
    options.seconds = options.seconds or (4.0 if cuda else 30.0)
    options.rounds = options.rounds or (2 if options.quick else 100 if cuda else 15)
    if not options.batches:
        large = [256, 1024, 4096, 16384, 65536, 262144] if cuda else [256, 1024, 4096]
        options.batches = [72] if options.quick else large
    options.directions = options.directions or ([1, 2] if cuda else [1])
    if options.budget_s is None:
        options.budget_s = 440.0 if cuda else 0.0  # and with the shape then under way, 9 minutes at most
    if options.out is None:
        folder = Path(tempfile.gettempdir()) if options.quick else ROOT / "benchmarks" / "data"
        options.out = folder / ("adapter_info_nce.csv" if cuda else "adapter_info_nce_cpu.csv")
    options.commit = options.commit or git_commit()
    return options


def groups(options: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """Directions, op and B in order of weight: where the budget ends, the least wanted is what is missing."""
    for directions in options.directions:
        for op in options.ops:
            for batch in options.batches:
                yield directions, op, batch


def measure(problem: Problem, limits: Ceilings, options: argparse.Namespace, skipped: set[str]) -> Iterator[Row]:
    """Rows of one problem: every variant prepared and checked, then timed in turns.

    Args:
        skipped: takes a line for each variant that cannot run here.
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
    truth = true_loss(problem, 0, 1 << 28 if problem.device.type == "cuda" else 1 << 22)
    gradients = true_gradients(problem, 0) if shape.rows <= SMALL else None
    variants: list[Variant] = []
    for impl in options.impls:
        try:
            variant = Variant(impl, problem)
            prepare(variant, truth, gradients)
        except NotHereError as reason:
            skipped.add(f"{impl} skipped: {reason}")
        except Exception as error:  # a peer may fail in any way, out of memory first: its row says so, the others go on
            yield base | {"impl": impl, "mode": "both", "error": one_line(error)}
            print(f"  {impl}: {one_line(error)}")
        else:
            variants.append(variant)
        release(problem)
    for row in timed_rows(variants, limits, options):
        yield base | row
    if problem.device.type == "cuda" and shape.rows <= SMALL:
        # Last the one most likely to fail, as it handles RNG states: a broken capture may trouble the next.
        for variant in sorted(variants, key=lambda variant: variant.impl == "st_cached_mnrl"):
            if variant.impl != "compile_reduce_overhead":  # its calls are graph replays already
                yield base | graph_row(variant, limits, options.rounds)
                release(problem)


def prepare(variant: Variant, truth: float, gradients: list[Tensor] | None) -> None:
    """Warm one variant up, check it, and take its peak memory and the time of one call.

    Raises:
        ValueError: its loss or gradients are not those of the truth, or one call takes too long.
        NotHereError: it finds a peer missing.
    """
    problem = variant.problem
    cuda = problem.device.type == "cuda"
    release(problem)
    before = torch.cuda.memory_allocated() if cuda else 0
    variant.clear(0)
    started = time.monotonic()
    loss = variant.both(0).item()
    check_pace(time.monotonic() - started, 6 * SLOWEST_CALL_S)  # the first call compiles
    tolerance, grad_tolerance = CHECKS[problem.dtype]
    if not abs(loss - truth) <= tolerance * (1 + abs(truth)):
        raise ValueError(f"loss {loss:.6g}, expected {truth:.6g}: not timed")
    if gradients is not None:
        got = [leaf.grad for leaf in problem.leaves(0)]
        if any(grad is None for grad in got):
            raise ValueError("a gradient is missing: not timed")
        apart = sum(float((g.float() - t).square().sum()) for g, t in zip(got, gradients, strict=True) if g is not None)
        error = (apart / sum(float(t.square().sum()) for t in gradients)) ** 0.5
        if not error <= grad_tolerance:
            raise ValueError(f"gradients off by {error:.2g} of their norm: not timed")
    calls: list[tuple[str, Callable[[int], Tensor]]] = [("both", variant.both), ("forward", variant.forward)]
    for mode, call in calls:
        variant.clear(1)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            call(1)
            variant.peak_mib[mode] = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            variant.peak_mib[mode] = peak_bytes(partial(call, 1)) / 2**20
    variant.clear(1)
    variant.seconds = wall_sample(variant, 1).ms["both"] / 1e3
    check_pace(variant.seconds, SLOWEST_CALL_S)


def check_pace(seconds: float, limit: float) -> None:
    """Raise ValueError where one call took longer than `limit`."""
    if seconds > limit:
        raise ValueError(f"one call takes {seconds:.1f} s, more than {limit:g}: not timed")


def timed_rows(variants: list[Variant], limits: Ceilings, options: argparse.Namespace) -> Iterator[Row]:
    """Rows of the rounds in which all variants take turns."""
    if not variants:
        return
    problem = variants[0].problem
    methods: list[tuple[str, Callable[[Variant, int], Sample]]] = [("wall", wall_sample)]
    if problem.device.type == "cuda":
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=problem.device)
        methods = [("events", lambda variant, index: event_sample(variant, index, flush))]
        if problem.shape.rows <= SMALL:
            methods.append(("wall", wall_sample))
    one_round = sum(variant.seconds for variant in variants)
    rounds = max(min(options.rounds, 3), min(options.rounds, int(options.seconds / one_round)))
    order = random.Random(0)
    for method, take in methods:
        samples: dict[str, list[Sample]] = defaultdict(list)
        for number in range(rounds + 1):  # the first warms caches up again, and is dropped
            for variant in order.sample(variants, len(variants)):
                index = number % len(problem.pool)
                variant.clear(index)
                sample = take(variant, index)
                if number:
                    samples[variant.impl].append(sample)
        for variant in variants:
            for mode in MODES:
                if mode in samples[variant.impl][0].ms:
                    yield result(variant, mode, method, samples[variant.impl], limits)


def wall_sample(variant: Variant, index: int) -> Sample:
    """Wall clock and CPU time of a call as a caller sees it; on CUDA both directions at once, up to their end."""
    cuda = variant.problem.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = [time.perf_counter()], [time.process_time()]
    loss = variant.forward(index)
    if not cuda:
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    wall.append(time.perf_counter())
    cpu.append(time.process_time())
    return Sample(by_mode(wall), by_mode(cpu))


def by_mode(marks: list[float]) -> dict[str, float]:
    """Milliseconds by mode from two or three marks in seconds."""
    spent = {"both": (marks[-1] - marks[0]) * 1e3}
    if len(marks) == 3:
        spent |= {"forward": (marks[1] - marks[0]) * 1e3, "backward": (marks[2] - marks[1]) * 1e3}
    return spent


def event_sample(variant: Variant, index: int, flush: Tensor) -> Sample:
    """Device time by CUDA events from a cold L2: launches are hidden only as far as the flush hides them."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in MODES]
    flush.zero_()
    marks[0].record()
    loss = variant.forward(index)
    marks[1].record()
    loss.backward()
    marks[2].record()
    torch.cuda.synchronize()
    seconds = [0.0, marks[0].elapsed_time(marks[1]) / 1e3, marks[0].elapsed_time(marks[2]) / 1e3]
    return Sample(by_mode(seconds), {})


def graph_row(variant: Variant, limits: Ceilings, rounds: int) -> Row:
    """Replay of forward and backward captured as one CUDA graph, or the reason why it does not capture."""
    problem = variant.problem
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                variant.clear(0)
                variant.both(0)
        torch.cuda.current_stream().wait_stream(side)
        variant.clear(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            variant.both(0)
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=problem.device)
        samples = []
        for number in range(rounds + 1):
            for static, fresh in zip(problem.pool[0], problem.pool[1 + number % (len(problem.pool) - 1)], strict=True):
                static.detach().copy_(fresh.detach())
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(Sample({"both": start.elapsed_time(end)}, {}))
    except Exception as error:  # whatever a variant does that cannot be captured: the row says it
        return {"impl": variant.impl, "mode": "both", "method": "graph", "error": one_line(error)}
    return result(variant, "both", "graph", samples[1:], limits)


def result(variant: Variant, mode: str, method: str, samples: list[Sample], limits: Ceilings) -> Row:
    """The row of one variant, mode and method."""
    problem = variant.problem
    times = torch.tensor([sample.ms[mode] for sample in samples], dtype=torch.float64)
    p20, p50, p80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    cpu = [sample.cpu_ms[mode] for sample in samples if mode in sample.cpu_ms]
    floor = floor_ms(problem.op, problem.shape, problem.directions, mode, problem.dtype.itemsize, limits)
    return {
        "impl": variant.impl,
        "mode": mode,
        "method": method,
        "p20_ms": round(p20, 5),
        "p50_ms": round(p50, 5),
        "p80_ms": round(p80, 5),
        "cpu_ms": round(torch.tensor(cpu, dtype=torch.float64).quantile(0.5).item(), 3) if cpu else "",
        "peak_mib": round(variant.peak_mib[mode], 3) if mode in variant.peak_mib and method != "graph" else "",
        "floor_ms": round(floor, 6),
        "share_of_floor": round(floor / p50, 4),
        "rounds": len(samples),
    }


def floor_ms(op: str, shape: Shape, directions: int, mode: str, itemsize: int, limits: Ceilings) -> float:
    """The least time by a roofline: the longer of its FLOPs and its bytes at this device's ceilings.

    R = 2B rows go through the MLP: 2R(DH + HE) FLOPs forward and 2R(2HE + DH) backward, without a gradient of x.
    Logits, one direction: 4·B²·E forward, where the anchors' gradient comes with the loss, and 4·B²·E backward. Both
    directions: 2·B²·E forward for the two sums, and 8·B²·E backward in two passes without atomics. Bytes: each input
    read once a pass, embeddings and gradients written once; logits cost none.
    """
    if mode == "both":
        return sum(floor_ms(op, shape, directions, half, itemsize, limits) for half in ("forward", "backward"))
    b, d, h, e = shape.rows, shape.encoder, shape.hidden, shape.embedding
    r = 2 * b
    forward = mode == "forward"
    flops = b * b * e * (4 if directions == 1 else 2 if forward else 8)
    moved = r * e * itemsize * (1 if forward else 2)
    if op == "adapter_info_nce":
        flops += 2 * r * (d * h + h * e) if forward else 2 * r * (2 * h * e + d * h)
        moved += r * d * itemsize + (d * h + h * e) * 4
    return max(flops / limits.flops_s, moved / limits.bytes_s) * 1e3


def ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool) -> Ceilings:
    """The best of some copies and some square matrix products."""
    cuda = device.type == "cuda"
    size = (1 << 30 if cuda else 1 << 26) if not quick else 1 << 20
    side = (8192 if cuda else 1024) if not quick else 128
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def best(call: Callable[[], object]) -> float:
        spent = []
        for _ in range(12):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - start)
        return min(spent)

    copy, multiply = best(lambda: target.copy_(source)), best(lambda: torch.mm(left, right, out=product))
    return Ceilings(2 * size / copy, 2 * side**3 / multiply)


def release(problem: Problem) -> None:
    """Give back what a variant left behind."""
    for index in range(len(problem.pool)):
        for leaf in problem.leaves(index):
            leaf.grad = None
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.synchronize()  # raises, and ends the run, where a kernel has broken the device's context
        torch.cuda.empty_cache()


def print_ratios(rows: list[Row]) -> None:
    """Each variant's time and memory relative to ours: the Triton kernels where they ran, else the reference."""
    done = {
        (row["op"], row["directions"], row["B"], row["method"], row["impl"]): row
        for row in rows
        if row["mode"] == "both" and not row.get("error")
    }
    table = ["op directions B method impl p50_ms time/ours cpu/ours peak_mib peak/ours of_floor".split()]
    for (op, directions, batch, method, impl), row in done.items():
        ours = next(
            (
                done[op, directions, batch, method, name]
                for name in ("ours_triton", "ours_torch")
                if (op, directions, batch, method, name) in done
            ),
            None,
        )
        ratios = [ratio(row, ours, key) for key in ("p50_ms", "cpu_ms", "peak_mib")]
        cells = [op, directions, batch, method, impl, f"{row['p50_ms']:.3f}", *ratios[:2], row["peak_mib"], ratios[2]]
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
