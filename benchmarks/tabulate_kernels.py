"""Write the tables of kernels/README.md anew from the rows under benchmarks/data.

python benchmarks/tabulate_kernels.py

Where a table stands: page_tables.py. `times` alone is every problem of the file, all but the first folded away;
`times OP DIRECTIONS D H E` is one of them. A file of several devices has a table for each.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a test that runs the script by its path

from kernel_rows import GPU_ROWS, METHODS, OURS, Group, Timing, Timings, groups, label, read_rows
from page_tables import rewritten, table

PAGE = Path(__file__).resolve().parents[1] / "kernels" / "README.md"
WAITING = "No rows yet: no GPU has been at hand ([what waits](../benchmarks/GPU.md)).\n"
NOTHING = "—"


def digits(value: float) -> str:
    """Three of them: `0.0251`, `14.9`, `1,234`."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def problem(group: Group) -> str:
    """What was computed: `adapter_info_nce`, anchor to positive, 768 → 512 → 128."""
    dims = f"E {group.embedding}"
    if group.op == "adapter_info_nce":
        dims = f"{group.encoder} → {group.hidden} → {group.embedding}"
    return f"`{group.op}`, {'anchor to positive' if group.directions == 1 else 'both directions'}, {dims}"


def methods(timings: Timings) -> str:
    """How the main figures were taken, up to which B."""
    last = {timings.method(batch): batch for batch in timings.batches}
    *smaller, largest = last
    parts = [f"{METHODS[method]} up to B {last[method]:,}" for method in smaller]
    return ", ".join([*parts, METHODS[largest] + " above" * bool(smaller)])


def told(values: Iterable[str], word: str) -> str:
    """What rows have in common, or all that they have: `commits a1, b2`."""
    distinct = list(dict.fromkeys(value for value in values if value))
    return f"{word}{'s' if word == 'commit' and len(distinct) > 1 else ''} {', '.join(distinct)}" if distinct else ""


def caption(timings: Timings) -> str:
    """Problem, method, device, versions, commits and dates."""
    rows, group = timings.rows, timings.group
    parts = [
        group.device,
        group.dtype,
        told((row.torch for row in rows), "torch"),
        told((row.triton for row in rows), "triton"),
        told((row.commit for row in rows), "commit"),
        told(sorted(row.date for row in rows), "").strip(),
        f'`impl="auto"`: `{timings.auto.removeprefix("ours_")}`',
    ]
    return f"**{problem(group)}**: {methods(timings)}; {'; '.join(part for part in parts if part)}."


def cell(row: Timing | None, of: Timing | None, least: float | None) -> str:
    """Milliseconds, bold where they are the least, and in brackets how many times those of `of`."""
    if row is None:
        return NOTHING
    if row.error:
        return "out of memory" if "out of memory" in row.error.lower() else NOTHING
    text = marked(digits(row.p50_ms), row.p50_ms == least)
    if of is None or of.error or of.impl == row.impl:
        return text
    ratio = row.p50_ms / of.p50_ms
    return f"{text} ({ratio:.{2 if ratio < 10 else 1}f}×)"


def time_lines(timings: Timings, batches: list[int], pick: Callable[[str, int], Timing | None]) -> list[list[str]]:
    """A line for each implementation, a cell for each B."""
    columns = []
    for batch in batches:
        found = {impl: pick(impl, batch) for impl in timings.impls}
        least = min((row.p50_ms for row in found.values() if row and not row.error), default=None)
        columns.append([cell(row, found.get(timings.auto), least) for row in found.values()])
    return [[label(impl), *cells] for impl, *cells in zip(timings.impls, *columns, strict=True)]


def beside(timings: Timings, field: str, name: str, words: Callable[[float], str]) -> list[list[str]]:
    """A figure of what `auto` takes, and from the least to the greatest of the others; the least of all is bold."""
    ours = [f"{name}, ours"]
    others = [f"{name}, others"]
    for batch in timings.batches:
        mine = timings.known(timings.auto, batch, field)
        theirs = [timings.known(impl, batch, field) for impl in timings.impls if impl not in OURS]
        known = sorted(value for value in theirs if value is not None)
        least = min([*known, *([mine] if mine is not None else [])], default=None)
        ours.append(NOTHING if mine is None else marked(words(mine), mine == least))
        ends = list(dict.fromkeys(words(value) for value in (*known[:1], *known[-1:]))) or [NOTHING]
        others.append(" – ".join([marked(ends[0], known[:1] == [least]), *ends[1:]]))
    return [line for line in (ours, others) if set(line[1:]) != {NOTHING}]


def marked(text: str, bold: bool) -> str:
    """The text, in bold where it wins."""
    return f"**{text}**" if bold else text


def share(timings: Timings) -> list[list[str]]:
    """How much of the time is the floor's, for what `auto` takes."""
    rows = [timings.main(timings.auto, batch) for batch in timings.batches]
    cells = [f"{row.share_of_floor:.0%}" if row and not row.error else NOTHING for row in rows]
    return [["share of the roofline, ours", *cells]] if set(cells) != {NOTHING} else []


def notes(timings: Timings) -> str:
    """Which cells are of another method than the caption's, and why some are empty where memory is not the reason."""
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for impl in timings.impls:
        for batch in timings.batches:
            row = timings.main(impl, batch)
            if row and row.error and "out of memory" not in row.error.lower():
                where[impl, row.error].append(f"{batch:,}")
            elif row and not row.error and row.method != timings.method(batch):
                where[impl, METHODS[row.method]].append(f"{batch:,}")
    told = [f"{label(impl)} at B {', '.join(at)}: {what}" for (impl, what), at in where.items()]
    return f"\n{'; '.join(told)}.\n" if told else ""


def one(timings: Timings) -> str:
    """The table of one group, and on a GPU a second one of whole calls by the clock."""
    head = ["ms", *(f"B {batch:,}" for batch in timings.batches)]
    lines = time_lines(timings, timings.batches, timings.main)
    lines += share(timings)
    lines += beside(timings, "peak_mib", "peak MiB", digits)
    lines += beside(timings, "grad_error", "gradients' error", lambda value: f"{value:.1e}".replace("e-0", "e-"))
    text = f"{table(head, lines)}{notes(timings)}"
    called = sorted({row.batch for row in timings.rows if row.method == "wall"}) if timings.on_gpu else []
    if called:
        calls = time_lines(timings, called, lambda impl, batch: timings.last(impl, batch, "wall"))
        head = ["ms of a call by the clock", *(f"B {batch:,}" for batch in called)]
        text += f"\n{table(head, calls)}"
    return text


def times(rows: list[Timing] | None, *arguments: str) -> str:
    """Tables of some groups, or of all, with their captions; a word where a file still waits for its rows."""
    if rows is None:
        return WAITING
    known = groups(rows)
    wanted = [group for group in known if not arguments or tuple(map(str, group[:5])) == arguments]
    if not wanted:
        there = ", ".join(dict.fromkeys(" ".join(map(str, group[:5])) for group in known)) or "none"
        raise ValueError(f"no rows of {' '.join(arguments) or 'any problem'}; OP DIRECTIONS D H E with rows: {there}")
    made = [Timings(group, rows) for group in wanted]
    shown = len(made) if arguments else 1
    parts = [f"{caption(timings)}\n\n{one(timings)}" for timings in made[:shown]]
    return "\n".join([*parts, *(folded(timings) for timings in made[shown:])])


def folded(timings: Timings) -> str:
    """A table that a reader has to open; Markdown ends at the summary's tags and begins anew after an empty line."""
    summary = f"{problem(timings.group)}, {timings.group.device}".replace("`", "")
    return f"<details><summary>{escape(summary)}</summary>\n\n{caption(timings)}\n\n{one(timings)}\n</details>\n"


def read(path: Path) -> list[Timing] | None:
    """The rows of a file; None where it is the GPU's and does not exist yet."""
    return None if path.stem == GPU_ROWS and not path.exists() else read_rows(path)


def written(page: str) -> str:
    """The page with its tables made from the rows."""
    return rewritten(page, {"times": times}, read)


def main() -> None:
    """Rewrite the page in place."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        page = written(PAGE.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
