"""Descriptions beside their sources: their order, what is marked in them, and what the model was asked for."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.knowledge.grounding import grounding
from kellm_features.report.html import write_report
from kellm_features.report.sections import knowledge
from kellm_features.report.sections.knowledge import Descriptions, Sample, descriptions
from kellm_features.report.view import RunView
from kellm_features.settings import Settings

STAGES = ("ingest", "wiki", "link", "generate")
MakeRun = Callable[..., Path]


def row(item: int, text: str, score: float | None = None, source: str = "llm", **more: object) -> dict[str, object]:
    return {"item_id": item, "description": text, "description_source": source, "grounding": score, **more}


def told(run: Path) -> Descriptions:
    return descriptions(RunView(run, Settings()))


def rendered(run: Path) -> str:
    """The section's HTML."""
    page = write_report(run, Settings()).read_text(encoding="utf-8")
    (section,) = re.findall(r'<section id="descriptions">.*?</section>', page, re.DOTALL)
    return str(section)


def words(markup: str) -> str:
    """What a person reads of it."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def marked(markup: str) -> list[str]:
    """The marked texts, without the word that explains the mark."""
    found = re.findall(r'<mark title="not in the page">(.*?)</mark>', markup)
    assert found[0] == "Marked"
    return [html.unescape(text) for text in found[1:]]


def whole(sample: Sample) -> str:
    return "".join(part.text for part in sample.parts)


def test_what_the_page_does_not_hold_is_marked(make_run: MakeRun) -> None:
    """Item 2's page is "Page 8" with the lead "Lead 8."; its title is "Two <script>…" of 1992."""
    text = "Two <b>Jane Evil</b> & Orson Welles made Two in 1992, not in 1934, says Page 8."
    run = make_run(*STAGES, generate={"rows": [row(2, text, 0.5)]})
    section = rendered(run)
    (worst, known) = re.findall(r'<div class="pair">.*?</p>', section, re.DOTALL)
    assert worst == known
    assert marked(section)[:3] == ["Jane Evil", "Orson Welles", "1934"]
    assert "&lt;b&gt;<mark" in worst
    assert "<b>" not in section
    (paragraph,) = re.findall(r"<p>(.*?)</p>", worst)
    assert html.unescape(re.sub(r"</?mark[^>]*>", "", paragraph)) == text
    assert "3 of 5 not in the page" in words(section)  # Jane Evil, Orson Welles, 1992, 1934, Page 8
    assert "grounding 0.50" in words(section)
    assert 'style="width:50.00%"' in section


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r")), st.text())
def test_no_letter_is_lost_or_doubled(text: str, source: str) -> None:
    text = f"Ann Lee {text} in 1984 by Orson Welles"
    claims = grounding(text, source).unsupported
    parts = knowledge._parts(text, claims)
    assert "".join(part.text for part in parts) == text
    assert [part.text for part in parts if part.is_marked] == [text[claim.start : claim.end] for claim in claims]


def test_worst_first(make_run: MakeRun) -> None:
    """A template's score of 0 does not count beside a model's; of equals the better-known item comes first."""
    scores = {4: 0.75, 3: 0.25, 2: 0.5, 1: 0.5}
    rows = [row(item, "A text.", score) for item, score in scores.items()]
    rows += [row(5, "A text.", 0.0, "template"), row(6, "A text.")]
    run = make_run(*STAGES, generate={"rows": rows})
    found = told(run)
    assert [sample.score for sample in found.worst] == [0.25, 0.5, 0.5, 0.75]
    assert [sample.label[:3] for sample in found.worst] == ["Thr", "One", "Two", "Ite"]
    assert "All 4 scored descriptions from llm" in words(rendered(run))


def test_of_many_the_worst(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge, "WORST", 2)
    run = make_run(*STAGES, generate={"rows": [row(item, "A text.", item / 4) for item in (3, 2, 1)]})
    assert [sample.score for sample in told(run).worst] == [0.25, 0.5]
    assert "The 2 lowest scores of 3 descriptions from llm" in words(rendered(run))


def test_among_zeros_what_is_false_comes_before_what_says_nothing(make_run: MakeRun) -> None:
    rows = [row(1, "It is nice to see.", 0.0), row(2, "By Orson Welles.", 0.0)]
    run = make_run(*STAGES, generate={"rows": rows})
    assert [whole(sample) for sample in told(run).worst] == ["By Orson Welles.", "It is nice to see."]
    section = words(rendered(run))
    assert "1 of 1 not in the page" in section
    assert "nothing to check" in section


def test_without_a_model_the_templates_are_shown(make_run: MakeRun) -> None:
    rows = [row(1, "By Orson Welles.", 0.0, "template"), row(2, "A text.", None, "template")]
    found = told(make_run(*STAGES, generate={"rows": rows}))
    assert [(sample.source, whole(sample)) for sample in found.worst] == [("template", "By Orson Welles.")]
    assert found.figures == ()


def test_no_score_at_all(make_run: MakeRun) -> None:
    run = make_run(*STAGES, generate={"rows": [row(5, "By Orson Welles in 1934.")]})
    found = told(run)
    assert (found.worst, found.histograms) == ((), ())
    section = rendered(run)
    assert "<mark" not in section
    assert "Worst grounding first" not in section
    assert "No page is linked (no page of that name)" in words(section)


def test_all_pages_of_an_item_are_its_source(make_run: MakeRun) -> None:
    """The better link stands first, and what either page holds is not marked."""
    links = [(1, 8, "Page 8", 0.8, "mention", None, None), (1, 9, "Page 9", 0.9, "mention", None, None)]
    rows = [row(1, "Page 8 is by Orson Welles. Page 9 is not.", 0.5)]
    run = make_run(*STAGES, links=links, generate={"rows": rows})
    (sample,) = told(run).worst
    assert [(page.title, page.lead) for page in sample.pages] == [("Page 9", "Lead 9."), ("Page 8", "Lead 8.")]
    assert (sample.missing, sample.claims) == (1, 3)
    assert marked(rendered(run)) == ["Orson Welles"] * 2


def test_pages_that_are_gone(make_run: MakeRun) -> None:
    """Nothing is marked where there is nothing to look it up in."""
    run = make_run("ingest", "link", "generate", generate={"rows": [row(1, "By Orson Welles.", 0.25)]})
    assert marked(rendered(run)) == []
    assert "The linked page is not among the pages read." in words(rendered(run))


def test_factors_replace_the_text_that_they_make(make_run: MakeRun) -> None:
    text = "One (1991). Director: Orson Welles. Theme: counting <b>."
    factors = [("director", "Orson Welles"), ("theme", "counting <b>")]
    run = make_run(*STAGES, generate={"rows": [row(1, text, 0.5, factors=factors)]})
    section = rendered(run)
    assert "<dt>director</dt><dd><mark" in section
    assert "<dt>theme</dt><dd>counting &lt;b&gt;</dd>" in section
    assert section.count("Orson Welles") == 2  # among the worst and among the well-known
    assert "Director: " not in words(section)


def test_factors_beside_a_text_of_its_own(make_run: MakeRun) -> None:
    rows = [row(1, "A film about counting.", 1.0, "template", factors=[("director", "Orson Welles")])]
    (sample,) = told(make_run(*STAGES, generate={"rows": rows})).worst
    assert whole(sample) == "A film about counting."
    assert [(name, [part.text for part in parts]) for name, parts in sample.factors] == [("director", ["Orson Welles"])]


def test_histograms_by_source(make_run: MakeRun) -> None:
    """A score of 0.7, in float32 a little less, belongs to the step from 0.7 to 0.8; 1 to the last step."""
    scores = (0.0, 0.05, 0.1, 0.7, 0.95, 1.0)
    rows = [row(item, "A text.", score) for item, score in enumerate(scores, 1)]
    rows += [row(7, "A text.", 0.25, "extract"), row(8, "A text.")]
    run = make_run(*STAGES, generate={"rows": rows})
    llm, extract = told(run).histograms
    assert (llm.source, llm.scored, llm.counts) == ("llm", 6, (2, 1, 0, 0, 0, 0, 0, 1, 0, 2))
    assert llm.mean == pytest.approx(2.8 / 6)
    assert (extract.source, extract.scored, extract.counts) == ("extract", 1, (0, 0, 1, 0, 0, 0, 0, 0, 0, 0))
    assert "llm 6 · mean 0.47" in words(rendered(run))


def test_the_least_grounding_of_the_run_is_told(make_run: MakeRun) -> None:
    """That of the run, whatever the settings say now."""
    config = {"generate": {"min_grounding": 0.375}}
    run = make_run(*STAGES, generate={"rows": [row(1, "A text.", 0.5)], "config": config})
    assert told(run).least == 0.375
    assert "An answer below 0.38 ( generate.min_grounding , the dashed line)" in words(rendered(run))


def test_no_least_grounding(make_run: MakeRun) -> None:
    config = {"generate": {"min_grounding": 0.0}}
    run = make_run(*STAGES, generate={"rows": [row(1, "A text.", 0.5)], "config": config})
    assert told(run).least is None
    assert "min_grounding" not in rendered(run)


def test_figures_that_the_manifest_lacks_are_left_out(make_run: MakeRun) -> None:
    """One row fell back to an extract, one to a template after its answer was refused, one was a template's at once."""
    rows = [
        row(1, "A text."),
        row(2, "A text.", None, "extract"),
        row(3, "A text.", None, "template", completion_tokens=9),
        row(4, "A text.", None, "template"),
    ]
    notes = {"generated": 12345, "asked_again": 3, "tokens_per_s": 83.25, "mean_grounding": {"llm": 0.5}}
    run = make_run(*STAGES, generate={"rows": rows, "notes": notes})
    assert [(figure.label, figure.value) for figure in told(run).figures] == [
        ("answers written in this run", 12345),
        ("asked for a second time", 3),
        ("items that fell back", 2),
        ("tokens of answers per second", 83.25),
    ]
    assert "answers written in this run 12,345 asked for a second time 3 items that fell back 2" in words(rendered(run))


def test_dead_letters(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge, "DEAD_LETTERS_SHOWN", 2)
    letters = [
        {"side": "user", "id": "3", "reason": "not shown"},
        {"side": "user", "id": "1", "reason": "HTTP 500 <b>"},
        {"side": "item", "id": "1", "reason": "the prompt is too long"},
    ]
    run = make_run(*STAGES, generate={"dead_letters": letters, "notes": {"dead_letters": 3}})
    section = words(rendered(run))
    assert "item 1 One (1991) the prompt is too long user 1 – HTTP 500 <b>" in section
    assert "3 requests failed for good" in section
    assert "give the same command again" in section
    assert "The first 2 of 3" in section
    assert "not shown" not in section


def test_no_dead_letters_no_table(make_run: MakeRun) -> None:
    assert "Failed requests" not in rendered(make_run(*STAGES))
