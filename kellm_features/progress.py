"""Progress on stderr: a bar with rate and ETA on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)
LOG_EVERY_S = 15.0


class Advance(Protocol):
    """Call with the units just done and, where there is news, a short note (loss, tokens/s)."""

    def __call__(self, amount: float = 1, note: str = "") -> None: ...


class _RateAndEta(ProgressColumn):
    """Over the whole time so far: rich's own columns look 30 s back, and know nothing where a step takes longer."""

    def render(self, task: Task) -> Text:
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        if not rate:
            return Text("")
        left_s = (task.remaining or 0) / rate
        return Text(f"{rate:,.1f} {task.fields['unit']}/s, {timedelta(seconds=round(left_s))} left", style="cyan")


@contextmanager
def track(label: str, total: int, unit: str = "rows") -> Iterator[Advance]:
    """Show progress of a long loop.

    Args:
        label: what is being done, in a word or two.
        total: units of work.
        unit: the plural of one unit.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateAndEta(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, unit=unit, note="")

            def advance(amount: float = 1, note: str = "") -> None:
                bar.update(task, advance=amount)
                if note:
                    bar.update(task, note=note)

            yield advance
        return
    started = last = time.monotonic()
    done = 0.0

    def log(amount: float = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last = now
            rate = done / (now - started)
            eta = (total - done) / rate if rate else float("inf")
            logger.info(
                "%s: %.0f of %d %s, %.1f/s, ETA %.0f s%s",
                label,
                done,
                total,
                unit,
                rate,
                eta,
                note and f", {note}",
            )

    yield log
