"""The tables of an evaluation: pure functions from rows to grids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kellm_features.evaluation import papers
from kellm_features.evaluation.grid import NOTHING, Cell, Column, Estimate, Grid, csv_text, markdown
from kellm_features.evaluation.results import ALL, COLD, LOWER_IS_BETTER, ResultRow, Suite, ordered
from kellm_features.store.layout import write_atomic

REFERENCE = "id-30"
"""The arm that a gain is a gain over: ids with as much history as the language model reads."""
HELPS, HURTS, UNDECIDED, UNMEASURED = "helps", "hurts", "no difference shown", "not measured"
RETRIEVAL = {
    "recall@20": "recall@20",
    "ndcg@20": "NDCG@20",
    "recall@20 normalized": "norm. recall",
    "ndcg@20 normalized": "norm. NDCG",
}
"""Metrics of retrieval and their heads; normalised: the true neighbours' scores over (10 + likes of the neighbour)."""
METRICS = {"auc": "AUC", "log_loss": "LogLoss", "gauc": "GAUC", "ece": "ECE"} | RETRIEVAL
SPLITS = {"A": "split A (KAR's)", "B": "split B (users)", "C": "split C (time)", "cold": "cold items"}
LEVEL = 0.05
_ANY = (COLD, ALL)
"""Slices that retrieval may be told under: its items are all cold."""
_INTERVALS = "In brackets: 95 % intervals from a bootstrap over {clusters}. Differences are paired."


class Results:
    """Rows by what they tell of; names keep the order in which the rows bring them."""

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        self.rows = ordered(rows)
        self._labels: dict[tuple[str, str], str] = {}
        for row in self.rows:
            self._labels.setdefault((row.suite, row.arm), row.label)
            self._labels.setdefault(("", row.arm), row.label)
        self._found: dict[tuple[str, ...], dict[str, ResultRow]] = {}
        for row in self.rows:
            self._found.setdefault(row.key[:-1], {})[row.reference] = row

    def label(self, arm: str, suite: str = "") -> str:
        """What people read for an arm: the suite's own name for it, else any other's, else its key."""
        return self._labels.get((suite, arm)) or self._labels.get(("", arm), arm)

    def where(self, **wanted: str) -> list[ResultRow]:
        """Rows whose fields have these values."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def names(self, field: str, **wanted: str) -> list[str]:
        """Distinct values of a field over these rows."""
        return list(dict.fromkeys(getattr(row, field) for row in self.where(**wanted)))

    def get(
        self, suite: str, split: str, backbone: str, arm: str, metric: str, slice_: str = ALL, reference: str = ""
    ) -> ResultRow | None:
        """One row: the one against `reference` where there is one, else whichever tells the value."""
        rows = self._found.get((suite, split, backbone, arm, metric, slice_), {})
        return rows.get(reference) or next(iter(rows.values()), None)


def value_of(row: ResultRow | None) -> Estimate | None:
    """The row's metric with its interval."""
    return None if row is None or row.value is None else Estimate(row.value, row.low, row.high)


def delta_of(row: ResultRow | None, reference: str | None = None) -> Estimate | None:
    """The row's difference with its interval; None where it is against another arm than `reference`."""
    if row is None or row.delta is None or reference not in (None, row.reference):
        return None
    return Estimate(row.delta, row.delta_low, row.delta_high, is_signed=True)


def p_of(row: ResultRow | None) -> float | None:
    """Holm's p where it was computed; the raw one is in results.csv alone."""
    return row.p_holm if row else None


def verdict(row: ResultRow | None) -> str:
    """What a difference shows, by the metric's direction: nothing where its interval touches 0, or Holm's p is 0.05."""
    if row is None or row.delta_low is None or row.delta_high is None:
        return UNMEASURED
    if row.delta_low <= 0 <= row.delta_high or (row.p_holm is not None and row.p_holm >= LEVEL):
        return UNDECIDED
    more = row.delta_low > 0
    return HELPS if more != (row.metric in LOWER_IS_BETTER) else HURTS


def capped(rows: Iterable[ResultRow]) -> str:
    """A warning, where the best epoch of a training was the last that it may have; else nothing."""
    arms = {(row.suite, row.split, row.backbone, row.arm): row for row in rows if row.capped is not None}
    cut = sum(row.capped or 0 for row in arms.values())
    if not cut:
        return ""
    trainings = sum((row.folds or 0) * (row.seeds or 0) for row in arms.values())
    return (
        f"{cut} of {trainings} trainings were at their best in the last epoch of their budget, and might have come "
        "further: raise evaluate.epochs to tell (column capped of results.csv)."
    )


def ladder(rows: Iterable[ResultRow], *, suite: Suite = "ctr", split: str = "B", reference: str = REFERENCE) -> Grid:
    """Arms per backbone, from the simplest up: four metrics, the gain over `reference`, and AUC on cold items.

    Cold AUC is of the suite `cold`, whose items have no train interaction by design, where it was run; else of the
    slice `cold` of the same split.
    """
    results = Results(rows)
    cold: tuple[str, str] = (
        ("cold", "cold") if suite == "ctr" and results.where(suite="cold", metric="auc", slice=COLD) else (suite, split)
    )
    against = results.label(reference, suite)
    columns = (
        Column("backbone", "backbone", folds=True),
        Column("label", "arm"),
        Column("auc", "AUC", "metric", "value"),
        Column("log_loss", "LogLoss", "metric", "value"),
        Column("gauc", "GAUC", "metric", "value"),
        Column("ece", "ECE", "metric", "value"),
        Column("delta_auc", "ΔAUC", "delta"),
        Column("p_holm", "p", "p"),
        Column("cold_auc", "cold AUC", "metric", "value"),
        Column("delta_cold_auc", "cold ΔAUC", "delta", "none"),
    )
    lines: list[tuple[Cell, ...]] = []
    for backbone in results.names("backbone", suite=suite, split=split):
        for arm in results.names("arm", suite=suite, split=split, backbone=backbone):
            auc, *others = (
                results.get(suite, split, backbone, arm, metric, reference=reference)
                for metric in ("auc", "log_loss", "gauc", "ece")
            )
            on_cold = results.get(*cold, backbone, arm, "auc", COLD, reference)
            gain = delta_of(auc, reference)
            lines.append(
                (
                    backbone or NOTHING,
                    results.label(arm, suite),
                    value_of(auc),
                    *map(value_of, others),
                    gain,
                    p_of(auc) if gain else None,
                    value_of(on_cold),
                    delta_of(on_cold, reference),
                )
            )
    source = "items held out of training" if cold[0] == "cold" else "the slice without train interactions"
    note = (
        f"ΔAUC is against {against}; p is Holm's, over the arms of a backbone. Cold AUC: {source}. "
        f"{_rests_on(results.where(suite=suite, split=split))}"
    )
    key = "ladder" if (suite, split) == ("ctr", "B") else f"ladder_{suite}_{split}".lower()
    return Grid(key, f"Ladder, {SPLITS.get(split, f'split {split}')}", columns, tuple(lines), note)


def slices(rows: Iterable[ResultRow], *, suite: Suite = "ctr", split: str = "B", reference: str = REFERENCE) -> Grid:
    """AUC of each arm on each part of the test examples, and the gain over `reference` there."""
    results = Results(rows)
    columns = (
        Column("backbone", "backbone", folds=True),
        Column("slice", "slice", folds=True),
        Column("examples", "examples", "count", folds=True),
        Column("label", "arm"),
        Column("auc", "AUC", "metric"),
        Column("delta_auc", "ΔAUC", "delta"),
        Column("p_holm", "p", "p"),
    )
    scope = {"suite": suite, "split": split, "metric": "auc"}
    lines: list[tuple[Cell, ...]] = []
    for backbone in results.names("backbone", **scope):
        for slice_ in results.names("slice", **scope, backbone=backbone):
            for arm in results.names("arm", **scope, backbone=backbone, slice=slice_):
                row = results.get(suite, split, backbone, arm, "auc", slice_, reference)
                gain = delta_of(row, reference)
                size = row.examples if row else None
                lines.append(
                    (
                        backbone or NOTHING,
                        slice_,
                        size,
                        results.label(arm, suite),
                        value_of(row),
                        gain,
                        p_of(row) if gain else None,
                    )
                )
    against = results.label(reference, suite)
    return Grid(
        "slices" if (suite, split) == ("ctr", "B") else f"slices_{suite}_{split}".lower(),
        f"Slices, {SPLITS.get(split, f'split {split}')}",
        columns,
        tuple(lines),
        f"ΔAUC is against {against}; p is Holm's, over the arms of a backbone on a slice. "
        f"{_rests_on(results.where(**scope))}",
    )


def text_variants(rows: Iterable[ResultRow], *, arms: Sequence[str] | None = None) -> Grid:
    """What each text is worth on cold items: AUC per backbone, and neighbours found, raw and normalised.

    Args:
        rows: of the suites `cold` and `retrieval`, joined by arm; others are passed over.
        arms: keys to show, in order; by default all of the suite `retrieval`.
    """
    results = Results(rows)
    backbones = [name for name in results.names("backbone", suite="cold", metric="auc", slice=COLD) if name]
    chosen = list(arms) if arms is not None else results.names("arm", suite="retrieval")
    lines: list[tuple[Cell, ...]] = [
        (
            results.label(arm, "retrieval"),
            *(value_of(results.get("cold", "cold", backbone, arm, "auc", COLD)) for backbone in backbones),
            *(value_of(_pick(results, "retrieval", "", arm, metric, _ANY)) for metric in RETRIEVAL),
        )
        for arm in chosen
    ]
    columns = (
        Column("label", "text"),
        *(Column(f"cold_auc_{name}", f"AUC {name}", "metric", "value") for name in backbones),
        *(Column(metric.replace(" ", "_"), head, "metric", "value") for metric, head in RETRIEVAL.items()),
    )
    note = (
        "AUC: clicks on cold items, of a model with this text. Recall and NDCG: the adapted text by ridge transfer, "
        "where each truth has the weight of popularity that validation items prefer. Normalised: true neighbours by "
        "score over (10 + likes of the neighbour), so that hubs have no advantage. SWING by the preset yang. "
        f"{_rests_on(results.where(suite='retrieval'))}"
    )
    return Grid("text_variants", "Text variants on cold items", columns, tuple(lines), note)


def contrastive_forms(rows: Iterable[ResultRow]) -> Grid:
    """Whether each form of the contrastive term pays, in clicks, in clicks on cold items and in retrieval."""
    results = Results(rows)
    questions = (
        ("ctr", "clicks", "ΔAUC", "auc", (ALL,)),
        ("cold_ctr", "cold clicks", "cold ΔAUC", "auc", (COLD,)),
        ("recall", "retrieval", "Δrecall@20", "recall@20", _ANY),
        ("recall_normalized", "normalised", "Δrecall@20, normalised", "recall@20 normalized", _ANY),
    )
    pairs = dict.fromkeys(
        (row.backbone, row.arm, row.reference) for row in results.where(suite="contrastive") if row.delta is not None
    )
    lines: list[tuple[Cell, ...]] = []
    for backbone, arm, reference in pairs:
        names = (results.label(key, "contrastive") for key in (arm, reference))
        cells: list[Cell] = [backbone or NOTHING, *names]
        for _, _, _, metric, wanted in questions:
            row = _pick(results, "contrastive", backbone, arm, metric, wanted, reference)
            gain = delta_of(row, reference)
            cells += [gain, verdict(row) if gain else UNMEASURED]
        lines.append(tuple(cells))
    columns = [
        Column("backbone", "backbone", folds=True),
        Column("label", "form"),
        Column("reference", "against", brief="none"),
    ]
    for key, head, delta, _, _ in questions:
        columns += [Column(f"delta_{key}", delta, "delta", "none"), Column(f"verdict_{key}", head, "verdict")]
    note = (
        "A form helps or hurts where the 95 % interval of its paired difference leaves 0 out and Holm's p, over the "
        f"forms against the same, is below {LEVEL}; else {UNDECIDED}, which is not the same as none. "
        f"{_rests_on(results.where(suite='contrastive'))}"
    )
    return Grid("contrastive_forms", "Forms of the contrastive term", tuple(columns), tuple(lines), note)


def claims(rows: Iterable[ResultRow], *, reference: str = REFERENCE) -> Grid:
    """Differences to other arms than `reference`: what a step adds to the one before it, and to its null."""
    results = Results(rows)
    lines: list[tuple[Cell, ...]] = []
    shown: list[ResultRow] = []
    for suite in ("ctr", "cold", "time"):
        for row in results.where(suite=suite, metric="auc"):
            if row.reference in ("", reference) or row.delta is None or row.slice not in (ALL, COLD):
                continue
            if row.slice == COLD and suite != "cold":
                continue
            names = (results.label(key, suite) for key in (row.arm, row.reference))
            lines.append((suite, row.backbone or NOTHING, row.slice, *names, delta_of(row), p_of(row), verdict(row)))
            shown.append(row)
    columns = (
        Column("suite", "suite", folds=True),
        Column("backbone", "backbone", folds=True),
        Column("slice", "slice", folds=True),
        Column("label", "arm"),
        Column("reference", "against"),
        Column("delta_auc", "ΔAUC", "delta"),
        Column("p_holm", "p", "p"),
        Column("verdict", "verdict", "verdict"),
    )
    note = f"p is Holm's, over the claims of one suite, backbone and slice. {_rests_on(shown)}"
    return Grid("claims", "What each step adds", columns, tuple(lines), note)


def replication(rows: Iterable[ResultRow], *, ours: Mapping[str, str] = papers.OURS) -> Grid:
    """The papers' figures beside ours on MovieLens-1M: each arm, then the differences that the papers claim.

    Args:
        rows: of the suites `replication` (split A) and `ctr` (split B); others are passed over.
        ours: a paper's arm -> the key of ours that does the same.
    """
    results = Results(rows)
    places = [("replication", "A"), ("ctr", "B")]
    lines: list[tuple[Cell, ...]] = []
    for paper in papers.PAPERS:
        figures = [figure for figure in papers.FIGURES if figure.paper == paper]
        for backbone in dict.fromkeys(figure.backbone for figure in figures):
            for figure in figures:
                if figure.backbone == backbone:
                    key = ours.get(figure.arm, "")
                    found = [value_of(results.get(*place, backbone, key, figure.metric)) for place in places]
                    lines.append((paper, backbone, figure.arm, METRICS[figure.metric], Estimate(figure.value), *found))
            for of, arm, base in papers.DIFFERENCES:
                new, old = (papers.printed(paper, backbone, name, "auc") for name in (arm, base))
                if of != paper or new is None or old is None:
                    continue
                key, against = ours.get(arm, ""), ours.get(base, "")
                gains = [delta_of(results.get(*place, backbone, key, "auc", ALL, against), against) for place in places]
                printed = Estimate(round(new - old, 4), is_signed=True)
                lines.append((paper, backbone, f"{arm} over {base}", "ΔAUC", printed, *gains))
    columns = (
        Column("paper", "paper", folds=True),
        Column("backbone", "backbone", folds=True),
        Column("label", "arm"),
        Column("metric", "metric"),
        Column("printed", "printed", "metric"),
        *(Column(f"ours_{split}".lower(), f"ours, split {split}", "metric") for _, split in places),
    )
    sources = "; ".join(f"{p.name}: {p.citation}, {p.protocol} ({p.read})" for p in papers.PAPERS.values())
    named = ", ".join(f"{arm} = {results.label(key)}" for arm, key in ours.items())
    note = f"{sources}. Split A is KAR's, split B KELLMRec's 8:1:1 users. Ours: {named}."
    return Grid("replication", "What the papers print, and what came out here", columns, tuple(lines), note)


def all_tables(rows: Iterable[ResultRow], *, reference: str = REFERENCE) -> list[Grid]:
    """Every table that the rows have something for, in the order in which they are read."""
    rows = list(rows)
    results = Results(rows)
    grids: list[Grid] = []
    plan: tuple[tuple[Suite, Callable[..., Grid]], ...]
    plan = (("ctr", ladder), ("time", ladder), ("ctr", slices), ("time", slices), ("cold", slices))
    for suite, build in plan:
        for split in results.names("split", suite=suite):
            grids.append(build(rows, suite=suite, split=split, reference=reference))
    step_by_step = claims(rows, reference=reference)
    if step_by_step.rows:
        grids.append(step_by_step)
    if results.where(suite="retrieval"):
        grids.append(text_variants(rows))
    if results.where(suite="contrastive"):
        grids.append(contrastive_forms(rows))
    if results.where(suite="replication") or results.where(suite="ctr"):
        grids.append(replication(rows))
    return grids


def write_tables(rows: Iterable[ResultRow], folder: Path, *, reference: str = REFERENCE) -> list[Path]:
    """Write `tables.md` and one CSV per table, each whole or not at all.

    Returns:
        The paths written, `tables.md` first.
    """
    grids = all_tables(rows, reference=reference)
    paths = [folder / "tables.md", *(folder / f"{grid.key}.csv" for grid in grids)]
    write_atomic(paths[0], "\n".join(["# Results\n", *(markdown(grid, level=2) for grid in grids)]))
    for path, grid in zip(paths[1:], grids, strict=True):
        write_atomic(path, csv_text(grid))
    return paths


def _pick(
    results: Results, suite: Suite, backbone: str, arm: str, metric: str, slices_: Sequence[str], reference: str = ""
) -> ResultRow | None:
    """A row whatever its split: against `reference` and held-out items before others."""
    scope = {"suite": suite, "backbone": backbone, "arm": arm, "metric": metric}
    rows = [row for row in results.where(**scope) if row.slice in slices_]
    rows.sort(key=lambda row: (row.reference != reference, row.split != "cold"))
    return rows[0] if rows else None


def _rests_on(rows: Sequence[ResultRow]) -> str:
    """Where the intervals come from, and whether trainings were cut short: the end of a note."""
    kinds = list(dict.fromkeys(f"{row.cluster}s" for row in rows if row.cluster))
    return " ".join(filter(None, (_INTERVALS.format(clusters=" or ".join(kinds) or "clusters"), capped(rows))))
