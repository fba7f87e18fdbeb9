"""Links to check: which items stand there, with which pages, and what a browser makes of the decisions."""

import base64
import csv
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kellm_features.errors import DataError
from kellm_features.report.html import write_report
from kellm_features.report.sections import review
from kellm_features.report.sections.review import Case, LinkReview, link_review
from kellm_features.report.view import RunView
from kellm_features.settings import Settings

HOSTILE = "<script>alert('x')</script>"
BREAKOUT = "</script><script>alert(1)</script>\"'>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MakeRun = Callable[..., Path]
"""Train interactions of the items: 1: 6, 2: 5, 3 and 4: 4, 5: 3, all others 0."""


def none(item: int, runner_up: str | None = None, reason: str = "no candidate") -> tuple[object, ...]:
    return (item, None, None, 0.0, None, runner_up, reason)


def linked(item: int, page: int, score: float, runner_up: str | None = None) -> tuple[object, ...]:
    return (item, page, f"Page {page}", score, "exact", runner_up, None)


def reviewed(run: Path, overrides: Path | None = None) -> LinkReview:
    return link_review(RunView(run, Settings.model_validate({"link": {"overrides": overrides}})))


def cases_of(told: LinkReview) -> dict[str, Case]:
    return {case.item_id: case for case in told.cases}


def offers(case: Case) -> list[tuple[str, str | None]]:
    return [(choice.keys, choice.page) for choice in case.choices]


@pytest.fixture
def overrides(tmp_path: Path) -> Path:
    return tmp_path / "overrides.csv"


def test_the_least_certain_come_first_and_no_more_than_shown(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "SHOWN", 3)
    links = [
        linked(1, 8, 0.9), linked(2, 8, 0.8), linked(3, 9, 0.9), linked(5, 9, 1.0), linked(10, 8, 0.9),
        none(4), none(6), none(7, "Page 8"), none(8, "Page 9"), none(9), none(11), none(12),
    ]  # fmt: skip
    told = reviewed(make_run("ingest", "wiki", "link", links=links))
    assert [(case.kind, case.item_id) for case in told.cases] == [
        ("link", "2"), ("link", "1"), ("link", "3"),  # 0.8; of the three with 0.9 those with 6 and 4 interactions
        ("abstention", "7"), ("abstention", "8"), ("abstention", "4"),  # with a runner-up first, then 4 interactions
    ]  # fmt: skip
    assert told.totals == {"link": 5, "abstention": 7, "override": 0}
    assert told.shown == {"link": 3, "abstention": 3, "override": 0}


def test_a_link_with_its_page_and_its_runner_up(make_run: MakeRun) -> None:
    case = cases_of(reviewed(make_run()))["1"]
    (page,) = case.links
    assert (case.label, case.about) == ("One (1991)", "Drama, War · 6 training interactions")
    assert (page.title, page.page_id, page.year) == (f"One {HOSTILE}", 7, 1991)
    assert (page.score, page.method, case.score) == (0.75, "exact", 0.75)
    assert page.lead.startswith(f"One is a film {HOSTILE} about counting. word word")
    assert 380 < len(page.lead) <= 402
    assert page.lead.endswith("word …")
    assert case.runner_up
    assert case.runner_up.page_id == 11  # 10 has the same title and is a redirect
    assert (case.runner_up.year, case.runner_up.lead) == (1992, f"The rival's lead {HOSTILE}.")
    assert offers(case) == [("a", "7"), ("r", "none"), ("n", "11")]
    assert [choice.note for choice in case.choices][1:] == ["One (1991): no page", f"One (1991): Rival {HOSTILE}"]


def test_an_abstention_with_its_reason(make_run: MakeRun) -> None:
    links = [none(1, "Page 9", "year mismatch"), none(2)]
    cases = cases_of(reviewed(make_run("ingest", "wiki", "link", links=links)))
    assert (cases["1"].reason, cases["1"].links) == ("year mismatch", ())
    assert cases["1"].runner_up
    assert cases["1"].runner_up.lead == "Lead 9."
    assert offers(cases["1"]) == [("ar", "none"), ("n", "9")]
    assert offers(cases["2"]) == [("ar", "none")]


def test_pages_that_were_not_read(make_run: MakeRun) -> None:
    """A title serves where no id is known, unless the overrides would read it as an id or as "none"."""
    links = [linked(1, 99, 0.9, "Elsewhere"), linked(2, 8, 0.9, "1917"), linked(3, 8, 0.9, "none")]
    cases = cases_of(reviewed(make_run("ingest", "wiki", "link", links=links)))
    assert (cases["1"].links[0].title, cases["1"].links[0].page_id) == ("Page 99", 99)
    assert cases["1"].links[0].lead == "This page is not among the pages read."
    assert offers(cases["1"]) == [("a", "99"), ("r", "none"), ("n", "Elsewhere")]
    assert offers(cases["2"]) == offers(cases["3"]) == [("a", "8"), ("r", "none")]


def test_without_the_pages_there_are_still_titles(make_run: MakeRun) -> None:
    case = cases_of(reviewed(make_run("ingest", "link")))["1"]
    assert (case.links[0].title, case.links[0].page_id) == (f"One {HOSTILE}", 7)
    assert case.links[0].lead == "This page is not among the pages read."


def test_several_pages_of_one_item_are_one_case(make_run: MakeRun) -> None:
    links = [linked(1, 8, 0.9), linked(1, 9, 0.4, "Page 7"), linked(2, 8, 0.6)]
    told = reviewed(make_run("ingest", "wiki", "link", links=links))
    assert [case.item_id for case in told.cases] == ["1", "2"]  # by the least certain of its links
    assert [page.page_id for page in told.cases[0].links] == [9, 8]
    assert [(choice.label, choice.page) for choice in told.cases[0].choices] == [
        ("Only “Page 9”", "9"), ("Only “Page 8”", "8"), ("No page", "none"), ("Take the runner-up", "Page 7"),
    ]  # fmt: skip


def test_items_that_overrides_decide_stand_apart(make_run: MakeRun, overrides: Path) -> None:
    overrides.write_text("item_id,page,note\n1,none,no\n2,Page 9,\n3,9,\n6,Elsewhere,\n77,8,gone\n", encoding="utf-8")
    links = [
        linked(1, 8, 0.5), linked(2, 8, 0.5), (3, 9, "Page 9", 1.0, "override", None, None),
        none(4, None, "override"), linked(5, 8, 0.9), none(6),
    ]  # fmt: skip
    told = reviewed(make_run("ingest", "wiki", "link", links=links), overrides)
    cases = cases_of(told)
    assert [(case.kind, case.item_id) for case in told.cases] == [
        ("link", "5"), ("override", "1"), ("override", "2"), ("override", "3"), ("override", "4"), ("override", "6"),
    ]  # fmt: skip
    assert [cases[item].override for item in "12346"] == ["no page", "Page 9", "Page 9", None, "Elsewhere"]
    assert offers(cases["1"]) == [("a", "8"), ("", None)]  # "no page" is what stands there
    assert offers(cases["2"]) == [("a", "8"), ("r", "none"), ("", None)]
    assert offers(cases["3"]) == [("r", "none"), ("", None)]
    assert offers(cases["4"]) == [("r", "none")]  # made by a row that the file no longer holds
    assert (told.overrides, told.overrides_path) == (5, str(overrides))
    assert json.loads(told.payload)["rows"][-1] == ["77", "8", "gone"]


def test_broken_overrides_leave_one_line(make_run: MakeRun, overrides: Path) -> None:
    run = make_run()
    with pytest.raises(DataError, match="not readable as CSV"):
        reviewed(run, overrides)
    page = write_report(run, Settings.model_validate({"link": {"overrides": overrides}})).read_text(encoding="utf-8")
    assert "overrides.csv, which is not readable as CSV" in page
    assert "details class=" not in page


def test_hostile_cells_stay_cells(make_run: MakeRun, overrides: Path) -> None:
    with overrides.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([["item_id", "page", "note"], ["1", BREAKOUT, BREAKOUT], [BREAKOUT, "none", ""]])
    path = write_report(make_run(), Settings.model_validate({"link": {"overrides": overrides}}))
    source = path.read_text(encoding="utf-8")
    assert BREAKOUT not in source
    assert HOSTILE not in source
    assert source.count("<script") == 1
    (payload,) = re.findall(r'data-overrides="([^"]*)"', source)
    told = json.loads(html.unescape(payload))
    assert told == {
        "run": "run-link",
        "header": ["item_id", "page", "note"],
        "rows": [["1", BREAKOUT, BREAKOUT], [BREAKOUT, "none", ""]],
    }


def test_the_page_says_what_to_run(make_run: MakeRun, overrides: Path) -> None:
    run = make_run()
    assert f"kellm run --out {run} --set link.overrides=overrides.csv<" in write_report(run, Settings()).read_text()
    overrides.write_text("item_id,page,note\n1,8,\n", encoding="utf-8")
    page = write_report(run, Settings.model_validate({"link": {"overrides": overrides}})).read_text()
    assert f"the 1 override that stood in <code>{overrides}</code>" in page
    assert f"<code>kellm run --out {run}</code>" in page


DRIVER = """
const press = (item, key) => document.querySelector(`[data-item="${item}"] summary`).dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true }));
const ids = (selector) => [...document.querySelectorAll(selector)].map((item) => item.dataset.item);
const shown = () => ids(".case:not([hidden])");
const open = () => ids(".case[open]");
const told = { stored: document.querySelector('[data-item="5"] .verdict').textContent, open: [] };
document.querySelector('[data-item="1"]').open = true;
press("1", "n"); told.open.push(open());
press("3", "r"); told.open.push(open());
press("2", "a"); press("4", "k"); press("2", "u"); told.open.push(open());
const typed = document.querySelector('[data-item="4"] .other');
typed.querySelector("input").value = ' The "Odd", One ';
typed.querySelector(".use").click();
document.querySelector('[data-item="12"] .choice:not([data-page])').click();
told.status = document.querySelector(".status").textContent;
document.querySelector(".filters [data-kind=link]").click(); told.links = shown();
document.querySelector(".open-only").click(); told.undecided = shown();
document.querySelector(".filters [data-kind='']").click();
document.querySelector(".find").value = "ITEM 1"; document.querySelector(".find").dispatchEvent(new Event("input"));
told.found = shown();
told.kept = localStorage.getItem("kellm links run-link");
const blobUrl = URL.createObjectURL;
URL.createObjectURL = (blob) => {
  blob.text().then((text) => {
    document.body.textContent = `TOLD${JSON.stringify({ ...told, saved: text })}TOLD`;
  });
  return blobUrl.call(URL, blob);
};
document.querySelector(".save").click();
"""


# A browser comes from no package registry: where none is installed, `test_overrides.py` still runs the script's logic.
@pytest.mark.skipif(
    BROWSER is None, reason="the page's behaviour shows only in a browser, and no Chromium is installed"
)
def test_decisions_in_a_browser(make_run: MakeRun, overrides: Path, tmp_path: Path) -> None:
    """Keys, buttons, filters, what the browser keeps, and the saved file, under the page's own security policy."""
    assert BROWSER
    overrides.write_text("item_id,page,note,who\n12,8,old,ann\n77,none,not in this catalogue,bob\n", encoding="utf-8")
    page = write_report(make_run(), Settings.model_validate({"link": {"overrides": overrides}}))
    before = 'localStorage.setItem(\'kellm links run-link\', \'[["5",{"page":"none","note":"earlier"}]]\');\n'
    source, script, rest = re.split(r"(?<=<script>)(.*)(?=</script>)", page.read_text(encoding="utf-8"), flags=re.S)
    driven = before + script + DRIVER

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert digest(script) in source
    copy = tmp_path / "driven.html"
    copy.write_text(source.replace(digest(script), digest(driven)) + driven + rest, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = [BROWSER, *flags, "--virtual-time-budget=3000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(dump, capture_output=True, check=True, timeout=120)
    told = json.loads(html.unescape(done.stdout.decode().split("TOLD")[1]))

    assert told["stored"] == "no page"
    assert told["open"] == [["3"], ["2"], ["2"]]  # in the order of the list: 1 (0.75), 3 (0.91), 2 (1.0), 4
    assert told["status"] == "5 of 12 decided here"
    assert (told["links"], told["undecided"]) == (["1", "3", "2"], ["2"])
    assert told["found"] == ["10", "11"]  # of Item 10 to 12 the last is decided
    assert [item for item, _ in json.loads(told["kept"])] == ["5", "1", "3", "4", "12"]
    assert list(csv.reader(io.StringIO(told["saved"], newline=""), strict=True)) == [
        ["item_id", "page", "note", "who"],
        ["77", "none", "not in this catalogue", "bob"],  # 12 is left to the linker
        ["5", "none", "earlier", ""],
        ["1", "11", f"One (1991): Rival {HOSTILE}", ""],
        ["3", "none", "Three (1993): no page", ""],
        ["4", 'The "Odd", One', "Item 4 (1994): given by hand", ""],
    ]
