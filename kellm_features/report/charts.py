"""Geometry of the report's charts: plain numbers for the template to draw as SVG, no plotting library.

Coordinates are SVG user units, the origin at the top left. Text never enters a drawing here: the template escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHARACTER_WIDTH = 6.3
"""Mean advance of the map labels' bold 10.5-unit font; only collisions depend on it."""
LABEL_HEIGHT = 12.0


@dataclass(frozen=True)
class Bar:
    """One row of a bar list."""

    label: str
    count: int
    share: float
    """Of the whole, 0..1."""
    width: float
    """Per cent of the longest bar."""
    note: str = ""


@dataclass(frozen=True)
class Tick:
    """A gridline: where it stands and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series: its name, its path, and its points where they are few enough to be shown."""

    name: str
    path: str
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class LineChart:
    """A chart with linear axes; the plot lies between (left, top) and (right, bottom)."""

    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: Tick | None = None
    """A vertical line with a word on it."""
    width: int = 440
    height: int = 230
    left: int = 52
    right: int = 428
    top: int = 14
    bottom: int = 190


@dataclass(frozen=True)
class Label:
    """Text beside a point of the map, and the point."""

    point: tuple[float, float]
    x: float
    y: float
    anchor: str
    text: str


def bars(rows: Sequence[tuple[str, int, str]], total: int) -> list[Bar]:
    """Bars of (label, count, note) rows, longest first; ties by label."""
    ordered = sorted(rows, key=lambda row: (-row[1], row[0]))
    longest = max((count for _, count, _ in ordered), default=0) or 1
    return [Bar(label, count, count / (total or 1), 100 * count / longest, note) for label, count, note in ordered]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if high <= low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def line_chart(
    title: str,
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    points: bool = False,
    mark: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
) -> LineChart | None:
    """Lay out one chart; values that are not finite are left out, and None is returned where none is left.

    Args:
        title: what the y axis shows.
        series: name -> (x, y).
        x_label: what the x axis shows.
        points: show each point, and its value on hover.
        mark: (x, word) of a vertical line.
        y_range: what the y axis covers, where several charts share it; by default what the values need.
    """
    finite = {
        name: [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        for name, (xs, ys) in series.items()
    }
    everything = [point for line in finite.values() for point in line]
    if not everything:
        return None
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    y_values = nice_ticks(*(y_range or (min(ys), max(ys))))
    x_values = [v for v in nice_ticks(min(xs), max(xs), 6) if min(xs) <= v <= max(xs) and v == round(v)]
    frame = LineChart(title, x_label, (), (), ())
    x_span = (max(xs) - min(xs)) or 1.0

    def place_x(x: float) -> float:
        share = (x - min(xs)) / x_span if len(set(xs)) > 1 else 0.5
        return round(frame.left + share * (frame.right - frame.left), 1)

    def place_y(y: float) -> float:
        share = (y - y_values[0]) / (y_values[-1] - y_values[0])
        return round(frame.bottom - share * (frame.bottom - frame.top), 1)

    digits = max(0, -math.floor(math.log10(y_values[1] - y_values[0]) + 1e-9))
    return LineChart(
        title,
        x_label,
        tuple(
            Line(
                name,
                " ".join(f"{place_x(x)},{place_y(y)}" for x, y in line),
                tuple((place_x(x), place_y(y), f"{name}, {x:g}: {y:.4f}") for x, y in line) if points else (),
            )
            for name, line in finite.items()
        ),
        tuple(Tick(place_x(v), f"{v:,.0f}") for v in x_values),
        tuple(Tick(place_y(v), f"{v:,.{digits}f}") for v in y_values),
        Tick(place_x(mark[0]), mark[1]) if mark else None,
    )


def fit_square(layout: np.ndarray, size: float, pad: float) -> np.ndarray:
    """(N, 2) points moved and scaled, both axes alike, into the square [pad, size - pad]²."""
    low, high = layout.min(axis=0), layout.max(axis=0)
    scale = (size - 2 * pad) / max(float((high - low).max()), 1e-12)
    return np.asarray(np.round((layout - (low + high) / 2) * scale + size / 2, 1))


def place_labels(points: np.ndarray, names: Sequence[str], size: float, offset: float = 5.0) -> list[Label]:
    """Labels beside points, in order of importance; one that would overlap an earlier one or leave the square is
    tried on the other sides and else left out.

    Args:
        points: (n, 2) positions.
        names: n texts, most important first.
        size: side of the square.
        offset: gap between point and text.
    """
    taken: list[tuple[float, float, float, float]] = []
    placed = []
    for (x, y), name in zip(points.tolist(), names, strict=True):
        width = CHARACTER_WIDTH * len(name)
        for dx, dy, anchor in ((offset, 3.5, "start"), (-offset, 3.5, "end"), (0, -7, "middle"), (0, 14, "middle")):
            left = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, y + dy - LABEL_HEIGHT + 2, left + width, y + dy + 2)
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= size and box[3] <= size
            clear = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if inside and clear:
                taken.append(box)
                placed.append(Label((x, y), round(x + dx, 1), round(y + dy, 1), anchor, name))
                break
    return placed
