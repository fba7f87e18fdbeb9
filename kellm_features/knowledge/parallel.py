"""Batches of a model side by side on a CPU, each on its share of the threads.

A transformer's forward pass is many small operations. One batch on all threads waits at a barrier after each of them:
measured on two cores, decoding gained nothing from the second thread, and where other processes wanted the cores the
barriers' spinning cost 4 times the CPU seconds in decoding and 2 to 3 times in encoding. Independent batches meet none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MAX_WORKERS = 4
"""Batches at a time: beyond this the interpreter's lock, not the cores, sets the pace."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def cpu_workers() -> int:
    """How many batches to compute at a time on this machine's CPU."""
    import torch

    return min(MAX_WORKERS, torch.get_num_threads())


def side_by_side(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results of a function over tasks, in order, `workers` at a time; torch's thread count is restored afterwards."""
    import torch

    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield from pool.map(function, tasks)
    finally:
        torch.set_num_threads(threads)
