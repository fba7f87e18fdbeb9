"""Draw docs/img/kernels-roofline.svg from the rows of bench_adapter_info_nce.py: FLOP/s reached, and the roof.

python benchmarks/plot_kernels.py

Takes the GPU's rows where there are any, else the CPU's; of them the device measured last, and there the first problem:
the adapter with InfoNCE, one direction.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a test that runs the script by its path

from kernel_rows import CPU_ROWS, GPU_ROWS, Group, Timing, Timings, groups, label, read_rows
from page_tables import DATA
from roofline import Work, least_work
from tabulate_kernels import digits, methods, problem

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "img" / "kernels-roofline.svg"
WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 520, 96, 396
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LINE = 16
"""Between the labels of two lines."""
COLORS = {
    "ours_triton": ("#1f6fc0", "#58a6ff"),
    "ours_torch": ("#1f6fc0", "#58a6ff"),
    "eager": ("#6e7781", "#9da7b3"),
    "chunked": ("#6e7781", "#9da7b3"),
    "compile": ("#8f6a1e", "#c9a24d"),
    "compile_reduce_overhead": ("#8f6a1e", "#c9a24d"),
    "st_mnrl": ("#8257a8", "#b795d8"),
    "st_cached_mnrl": ("#8257a8", "#b795d8"),
    "inf_cl": ("#3b7d58", "#72b58f"),
    "memeff": ("#a8534f", "#d98a85"),
}
"""On a light and on a dark ground; what shares a hue differs in its stroke."""
DASHED = ("chunked", "compile_reduce_overhead", "st_cached_mnrl", "ours_torch")
"""Unless it is what `auto` takes."""
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
.bg { fill: #ffffff; }
.title { font-size: 15px; font-weight: 600; fill: #1b1f24; }
.note, .tick, .label { font-size: 11.5px; fill: #57606a; }
.name { font-size: 11.5px; fill: currentColor; }
.grid { stroke: #d8dee4; stroke-width: 1; }
.batch { stroke: #d8dee4; stroke-width: 1; stroke-dasharray: 2 4; }
.roof { fill: none; stroke: #1b1f24; stroke-width: 1.6; }
.line { fill: none; stroke: currentColor; stroke-width: 1.4; }
.lead { fill: none; stroke: currentColor; stroke-width: 0.8; stroke-dasharray: 1 3; }
.point { fill: currentColor; stroke: #ffffff; stroke-width: 1; }
.dashed .line { stroke-dasharray: 5 3; }
.auto .line { stroke-width: 2.6; }
.auto .name { font-weight: 600; }
LIGHT
@media (prefers-color-scheme: dark) {
.bg { fill: #0d1117; }
.title { fill: #e6edf3; }
.note, .tick, .label { fill: #9da7b3; }
.grid, .batch { stroke: #2a313c; }
.roof { stroke: #e6edf3; }
.point { stroke: #0d1117; }
DARK
}
"""


@dataclass(frozen=True)
class Point:
    """One implementation at one B."""

    batch: int
    intensity: float
    """FLOPs per byte of the least work."""
    flops_s: float
    """FLOPs of the least work over the measured time."""


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: values from `low` to `high` on the drawing from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        """Powers of ten, and some of their multiples where those would be few."""
        ratio = self.high / self.low
        multiples = (1, 2, 3, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 100 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = (multiple * 10.0**power for power in powers for multiple in multiples)
        return [value for value in values if self.low <= value <= self.high]


def least(group: Group, batch: int) -> Work:
    """The least work of forward and backward together."""
    if group.dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {group.dtype!r} has no size here; add it to ITEM_BYTES of {Path(__file__).name}")
    halves = [
        least_work(
            group.op,
            mode,
            rows=batch,
            encoder=group.encoder,
            hidden=group.hidden,
            embedding=group.embedding,
            directions=group.directions,
            itemsize=ITEM_BYTES[group.dtype],
        )
        for mode in ("forward", "backward")
    ]
    return Work(sum(half.flops for half in halves), sum(half.moved for half in halves))


def points(timings: Timings) -> dict[str, list[Point]]:
    """Each implementation's points by B; without those that have none."""
    found: dict[str, list[Point]] = {}
    for impl in timings.impls:
        for batch in timings.batches:
            row, work = timings.main(impl, batch), least(timings.group, batch)
            if row and not row.error:
                point = Point(batch, work.flops / work.moved, work.flops / row.p50_ms * 1e3)
                found.setdefault(impl, []).append(point)
    return found


def spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Places for labels near those wanted, in the same order, `LINE` apart and within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [0.0] * len(wanted)
    below = low - LINE
    for index in order:
        below = places[index] = max(wanted[index], below + LINE)
    above = high + LINE
    for index in reversed(order):
        above = places[index] = min(places[index], above - LINE)
    return places


def draw(timings: Timings) -> str:
    """The drawing, both axes logarithmic."""
    lines = points(timings)
    if not lines:
        raise ValueError(f"nothing was timed of {problem(timings.group)} on {timings.group.device}")
    flops_s, bytes_s = (max(getattr(row, name) for row in timings.rows) for name in ("flops_s", "bytes_s"))
    ridge = flops_s / bytes_s
    every = [point for line in lines.values() for point in line]
    xs = [point.intensity for point in every]
    x = Axis(min(ridge, *xs) / 6, max(ridge, *xs) * 1.3, LEFT, RIGHT)
    y = Axis(min(point.flops_s for point in every) / 1.6, 1.35 * max(flops_s, *(p.flops_s for p in every)), BOTTOM, TOP)
    scale, unit = (1e12, "TFLOP/s") if flops_s >= 1e12 else (1e9, "GFLOP/s")
    product, copy = f"matrix product {digits(flops_s / scale)} {unit}", f"copy {digits(bytes_s / 1e9)} GB/s"
    title = "FLOP/s reached against FLOPs per byte"
    told = "; ".join(
        f"{label(impl)} " + ", ".join(f"{digits(point.flops_s / scale)} at B {point.batch:,}" for point in line)
        for impl, line in lines.items()
    )
    notes = (
        f"{problem(timings.group).replace('`', '')}, {timings.group.dtype}; FLOPs and bytes of the least work",
        f"{timings.group.device}; p50 of forward and backward, {methods(timings)}",
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(f"{title}, {timings.group.device}. Roof: {product}, {copy}. In {unit}: {told}.")}">',
        f"<style>{style()}</style>",
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        f'<text class="title" x="20" y="28">{title}</text>',
        *(f'<text class="note" x="20" y="{47 + 16 * i}">{escape(note)}</text>' for i, note in enumerate(notes)),
    ]
    top = y(flops_s)
    for tick in y.ticks():
        if tick < flops_s:  # beneath the roof alone, whose words stand above it
            edge = x(max(x.low, tick / bytes_s))
            parts.append(f'<line class="grid" x1="{edge}" y1="{y(tick)}" x2="{RIGHT}" y2="{y(tick)}"/>')
        parts.append(text("tick", LEFT - 8, y(tick) + 4, f"{tick / scale:,.10g}", "end"))
    for batch, at in {point.batch: x(point.intensity) for point in every}.items():
        parts.append(f'<line class="batch" x1="{at}" y1="{top}" x2="{at}" y2="{BOTTOM + 4}"/>')
        parts.append(text("tick", at, BOTTOM + 17, f"{batch:,}", "middle"))
    for tick in x.ticks():
        parts.append(text("tick", x(tick), BOTTOM + 37, f"{tick:,.10g}", "middle"))
    parts.append(text("label", RIGHT + 24, BOTTOM + 17, "B"))
    parts.append(text("label", RIGHT + 24, BOTTOM + 37, "FLOPs per byte"))
    parts.append(text("label", LEFT - 8, TOP - 8, unit, "middle"))
    start = max(x.low, y.low / bytes_s)
    foot = x(start), y(start * bytes_s)
    parts.append(f'<polyline class="roof" points="{foot[0]},{foot[1]} {x(ridge)},{top} {RIGHT},{top}"/>')
    parts.append(text("label", RIGHT, top - 7, product, "end"))
    parts.append(along(foot, (x(ridge), top), copy))
    parts += marks(lines, timings.auto, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def marks(lines: dict[str, list[Point]], auto: str, x: Axis, y: Axis) -> Iterable[str]:
    """Lines, points and names at the right, what `auto` takes last and so above the others."""
    names = spread([y(line[-1].flops_s) for line in lines.values()], TOP, BOTTOM)
    for (impl, line), name in reversed(list(zip(lines.items(), names, strict=True))):
        yield f'<g class="{impl}{" auto" if impl == auto else " dashed" if impl in DASHED else ""}">'
        path = " ".join(f"{x(point.intensity)},{y(point.flops_s)}" for point in line)
        yield f'<polyline class="line" points="{path}"/>'
        end = line[-1]
        yield (
            f'<polyline class="lead" points="{x(end.intensity)},{y(end.flops_s)} {RIGHT},{y(end.flops_s)} '
            f'{RIGHT + 20},{name:.1f}"/>'
        )
        for point in line:
            yield (
                f'<circle class="point" cx="{x(point.intensity)}" cy="{y(point.flops_s)}" '
                f'r="{4.5 if impl == auto else 3.5}"/>'
            )
        yield text("name", RIGHT + 24, name + 4, label(impl))
        yield "</g>"


def along(start: tuple[float, float], end: tuple[float, float], words: str) -> str:
    """Words over the middle of a line, in its direction."""
    (left, low), (right, high) = start, end
    at = f"{(left + right) / 2:.1f} {(low + high) / 2:.1f}"
    angle = math.degrees(math.atan2(high - low, right - left))
    return f'<g transform="translate({at}) rotate({angle:.1f})">{text("label", 0, -7, words, "middle")}</g>'


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """A piece of text."""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{at}>{escape(words)}</text>'


def style() -> str:
    """The sheet, with the colours of the implementations."""
    light, dark = ("\n".join(f".{impl} {{ color: {pair[i]}; }}" for impl, pair in COLORS.items()) for i in (0, 1))
    return STYLE.replace("LIGHT", light).replace("DARK", dark)


def source() -> Path:
    """The file to draw: the GPU's where it exists."""
    gpu = DATA / f"{GPU_ROWS}.csv"
    return gpu if gpu.exists() else DATA / f"{CPU_ROWS}.csv"


def chosen(rows: Sequence[Timing]) -> Timings:
    """What is drawn of a file's rows."""
    last = rows[-1].group
    return Timings(next(g for g in groups(rows) if (g.device, g.dtype) == (last.device, last.dtype)), rows)


def main() -> None:
    """Read the rows and write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=source())
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    try:
        drawing = draw(chosen(read_rows(options.data)))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    options.out.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
