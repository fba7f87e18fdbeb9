"""Build the mini wiki's dump from the wikitext under ``source/``.

Run ``python examples/mini_wiki/build_dump.py``. It writes two files to ``dump/``, laid out like Wikimedia's
own multistream dumps:

* ``miniwiki-pages-articles-multistream.xml.bz2``: a MediaWiki export 0.11. The first bz2 stream holds the
  header and the site information, each following one `PAGES_PER_STREAM` pages, the last one the closing tag.
* ``miniwiki-pages-articles-multistream-index.txt.bz2``: one line ``offset:page_id:title`` a page, where
  ``offset`` is the byte at which the page's stream starts in the compressed file.

The same source gives the same bytes: page ids follow from the order of the pages, and every revision carries
one fixed timestamp.

In a source file a line ``@@ Title`` opens a page, and the lines up to the next such line are the page's
wikitext. Only blank lines and comments (lines that start with ``#``) may stand before the first page.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

HERE = Path(__file__).resolve().parent
DUMP_NAME = "miniwiki-pages-articles-multistream.xml.bz2"
INDEX_NAME = "miniwiki-pages-articles-multistream-index.txt.bz2"

PAGES_PER_STREAM = 20  # Wikimedia packs 100; fewer here, so that a few hundred pages still make many streams.
FIRST_PAGE_ID = 10
PAGE_ID_STEP = 3  # Real ids have gaps too: a reader must not take an id for a position.
REVISION_ID_BASE = 100_000
TIMESTAMP = "2025-01-01T00:00:00Z"

NAMESPACES = {
    -2: "Media",
    -1: "Special",
    0: "",
    1: "Talk",
    2: "User",
    3: "User talk",
    4: "Mini Wiki",
    5: "Mini Wiki talk",
    6: "File",
    7: "File talk",
    8: "MediaWiki",
    9: "MediaWiki talk",
    10: "Template",
    11: "Template talk",
    12: "Help",
    13: "Help talk",
    14: "Category",
    15: "Category talk",
}
_NAMESPACE_KEYS = {name.lower(): key for key, name in NAMESPACES.items() if key > 0}

_REDIRECT = re.compile(r"#REDIRECT\b", re.IGNORECASE)
_REDIRECT_TARGET = re.compile(  # up to the section or the label, if there is one
    r"#REDIRECT\s*:?\s*\[\[\s*:?([^\[\]|#]+?)\s*(?:#[^\[\]|]*)?(?:\|[^\[\]]*)?\]\]", re.IGNORECASE
)
_BAD_IN_TITLE = re.compile(r"[#<>\[\]{}|_]|\s{2}")
_BAD_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class SourceError(ValueError):
    """What is wrong with the source, in one line that starts with the file and the line number."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        super().__init__(f"{path.name}:{line}: {message}")


@dataclass(frozen=True)
class Page:
    """One page of the source: where it stands, and what it says."""

    path: Path
    line: int
    title: str
    text: str

    def error(self, message: str) -> SourceError:
        """Return the error that says `message` of this page."""
        return SourceError(self.path, self.line, f"page {self.title!r}: {message}")

    @property
    def namespace(self) -> int:
        """Key of the page's namespace, by the title's prefix; 0 (an article) without one."""
        prefix, colon, _ = self.title.partition(":")
        return _NAMESPACE_KEYS.get(prefix.lower(), 0) if colon else 0

    @property
    def redirect(self) -> str | None:
        """Title of the page this one leads to (without a section), or None where it is no redirect.

        Raises:
            SourceError: the page starts with ``#REDIRECT`` but names no target.
        """
        if not _REDIRECT.match(self.text):
            return None
        match = _REDIRECT_TARGET.match(self.text)
        if match is None:
            raise self.error("the redirect names no target; write #REDIRECT [[Target]]")
        target = match.group(1).replace("_", " ")
        return target[0].upper() + target[1:]


def read_pages(path: Path) -> Iterator[Page]:
    """Yield the pages of one source file, in order.

    Raises:
        SourceError: text before the first page, an invalid title, an empty page, or a character that XML 1.0
            has no place for.
    """
    title = ""
    opened_at = 0
    body: list[str] = []

    def close_page() -> Page:
        page = Page(path, opened_at, title, "\n".join(body).strip())
        if not page.text:
            raise page.error("it is empty; write its wikitext or remove it")
        return page

    source = unicodedata.normalize("NFC", path.read_text(encoding="utf-8"))
    for number, line in enumerate(source.split("\n"), start=1):
        if bad := _BAD_IN_XML.search(line):
            raise SourceError(path, number, f"character {bad.group()!r} cannot stand in XML; remove it")
        if line.rstrip() == "@@" or line.startswith("@@ "):
            if opened_at:
                yield close_page()
            title, opened_at, body = line[2:].strip(), number, []
            if not title or _BAD_IN_TITLE.search(title) or title[0] != title[0].upper():
                hint = "start with a capital, no double space, none of # < > [ ] { } | _"
                raise SourceError(path, number, f"{title!r} is no page title; {hint}")
        elif opened_at:
            body.append(line.rstrip())
        elif line.strip() and not line.startswith("#"):
            hint = "open a page with '@@ Title' or start the line with #"
            raise SourceError(path, number, f"text before the first page: {line.strip()[:40]!r}; {hint}")
    if opened_at:
        yield close_page()


def read_source(source: Path) -> list[Page]:
    """Return all pages of ``source/*.wikitext``, by file name and position, checked against each other.

    Raises:
        SourceError: as `read_pages`, or a title given twice, or a redirect to itself or to no page.
    """
    pages: dict[str, Page] = {}
    for path in sorted(source.glob("*.wikitext")):
        for page in read_pages(path):
            if first := pages.get(page.title):
                raise page.error(f"duplicate title, first at {first.path.name}:{first.line}")
            pages[page.title] = page
    for page in pages.values():
        if page.redirect == page.title:
            raise page.error("it redirects to itself")
        if page.redirect is not None and page.redirect not in pages:
            raise page.error(f"the target of its redirect, {page.redirect!r}, is missing")
    return list(pages.values())


def sha1_base36(data: bytes) -> str:
    """Return the SHA-1 of `data` as MediaWiki writes it: in base 36, 31 digits."""
    number = int.from_bytes(hashlib.sha1(data, usedforsecurity=False).digest(), "big")
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits.rjust(31, "0")


def header_xml() -> str:
    """Return the opening tag and the site information."""
    namespaces = "".join(
        f'\n      <namespace key="{key}" case="first-letter"' + (f">{name}</namespace>" if name else " />")
        for key, name in NAMESPACES.items()
    )
    schema = "http://www.mediawiki.org/xml/export-0.11"
    return f"""\
<mediawiki xmlns="{schema}/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:schemaLocation="{schema}/ {schema}.xsd" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Mini Wiki</sitename>
    <dbname>miniwiki</dbname>
    <base>https://miniwiki.example/wiki/Main_Page</base>
    <generator>examples/mini_wiki/build_dump.py</generator>
    <case>first-letter</case>
    <namespaces>{namespaces}
    </namespaces>
  </siteinfo>
"""


def page_xml(page: Page, page_id: int) -> str:
    """Return the page element, with the page's one revision."""
    data = page.text.encode()
    sha1 = sha1_base36(data)
    redirect = f"    <redirect title={quoteattr(page.redirect)} />\n" if page.redirect is not None else ""
    revision_id = REVISION_ID_BASE + page_id
    return f"""\
  <page>
    <title>{escape(page.title)}</title>
    <ns>{page.namespace}</ns>
    <id>{page_id}</id>
{redirect}    <revision>
      <id>{revision_id}</id>
      <timestamp>{TIMESTAMP}</timestamp>
      <contributor>
        <username>Mini Wiki</username>
        <id>1</id>
      </contributor>
      <comment>from source/{escape(page.path.name)}</comment>
      <origin>{revision_id}</origin>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{len(data)}" sha1="{sha1}" xml:space="preserve">{escape(page.text, {'"': "&quot;"})}</text>
      <sha1>{sha1}</sha1>
    </revision>
  </page>
"""


def build(pages: Iterable[Page]) -> tuple[bytes, bytes]:
    """Return the compressed dump and the compressed index of `pages`."""
    numbered = [(FIRST_PAGE_ID + PAGE_ID_STEP * position, page) for position, page in enumerate(pages)]
    dump = bytearray(bz2.compress(header_xml().encode()))
    index: list[str] = []
    for start in range(0, len(numbered), PAGES_PER_STREAM):
        batch = numbered[start : start + PAGES_PER_STREAM]
        index += [f"{len(dump)}:{page_id}:{page.title}\n" for page_id, page in batch]
        dump += bz2.compress("".join(page_xml(page, page_id) for page_id, page in batch).encode())
    dump += bz2.compress(b"</mediawiki>\n")
    return bytes(dump), bz2.compress("".join(index).encode())


def main(argv: list[str] | None = None) -> int:
    """Build the dump, report what went into it, and return the exit status (1: the source was refused)."""
    parser = argparse.ArgumentParser(description="Build the mini wiki's multistream dump.")
    parser.add_argument("--source", type=Path, default=HERE / "source", help="folder of the *.wikitext files")
    parser.add_argument("--out", type=Path, default=HERE / "dump", help="folder the dump goes to")
    args = parser.parse_args(argv)
    try:
        pages = read_source(args.source)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not pages:
        print(f"error: {args.source}: no page in any *.wikitext file", file=sys.stderr)
        return 1
    dump, index = build(pages)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / DUMP_NAME).write_bytes(dump)
    (args.out / INDEX_NAME).write_bytes(index)

    counts = {
        "redirects": sum(page.redirect is not None for page in pages),
        "disambiguation pages": sum("{{disambiguation" in page.text.lower() for page in pages),
        "pages outside the article namespace": sum(page.namespace != 0 for page in pages),
    }
    print(f"{len(pages)} pages, among them " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    print(f"{args.out / DUMP_NAME}: {len(dump):,} bytes")
    print(f"{args.out / INDEX_NAME}: {len(index):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
