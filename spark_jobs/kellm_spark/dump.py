"""A MediaWiki dump to one row a page.

The dump is split at `</page>`, which Spark does inside bz2 too, in parallel, and each piece is one page element
for an XML parser. What Spark would read in silence is looked for first, before anything is written: a file that is
no dump, one that stops early, a document type with entities.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kellm_features.errors import DataError
from kellm_features.schemas import PAGES
from kellm_spark.evidence import kinds_of, year_of
from kellm_spark.wikitext import Article, Names, infobox, parse_article, plain_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Observation, SparkSession

HEAD_BYTES = 1 << 20
"""<siteinfo> of the largest wiki takes 20 kB."""
_STREAM_START = re.compile(rb"BZh[1-9]1AY&SY")
_END = b"</mediawiki>"
_AGAIN = "fetch it again, or compare its checksum with the one published beside it"
# The template of a disambiguation page, or of a list of namesakes, in the largest editions.
_DISAMBIGUATION = re.compile(
    r"^(?:disambig|dab$|disamb$|hndis|geodis|roaddis|schooldis|[\w -]+ disambiguation$|set index|sia$|surname"
    r"|given name$|begriffsklärung|homonymie|desambiguación|desambiguação|disambigua|ujednoznacznienie|förgrening)"
)
_SPARK_SCHEMA = (
    "wiki_page_id bigint, wiki_title string, display_title string, redirect_to string, is_disambiguation boolean, "
    "lead string, sections array<struct<name: string, text: string>>, categories array<string>, "
    "evidence array<string>, year int, namespace int"
)
_ARROW_SCHEMA = pa.schema([*PAGES.arrow(), pa.field("namespace", pa.int32())])


def read_dump(spark: SparkSession, path: Path | str, observation: Observation | None = None) -> DataFrame:
    """The articles and redirects of a MediaWiki XML dump.

    The dump's own <siteinfo> says what its namespaces are called; redirects come from the <redirect> elements.
    Templates are not expanded, and of several revisions of a page the last one counts.

    Args:
        spark: the session.
        path: `.xml` or `.xml.bz2` (one stream or many) on this machine or one that its workers share.
        observation: when given, gets `pages` (all that the dump holds) and `other_namespaces` (left out here) once
            the result is written.

    Returns:
        `schemas.PAGES`, namespace 0 only, in no particular order.

    Raises:
        DataError: the file is missing, empty, not a MediaWiki dump, not UTF-8, cut off, or declares a document type.
            What is wrong inside a page shows when the rows are made: use it inside `session.data_errors()`.
    """
    from pyspark.sql import functions as sf

    path = Path(path)
    names = Names.of(check_dump(path))
    records = spark.read.option("lineSep", "</page>").text(str(path)).where(sf.col("value").contains("<page>"))
    pages = records.mapInArrow(_page_function(names, str(path)), _SPARK_SCHEMA)
    if observation is not None:
        pages = pages.observe(
            observation,
            sf.count("*").alias("pages"),
            sf.count_if(sf.col("namespace") != 0).alias("other_namespaces"),
        )
    return pages.where("namespace = 0").drop("namespace")


def check_dump(path: Path) -> dict[int, str]:
    """Refuse a file that is no whole MediaWiki dump; return its namespaces (number -> local name).

    It reads the head and the end. Of a bz2 file with several streams, the last stream is decompressed; with a single
    one, the whole file is (15 MB/s), because nothing less shows that it is whole.

    Raises:
        DataError: see `read_dump`.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): wiki.dump is the path of a MediaWiki dump, .xml or .xml.bz2"
        ) from error
    if not start:
        raise DataError(f"{path} is empty (0 bytes): a MediaWiki dump was expected; {_AGAIN}")
    compressed = start.startswith(b"BZh")
    if compressed != (path.suffix == ".bz2"):
        seen = "bz2-compressed" if compressed else f"not bz2 (it starts with {start[:8]!r})"
        raise DataError(f"{path} is {seen}, which its name does not say: rename it to end in .xml or .xml.bz2")
    head = _head(path, compressed)
    namespaces = _check_head(path, head)
    tail = _bz2_tail(path) if compressed else _plain_tail(path)
    if not tail.rstrip().endswith(_END):
        raise DataError(f"{path} is cut off: it ends with {_shorten(tail[-60:])} and not with </mediawiki>; {_AGAIN}")
    return namespaces


def _head(path: Path, compressed: bool) -> bytes:
    try:
        with bz2.open(path) if compressed else path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except EOFError:
        raise DataError(f"{path} is cut off: its bz2 stream has no end; {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path} is not readable bz2 ({error}); {_AGAIN}") from error


def _check_head(path: Path, head: bytes) -> dict[int, str]:
    before_pages = head.partition(b"<page>")[0]
    if before_pages.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16: a MediaWiki dump is UTF-8; convert it with  iconv -f UTF-16 -t UTF-8")
    if not re.search(rb"<mediawiki[\s>]", before_pages):
        raise DataError(
            f"{path} is not a MediaWiki dump: it starts with {_shorten(head[:60])} and <mediawiki> was expected; take "
            "a pages-articles file from dumps.wikimedia.org, or one made by Special:Export"
        )
    if b"<!DOCTYPE" in before_pages or b"<!ENTITY" in before_pages:
        raise DataError(f"{path} declares a document type, which a MediaWiki dump never does: it is not read")
    declared = re.search(rb"<\?xml[^>]*encoding=[\"']([^\"']+)", before_pages)
    if declared and declared[1].lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise DataError(f"{path} declares the encoding {declared[1].decode('latin-1')}: a MediaWiki dump is UTF-8")
    found = re.findall(rb'<namespace key="(-?\d+)"[^>]*?(?:/>|>([^<]*)</namespace>)', before_pages)
    return {int(key): plain_text(name.decode("utf-8", "replace")) for key, name in found}


def _plain_tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        return file.read()


def _bz2_tail(path: Path) -> bytes:
    """The end of the text; a bz2 file that stops early or has a broken last stream is refused."""
    for start in _last_streams(path):
        decompressor = bz2.BZ2Decompressor()
        tail = b""
        with path.open("rb") as file:
            file.seek(start)
            try:
                while block := file.read(1 << 20):
                    while block:
                        tail = (tail + decompressor.decompress(block))[-4096:]
                        block = b""
                        if decompressor.eof and (block := decompressor.unused_data or file.read(1)):
                            decompressor = bz2.BZ2Decompressor()
            except OSError as error:
                if start:
                    continue  # the mark stood inside another stream: take the one before
                raise DataError(
                    f"{path} is damaged: its bz2 data cannot be decompressed ({error}); {_AGAIN}"
                ) from error
        if not decompressor.eof:
            raise DataError(f"{path} is cut off: its last bz2 stream, at byte {start:,}, has no end; {_AGAIN}")
        return tail
    raise AssertionError("a bz2 file has a stream at byte 0")


def _last_streams(path: Path) -> Iterator[int]:
    """Where bz2 streams start, last two first, then the file's start: enough, as a stream holds a hundred pages."""
    size = path.stat().st_size
    window = 64 << 20
    with path.open("rb") as file:
        begin = max(size - window, 0)
        file.seek(begin)
        marks = [begin + match.start() for match in _STREAM_START.finditer(file.read())]
    # The very last stream may hold </mediawiki> alone, so the text's end can span two.
    yield from (mark for mark in reversed(marks[-2:]) if mark)
    yield 0


def _page_function(names: Names, source: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function that turns batches of text up to `</page>` into rows, for `mapInArrow`."""

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [_page(record, names, source) for record in batch.column(0).to_pylist()]
            yield pa.RecordBatch.from_pylist(rows, schema=_ARROW_SCHEMA)

    return parse


def _page(record: str, names: Names, source: str) -> dict[str, Any]:
    from lxml import etree

    element = record[record.index("<page>") :] + "</page>"
    # No entity beyond XML's own five is resolved, none is fetched; a page may be larger than libxml2's default.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=True)
    try:
        page = etree.fromstring(element, parser)
    except etree.XMLSyntaxError as error:
        raise DataError(
            f"{source} holds a page that is no XML ({error.msg}): {_shorten(element[:80].encode())}; {_AGAIN}"
        ) from error
    title, page_id = page.findtext("title"), page.findtext("id")
    if not title or not page_id or not page_id.strip().isdigit():
        raise DataError(
            f"{source} holds a page without <title> or <id>: {_shorten(element[:80].encode())}; "
            "take a pages-articles file"
        )
    namespace = int(page.findtext("ns") or _namespace_of(title, names))
    redirect = page.find("redirect")
    revisions = page.findall("revision")
    text = (revisions[-1].findtext("text") if revisions else None) or ""
    row: dict[str, Any] = {
        "wiki_page_id": int(page_id),
        "wiki_title": title,
        "display_title": None,
        "redirect_to": redirect.get("title") if redirect is not None else None,
        "is_disambiguation": False,
        "lead": "",
        "sections": [],
        "categories": [],
        "evidence": [],
        "year": None,
        "namespace": namespace,
    }
    if namespace == 0 and redirect is None:
        article = parse_article(text, names)
        row |= {
            "display_title": _display_title(article, title),
            "is_disambiguation": _is_disambiguation(article, title),
            "lead": article.lead,
            "sections": [{"name": name, "text": body} for name, body in article.sections],
            "categories": article.categories,
            "evidence": kinds_of(article, title),
            "year": year_of(article, title),
        }
    return row


def _namespace_of(title: str, names: Names) -> int:
    """0, or -1 for any other: dumps before 2010 have no <ns> and tell it by the title's prefix."""
    prefix, colon, _ = title.partition(":")
    return -1 if colon and prefix.strip().lower() in names.files | names.categories | names.others else 0


def _display_title(article: Article, title: str) -> str | None:
    """What the page calls itself where that differs from its title: DISPLAYTITLE, or the infobox's name."""
    for template in article.templates:
        if template.name == "displaytitle":
            shown = plain_text(template.fields.get("1", ""))
            return shown if shown and shown != title else None
    box = infobox(article)
    for key in ("name", "title", "film name"):
        shown = plain_text(box.fields[key]).partition("\n")[0].strip() if box and key in box.fields else ""
        if shown:
            return shown if shown not in (title, re.sub(r" \([^()]*\)$", "", title)) else None
    return None


def _is_disambiguation(article: Article, title: str) -> bool:
    return (
        "DISAMBIG" in article.magic_words
        or title.lower().endswith("(disambiguation)")
        or any(_DISAMBIGUATION.match(template.name) for template in article.templates)
    )


def _shorten(seen: bytes) -> str:
    text = " ".join(seen.decode("utf-8", "replace").split())
    return repr(text[:60])
