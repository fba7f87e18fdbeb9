"""CPU seconds and peak memory of this process and all its children (the JVM, Spark's Python workers)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

SAMPLE_EVERY_S = 0.25
MIB = 1024 * 1024


@dataclass
class Usage:
    """Filled in when the measured block ends."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0
    """Largest sum of resident memory over the process tree, as sampled; shared pages count once per process."""


class _Sampler(threading.Thread):
    def __init__(self, own: bool) -> None:
        super().__init__(daemon=True, name="kellm-usage")
        self.own = own
        self.stopped = threading.Event()
        self.peak_bytes = 0
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.sample(born=False)

    def sample(self, born: bool = True) -> None:
        """Read the tree once. `born`: a process first seen now started inside the block."""
        me = psutil.Process()
        resident = 0
        for process in [*([me] if self.own else []), *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                resident += process.memory_info().rss
            except psutil.Error:  # it ended between the listing and the reading
                continue
            spent = times.user + times.system
            self.first.setdefault(process.pid, 0.0 if born else spent)
            self.last[process.pid] = spent
        self.peak_bytes = max(self.peak_bytes, resident)

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_EVERY_S):
            self.sample()


@contextmanager
def measure(*, own: bool = True) -> Iterator[Usage]:
    """Measure a block: `with measure() as usage: ...`, then read `usage`. `own` off: children only."""
    usage = Usage()
    sampler = _Sampler(own)
    sampler.start()
    started = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - started
        sampler.stopped.set()
        sampler.join()
        sampler.sample()
        usage.cpu_seconds = sum(sampler.last[pid] - sampler.first[pid] for pid in sampler.last)
        usage.peak_mib = sampler.peak_bytes / MIB
