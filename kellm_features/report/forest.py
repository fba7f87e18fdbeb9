"""Geometry of forest plots: a point and its interval per row, in one or more panels side by side.

Coordinates are SVG user units, the origin at the top left. Text never enters a drawing here: the template escapes it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kellm_features.report.charts import Tick, nice_ticks

ROW, HEAD, AXIS, NOTE = 21.0, 30.0, 26.0, 20.0
"""Heights of a row, of the panels' heads above, of the axis and of the note below."""
APART = 7.0
"""Added above a heading, but for the first."""
TICK = 46.0
"""Least distance of gridlines: the room that `-0.005` takes."""
PAD = 0.05
"""Share of the axis that is left free beyond what it must cover."""
FIGURES = 66.0
"""Width of the column of numbers to the right of a panel."""
CHARACTER = 6.4
"""Mean advance of the 12-unit font, rounded up: a label is cut before it runs into its panel."""
LONGEST = 34
"""Characters of a label that are drawn; the whole of it stands in its tooltip."""
FAR = 2.0
"""Times the median extent beyond which a row no longer widens the axis and is drawn as an arrow at its edge."""

Tone = Literal["plain", "good", "bad", "unsure", "reference"]


@dataclass(frozen=True)
class Measure:
    """A figure to draw."""

    value: float
    low: float | None = None
    high: float | None = None
    tone: Tone = "plain"
    text: str = ""
    """Printed to the right of the panel."""


@dataclass(frozen=True)
class Panel:
    """One column of a forest plot: a measure per row, None where there is none."""

    head: str
    measures: Sequence[Measure | None]
    zero: float | None = None
    """Where a line says "no difference"; the axis always shows it."""
    bars: bool = False
    """Bars from 0 instead of points."""
    domain: tuple[float, float] | None = None
    """What the axis covers, where several charts share it."""


@dataclass(frozen=True)
class Mark:
    """One row of a panel: x of the point and of the interval's ends, inside the panel."""

    y: float
    at: float
    low: float | None
    high: float | None
    beyond: Literal["", "left", "right"]
    """The side on which the point lies off the axis; `at` is the edge then."""
    tone: Tone
    text: str
    full: str
    """Value and interval, for the tooltip."""


@dataclass(frozen=True)
class DrawnPanel:
    """A panel in place."""

    head: str
    left: float
    right: float
    ticks: tuple[Tick, ...]
    zero: float | None
    bars: bool
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Name:
    """The label of a row, or the heading of a group."""

    y: float
    text: str
    full: str
    is_heading: bool


@dataclass(frozen=True)
class ForestChart:
    """A forest plot in place; rows lie between `top` and `bottom`."""

    title: str
    names: tuple[Name, ...]
    panels: tuple[DrawnPanel, ...]
    width: float
    height: float
    top: float
    bottom: float
    note: str = ""
    """One line below the axes."""


def forest_chart(
    title: str,
    groups: Sequence[tuple[str, Sequence[str]]],
    panels: Sequence[Panel],
    *,
    note: str = "",
    width: float = 760,
) -> ForestChart | None:
    """Lay out one plot; None where no panel has a measure.

    Args:
        title: what the plot shows, for those who do not see it.
        groups: (heading, labels of its rows); an empty heading takes no room.
        panels: each with a measure, or None, for every row of all groups in turn.
        note: how the picture is read, in one line.
        width: of the whole drawing, in user units.

    Raises:
        ValueError: a panel has more or fewer measures than there are rows.
    """
    labels = [label for _, rows in groups for label in rows]
    for panel in panels:
        if len(panel.measures) != len(labels):
            raise ValueError(f"panel {panel.head!r} has {len(panel.measures)} measures for {len(labels)} rows")
    if not any(measure for panel in panels for measure in panel.measures):
        return None
    head = HEAD if any(panel.head for panel in panels) else 6.0
    names, heights = _names(groups, head)
    bottom = names[-1].y + ROW / 2
    gutter = 18 + CHARACTER * max(len(name.text) for name in names)
    share = (width - gutter - 8) / len(panels)
    drawn = []
    for number, panel in enumerate(panels):
        left = gutter + number * share + 8
        drawn.append(_draw(panel, heights, round(left, 1), round(left + share - 8 - FIGURES, 1)))
    height = bottom + AXIS + (NOTE if note else 0.0)
    return ForestChart(title, names, tuple(drawn), width, height, head, bottom, note)


def axis_of(measures: Sequence[Measure | None], zero: float | None = None) -> tuple[float, float]:
    """What an axis must cover: all intervals, but for rows so far from the rest that they would flatten it.

    Distance is from `zero`, or from the median value where there is none; a row counts as far when its interval
    reaches beyond `FAR` times the median reach.
    """
    present = [measure for measure in measures if measure is not None]
    if not present:
        return (0.0, 1.0)
    centre = zero if zero is not None else statistics.median(measure.value for measure in present)
    ends = [(_low(measure), _high(measure)) for measure in present]
    reach = [max(abs(low - centre), abs(high - centre)) for low, high in ends]
    limit = FAR * statistics.median(reach)
    near = [end for end, far in zip(ends, reach, strict=True) if far <= limit] or ends
    low, high = min(low for low, _ in near), max(high for _, high in near)
    return (low, high) if zero is None else (min(low, zero), max(high, zero))


def _names(groups: Sequence[tuple[str, Sequence[str]]], head: float) -> tuple[tuple[Name, ...], list[float]]:
    """Labels and headings from the top down, and the height of each row without the headings'."""
    names: list[Name] = []
    heights: list[float] = []
    y = head + ROW / 2
    for heading, rows in groups:
        if heading:
            y += APART if names else 0.0
            names.append(Name(y, _cut(heading), heading, True))
            y += ROW
        for label in rows:
            names.append(Name(y, _cut(label), label, False))
            heights.append(y)
            y += ROW
    return tuple(names), heights


def _draw(panel: Panel, heights: Sequence[float], left: float, right: float) -> DrawnPanel:
    zero = 0.0 if panel.bars else panel.zero
    if panel.domain is not None:
        low, high = panel.domain
    elif panel.bars:  # a bar that is cut tells a lie
        low, high = 0.0, max((_high(measure) for measure in panel.measures if measure), default=1.0)
    else:
        low, high = axis_of(panel.measures, zero)
    pad = (high - low or abs(high) or 1.0) * PAD
    first, last = low if panel.bars else low - pad, high + pad
    values = _ticks(first, last, right - left)
    digits = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9)) if len(values) > 1 else 4

    def place(value: float) -> float:
        share = (value - first) / (last - first)
        return round(left + min(max(share, 0.0), 1.0) * (right - left), 1)

    marks = []
    for y, measure in zip(heights, panel.measures, strict=True):
        if measure is None:
            continue
        beyond: Literal["", "left", "right"] = ""
        if measure.value < first or measure.value > last:
            beyond = "left" if measure.value < first else "right"
        has_interval = measure.low is not None and not beyond
        interval = f" [{measure.low:.4f}, {measure.high:.4f}]" if measure.low is not None else ""
        marks.append(
            Mark(
                y,
                place(measure.value),
                place(_low(measure)) if has_interval else None,
                place(_high(measure)) if has_interval else None,
                beyond,
                measure.tone,
                measure.text,
                f"{measure.value:.4f}{interval}",
            )
        )
    ticks = tuple(Tick(place(v), f"{round(v, digits) + 0.0:.{digits}f}") for v in values)
    return DrawnPanel(panel.head, left, right, ticks, None if zero is None else place(zero), panel.bars, tuple(marks))


def _ticks(low: float, high: float, room: float) -> list[float]:
    """Round values inside an axis, as many as stand `TICK` apart."""
    for count in (6, 5, 4, 3):
        values = [value for value in nice_ticks(low, high, count) if low <= value <= high]
        if len(values) < 2 or room * (values[1] - values[0]) / (high - low) >= TICK:
            break
    return values


def _low(measure: Measure) -> float:
    return measure.value if measure.low is None else min(measure.low, measure.value)


def _high(measure: Measure) -> float:
    return measure.value if measure.high is None else max(measure.high, measure.value)


def _cut(label: str) -> str:
    label = " ".join(label.split())
    return label if len(label) <= LONGEST else label[: LONGEST - 1].rstrip() + "…"
