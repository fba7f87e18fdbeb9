"""The tables of docs/evaluation.md are those of the committed rows."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_of_the_page_are_made_from_the_rows() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "tabulate_evaluation.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert {match[2] for match in script["BLOCK"].finditer(page)} >= {"cold", "forms", "retrieval"}
    assert script["written"](page) == page
