"""The page and the pictures: what they tell, what they leave out, and what they do not let through."""

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kellm_features.errors import DataError
from kellm_features.evaluation.about import ArmFacts, EvaluationFacts, History, Planned, missing
from kellm_features.evaluation.page import duration, write_page
from kellm_features.evaluation.pictures import (
    ladder_chart,
    learning_curves,
    retrieval_chart,
    slice_charts,
    write_pictures,
)
from kellm_features.evaluation.results import ResultRow

HOSTILE = "<script>alert('x')</script>\"'><img src=http://evil>"
ARMS = {"item-mean": -0.06, "id-30": 0.0, "page": 0.004, "kellmrec": 0.0041}
LABELS = {"item-mean": "item mean", "id-30": "ID, 30 events", "page": HOSTILE, "kellmrec": "+ contrastive"}
FACTS = EvaluationFacts(
    name="Trial & error",
    data="1,234 interactions",
    arms=tuple(ArmFacts(key=key, label=LABELS[key], description=f"about {key}") for key in ARMS),
    budget="8 trials",
    version="9.9.9",
    machine="2 cores",
    split_hashes={"B0": "f" * 64},
    finished=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    seconds=12_345,
    trainings=660,
)


def row(arm: str, **changes: Any) -> ResultRow:
    delta = ARMS.get(arm, 0.0)
    told: dict[str, Any] = {
        "suite": "ctr", "split": "B", "backbone": "din", "label": LABELS.get(arm, arm), "metric": "auc",
        "value": 0.77 + delta, "low": 0.76 + delta, "high": 0.78 + delta, "cluster": "user", "folds": 10,
        "seeds": 2, "capped": 0, "examples": 4321, "clusters": 60,
    }  # fmt: skip
    if arm != "id-30":
        told |= {"reference": "id-30", "delta": delta, "delta_low": delta - 0.001, "delta_high": delta + 0.001}
    return ResultRow.model_validate(told | {"arm": arm} | changes)


@pytest.fixture
def rows() -> list[ResultRow]:
    cold: dict[str, Any] = {"split": "cold", "slice": "cold", "cluster": "item"}
    found: dict[str, Any] = cold | {
        "folds": 2,
        "seeds": 1,
        "capped": None,
        "suite": "retrieval",
        "backbone": "",
        "metric": "recall@20",
        "reference": "popularity",
    }
    return [
        *(row(arm, slice=slice_) for slice_ in ("all", "cold", "items 1-9") for arm in ARMS),
        row("page", suite="cold", **cold | {"folds": 2, "seeds": 1}),
        row("popularity", **found | {"reference": "", "value": 0.338, "low": 0.33, "high": 0.35, "delta": None}
            | {"delta_low": None, "delta_high": None}),
        row("page", **found | {"value": 0.455, "low": 0.44, "high": 0.47}),
        row("pretrain", suite="contrastive", **{"reference": "none", "delta": -0.002, "delta_low": -0.003}
            | {"delta_high": -0.001}),
    ]  # fmt: skip


def history(arm: str, seed: int, values: list[float | None]) -> History:
    epochs = [{"epoch": n, "loss": 0.5, "valid_auc": value, "kept": True} for n, value in enumerate(values, 1)]
    return History.model_validate(
        {"suite": "ctr", "split": "B", "backbone": "din", "arm": arm, "label": LABELS[arm], "fold": "B0", "seed": seed}
        | {"epochs": epochs}
    )


class Page(HTMLParser):
    """Text per section, and all tags with their attributes; every tag must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[str]] = {"": []}
        self.at = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "section":
            self.at = dict(attrs)["id"] or ""
            self.sections[self.at] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.at = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.sections[self.at].append(data)

    def text(self, section: str = "") -> str:
        return " ".join(" ".join(self.sections[section]).split())


@pytest.fixture
def page(tmp_path: Path, rows: list[ResultRow]) -> Page:
    histories = [history("page", seed, [0.7, 0.75, None, 0.74]) for seed in (1, 2)]
    return Page(write_page(rows, tmp_path / "deep" / "evaluation.html", FACTS, histories))


def test_head_tells_what_was_run(page: Page) -> None:
    head = page.text()
    assert "kellm-features 9.9.9 · evaluation Trial & error 1,234 interactions. Finished 2026-01-02 03:04 UTC." in head
    assert "Folds 12 by split: B 10, cold 2; 1 to 2 seeds each Models trained 660" in head
    assert "Test examples 4,321 of 60 users Time 3 h 26 min 2 cores" in head
    about = page.text("about")
    assert "budget of each arm 8 trials machine 2 cores" in about
    assert "ID, 30 events id-30 about id-30" in about
    assert f"B0 {'f' * 64}" in about
    assert "not complete" not in about
    assert "last epoch" not in about


def test_trainings_that_may_have_stopped_too_early_are_told(tmp_path: Path, rows: list[ResultRow]) -> None:
    cut = [one.model_copy(update={"capped": 3}) if (one.suite, one.arm) == ("ctr", "page") else one for one in rows]
    page = Page(write_page(cut, tmp_path / "evaluation.html", FACTS))
    # Four arms of 10 folds and 2 seeds on split B, one of 2 on cold items, and a form.
    assert "3 of 102 trainings were at their best in the last epoch of their budget" in page.text("about")
    assert "3 of 80 trainings" in page.text("ladder")
    assert "trainings were at" not in page.text("contrastive")


def test_sections_hold_the_figures_of_the_rows(page: Page) -> None:
    ladder = page.text("ladder")
    assert "+ contrastive 0.7741 [0.7641, 0.7841]" in ladder
    assert "+0.0041 [+0.0031, +0.0051]" in ladder
    assert "ΔAUC against ID, 30 events" in ladder
    assert "items 1-9 4,321" in page.text("slices")
    assert "popularity" in page.text("cold")
    assert "0.4550 [0.4400, 0.4700]" in page.text("cold")
    assert "pretrain none -0.0020 [-0.0030, -0.0010] hurts" in page.text("contrastive")
    assert "0.7690" in page.text("papers")
    assert "Validation AUC by epoch" in page.text("curves")


def test_nothing_comes_from_outside_and_labels_do_nothing(page: Page) -> None:
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "srcset", "onerror", "onload", "xlink:href"}
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object"}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(link and link.startswith("#") and f'id="{link[1:]}"' in page.source for link in links)
    assert not re.search(r"@import|url\(", page.source)
    assert HOSTILE not in page.source
    assert HOSTILE in page.text("ladder")


def test_a_killed_suite_shows_what_is_there_and_says_what_is_missing(tmp_path: Path) -> None:
    plan = tuple(
        Planned(suite=suite, split=split, backbone=backbone, arm=arm, folds=10)
        for suite, split in (("ctr", "B"), ("time", "C"))
        for backbone in ("din", "dien")
        for arm in ("id-30", "page")
    )
    facts = FACTS.model_copy(update={"planned": plan})
    there = [row("id-30"), row("page", folds=3)]
    assert missing(there, facts) == [
        f"suite ctr, split B, din: {HOSTILE} (3 of 10 folds)",
        f"suite ctr, split B, dien: ID, 30 events, {HOSTILE}",
        f"suite time, split C, din: ID, 30 events, {HOSTILE}",
        f"suite time, split C, dien: ID, 30 events, {HOSTILE}",
    ]
    page = Page(write_page(there, tmp_path / "evaluation.html", facts))
    assert "This evaluation is not complete." in page.text("about")
    assert "split B, dien: ID, 30 events" in page.text("about")
    assert "0.7740 [0.7640, 0.7840]" in page.text("ladder")
    assert "Not measured yet: run kellm evaluate --suite cold --out FOLDER" in page.text("cold")
    assert "No history of a training is stored." in page.text("curves")


def test_a_page_of_nothing(tmp_path: Path) -> None:
    page = Page(write_page([], tmp_path / "evaluation.html", EvaluationFacts(name="empty", data="none")))
    assert "Not measured yet" in page.text("ladder")
    assert "svg" not in {tag for tag, _ in page.tags}


def test_the_old_page_stays_where_the_new_one_cannot_be_made(tmp_path: Path) -> None:
    target = write_page([row("id-30")], tmp_path / "evaluation.html", FACTS)
    before = target.read_bytes()
    with pytest.raises(DataError, match="told once"):
        write_page([row("id-30"), row("id-30")], target, FACTS)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_ladder_picture_follows_the_rows(rows: list[ResultRow]) -> None:
    chart = ladder_chart(rows)
    assert chart is not None
    assert [name.full for name in chart.names] == ["din", *(LABELS[arm] for arm in ARMS)]
    auc, gain = chart.panels
    assert [mark.text for mark in auc.marks] == ["0.7100", "0.7700", "0.7740", "0.7741"]
    assert [mark.tone for mark in auc.marks] == ["plain", "reference", "plain", "plain"]
    assert [mark.tone for mark in gain.marks] == ["bad", "good", "good"]  # the reference has no difference to itself
    assert [mark.beyond for mark in gain.marks] == ["left", "", ""]
    assert ladder_chart([]) is None


def test_retrieval_picture_is_ordered_and_toned_by_the_difference(rows: list[ResultRow]) -> None:
    chart = retrieval_chart(rows)
    assert chart is not None
    assert [name.full for name in chart.names] == [HOSTILE, "popularity"]
    assert [mark.tone for mark in chart.panels[0].marks] == ["good", "unsure"]
    assert "better than popularity" in chart.note


def test_slices_share_an_axis_on_which_the_cold_ones_are(rows: list[ResultRow]) -> None:
    wide = {"delta": 0.03, "delta_low": 0.02, "delta_high": 0.04}
    rows = [one.model_copy(update=wide) if (one.arm, one.slice) == ("page", "cold") else one for one in rows]
    (multiple,) = slice_charts(rows)
    assert [chart.title for chart in multiple.charts] == ["item mean", HOSTILE, "+ contrastive"]
    assert len({tuple(chart.panels[0].ticks) for chart in multiple.charts}) == 1
    assert [mark.beyond for mark in multiple.charts[1].panels[0].marks] == ["", "", ""]
    assert {mark.beyond for mark in multiple.charts[0].panels[0].marks} == {"left"}


def test_learning_curves_share_an_axis_and_leave_out_what_was_not_measured() -> None:
    (curves,) = learning_curves([history("page", 1, [0.7, None, 0.75]), history("id-30", 1, [0.71, 0.72])])
    assert curves.place == "din, suite ctr, split B"
    assert [chart.title for chart in curves.charts] == [HOSTILE, "ID, 30 events"]
    assert curves.charts[0].y_ticks == curves.charts[1].y_ticks
    assert len(curves.charts[0].lines[0].path.split()) == 2
    assert learning_curves([history("page", 1, [None])]) == []


def test_pictures_are_whole_svg_files(tmp_path: Path, rows: list[ResultRow]) -> None:
    paths = write_pictures(rows, tmp_path / "img")
    assert [path.name for path in paths] == ["ladder.svg", "cold.svg"]
    for path in paths:
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        tags = {element.tag.partition("}")[2] for element in root.iter()}
        assert not tags & {"script", "image", "use", "foreignObject", "a"}
        assert HOSTILE in "".join(root.itertext())
        assert not re.search(r"url\(|@import|href", path.read_text(encoding="utf-8"))
    assert [path.name for path in write_pictures([row("id-30")], tmp_path / "one")] == ["ladder.svg"]
    with pytest.raises(DataError, match="No picture can be drawn of 0 rows"):
        write_pictures([], tmp_path)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7_140, "119 min"), (7_199, "2 h 0 min"), (12_345, "3 h 26 min")],
)
def test_duration(seconds: float, told: str) -> None:
    assert duration(seconds) == told
