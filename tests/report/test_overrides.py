"""The overrides as read for the review page, and as its script writes them out again."""

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from kellm_features.errors import DataError
from kellm_features.overrides import read_overrides
from kellm_features.report.html import TEMPLATES

NODE = shutil.which("node")
HOSTILE = [
    'a "b", c',
    "line\nbreak",
    "return\r\n",
    " led and trailed ",
    "</script><script>",
    ",",
    '"',
    "",
    "=1+1",
    "é 猫",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "overrides.csv"


def saved(header: list[str], rows: list[list[str]], decisions: dict[str, tuple[str | None, str]]) -> list[list[str]]:
    """The cells that Python's csv reads from what the script would save."""
    assert NODE
    script = (TEMPLATES / "overrides.js").read_text(encoding="utf-8") + (
        "const given = JSON.parse(require('fs').readFileSync(0));"
        "process.stdout.write(overridesCsv(given.header, given.rows, new Map(given.decisions)));"
    )
    told = [[item, {"page": page, "note": note}] for item, (page, note) in decisions.items()]
    given = json.dumps({"header": header, "rows": rows, "decisions": told})
    done = subprocess.run([NODE, "-e", script], input=given.encode(), capture_output=True, check=True, timeout=30)
    return list(csv.reader(io.StringIO(done.stdout.decode(), newline=""), strict=True))


def test_none_without_a_file() -> None:
    assert read_overrides(None).header == ("item_id", "page", "note")
    assert read_overrides(None).rows == ()


def test_cells_are_kept_and_the_last_row_of_an_item_counts(path: Path) -> None:
    path.write_text('﻿who,item_id,page\nann,1,"Rome, Open City"\n\nbob, 2 ,none\nann,1,77\n', encoding="utf-8")
    overrides = read_overrides(path)
    assert overrides.header == ("who", "item_id", "page", "note")
    assert overrides.rows[0] == ("ann", "1", "Rome, Open City", "")
    assert overrides.pages() == {"1": "77", "2": "none"}


def test_an_empty_file_holds_none(path: Path) -> None:
    path.write_text("", encoding="utf-8")
    assert read_overrides(path).rows == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"item,page\n1,none\n", "lacks the column item_id"),
        (b"id,title\n1,none\n", "lacks the column item_id and page: .* seen: id, title"),
        (b"item_id,page\n1,Rome, Open City\n", "has 3 cells and the header 2; quote a title"),
        (b"item_id,page\n1,\xff\n", "not readable as CSV in UTF-8"),
        (b'item_id,page\n1,"none\n', "not readable as CSV in UTF-8"),
        (None, "not readable as CSV in UTF-8: .*No such file"),
    ],
)
def test_a_file_that_would_be_lost_on_saving_is_refused(path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_overrides(path)


# Neither node nor a browser comes from a package registry: where one is missing, the rest of the page is still tested.
@pytest.mark.skipif(NODE is None, reason="node runs the page's script outside of a browser, and is not installed")
class TestSaving:
    def test_decisions_replace_remove_and_follow(self) -> None:
        header = ["item_id", "page", "note", "who"]
        rows = [["1", "none", "a", "ann"], ["2", "20", "b", "bob"], ["3", "Page", "c", "cyd"], ["2", "21", "", ""]]
        decisions = {"9": ("none", "new"), "2": ("22", "changed"), "3": (None, ""), "4": (None, "was not there")}
        assert saved(header, rows, decisions) == [
            header,
            ["1", "none", "a", "ann"],
            ["2", "22", "changed", ""],  # once, in the place of its first row
            ["9", "none", "new", ""],
        ]

    def test_cells_survive_whatever_they_hold(self) -> None:
        rows = [[str(n), text, text[::-1]] for n, text in enumerate(HOSTILE)]
        decisions: dict[str, tuple[str | None, str]] = {f"new {text}": (text, text) for text in HOSTILE}
        decisions["__proto__"] = ("toString", "constructor")
        expected = rows + [[item, page, note] for item, (page, note) in decisions.items()]
        assert saved(["item_id", "page", "note"], rows, decisions)[1:] == expected

    def test_nothing_decided_is_the_file_itself(self, path: Path) -> None:
        path.write_text('item_id,page,note\n1,"Rome, Open City",\n2,none,"said ""no"""\n', encoding="utf-8")
        overrides = read_overrides(path)
        cells = [list(row) for row in overrides.rows]
        assert saved(list(overrides.header), cells, {}) == [list(overrides.header), *cells]
