"""Files that are no whole dump: refused before anything is read, in one line."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from kellm_features.errors import DataError
from kellm_spark.dump import Site, check_dump
from kellm_spark.dump.rows import NO_ID, NOT_UTF8, NOT_XML, Rows

from .dumps import DUMP, NAMESPACES, page, write


def cut_at_stream(data: bytes) -> bytes:
    """The multistream dump without its last two streams: every stream that is left is whole."""
    return data[: data.rfind(b"BZh9", 0, data.rfind(b"BZh9"))]


BOMB = b'<!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
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
    "gzip": ("wiki.xml", b"\x1f\x8b\x08" + b"x" * 400, "is compressed as gzip: decompress it"),
    "utf-16": ("wiki.xml", DUMP.encode("utf-16"), "is UTF-16"),
    "utf-16 unmarked": ("wiki.xml", DUMP.encode("utf-16-le"), "is UTF-16"),
    "latin-1": ("wiki.xml", b'<?xml version="1.0" encoding="ISO-8859-1"?>' + DUMP.encode(), "the encoding ISO-8859-1"),
    "latin-1 names": (
        "wiki.xml",
        DUMP.encode("latin-1", "xmlcharrefreplace").replace(b"Fails", b"F\xe4il"),
        "not UTF-8",
    ),
    "entity bomb": ("wiki.xml", BOMB + DUMP.encode(), "declares a document type"),
    "entity bomb in bz2": ("wiki.xml.bz2", bz2.compress(BOMB + DUMP.encode()), "declares a document type"),
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
    assert check_dump(path) == Site("ltgwiki", "ltg", NAMESPACES)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(DataError, match="cut off"):
        check_dump(path)
    path.write_bytes(cut_at_stream(whole))
    with pytest.raises(DataError, match="is cut off: it ends with"):
        check_dump(path)


@pytest.mark.parametrize("name", ["none.xml", "none.xml.bz2"])
def test_a_missing_dump_is_refused(tmp_path: Path, name: str) -> None:
    for path in (str(tmp_path / name), (tmp_path / name).as_uri()):
        with pytest.raises(DataError, match=r"none\.xml.* cannot be read"):
            check_dump(path)
    with pytest.raises(DataError, match=r"nfs://host/x\.xml cannot be opened"):
        check_dump("nfs://host/x.xml")


BILLION = "<!DOCTYPE page [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY a{n} '{f'&a{n - 1 or str()};' * 10}'>" for n in range(1, 10)
) + "]>"  # fmt: skip
WHOLE = page(7, "Heat", "A ''film'' é.").strip().encode()
FETCH = b'<!DOCTYPE page [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
SPOILT = {
    "undefined entity": (WHOLE.replace(b"film", b"&bomb;"), NOT_XML),
    "entity bomb": (WHOLE.replace(b"<page>", b"<page>" + BILLION.encode()).replace(b"film", b"&a9;"), NOT_XML),
    "external entity": (WHOLE.replace(b"<page>", b"<page>" + FETCH).replace(b"film", b"&x;"), NOT_XML),
    "unclosed title": (WHOLE.replace(b"</title>", b""), NOT_XML),
    "nested without end": (WHOLE.replace(b"film", b"<a>" * 100_000), NOT_XML),
    "latin-1": (WHOLE.replace("é".encode(), b"\xe9"), NOT_UTF8),
    "cut character": (WHOLE.replace("é".encode(), "é".encode()[:1]), NOT_UTF8),
    "surrogate": (WHOLE.replace(b"film", b"\xed\xa0\x80"), NOT_UTF8),
    "surrogate reference": (WHOLE.replace(b"film", b"&#xD800;"), NOT_XML),
    "control character": (WHOLE.replace(b"film", b"\x00"), NOT_XML),
    "no title": (WHOLE.replace(b"<title>Heat</title>", b""), NO_ID),
    "empty title": (WHOLE.replace(b"Heat", b""), NO_ID),
    "no id": (WHOLE.replace(b"<id>7</id>", b""), NO_ID),
    "id of letters": (WHOLE.replace(b"<id>7</id>", b"<id>seven</id>"), NO_ID),
    "id of 30 digits": (WHOLE.replace(b"<id>7</id>", b"<id>" + b"7" * 30 + b"</id>"), NO_ID),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_page_is_a_skipped_row(case: str) -> None:
    element, reason = SPOILT[case]
    rows = Rows(Site("enwiki", "en", {0: ""}), lead_only=False)
    assert rows.row(WHOLE, None)["lead"] == "A film é."
    row = rows.row(element, None)
    assert (row["skipped"], row["wiki_page_id"], row["lead"]) == (reason, None, "")
    assert len(row["wiki_title"]) < 70
    assert rows.row(WHOLE, None)["skipped"] is None  # the parser is as it was
