"""How `bench_adapter_info_nce.py` measures a variant: checked on every input, then in turns with the others."""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Beside this folder, which is on the path already: not installed where only a checkout is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

from bench_place import one_line
from bench_variants import SMALL, Errors, Problem, Shape, Values, build, check
from memory import peak_bytes
from roofline import least_work

MODES = ("forward", "backward", "both")
SLOWEST_CALL_S = 10.0  # a variant slower than this gets its row from no round: it would starve the others
FIRST_CALL_S = 60.0  # the first call compiles
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


class OutOfTimeError(Exception):
    """The time that a run may take is over."""


class Variant:
    """One implementation, ready to run."""

    def __init__(self, impl: str, problem: Problem) -> None:
        self.impl, self.problem, self.loss = impl, problem, build(impl, problem)
        self.peak_mib: dict[str, float] = {}
        self.errors = Errors()  # the largest over the pool's inputs
        self.seconds = 0.0  # of one warm call

    def clear(self) -> None:
        """Drop gradients, so that every backward pass writes new ones."""
        drop_gradients(self.problem)
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


def methods_of(impl: str, rows: int, device: torch.device) -> list[str]:
    """How a variant is timed at `rows` rows."""
    if device.type != "cuda":
        return ["wall"]
    if rows > SMALL:
        return ["events"]
    return ["events", "wall"] if impl == "compile_reduce_overhead" else ["events", "wall", "graph"]  # it is one


def prepare(variant: Variant, truths: Sequence[Values]) -> None:
    """Warm one variant up, check it on every input, and take its peak memory and the time of one call.

    Raises:
        ValueError: its loss or gradients are not those of the truth, or one call takes too long.
    """
    problem = variant.problem
    release(problem)
    before = torch.cuda.memory_allocated() if problem.device.type == "cuda" else 0
    for index, truth in enumerate(truths):
        variant.clear()
        started = time.monotonic()
        loss = variant.both(index)
        synchronize(problem.device)
        variant.seconds = time.monotonic() - started
        check_pace(variant.seconds, SLOWEST_CALL_S if index else FIRST_CALL_S)
        variant.errors = largest(variant.errors, check(problem, index, loss, truth))
    for mode, call in (("both", variant.both), ("forward", variant.forward)):
        variant.clear()
        variant.peak_mib[mode] = peak_mib(partial(call, 0), problem.device, before)


def peak_mib(call: Callable[[], object], device: torch.device, before: int) -> float:
    """The most that `call` has allocated beyond `before` bytes (CUDA) or what is there (CPU), MiB."""
    if device.type != "cuda":
        return peak_bytes(call) / 2**20
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def largest(one: Errors, other: Errors) -> Errors:
    """The larger of both, each for itself."""
    return Errors(*map(max, one, other))


def check_time(deadline: float) -> None:
    """Raise OutOfTimeError after the deadline."""
    if time.monotonic() > deadline:
        raise OutOfTimeError


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
    share = options.seconds / len(variants)
    rounds = {v.impl: min(options.rounds, max(3, int(share / v.seconds))) for v in variants}
    order = random.Random(0)
    for method, take in methods:
        samples: dict[str, list[Sample]] = defaultdict(list)
        failed: dict[str, str] = {}
        for number in range(max(rounds.values()) + 1):  # the first warms caches up again, and is dropped
            check_time(options.deadline)
            for variant in order.sample(variants, len(variants)):
                if variant.impl in failed or number > rounds[variant.impl]:
                    continue
                variant.clear()
                try:
                    sample = take(variant, number % len(problem.pool))
                except Exception as error:  # what the others keep may leave too little memory
                    failed[variant.impl] = one_line(error)
                if variant.impl in failed:  # outside, where the error has let go of the tensors
                    release(problem)
                    continue
                if number:
                    samples[variant.impl].append(sample)
        for variant in variants:
            if variant.impl in failed:
                print(f"  {variant.impl}: {failed[variant.impl]}")
                yield {"impl": variant.impl, "mode": "both", "method": method, "error": failed[variant.impl]}
                continue
            for mode in MODES:
                if mode in samples[variant.impl][0].ms:
                    yield result(variant, mode, method, samples[variant.impl], limits)


def wall_sample(variant: Variant, index: int) -> Sample:
    """Wall clock and CPU time of a call as a caller sees it; on CUDA both directions at once, up to their end."""
    device = variant.problem.device
    synchronize(device)
    wall, cpu = [time.perf_counter()], [time.process_time()]
    loss = variant.forward(index)
    if device.type != "cuda":
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
    loss.backward()
    synchronize(device)
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
    """Device time by CUDA events from a cold L2: launches are hidden only as far as the flush hides them.

    Where the allocator had to ask the device for memory, because the variant before kept other blocks, it is taken once
    more: a trainer, which runs one loss, does not ask again after its first step.
    """
    sample = Sample({}, {})
    for _ in range(2):
        asked = torch.cuda.memory_stats().get("num_device_alloc", 0)
        marks = [torch.cuda.Event(enable_timing=True) for _ in MODES]
        variant.clear()
        flush.zero_()
        marks[0].record()
        loss = variant.forward(index)
        marks[1].record()
        loss.backward()
        marks[2].record()
        torch.cuda.synchronize()
        del loss
        sample = Sample(by_mode([0.0, *(marks[0].elapsed_time(mark) / 1e3 for mark in marks[1:])]), {})
        if torch.cuda.memory_stats().get("num_device_alloc", 0) == asked:
            break
    return sample


def graph_row(variant: Variant, truths: Sequence[Values], limits: Ceilings, rounds: int) -> Row:
    """Replay of forward and backward captured as one CUDA graph, or the reason why it does not capture.

    The graph reads the first inputs of the pool, which the others are copied to; replays are checked before they are
    timed.
    """
    problem = variant.problem
    others = range(1, len(problem.pool))
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                variant.clear()
                variant.both(0)
        torch.cuda.current_stream().wait_stream(side)
        variant.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = variant.both(0)
        errors = Errors()
        for index in others:
            feed(problem, index)
            graph.replay()
            torch.cuda.synchronize()
            errors = largest(errors, check(problem, 0, loss, truths[index]))  # what it replays is on the first's leaves
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=problem.device)
        samples = []
        for number in range(rounds + 1):
            feed(problem, others[number % len(others)])
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(Sample({"both": start.elapsed_time(end)}, {}))
    except Exception as error:  # whatever a variant does that cannot be captured: the row says it
        print(f"  {variant.impl}, graph: {one_line(error)}")
        return {"impl": variant.impl, "mode": "both", "method": "graph", "error": one_line(error)}
    return result(variant, "both", "graph", samples[1:], limits) | error_cells(errors)


def feed(problem: Problem, index: int) -> None:
    """Copy inputs `index` to where the first ones are."""
    for static, fresh in zip(problem.pool[0], problem.pool[index], strict=True):
        static.detach().copy_(fresh.detach())


def error_cells(errors: Errors) -> Row:
    """The columns of the largest relative errors."""
    return {"loss_error": f"{errors.loss:.2e}", "grad_error": f"{errors.gradients:.2e}"}


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
        **error_cells(variant.errors),
        "rounds": len(samples),
    }


def floor_ms(op: str, shape: Shape, directions: int, mode: str, itemsize: int, limits: Ceilings) -> float:
    """The least time by a roofline at this device's ceilings; that of `both` is the sum."""
    halves = ("forward", "backward") if mode == "both" else (mode,)
    size = {"rows": shape.rows, "encoder": shape.encoder, "hidden": shape.hidden, "embedding": shape.embedding}
    work = (least_work(op, half, **size, directions=directions, itemsize=itemsize) for half in halves)
    return sum(each.seconds(limits.flops_s, limits.bytes_s) for each in work) * 1e3


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


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def drop_gradients(problem: Problem) -> None:
    """Of all inputs of the pool."""
    for index in range(len(problem.pool)):
        for leaf in problem.leaves(index):
            leaf.grad = None


def release(problem: Problem) -> None:
    """Give back what a variant left behind."""
    drop_gradients(problem)
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.synchronize()  # raises, and ends the run, where a kernel has broken the device's context
        torch.cuda.empty_cache()
