import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kellm_features.evaluation import arms, papers
from kellm_features.evaluation.grid import Cell, Column, Estimate, Grid, csv_text, markdown, rich_table
from kellm_features.evaluation.results import ResultRow
from kellm_features.evaluation.tables import (
    HELPS,
    HURTS,
    REFERENCE,
    UNDECIDED,
    UNMEASURED,
    all_tables,
    capped,
    claims,
    contrastive_forms,
    ladder,
    replication,
    slices,
    text_variants,
    verdict,
    write_tables,
)

HOSTILE = "<script>alert(1)</script>|[red]*x*_y_`z`![i](http://e)"
LABELS = {"id-5": "ID, 5 events", "id-30": "ID, 30 events", "page": "+ page", "kellmrec": "+ contrastive"}


def row(arm: str, value: float | None = None, **changes: Any) -> ResultRow:
    told: dict[str, Any] = {
        "suite": "ctr", "split": "B", "backbone": "din", "label": LABELS.get(arm, arm), "metric": "auc",
    }  # fmt: skip
    return ResultRow.model_validate(told | {"arm": arm, "value": value, "cluster": "user"} | changes)


def gain(reference: str, delta: float, half: float) -> dict[str, Any]:
    low, high = round(delta - half, 6), round(delta + half, 6)
    return {"reference": reference, "delta": delta, "delta_low": low, "delta_high": high}


@pytest.fixture
def rows() -> list[ResultRow]:
    return [
        row("id-30", 0.7700, low=0.7680, high=0.7720),
        row("id-5", 0.7400, **gain("id-30", -0.03, 0.001), p=0.0001, p_holm=0.0004),
        row("id-5", 0.5900, metric="log_loss"),
        row(
            "page", 0.7740, low=0.7720, high=0.7760, **gain("id-30", 0.004, 0.0005), p=0.001, p_holm=0.003, examples=90
        ),
        row("page", 0.7740, **gain("closed-book", 0.0007, 0.001)),
        row("page", 0.0123, metric="ece"),
        row("page", 0.7100, metric="gauc"),
        row("page", 0.6500, slice="cold", **gain("id-30", 0.02, 0.03), p_holm=0.5, examples=7),
        row("page", 0.6800, suite="cold", split="cold", slice="cold", **gain("id-30", 0.025, 0.01), cluster="item"),
        row("kellmrec", 0.7741, **gain("page", 0.0001, 0.001), p_holm=0.9),
        row("id-30", 0.7500, backbone="deepfm"),
    ]


def told(grid: Grid, key: str, **where: str) -> Cell:
    lines = [dict(zip((c.key for c in grid.columns), line, strict=True)) for line in grid.rows]
    (line,) = [line for line in lines if all(line[name] == value for name, value in where.items())]
    return line[key]


def test_ladder_tells_the_rows(rows: list[ResultRow]) -> None:
    grid = ladder(rows)
    assert grid.column("label") == ["ID, 30 events", "ID, 5 events", "+ page", "+ contrastive", "ID, 30 events"]
    assert grid.column("backbone") == ["din"] * 4 + ["deepfm"]
    page = {"backbone": "din", "label": "+ page"}
    assert told(grid, "auc", **page) == Estimate(0.7740, 0.7720, 0.7760)
    assert told(grid, "gauc", **page) == Estimate(0.7100)
    assert told(grid, "ece", **page) == Estimate(0.0123)
    assert told(grid, "log_loss", **page) is None
    assert told(grid, "delta_auc", **page) == Estimate(0.004, 0.0035, 0.0045, is_signed=True)
    assert told(grid, "p_holm", **page) == 0.003
    assert told(grid, "cold_auc", **page) == Estimate(0.6800)  # held out, not the slice of split B
    assert told(grid, "log_loss", label="ID, 5 events") == Estimate(0.59)
    assert "against ID, 30 events" in grid.note
    assert "items held out of training" in grid.note


def test_a_difference_to_another_arm_is_not_told_as_one_to_the_reference(rows: list[ResultRow]) -> None:
    grid = ladder(rows)
    assert told(grid, "auc", label="+ contrastive") == Estimate(0.7741)
    assert told(grid, "delta_auc", label="+ contrastive") is None
    assert told(grid, "p_holm", label="+ contrastive") is None
    assert told(grid, "delta_auc", backbone="din", label="ID, 30 events") is None


def test_cold_auc_falls_back_on_the_slice_of_the_split_for_all_arms(rows: list[ResultRow]) -> None:
    grid = ladder([one for one in rows if one.suite != "cold"])
    assert told(grid, "cold_auc", label="+ page") == Estimate(0.6500)
    assert "without train interactions" in grid.note


def test_slices_tell_the_rows(rows: list[ResultRow]) -> None:
    grid = slices(rows)
    cold = {"backbone": "din", "slice": "cold"}
    assert told(grid, "auc", **cold) == Estimate(0.65)
    assert told(grid, "examples", **cold) == 7
    assert told(grid, "p_holm", **cold) == 0.5
    delta = told(grid, "delta_auc", **cold)
    assert isinstance(delta, Estimate)
    assert (delta.value, delta.low, delta.high) == pytest.approx((0.02, -0.01, 0.05))


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("auc", 0.001, 0.002, HELPS),
        ("auc", -0.002, -0.001, HURTS),
        ("auc", -0.001, 0.002, UNDECIDED),
        ("auc", 0.0, 0.002, UNDECIDED),
        ("auc", -0.002, 0.0, UNDECIDED),
        ("log_loss", -0.002, -0.001, HELPS),
        ("ece", 0.001, 0.002, HURTS),
        ("recall@20", 0.001, 0.002, HELPS),
        ("auc", None, None, UNMEASURED),
    ],
)
def test_verdict_by_hand(metric: str, low: float | None, high: float | None, expected: str) -> None:
    assert verdict(row("a", metric=metric, reference="b", delta=0.0, delta_low=low, delta_high=high)) == expected
    assert verdict(None) == UNMEASURED


def test_a_verdict_needs_holm() -> None:
    """An interval that leaves 0 out is one claim's; p after Holm is that of all."""
    alone = row("a", **gain("b", 0.01, 0.005))
    assert verdict(alone) == verdict(alone.model_copy(update={"p": 0.01, "p_holm": 0.049})) == HELPS
    assert verdict(alone.model_copy(update={"p": 0.01, "p_holm": 0.05})) == UNDECIDED


def test_contrastive_forms_join_clicks_cold_clicks_and_retrieval() -> None:
    scope: dict[str, Any] = {"suite": "contrastive"}
    cold = scope | {"split": "cold", "slice": "cold"}
    grid = contrastive_forms(
        [
            row("mean", 0.77, **scope, **gain("none", -0.003, 0.001)),
            row("mean", 0.77, **scope, **gain("random", 0.003, 0.001)),
            row("mean", 0.68, **cold, **gain("none", 0.01, 0.02)),
            row("mean", 0.4, metric="recall@20", **cold, **gain("none", 0.05, 0.01)),
            row("user", 0.76, **scope, **gain("none", 0.0, 0.001)),
            row("late", 0.3, metric="recall@20 normalized", **cold, **gain("none", -0.05, 0.01)),
            row("none", 0.77, **scope),
        ]
    )
    keys = ("backbone", "label", "reference", "verdict_ctr", "verdict_cold_ctr", "verdict_recall")
    lines = list(zip(*(grid.column(key) for key in keys), grid.column("verdict_recall_normalized"), strict=True))
    assert lines == [
        ("din", "mean", "none", HURTS, UNDECIDED, HELPS, UNMEASURED),
        ("din", "mean", "random", HELPS, UNMEASURED, UNMEASURED, UNMEASURED),
        ("din", "user", "none", UNDECIDED, UNMEASURED, UNMEASURED, UNMEASURED),
        ("din", "late", "none", UNMEASURED, UNMEASURED, UNMEASURED, HURTS),
    ]
    recall = grid.column("delta_recall")[0]
    assert isinstance(recall, Estimate)
    assert recall.low == pytest.approx(0.04)


def test_claims_name_what_their_own_rows_draw(rows: list[ResultRow]) -> None:
    """Of the suite cold alone: steps on held-out items vary by item, whatever clicks elsewhere do."""
    steps = [
        row("page", 0.68, suite="cold", split="cold", slice="cold", cluster="item", **gain("title", 0.01, 0.001)),
        row("page", 0.68, suite="cold", split="cold", cluster="user", **gain("id-30", 0.01, 0.001)),
    ]
    assert claims(steps).column("reference") == ["title"]
    assert "bootstrap over items." in claims(steps).note
    assert "bootstrap over users." in claims(rows).note


def test_capped_counts_each_training_once() -> None:
    place: dict[str, Any] = {"folds": 3, "seeds": 2}
    told = [
        row("page", 0.77, **place, capped=4),
        row("page", 0.77, **place, capped=4, slice="cold"),
        row("page", 0.77, **place, capped=4, **gain("id-30", 0.01, 0.001)),
        row("id-30", 0.77, **place, capped=0),
        row("page", 0.77, backbone="deepfm", **place, capped=1),
        row("item-mean", 0.7, **place),  # a closed form is not trained
    ]
    assert capped(told).startswith("5 of 18 trainings were at their best in the last epoch")
    assert capped(told) in ladder(told).note
    assert capped(told[3:4]) == capped(told[-1:]) == capped([]) == ""


def test_text_variants_join_cold_clicks_and_retrieval() -> None:
    cold: dict[str, Any] = {"split": "cold", "slice": "cold"}
    retrieval = cold | {"suite": "retrieval", "backbone": ""}
    given = [
        row("page", 0.68, suite="cold", **cold, label="+ page"),
        row("page", 0.66, suite="cold", backbone="dien", **cold),
        row("page", 0.45, metric="recall@20", **retrieval | {"label": "page"}),
        row("page", 0.23, metric="recall@20 normalized", **retrieval | {"label": "page"}),
        row("popularity", 0.34, metric="recall@20", **retrieval),
        row("popularity", 0.30, metric="ndcg@20", **retrieval),
    ]
    grid = text_variants(given)
    assert [column.key for column in grid.columns] == [
        "label", "cold_auc_din", "cold_auc_dien", "recall@20", "ndcg@20", "recall@20_normalized", "ndcg@20_normalized",
    ]  # fmt: skip
    assert grid.rows == (
        ("page", Estimate(0.68), Estimate(0.66), Estimate(0.45), None, Estimate(0.23), None),
        ("popularity", None, None, Estimate(0.34), Estimate(0.30), None, None),
    )
    assert text_variants(given, arms=["popularity"]).column("label") == ["popularity"]


def test_replication_sets_the_papers_beside_ours() -> None:
    given = [
        row("id-5", 0.7423),
        row("id-5", 0.7511, suite="replication", split="A"),
        row("printed", 0.7733, **gain("id-5", 0.031, 0.001)),
    ]
    grid = replication(given)
    din = {"paper": "KELLMRec", "backbone": "din"}
    assert told(grid, "printed", **din, label="ID", metric="AUC") == Estimate(0.7690)
    assert told(grid, "ours_b", **din, label="ID", metric="AUC") == Estimate(0.7423)
    assert told(grid, "ours_a", **din, label="ID", metric="AUC") == Estimate(0.7511)
    assert told(grid, "printed", **din, label="ID", metric="LogLoss") == Estimate(0.5639)
    assert told(grid, "printed", **din, label="KELLMRec over ID", metric="ΔAUC") == Estimate(0.0105, is_signed=True)
    ours = told(grid, "ours_b", **din, label="KELLMRec over ID", metric="ΔAUC")
    assert isinstance(ours, Estimate)
    assert ours.value == 0.031
    assert told(grid, "ours_b", **din, label="KELLMRec over LLMRec", metric="ΔAUC") is None


def test_the_papers_differences_are_those_they_print() -> None:
    """KELLMRec's table prints its gains over ID and over LLMRec, too: they check the figures."""
    gains = {
        (backbone, base): round(
            (papers.printed("KELLMRec", backbone, "KELLMRec", "auc") or 0)
            - (papers.printed("KELLMRec", backbone, base, "auc") or 0),
            4,
        )
        for backbone in ("deepfm", "dien", "din")
        for base in ("ID", "LLMRec")
    }
    assert list(gains.values()) == [0.0119, 0.0005, 0.0271, 0.0012, 0.0105, 0.0004]
    assert papers.printed("KAR", "din", "KAR", "log_loss") is None


def test_keys_are_those_of_the_arms() -> None:
    known = {arm.key for arm in arms.ladder(["title", "digest", "page", "closed-book"])}
    assert arms.REFERENCE == REFERENCE
    assert set(papers.OURS.values()) <= known
    assert {figure.arm for figure in papers.FIGURES} >= set(papers.OURS)


GRID = Grid(
    "t",
    f"Title {HOSTILE}",
    (
        Column("backbone", "backbone", folds=True),
        Column("label", "arm"),
        Column("auc", "AUC", "metric", "value"),
        Column("delta", "Δ", "delta"),
        Column("p", "p", "p"),
        Column("n", "n", "count"),
        Column("hidden", "hidden", "text", "none"),
    ),
    (
        ("din", HOSTILE, Estimate(0.77405, 0.7, 0.8), Estimate(-0.00001, -0.01, 0.02), 0.0004, 12345, "h"),
        ("din", "b", None, None, None, None, "h"),
        ("dien", "b", 0.5, Estimate(0.004), 1.0, 0, "h"),
    ),
    note="Note <b>.",
)


def test_csv_holds_bare_numbers() -> None:
    lines = list(csv.reader(io.StringIO(csv_text(GRID))))
    assert lines == [
        "backbone,label,auc,auc_low,auc_high,delta,delta_low,delta_high,p,n,hidden".split(","),
        ["din", HOSTILE, "0.77405", "0.7", "0.8", "-1e-05", "-0.01", "0.02", "0.0004", "12345", "h"],
        ["din", "b", "", "", "", "", "", "", "", "", "h"],
        ["dien", "b", "0.5", "", "", "0.004", "", "", "1.0", "0", "h"],
    ]


def test_markdown_by_hand() -> None:
    text = markdown(GRID)
    assert "| din | " in text
    assert "0.7741 [0.7000, 0.8000] | 0.0000 [-0.0100, +0.0200] | <0.001 | 12,345 | h |" in text
    assert "\n|  | b | – | – | – | – | h |\n" in text  # din is told once
    assert "\n| dien | b | 0.5000 | +0.0040 | 1.000 | 0 | h |\n" in text
    assert "|---|---|---:|---:|---:|---:|---|" in text
    assert text.endswith("Note &lt;b>.\n")
    assert "<script>" not in text
    assert "&lt;script>alert(1)&lt;/script>\\|[red]\\*x\\*\\_y\\_\\`z\\`!\\[i]\\(http://e)" in text


def test_the_terminal_shows_every_figure_within_its_width() -> None:
    out = io.StringIO()
    Console(file=out, width=110, markup=True).print(rich_table(GRID))
    shown = " ".join(out.getvalue().split())
    assert "0.7741 0.0000 [-0.0100, +0.0200] <0.001 12,345" in shown
    assert "[red]" in shown  # is no markup
    assert "0.8000" not in shown
    assert "hidden" not in shown


def test_write_tables(tmp_path: Path, rows: list[ResultRow]) -> None:
    paths = write_tables(rows, tmp_path / "out")
    assert [path.name for path in paths] == [
        "tables.md", "ladder.csv", "slices.csv", "slices_cold_cold.csv", "claims.csv", "replication.csv",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)
    lines = list(csv.DictReader(paths[1].read_text(encoding="utf-8").splitlines()))
    assert lines[2]["label"] == "+ page"
    assert (lines[2]["auc"], lines[2]["auc_low"], lines[2]["delta_auc_high"]) == ("0.774", "0.772", "0.0045")
    text = paths[0].read_text(encoding="utf-8")
    assert "## Ladder, split B (users)" in text
    assert "0.7740 [0.7720, 0.7760]" in text


def test_nothing_measured_gives_no_table_and_no_zero(tmp_path: Path) -> None:
    assert all_tables([]) == []
    assert [path.name for path in write_tables([], tmp_path)] == ["tables.md"]
    grid = ladder([row("id-30")])
    assert grid.rows == (("din", "ID, 30 events", None, None, None, None, None, None, None, None),)
    assert "Nothing measured yet." in markdown(slices([]))
