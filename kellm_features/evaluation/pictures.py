"""The pictures of an evaluation: forest plots, bars and small multiples of the rows, and SVG files of two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kellm_features.errors import DataError, MissingExtraError
from kellm_features.evaluation.about import History
from kellm_features.evaluation.grid import number
from kellm_features.evaluation.results import ALL, COLD, ResultRow, Suite
from kellm_features.evaluation.tables import (
    HELPS,
    HURTS,
    METRICS,
    REFERENCE,
    UNDECIDED,
    Results,
    delta_of,
    value_of,
    verdict,
)
from kellm_features.report.charts import LineChart, line_chart
from kellm_features.report.forest import ForestChart, Measure, Panel, Tone, axis_of, forest_chart
from kellm_features.store.layout import write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
REPORT_TEMPLATES = Path(__file__).parent.parent / "report" / "templates"
LADDER, COLD_PICTURE = "ladder.svg", "cold.svg"
_TONES: dict[str, Tone] = {HELPS: "good", HURTS: "bad", UNDECIDED: "unsure"}
_SMALL, _WIDE = 330, 760
_BEYOND = 1.6
"""Times the furthest point that an interval may widen the axis of the slices."""
_INTERVAL = "Lines: 95 % intervals."
_KEY = f"{_INTERVAL} Blue: {{better}}; orange: {{worse}}; grey: no difference shown."


@dataclass(frozen=True)
class Multiple:
    """Small charts of one backbone that share their axis."""

    backbone: str
    charts: tuple[ForestChart, ...]


@dataclass(frozen=True)
class Curves:
    """Learning curves of one backbone: a chart per arm, a line per training, one axis for all."""

    place: str
    charts: tuple[LineChart, ...]


def ladder_chart(rows: Iterable[ResultRow], *, suite: Suite = "ctr", split: str = "B") -> ForestChart | None:
    """Per backbone, each arm's AUC and its paired difference to the reference; None where nothing was measured."""
    results = Results(rows)
    groups, auc, gain = [], [], []
    for backbone in results.names("backbone", suite=suite, split=split):
        arms = results.names("arm", suite=suite, split=split, backbone=backbone, metric="auc", slice=ALL)
        groups.append((backbone or "no click model", [results.label(arm, suite) for arm in arms]))
        for arm in arms:
            row = results.get(suite, split, backbone, arm, "auc", ALL, REFERENCE)
            auc.append(_value(row, "reference" if arm == REFERENCE else "plain"))
            gain.append(_difference(row))
    against = results.label(REFERENCE, suite)
    panels = [Panel("AUC", auc), Panel(f"ΔAUC against {against}", gain, zero=0.0)]
    title = "AUC of each arm, and its difference to the reference"
    note = _KEY.format(better="above 0", worse="below") + " ◂ ▸: beyond the axis."
    return forest_chart(title, groups, panels, note=note, width=_WIDE)


def retrieval_chart(rows: Iterable[ResultRow]) -> ForestChart | None:
    """Recall of each scorer on cold items, raw and normalised, best first; baselines are among them."""
    results = Results(rows)
    metrics = [m for m in ("recall@20", "recall@20 normalized") if results.where(suite="retrieval", metric=m)]
    if not metrics:
        return None
    found = {
        (row.arm, row.metric): row
        for row in reversed(results.where(suite="retrieval"))
        if row.slice in (COLD, ALL) and row.value is not None
    }

    def height(arm: str) -> float:
        row = found.get((arm, metrics[0]))
        return -(row.value or 0.0) if row else 0.0

    arms = sorted(results.names("arm", suite="retrieval"), key=height)
    panels = []
    for metric in metrics:
        measures = []
        for arm in arms:
            row = found.get((arm, metric))
            measures.append(_value(row, _TONES.get(verdict(row), "unsure") if row else "plain"))
        panels.append(Panel(METRICS[metric], measures, bars=True))
    groups = [("", [results.label(arm, "retrieval") for arm in arms])]
    against = [name for name in results.names("reference", suite="retrieval") if name]
    beaten = results.label(against[0], "retrieval") if against else "the reference"
    note = _KEY.format(better=f"better than {beaten}", worse="worse") if against else _INTERVAL
    return forest_chart("Neighbours of cold items that are found", groups, panels, note=note, width=_WIDE)


def slice_charts(rows: Iterable[ResultRow], *, suite: Suite = "ctr", split: str = "B") -> list[Multiple]:
    """Per backbone and arm, the difference to the reference on each slice; one axis for all charts."""
    results = Results(rows)
    scope = {"suite": suite, "split": split, "metric": "auc"}
    names = results.names("slice", **scope)
    measures = {
        (backbone, arm): [
            _difference(results.get(suite, split, backbone, arm, "auc", slice_, REFERENCE)) for slice_ in names
        ]
        for backbone in results.names("backbone", **scope)
        for arm in results.names("arm", **scope, backbone=backbone)
    }
    axis = _slice_axis(list(measures.values()))
    multiples = []
    for backbone in dict.fromkeys(key[0] for key in measures):
        charts = (
            forest_chart(
                results.label(arm, suite), [("", names)], [Panel("", line, zero=0.0, domain=axis)], width=_SMALL
            )
            for (of, arm), line in measures.items()
            if of == backbone
        )
        drawn = tuple(chart for chart in charts if chart)
        if drawn:
            multiples.append(Multiple(backbone or "no click model", drawn))
    return multiples


def learning_curves(histories: Sequence[History]) -> list[Curves]:
    """Validation AUC by epoch, per suite, split and backbone, then per arm."""
    values = [epoch.valid_auc for one in histories for epoch in one.epochs if epoch.valid_auc is not None]
    if not values:
        return []
    shared = (min(values), max(values))
    places: dict[tuple[str, str, str], dict[str, list[History]]] = {}
    for one in histories:
        places.setdefault((one.suite, one.split, one.backbone), {}).setdefault(one.label, []).append(one)
    told = []
    for (suite, split, backbone), arms in places.items():
        charts = (
            line_chart(
                label, {one.run: _points(one) for one in runs}, x_label="epoch", points=len(runs) == 1, y_range=shared
            )
            for label, runs in arms.items()
        )
        drawn = tuple(chart for chart in charts if chart)
        if drawn:
            told.append(Curves(f"{backbone}, suite {suite}, split {split}", drawn))
    return told


def write_pictures(rows: Iterable[ResultRow], folder: Path) -> list[Path]:
    """Write `ladder.svg` and `cold.svg`, each with its own background, light or dark as the reader's screen is.

    Returns:
        The files written: a picture without a row is left out.

    Raises:
        DataError: the rows hold neither.
        MissingExtraError: Jinja2 is not installed.
    """
    rows = list(rows)
    charts = {LADDER: ladder_chart(rows), COLD_PICTURE: retrieval_chart(rows)}
    drawn = {name: chart for name, chart in charts.items() if chart}
    if not drawn:
        raise DataError(
            f"No picture can be drawn of {len(rows):,} rows: the ladder needs the suite ctr, cold.svg the suite "
            "retrieval; run  kellm evaluate --suite all --out FOLDER"
        )
    template = environment().get_template("picture.svg.j2")
    style = (TEMPLATES / "palette.css").read_text(encoding="utf-8") + (TEMPLATES / "charts.css").read_text("utf-8")
    for name, chart in drawn.items():
        write_atomic(folder / name, template.render(chart=chart, style=style))
    return [folder / name for name in drawn]


def environment() -> Environment:
    """Jinja's, of this package's templates; what comes from outside is escaped.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", "jinja2", "the page of an evaluation") from error
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # labels come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _slice_axis(lines: Sequence[Sequence[Measure | None]]) -> tuple[float, float]:
    """One axis for all arms whose first slice, which is all examples, is not far off.

    All their points are on it; the interval of a slice of few examples may run beyond, lest it flatten the others.
    """
    low, high = axis_of([line[0] for line in lines if line], 0.0)
    near = [line for line in lines if line and line[0] and low <= line[0].value <= high]
    present = [measure for line in near or lines for measure in line if measure]
    reach = _BEYOND * max((abs(measure.value) for measure in present), default=1.0)
    lows = [measure.value if measure.low is None else measure.low for measure in present]
    highs = [measure.value if measure.high is None else measure.high for measure in present]
    return max(min(lows, default=0.0), -reach), min(max(highs, default=0.0), reach)


def _points(one: History) -> tuple[list[float], list[float]]:
    told = [(float(epoch.epoch), epoch.valid_auc) for epoch in one.epochs if epoch.valid_auc is not None]
    return [x for x, _ in told], [y for _, y in told]


def _value(row: ResultRow | None, tone: Tone) -> Measure | None:
    told = value_of(row)
    return Measure(told.value, told.low, told.high, tone, number(told.value, "metric")) if told else None


def _difference(row: ResultRow | None) -> Measure | None:
    told = delta_of(row, REFERENCE)
    tone = _TONES.get(verdict(row), "unsure")
    return Measure(told.value, told.low, told.high, tone, number(told.value, "delta")) if told else None
