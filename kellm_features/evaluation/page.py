"""The page of an evaluation: one self-contained HTML file of what was run and what came out, whole or partial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kellm_features import __version__
from kellm_features.evaluation import tables
from kellm_features.evaluation.about import EvaluationFacts, History, missing
from kellm_features.evaluation.grid import Grid
from kellm_features.evaluation.pictures import (
    REPORT_TEMPLATES,
    TEMPLATES,
    environment,
    ladder_chart,
    learning_curves,
    retrieval_chart,
    slice_charts,
)
from kellm_features.evaluation.results import ResultRow, Suite
from kellm_features.store.layout import write_atomic

PAGE = "evaluation.html"
_HOURS, _MINUTES = 3600, 60


@dataclass(frozen=True)
class Figure:
    """A headline figure: what, how much, and a few words on it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Part:
    """A section of the page: pictures above, tables below, or one line on why there is nothing."""

    key: str
    title: str
    lead: str = ""
    picture: Any = None
    multiples: Sequence[Any] = ()
    curves: Sequence[Any] = ()
    grids: Sequence[Grid] = ()
    folded: Sequence[Grid] = ()
    """Long tables, closed until they are asked for."""
    missing: str = ""


def write_page(
    rows: Iterable[ResultRow], path: Path, facts: EvaluationFacts, histories: Sequence[History] = ()
) -> Path:
    """Write the page, whole or not at all. It needs no network, and its content security policy allows none.

    Args:
        rows: what was measured so far; what a section lacks, it says.
        path: the HTML file; `evaluation.html` by custom.
        facts: what was run, and what was planned: the page lists what of it is missing.
        histories: epochs of the trainings, for the learning curves.

    Raises:
        DataError: two rows tell the same.
        MissingExtraError: Jinja2 is not installed.
    """
    rows = list(rows)
    style = "".join(
        file.read_text(encoding="utf-8")
        for file in (REPORT_TEMPLATES / "report.css", TEMPLATES / "charts.css", TEMPLATES / "evaluation.css")
    )
    page = (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            facts=facts,
            version=facts.version or __version__,
            figures=_figures(rows, facts),
            missing=missing(rows, facts),
            capped=tables.capped(rows),
            about=_about(facts),
            parts=[*_parts(rows), _curves(histories)],
            style=style,
        )
    )
    write_atomic(path, page)
    return path


def duration(seconds: float) -> str:
    """Seconds as people say them: `41 s`, `12 min`, `3 h 20 min`."""
    if seconds < 2 * _MINUTES:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTES)
    if minutes < 2 * _HOURS // _MINUTES:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _about(facts: EvaluationFacts) -> list[tuple[str, str]]:
    told = (("budget of each arm", facts.budget), ("machine", facts.machine))
    return [(name, value) for name, value in told if value]


def _figures(rows: Sequence[ResultRow], facts: EvaluationFacts) -> list[Figure]:
    figures = []
    by_split: dict[str, int] = {}
    for row in rows:
        by_split[row.split] = max(by_split.get(row.split, 0), row.folds or 0)
    if any(by_split.values()):
        told = ", ".join(f"{split} {folds}" for split, folds in by_split.items())
        figures.append(Figure("Folds", f"{sum(by_split.values()):,}", f"by split: {told}; {_seeds(rows)}"))
    if facts.trainings is not None:
        figures.append(Figure("Models trained", f"{facts.trainings:,}", "all arms, folds and seeds of the last call"))
    examples = max((row.examples or 0 for row in rows if row.suite == "ctr"), default=0)
    if examples:
        clusters = max(row.clusters or 0 for row in rows if row.suite == "ctr")
        figures.append(Figure("Test examples", f"{examples:,}", f"of {clusters:,} users" if clusters else ""))
    if facts.seconds is not None:
        figures.append(Figure("Time", duration(facts.seconds), facts.machine))
    return figures


def _seeds(rows: Sequence[ResultRow]) -> str:
    """Of clicks: retrieval is told of one seed, whatever they have."""
    seeds = sorted({row.seeds for row in rows if row.seeds and row.metric == "auc"}) or [1]
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{span} seed{'s' * (seeds[-1] > 1)} each"


def _parts(rows: Sequence[ResultRow]) -> list[Part]:
    have = {(row.suite, row.split) for row in rows}
    suites = {suite for suite, _ in have}
    parts = []
    ladders: tuple[tuple[Suite, str, str], ...] = (("ctr", "B", "Ladder"), ("time", "C", "Later times"))
    for suite, split, title in ladders:
        key = "ladder" if suite == "ctr" else suite
        if (suite, split) in have:
            parts.append(_ladder(rows, key, title, suite, split))
        elif suite == "ctr":
            parts.append(Part(key, title, missing=_not_run("ctr")))
    parts.append(
        Part(
            "slices",
            "Slices",
            "Where the gain lies: by what training saw of the item, and by the length of the user's history. All "
            "charts share one axis.",
            multiples=slice_charts(rows),
            folded=[tables.slices(rows)],
        )
        if ("ctr", "B") in have
        else Part("slices", "Slices", missing=_not_run("ctr"))
    )
    parts.append(
        Part(
            "cold",
            "Cold items",
            "Items that training never saw: the share of their true SWING neighbours found among 20, and AUC on them.",
            picture=retrieval_chart(rows),
            grids=[tables.text_variants(rows)] if "retrieval" in suites else [],
            folded=[tables.slices(rows, suite="cold", split="cold")] if "cold" in suites else [],
        )
        if suites & {"retrieval", "cold"}
        else Part("cold", "Cold items", missing=_not_run("cold"))
    )
    parts.append(
        Part(
            "contrastive",
            "Forms of the contrastive term",
            "Whether the term pays, and in which form, for clicks and for retrieval.",
            grids=[tables.contrastive_forms(rows)],
        )
        if "contrastive" in suites
        else Part("contrastive", "Forms of the contrastive term", missing=_not_run("all"))
    )
    parts.append(
        Part("papers", "Beside the papers", grids=[tables.replication(rows)])
        if suites & {"replication", "ctr"}
        else Part("papers", "Beside the papers", missing=_not_run("ctr"))
    )
    return parts


def _ladder(rows: Sequence[ResultRow], key: str, title: str, suite: Suite, split: str) -> Part:
    return Part(
        key,
        title,
        "From the simplest predictor up. Intervals of AUC are wide because users differ; differences are paired, over "
        "the same users, and much narrower: they, and not the intervals of AUC, say which arm is better.",
        picture=ladder_chart(rows, suite=suite, split=split),
        grids=[tables.ladder(rows, suite=suite, split=split)],
    )


def _curves(histories: Sequence[History]) -> Part:
    curves = learning_curves(histories)
    if not curves:
        return Part("curves", "Learning curves", missing="No history of a training is stored.")
    return Part(
        "curves",
        "Learning curves",
        "Validation AUC by epoch, a line for each training. The epoch with the best is kept.",
        curves=curves,
    )


def _not_run(suite: str) -> str:
    return f"Not measured yet: run  kellm evaluate --suite {suite} --out FOLDER"
