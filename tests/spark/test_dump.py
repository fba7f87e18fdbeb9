"""Dumps written by hand: what is read, and what is refused before a row is made."""

from __future__ import annotations

import bz2
import html
from pathlib import Path

import pytest

from kellm_features.errors import DataError
from kellm_spark.dump import check_dump, read_dump
from kellm_spark.session import data_errors

SITEINFO = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ltg">
  <siteinfo>
    <sitename>Vikipedeja</sitename>
    <namespaces>
      <namespace key="-2" case="first-letter">Medeja</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Fails</namespace>
      <namespace key="14" case="first-letter">Kategoreja</namespace>
    </namespaces>
  </siteinfo>
"""


def page(page_id: int, title: str, text: str, namespace: int = 0, redirect: str | None = None) -> str:
    lead_to = f'    <redirect title="{html.escape(redirect)}" />\n' if redirect else ""
    return (
        f"  <page>\n    <title>{html.escape(title)}</title>\n    <ns>{namespace}</ns>\n    <id>{page_id}</id>\n"
        f"{lead_to}"
        f'    <revision>\n      <id>{page_id}9</id>\n      <model>wikitext</model>\n      <text bytes="{len(text)}" '
        f'xml:space="preserve">{html.escape(text, quote=False)}</text>\n    </revision>\n  </page>\n'
    )


FILM = """{{Infobox film
| name = Heat
| released = {{Film date|1995|12|15}}
}}
'''''Heat''''' is a 1995 film by [[Michael Mann]].<ref>a & b</ref>
[[Fails:Heat.jpg|thumb|x]]
== Plot ==
A robbery <nowiki></page></nowiki> & a chase.
[[Kategoreja:1995 films]]
"""
PAGES = [
    page(1, "Heat (1995 film)", FILM),
    page(2, "Heat & Dust", "A ''novel''.\n[[Category:1975 novels]]"),
    page(3, "Heat (disambiguation)", "'''Heat''' may be:\n* [[Heat (1995 film)]]\n{{disambig}}"),
    page(4, "Heat (Mann)", "#REDIRECT [[Heat (1995 film)]]", redirect="Heat (1995 film)"),
    page(5, "Sprīža:Heat", "talk", namespace=1),
    page(6, "Sasaļšona", "__DISAMBIG__ Unicode: Ķīna 中国 𝄞"),
    *(page(100 + n, f"Filler {n}", f"Filler number {n}. " * 40) for n in range(60)),
]
DUMP = SITEINFO + "".join(PAGES) + "</mediawiki>\n"


def write(path: Path, kind: str) -> Path:
    if kind == "xml":
        path = path / "wiki.xml"
        path.write_text(DUMP, encoding="utf-8")
    elif kind == "bz2":
        path = path / "wiki.xml.bz2"
        path.write_bytes(bz2.compress(DUMP.encode()))
    else:  # the way Wikimedia does it: header, hundreds of pages a stream, footer, each a stream of its own
        path = path / "wiki-multistream.xml.bz2"
        parts = [SITEINFO, *("".join(PAGES[n : n + 7]) for n in range(0, len(PAGES), 7)), "</mediawiki>\n"]
        path.write_bytes(b"".join(bz2.compress(part.encode()) for part in parts))
    return path


@pytest.mark.spark
@pytest.mark.parametrize("kind", ["xml", "bz2", "multistream"])
def test_reads_every_article(spark, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    before = spark.conf.get("spark.sql.files.maxPartitionBytes")
    spark.conf.set("spark.sql.files.maxPartitionBytes", "5000")  # pages then straddle the splits
    try:
        rows = {row.wiki_page_id: row for row in read_dump(spark, path).collect()}
    finally:
        spark.conf.set("spark.sql.files.maxPartitionBytes", before)
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


def cut_at_stream(data: bytes) -> bytes:
    """The multistream dump without its last two streams: every stream that is left is whole."""
    return data[: data.rfind(b"BZh9", 0, data.rfind(b"BZh9"))]


REFUSED = {
    "empty": ("wiki.xml", b"", "is empty"),
    "text": ("wiki.xml", b"title,text\nHeat,film\n", "is not a MediaWiki dump: it starts with 'title,text Heat,film'"),
    "html": ("wiki.xml", b"<!DOCTYPE html><html></html>", "is not a MediaWiki dump"),
    "cut xml": ("wiki.xml", DUMP[: len(DUMP) // 2].encode(), "is cut off"),
    "cut after a page": ("wiki.xml", DUMP[: DUMP.rindex("</page>") + 8].encode(), "is cut off: it ends with"),
    "cut bz2": ("wiki.xml.bz2", bz2.compress(DUMP.encode())[:-30], "is cut off"),
    "bz2 of cut xml": ("wiki.xml.bz2", bz2.compress(DUMP.encode()[:9000]), "and not with </mediawiki>"),
    "damaged bz2": ("wiki.xml.bz2", b"BZh91AY&SY" + b"x" * 400, "damaged|not readable"),
    "not bz2": ("wiki.xml.bz2", DUMP.encode(), "is not bz2"),
    "not named bz2": ("wiki.xml", bz2.compress(DUMP.encode()), "is bz2-compressed"),
    "utf-16": ("wiki.xml", DUMP.encode("utf-16"), "is UTF-16"),
    "latin-1": ("wiki.xml", b'<?xml version="1.0" encoding="ISO-8859-1"?>' + DUMP.encode(), "the encoding ISO-8859-1"),
    "entity bomb": (
        "wiki.xml",
        b'<!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + DUMP.encode(),
        "declares a document type",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_read(tmp_path: Path, case: str) -> None:
    name, data, says = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        check_dump(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [1, 5, 14, 40, 300])
def test_a_multistream_dump_that_stops_early_is_refused(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, "multistream")
    assert check_dump(path) == {-2: "Medeja", 0: "", 6: "Fails", 14: "Kategoreja"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(DataError, match="is cut off"):
        check_dump(path)
    path.write_bytes(cut_at_stream(whole))
    with pytest.raises(DataError, match="is cut off: it ends with"):
        check_dump(path)


def test_a_missing_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        check_dump(tmp_path / "none.xml")


@pytest.mark.spark
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda dump: dump.replace("Filler number 7. Filler", "&bomb; Filler", 1), "no XML"),
        (lambda dump: dump.replace("<title>Filler 9</title>", "<title>Filler 9", 1), "no XML"),
        (lambda dump: dump.replace("<title>Filler 9</title>", "", 1), "without <title> or <id>"),
    ],
)
def test_a_broken_page_is_an_error_and_never_a_missing_row(spark, tmp_path: Path, spoil, says: str) -> None:
    path = tmp_path / "wiki.xml"
    path.write_text(spoil(DUMP), encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught, data_errors():
        read_dump(spark, path).collect()
    assert "\n" not in str(caught.value)
