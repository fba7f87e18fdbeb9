"""Draw docs/img/swing-growth.svg from benchmarks/data/swing_growth.csv: CPU seconds against millions of interactions.

python benchmarks/plot_swing.py

Takes the last row of each size among the rows of a mode that share side, preset and cap with the last of them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kellm_features.report.charts import nice_ticks

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 584, 72, 344
LIMIT = 1.3
"""Times linear: the most that growth may cost."""
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
.bg { fill: #ffffff; }
.title { font-size: 15px; font-weight: 600; fill: #1b1f24; }
.note, .tick { font-size: 11.5px; fill: #57606a; }
.label { font-size: 12px; fill: #57606a; }
.value { font-size: 12px; font-weight: 600; fill: #1f5f99; text-anchor: middle; }
.grid { stroke: #d8dee4; stroke-width: 1; }
.linear, .limit { fill: none; stroke: #6e7781; stroke-width: 1.4; }
.limit { stroke-dasharray: 5 4; }
.measured { fill: none; stroke: #2f74b5; stroke-width: 2.4; }
.point { fill: #2f74b5; stroke: #ffffff; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
.bg { fill: #0d1117; }
.title { fill: #e6edf3; }
.note, .tick, .label { fill: #9da7b3; }
.value { fill: #79b8ff; }
.grid { stroke: #2a313c; }
.linear, .limit { stroke: #8b949e; }
.measured { stroke: #58a6ff; }
.point { fill: #58a6ff; stroke: #0d1117; }
}
"""


@dataclass(frozen=True)
class Point:
    """One size of the growth benchmark."""

    millions: float
    cpu_s: float


def main() -> None:
    """Read the rows and write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "benchmarks" / "data" / "swing_growth.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "swing-growth.svg")
    parser.add_argument("--column", default="work_cpu_s", choices=("cpu_s", "work_cpu_s"))
    parser.add_argument("--mode", default="auto", help="auto: the graph whole on every host, at these sizes")
    options = parser.parse_args()
    with options.data.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["mode"] == options.mode]
    if not rows:
        raise SystemExit(f"{options.data.name} has no rows of mode {options.mode}; run bench_swing.py growth first")
    last = rows[-1]
    alike = [row for row in rows if all(row[k] == last[k] for k in ("side", "preset", "max_witnesses"))]
    sizes = {float(row["millions"]): float(row[options.column]) for row in alike}
    options.out.write_text(draw([Point(*size) for size in sorted(sizes.items())], last, options.column))
    print(f"{len(sizes)} sizes drawn to {options.out.name}")


def draw(points: Sequence[Point], row: dict[str, str], column: str) -> str:
    """The drawing, linear axes from zero.

    Args:
        points: ascending sizes; linear growth is told from the first one.
        row: a row of the benchmark, for what the sizes have in common.
        column: `cpu_s`, or `work_cpu_s` without start-up.
    """
    first, end = points[0], points[-1]
    x_ticks = nice_ticks(0, end.millions)
    rate = first.cpu_s / first.millions
    y_ticks = nice_ticks(0, max(LIMIT * rate * x_ticks[-1], *(point.cpu_s for point in points)))

    def x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * value / x_ticks[-1], 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * value / y_ticks[-1], 1)

    def ray(kind: str, slope: float, text: str) -> str:
        at = y(slope * x_ticks[-1])
        return (
            f'<line class="{kind}" x1="{x(0)}" y1="{y(0)}" x2="{x(x_ticks[-1])}" y2="{at}"/>'
            f'<text class="label" x="{RIGHT + 8}" y="{at + 4:.1f}">{text}</text>'
        )

    what = "start-up included" if column == "cpu_s" else "start-up left out"
    title = "CPU seconds of SWING against millions of interactions"
    cap = f"at most {int(row['max_witnesses']):,} witnesses a target" if row["max_witnesses"] else "exact"
    note = (
        f"{row['side']} side, {cap}, synthetic power law; all processes, {what}; {row['cores']} cores, {row['machine']}"
    )
    told = ", ".join(f"{point.cpu_s:.0f} s at {point.millions:g} million" for point in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(title)}: {told}.">',
        f"<style>{STYLE}</style>",
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        f'<text class="title" x="20" y="30">{escape(title)}</text>',
        f'<text class="note" x="20" y="49">{escape(note)}</text>',
    ]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y(tick)}" x2="{RIGHT}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,.3g}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="tick" x="{x(tick)}" y="{BOTTOM + 18}" text-anchor="middle">{tick:,.3g}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{BOTTOM + 40}" text-anchor="middle">million interactions</text>')
    parts.append(ray("linear", rate, "linear"))
    parts.append(ray("limit", LIMIT * rate, f"{LIMIT:g} × linear"))
    path = " ".join(f"{x(point.millions)},{y(point.cpu_s)}" for point in points)
    parts.append(f'<polyline class="measured" points="{path}"/>')
    for point in points:
        parts.append(f'<circle class="point" cx="{x(point.millions)}" cy="{y(point.cpu_s)}" r="5"/>')
        # Below the point, where no line runs as long as growth is not slower than the first size's share.
        parts.append(
            f'<text class="value" x="{x(point.millions)}" y="{y(point.cpu_s) + 20:.1f}">{point.cpu_s:.0f} s</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
