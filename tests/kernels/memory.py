"""Peak memory of a call on the CPU, from the allocator's own events."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that `call` had allocated at once through PyTorch's CPU allocator, beyond those there before.

    What BLAS or oneDNN take for themselves is not seen. The profiler does not always know the size of a block that it
    did not see allocated, so `call` should free nothing that was there before. What `call` returns counts as alive.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        kept = call()
    del kept
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results  # the public events() nets allocations per operator and loses the peak
    events = [event for event in results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
