"""Pages of a run, looked up one by one."""

from collections.abc import Callable
from pathlib import Path

from kellm_features.report.pages import excerpt_of, find_pages

HOSTILE = "<script>alert('x')</script>"


def test_pages_are_found_by_id_or_title(make_run: Callable[..., Path]) -> None:
    table = make_run("wiki") / "wiki/pages.parquet"
    assert find_pages(table) == []
    assert [page.page_id for page in find_pages(table, page_ids=[9, 10, 5])] == [9, 10]  # a redirect by its id
    assert [page.page_id for page in find_pages(table, titles=[f"Rival {HOSTILE}", "Page 8"])] == [8, 11]
    assert [page.lead for page in find_pages(table, [9], ["Page 8"])] == ["Lead 8.", "Lead 9."]


def test_excerpts_end_between_words() -> None:
    assert excerpt_of("short  text\n here", 15) == "short text here"
    assert excerpt_of("one two, three", 10) == "one two …"
    assert excerpt_of("one two, three", 8) == "one two …"
    assert len(excerpt_of("word " * 500, 700)) <= 702
