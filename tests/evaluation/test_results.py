import csv
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kellm_features.errors import DataError
from kellm_features.evaluation.results import COLUMNS, ResultRow, ordered, read_results, write_results

HOSTILE = 'a, "b"<script>|[red]\u2028;=1+1'

CONTROL = "".join(map(chr, (*range(32), 127)))


def row(**changes: Any) -> ResultRow:
    told = {"suite": "ctr", "split": "B", "backbone": "din", "arm": "id-30", "label": "ID", "metric": "auc"}
    return ResultRow.model_validate(told | changes)


def test_columns_are_a_contract() -> None:
    assert ",".join(COLUMNS) == (
        "suite,split,backbone,arm,label,metric,slice,value,low,high,reference,delta,delta_low,delta_high,p,p_holm,"
        "examples,clusters,cluster,folds,seeds,capped"
    )
    assert all(field.description for field in ResultRow.model_fields.values())


number = st.none() | st.floats(-1e3, 1e3, allow_subnormal=True)


@given(
    value=number,
    bounds=st.none() | st.tuples(st.floats(-9, 9), st.floats(-9, 9)).map(sorted),
    label=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=CONTROL), min_size=1) | st.just(HOSTILE),
    p=st.none() | st.floats(0, 1),
    examples=st.none() | st.integers(0, 10**12),
)
def test_rows_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    value: float | None,
    bounds: list[float] | None,
    label: str,
    p: float | None,
    examples: int | None,
) -> None:
    low, high = bounds or (None, None)
    told = row(value=value, low=low, high=high, label=label, p=p, examples=examples, reference="id-5", delta=value)
    path = write_results([told, row(arm="empty")], tmp_path_factory.mktemp("out") / "results.csv")
    assert read_results(path) == [told, row(arm="empty")]


def test_the_file_has_empty_cells_where_there_is_no_number(tmp_path: Path) -> None:
    path = write_results([row(value=0.5, examples=0)], tmp_path / "deep" / "results.csv")
    header, line = csv.reader(path.read_text(encoding="utf-8").splitlines())
    assert dict(zip(header, line, strict=True)) == dict.fromkeys(COLUMNS, "") | {
        "suite": "ctr", "split": "B", "backbone": "din", "arm": "id-30", "label": "ID", "metric": "auc", "slice": "all",
        "value": "0.5", "examples": "0",
    }  # fmt: skip
    assert list(path.parent.iterdir()) == [path]


def test_rows_keep_the_order_of_arms_and_group_what_came_apart() -> None:
    given = [
        row(suite="retrieval", arm="z"),
        row(arm="b"),
        row(arm="a"),
        row(arm="b", metric="gauc"),
        row(arm="b", backbone="deepfm"),
        row(arm="b", slice="cold"),
    ]
    told = [(one.suite, one.backbone, one.arm, one.metric, one.slice) for one in ordered(given)]
    assert told == [
        ("ctr", "din", "b", "auc", "all"),
        ("ctr", "din", "b", "auc", "cold"),
        ("ctr", "din", "b", "gauc", "all"),
        ("ctr", "din", "a", "auc", "all"),
        ("ctr", "deepfm", "b", "auc", "all"),
        ("retrieval", "din", "z", "auc", "all"),
    ]
    assert ordered(ordered(given)) == ordered(given)
    assert ordered([]) == []


def test_the_same_figure_twice_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = write_results([row(value=0.5)], tmp_path / "results.csv")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"1 rows twice, the first ctr/B/din/id-30/auc/all: .* told once"):
        write_results([row(value=0.5), row(value=0.6)], path)
    assert path.read_bytes() == before
    write_results([row(value=0.5), row(value=0.5, reference="id-5", delta=0.1)], path)  # against another arm


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"low": 0.6, "high": 0.5}, "low 0.6 is above high 0.5"),
        ({"delta_low": 0.1}, "delta_low and delta_high are given together"),
        ({"delta": 0.1}, "delta needs the reference"),
        ({"p": 1.5}, "less than or equal to 1"),
        ({"value": float("nan")}, "finite"),
        ({"suite": "ctrl"}, "'ctr', 'time'"),
        ({"examples": -1}, "greater than or equal to 0"),
        ({"delat": 0.1}, "Extra inputs"),
        ({"label": "a\rb"}, "hold no line breaks"),
    ],
)
def test_impossible_rows_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        row(**changes)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("0.25", "a quarter", r"results.csv, line 3: value: .*valid number.*\(seen: 'a quarter'\); write the file by"),
        ("p_holm", "holm", r"lacks the column p_holm: "),
        ("all,0.25,,,,,,,,,,,,,", "all", r"line 3: ends before its 22 cells"),
        ("all,0.25", '"all', r"not readable as results \(unexpected end of data\)"),
    ],
)
def test_a_damaged_file_is_told_by_line_and_column(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = write_results([row(value=0.5), row(arm="id-5", value=0.25)], tmp_path / "results.csv")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=why):
        read_results(path)


def test_missing_and_later_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not readable as results"):
        read_results(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not readable as results"):
        read_results(tmp_path / "binary.csv")
    path = write_results([row(value=0.5)], tmp_path / "results.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f"{lines[0]},added_later\n{lines[1]},7\n", encoding="utf-8")
    assert read_results(path) == [row(value=0.5)]


def test_any_order_of_writing_gives_the_same_sections() -> None:
    rows = [row(suite=suite, arm=arm) for suite in ("cold", "ctr", "time") for arm in "ab"]
    random.Random(0).shuffle(rows)
    assert [one.suite for one in ordered(rows)] == ["ctr", "ctr", "time", "time", "cold", "cold"]
