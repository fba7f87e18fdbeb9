"""The page itself: its numbers, what it leaves out, and what it does not let through."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kellm_features.errors import ArtifactError
from kellm_features.report.html import SECTIONS, write_report
from kellm_features.settings import Settings

HOSTILE = "<script>alert('x')</script>"
LINKS = [
    (1, 7, "One", 0.75, "exact", None, None),
    (2, 8, "Page 8", 1.0, "exact", None, None),
    (3, 9, "Page 9", 0.91, "fuzzy", None, None),
    *((n, None, None, 0.0, None, None, "no page of that name") for n in range(4, 13)),
]
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Text per section, and all tags with their attributes; every tag must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[str]] = {"": []}
        self.scripts: list[str] = []
        self.at = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
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
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.sections[self.at].append(data)

    def text(self, section: str = "") -> str:
        return " ".join(" ".join(self.sections[section]).split())


@pytest.fixture
def page(make_run: Callable[..., Path]) -> Page:
    return Page(write_report(make_run(), Settings()))


def test_headline_figures(page: Page) -> None:
    told = page.text()
    assert "Items served 12 of 12 in the catalogue" in told
    assert "Linked to Wikipedia 25.0 % 3 of 12 items have a Wikipedia page" in told
    assert "Described by the LLM 3 9 by template" in told
    assert "Test AUC 0.6377" in told
    assert "Embedding version v-123 2 dimensions, float32" in told


def test_stage_table(page: Page) -> None:
    told = page.text("stages")
    assert "ingest 12,345 12 42 1.2 2.5 100 item not in the catalogue 42 swing 20 12 0" in told  # no drop of 0 rows
    assert "publish 20 12 0 1,000.5 2.5 100" in told
    assert "all stages 1,010.5 22.5 100" in told  # 8 x 1.25 + 1000.5, 9 x 2.5


def test_links(page: Page) -> None:
    told = page.text("links")
    assert "3 of 12 items are linked to a page; 68.2 % of the training interactions" in told  # (6 + 5 + 4) / 22
    assert f"no page of that name such as Item 5 (1995), Item 6 (1996), Item 7 (1997) 8 66.7 % tie {HOSTILE}" in told
    assert "exact 2 16.7 % fuzzy 1 8.3 %" in told


def test_an_item_with_several_pages_counts_once(make_run: Callable[..., Path]) -> None:
    links = [(1, 8, "Page 8", 0.9, "mention", None, None), (1, 9, "Page 9", 0.8, "mention", None, None)]
    page = Page(write_report(make_run("ingest", "wiki", "link", links=[*links, *LINKS[1:]]), Settings()))
    assert "3 of 12 items are linked to a page; 68.2 % of" in page.text("links")
    assert "exact 1 8.3 % fuzzy 1 8.3 % mention 1 8.3 %" in page.text("links")
    assert "Linked to Wikipedia 25.0 % 3 of 12 items have a Wikipedia page" in page.text()


def test_descriptions_stand_beside_their_source(page: Page) -> None:
    told = page.text("descriptions")
    assert "template 9 75.0 % llm 3 25.0 %" in told
    first = told[told.index("One (1991) llm") :]
    assert f"Text 1 {HOSTILE} Page: One {HOSTILE} One is a film {HOSTILE} about counting. word" in first
    assert "Lead 8." in told
    assert "Item 4 (1994) llm" in told  # the LLM's best-known item without a page
    assert f"No page is linked (tie {HOSTILE}): the title and the catalogue's fields were all that was given." in told
    assert "SmolLM2-135M is there to try the path out" in told


def test_swing(page: Page) -> None:
    """Within the first 20, item 11 stands in three lists, items 6 and 2 in one, of 12 items."""
    told = page.text("swing")
    assert "pairs 6 2" in told
    assert "with neighbours 4 2" in told
    assert "in all 12 6" in told
    assert "most lists for one 3 1" in told
    assert "held by the top 1 % 60.0 % 50.0 %" in told
    assert "in no list 9 4" in told
    assert "Item 11 (2001) 3 25.0 %" in told


def test_training(page: Page) -> None:
    told = page.text("training")
    assert "The weights of epoch 2 of 3 were kept" in told
    assert "validation 0.6489 0.6100 0.6000 test 0.6377 0.6213 0.5921" in told
    assert "validation, 2: 0.6489" in told
    assert len([tag for tag, attributes in page.tags if tag == "polyline"]) == 4  # click loss, items, users, AUC


def test_map(page: Page) -> None:
    points = [attributes for tag, attributes in page.tags if tag == "circle" and "data-i" in attributes]
    assert len(points) == 2 * 12
    assert {point["data-i"] for point in points} == {str(n) for n in range(12)}
    told = page.text("map")
    assert "All 12 items" in told
    assert "Comedy 6 Drama 6" in told
    assert "Item 12 (2002): Comedy, War" in told


def test_neighbours(page: Page) -> None:
    told = page.text("neighbours")
    assert "One (1991) 6 training interactions" in told
    assert f"Two {HOSTILE} (1992) 0.985 Three (1993) 0.906" in told  # cos 10°, cos 25°
    assert "Item 11 (2001) 0.999 Item 6 (1996) 0.998" in told  # cos 2°, cos 4°
    marked = [attributes for tag, attributes in page.tags if tag == "li" and attributes.get("class") == "swing"]
    assert len(marked) >= 2


def test_fetching_code_runs_as_printed(page: Page) -> None:
    told = page.text("fetch")
    code = told[told.index("from feast") : told.index("Or on the command line")]
    assert 'FeatureStore("/data/feature repo")' in code
    assert 'entity_rows=[{"item_id": 1}, {"item_id": 2}, {"item_id": 3}]' in code
    (block,) = re.findall(r"<pre><code>(from feast.*?)</code>", page.source, re.DOTALL)
    compile(block.replace("&#34;", '"'), "snippet", "exec")
    assert "kellm fetch 1 2 3 --repo '/data/feature repo'" in told
    (block,) = re.findall(r"<pre><code>(from kellm_features.*?)</code>", page.source, re.DOTALL)
    compile(block.replace("&#34;", '"'), "snippet", "exec")
    assert "reader.get([1, 2, 3])" in block
    assert "+2.0000 +0.0000" in told


def test_the_version_and_its_gates(page: Page) -> None:
    told = page.text("version")
    assert "Version v-123 was promoted: it is what readers got from then on." in told
    assert "item_knowledge_embedding 12" in told
    assert "The gates, against v-122:" in told
    assert "coverage passed 0.975 ≥ 0.95 39 of 40 ids" in told


def test_manifests(page: Page) -> None:
    settings = json.loads(re.findall(r"resolved settings (\{.*?\}) ingest \{", page.text("manifest"))[0])
    assert Settings.model_validate(settings) == Settings()
    assert '"run_id": "run-train"' in page.text("manifest")


def test_text_from_outside_stays_text(page: Page) -> None:
    assert HOSTILE not in page.source
    assert "<script>alert" not in page.source
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_needs_no_network_and_allows_none(page: Page) -> None:
    assert not any({"src", "srcset"} & set(attributes) for _, attributes in page.tags)
    assert all((attributes["href"] or "").startswith("#") for _, attributes in page.tags if "href" in attributes)
    assert "link" not in {tag for tag, _ in page.tags}
    told = page.source.replace(Settings().generate.server.base_url, "")  # a setting, shown as text
    assert not re.search(r"url\(|@import|https?:", told)
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


NEEDS = {
    "stages": (),
    "links": ("ingest", "link"),
    "review": ("ingest", "link"),
    "descriptions": ("ingest", "generate"),
    "swing": ("ingest", "swing"),
    "training": ("train",),
    "map": ("ingest", "encode", "export"),
    "neighbours": ("ingest", "swing", "encode", "export"),
    "version": ("publish",),
    "fetch": ("ingest", "export", "publish"),
    "manifest": (),
}


@pytest.mark.parametrize(
    "stages",
    [
        ("ingest",),
        ("ingest", "swing"),
        ("wiki",),
        ("ingest", "wiki", "link", "generate"),
        ("ingest", "generate"),
        ("ingest", "swing", "encode", "train", "export"),
    ],
)
def test_a_missing_stage_leaves_one_line(make_run: Callable[..., Path], stages: tuple[str, ...]) -> None:
    page = Page(write_report(make_run(*stages), Settings()))
    for section in SECTIONS:
        missing = [stage for stage in NEEDS[section] if stage not in stages]
        told = re.findall(
            r"The stage '(\w+)' has not run yet\. Run kellm run --out \S+ --until (\w+)", page.text(section)
        )
        assert len(told) == (1 if missing else 0), section
        assert all(name == until and name in missing for name, until in told)
    assert "not run yet" in page.text("stages")


def test_a_file_that_is_gone_is_one_line_too(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "swing/user_pairs.parquet").unlink()
    assert "is missing although the stage 'swing' finished" in Page(write_report(run, Settings())).text("swing")


def test_no_stage_at_all(make_run: Callable[..., Path]) -> None:
    run = make_run()
    empty = run.parent / "empty"
    with pytest.raises(ArtifactError, match="holds no finished stage to report on"):
        write_report(empty, Settings())
    assert not empty.exists()


def test_a_page_that_is_up_to_date_is_left_alone(make_run: Callable[..., Path]) -> None:
    run = make_run("ingest", "wiki")
    path = write_report(run, Settings())
    os.utime(path, (1, 1))
    assert write_report(run, Settings()) == path
    assert path.stat().st_mtime == 1
    write_report(run, Settings.model_validate({"run": {"seed": 8}}))
    assert path.stat().st_mtime > 1
    assert [file.name for file in run.iterdir() if file.is_file()] == ["report.html"]


def test_edited_overrides_make_a_new_page(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Decisions saved from a page that knows an older file would undo the edit."""
    run = make_run("ingest", "wiki", "link")
    overrides = tmp_path / "overrides.csv"
    overrides.write_text("item_id,page,note\n1,none,\n", encoding="utf-8")
    settings = Settings.model_validate({"link": {"overrides": overrides}})
    before = write_report(run, settings).read_bytes()
    assert write_report(run, settings).read_bytes() == before
    overrides.write_text("item_id,page,note\n1,8,\n", encoding="utf-8")
    assert write_report(run, settings).read_bytes() != before


def test_a_failure_leaves_the_old_page(make_run: Callable[..., Path]) -> None:
    run = make_run("ingest")
    before = write_report(run, Settings()).read_bytes()
    (run / "ingest/manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not a manifest"):
        write_report(run, Settings())
    assert (run / "report.html").read_bytes() == before
