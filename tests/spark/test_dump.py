"""What is read of a dump, however it is cut into files, streams and splits."""

from __future__ import annotations

import bz2
import io
import random
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.errors import DataError
from kellm_spark.dump import check_parts, read_dump
from kellm_spark.dump import reading as reading_module
from kellm_spark.dump.bzip2 import blocks, last_text
from kellm_spark.dump.files import find_index, find_parts
from kellm_spark.dump.pages import MAX_PAGE_BYTES, TOO_LARGE, UNCLOSED, pages_in, plan_splits, read_pages

from .dumps import DUMP, END, PAGES, SITEINFO, page, write

KINDS = ["xml", "bz2", "multistream"]
NOISE = random.Random(3).randbytes(400_000)


@pytest.mark.spark
@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_article(spark, tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(reading_module, "SPLIT_BYTES", {"bz2": 900, "xml": 5000})  # pages then straddle the splits
    rows = {row.wiki_page_id: row for row in read_dump(spark, write(tmp_path, kind)).collect()}
    assert sorted(rows) == [1, 2, 3, 4, 6, *range(100, 160)]
    film = rows[1]
    assert film.wiki_title == "Heat (1995 film)"
    assert film.lead == "Heat is a 1995 film by Michael Mann."
    assert [(s.name, s.text) for s in film.sections] == [("Plot", "A robbery </page> & a chase.")]
    assert (film.categories, film.evidence, film.year) == (["1995 films"], ["film"], 1995)
    assert (film.display_title, film.redirect_to, film.is_disambiguation) == (None, None, False)
    assert (rows[2].wiki_title, rows[2].evidence, rows[2].year) == ("Heat & Dust", ["book"], 1975)
    assert rows[3].is_disambiguation
    assert rows[4].redirect_to == "Heat (1995 film)"
    assert rows[4].lead == ""
    assert rows[6].is_disambiguation
    assert "Ķīna 中国 𝄞" in rows[6].lead
    assert rows[159].lead == ("Filler number 59. " * 40).strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split_bytes", [1, 3, 50, 700, 1 << 30])
def test_splits_share_the_pages_out(tmp_path: Path, kind: str, split_bytes: int) -> None:
    path = str(write(tmp_path, kind))
    size = Path(path).stat().st_size
    if size / split_bytes > 5000:
        split_bytes = size // 5000
    found = [one for split in plan_splits({path: size}, split_bytes) for one in read_pages(split)]
    assert found == [(element.encode(), None) for element in re.findall("<page>.*?</page>", DUMP, re.DOTALL)]


def several_streams() -> bytes:
    """Streams of several blocks and of none, at different levels; noise makes blocks end at any bit."""
    texts = [NOISE, b"", DUMP.encode() * 40, b"a" * 3_000_000, NOISE[:5], b""]
    return b"".join(bz2.compress(text, level) for text, level in zip(texts, (1, 9, 5, 9, 1, 2), strict=True))


def test_blocks_are_the_text_from_any_byte() -> None:
    data = several_streams()
    every = list(blocks(io.BytesIO(data), "x", 0, len(data)))
    assert b"".join(text for _, text in every) == bz2.decompress(data)
    assert len(every) > 8
    starts = {begin + shift for begin, _ in every for shift in (-1, 0, 1)} | set(range(0, len(data), len(data) // 20))
    for start in sorted(starts):
        assert list(blocks(io.BytesIO(data), "x", start, len(data))) == [b for b in every if b[0] >= start]
    assert last_text(io.BytesIO(data), "x", len(data), 100) == bz2.decompress(data)[-100:]


@pytest.mark.parametrize("seed", range(30))
def test_no_damage_of_bz2_goes_unseen(seed: int) -> None:
    """A bit turned, bytes lost, gained or doubled anywhere: an error, or the text as it was."""
    draw = random.Random(seed)
    data = several_streams()
    place, length = draw.randrange(len(data)), draw.choice([1, 2, 50, 5000])
    kind = ("turned", "lost", "gained", "doubled", "cut")[seed % 5]
    if kind == "turned":
        spoilt = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    elif kind == "lost":
        spoilt = data[:place] + data[place + length :]
    elif kind == "gained":
        spoilt = data[:place] + draw.randbytes(length) + data[place:]
    elif kind == "doubled":
        spoilt = data[:place] + data[max(place - length, 0) :]
    else:
        spoilt = data[: -draw.choice([1, 3, 9, 14, 200])]
    found = blocks(io.BytesIO(spoilt), "wiki.xml.bz2", 0, len(spoilt))
    text, told = b"", ""
    try:
        text = b"".join(text for _, text in found)
    except DataError as error:
        told = str(error)
    # Unseen may go a stream's level, its padding, or its own checksum on top of those of its blocks: no text.
    assert text == bz2.decompress(data) or re.match(r"wiki\.xml\.bz2 is (damaged or cut off at|not readable)", told)


TEXT = "".join(PAGES[:8]).encode()


@given(st.lists(st.integers(0, len(TEXT)), max_size=12), st.integers(0, len(TEXT)))
def test_pages_do_not_depend_on_the_pieces(cuts: list[int], ours: int) -> None:
    """The first task reads what begins before `ours`, the second the rest, as a reader of all would."""
    edges = sorted({0, len(TEXT), ours, *cuts})
    pieces = [(TEXT[a:b], a < ours) for a, b in pairwise(edges)]
    first = list(pages_in(pieces))
    second = list(pages_in([(piece, True) for piece, mine in pieces if not mine]))
    assert first + second == [(found, None) for found in re.findall(b"<page>.*?</page>", TEXT, re.DOTALL)]


def test_a_page_of_100_mb_is_passed_over_in_little_memory() -> None:
    def pieces():
        yield b"<page><title>Huge</title>", True
        for _ in range(100):
            yield b"x" * (1 << 20), True
        yield b"</page><page>small</page>", True

    tracemalloc.start()
    found = list(pages_in(pieces()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [reason for _, reason in found] == [TOO_LARGE, None]
    assert found[0][0].startswith(b"<page><title>Huge</title>x")
    assert found[1][0] == b"<page>small</page>"
    assert peak < 4 * MAX_PAGE_BYTES


def test_an_unclosed_page_takes_no_other_with_it() -> None:
    text = b"<page>one</page><page>two <page>three</page> <page>four"
    found = [(element[:11], reason) for element, reason in pages_in([(text, True)])]
    assert found == [
        (b"<page>one</", None),
        (b"<page>two <", UNCLOSED),
        (b"<page>three", None),
        (b"<page>four", UNCLOSED),
    ]


def test_parts_are_found_by_the_names_that_wikimedia_gives(tmp_path: Path) -> None:
    names = [
        "enwiki-20240101-pages-articles-multistream1.xml-p1p41242.bz2",
        "enwiki-20240101-pages-articles-multistream2.xml-p41243p151573.bz2",
        "plain.xml",
        "whole.xml.bz2",
    ]
    others = [
        "enwiki-20240101-pages-articles-multistream-index1.txt-p1p41242.bz2",
        "enwiki-20240101-md5sums.txt",
        ".whole.xml.bz2.part",
        "notes.xml.txt",
    ]
    for name in [*names, *others]:
        (tmp_path / name).write_text("x")
    paths = [str(tmp_path / name) for name in names]
    assert find_parts([tmp_path]) == paths
    assert find_parts([tmp_path / "enwiki-*.bz2"]) == paths[:2]
    assert find_parts([paths[2], paths[1], tmp_path / "plain*", tmp_path]) == paths
    assert find_parts([tmp_path.as_uri()]) == [Path(path).as_uri() for path in paths]
    assert find_parts([tmp_path.as_uri() + "/enwiki-*.bz2"]) == [Path(path).as_uri() for path in paths[:2]]
    assert find_index(paths[0]) == str(tmp_path / others[0])
    assert find_index(paths[1]) is None
    assert find_index(paths[3]) is None
    for nothing in (tmp_path / "x*.xml", tmp_path.as_uri() + "/x*.xml"):
        with pytest.raises(DataError, match=r"x\*\.xml stands for no MediaWiki dump"):
            find_parts([nothing])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "enwiki.sql.gz").write_text("x")
    with pytest.raises(DataError, match=r"stands for no MediaWiki dump \(it holds enwiki\.sql\.gz\)"):
        find_parts([tmp_path / "empty"])


@pytest.mark.spark
def test_parts_of_one_wiki_are_read_together_and_of_two_refused(spark, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one = write(tmp_path / "a", "xml", PAGES[:10])
    two = write(tmp_path / "a", "multistream", PAGES[10:])
    found = read_dump(spark, tmp_path / "a").select("wiki_page_id").collect()
    assert sorted(row[0] for row in found) == [1, 2, 3, 4, 6, *range(100, 160)]
    uri = read_dump(spark, [one.as_uri(), two.as_uri()]).select("wiki_page_id").collect()
    assert sorted(uri) == sorted(found)
    other = tmp_path / "other.xml"
    for change, what in (("ltgwiki", "dbname: ltgwiki and lvwiki"), (">Fails<", "namespaces: 5 of their own and 5")):
        other.write_text(DUMP.replace(change, {"ltgwiki": "lvwiki"}.get(change, ">Attēls<")), encoding="utf-8")
        with pytest.raises(DataError, match=rf"wiki\.xml and .*other\.xml are of different wikis \({what}"):
            check_parts([str(one), str(other)])


@pytest.mark.spark
def test_the_dump_itself_says_which_templates_disambiguate(spark, tmp_path: Path) -> None:
    texts = {
        (1, "Taiss:Škiršona", 10, None): "{{Dmbox}}<includeonly>__DISAMBIG__</includeonly>",
        (2, "Taiss:Dab jaunais", 10, "Taiss:Škiršona"): "#REDIRECT [[Taiss:Škiršona]]",
        (3, "Taiss:Vuords", 10, None): "Nas.<noinclude>It is no __DISAMBIG__ page, nor <nowiki>__DISAMBIG__</nowiki>.",
        (4, "Grybuli", 0, None): "Grybuli:\n* sola\n{{škiršona}}",
        (5, "Roksts", 0, None): "Roksts:\n{{Dab_jaunais|x}}",
        (6, "Process", 0, None): "Process:\n{{Taiss:Škiršona}}",
        (7, "Cylvāks", 0, None): "Cylvāks {{Vuords}} {{Škiršona cyta}}.",
        (8, "Grybuli (sola)", 0, "Grybuli"): "#REDIRECT [[Grybuli]] {{Škiršona}}",
    }
    pages = [page(n, title, text, space, to) for (n, title, space, to), text in texts.items()]
    found = read_dump(spark, write(tmp_path, "xml", pages)).collect()
    assert {row.wiki_page_id: row.is_disambiguation for row in found} == {
        4: True, 5: True, 6: True, 7: False, 8: False
    }  # fmt: skip


def test_without_namespaces_only_english_is_known(tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml"
    start = SITEINFO[: SITEINFO.index("  <siteinfo>")]
    path.write_text(start.replace('"ltg"', '"en"') + PAGES[0] + END, encoding="utf-8")
    assert check_parts([str(path)]).namespaces == {}
    path.write_text(start + PAGES[0] + END, encoding="utf-8")
    with pytest.raises(DataError, match=r"has no <siteinfo> with <namespaces>, and its language is 'ltg'"):
        check_parts([str(path)])
