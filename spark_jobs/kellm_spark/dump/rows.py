"""One page element to one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from kellm_features.schemas import PAGES
from kellm_spark.dump.check import Site, shorten
from kellm_spark.evidence import kinds_of, split_title, year_of
from kellm_spark.wikitext import Article, Names, Template, infobox, parse_article, plain_text

NOT_UTF8, NOT_XML, NO_ID = "not UTF-8", "not XML", "no title or id"
TEMPLATE_NAMESPACE = 10
PARSED = pa.schema(
    [
        *(pa.field(column.name, column.type) for column in PAGES.columns),
        pa.field("namespace", pa.int32()),
        pa.field("templates", pa.list_(pa.string())),
        pa.field("skipped", pa.string()),
        pa.field("xml_bytes", pa.int64()),
    ]
)
"""`schemas.PAGES` and what the second pass needs: of articles the templates that they call; of a page that is not
read the reason, with its beginning as title."""
PARSED_DDL = (
    "wiki_page_id bigint, wiki_title string, display_title string, redirect_to string, is_disambiguation boolean, "
    "lead string, sections array<struct<name: string, text: string>>, categories array<string>, "
    "evidence array<string>, year int, namespace int, templates array<string>, skipped string, xml_bytes bigint"
)
_PAGE_ID, _NAMESPACE = re.compile(r"\d{1,18}"), re.compile(r"-?\d{1,9}")
_BATCH_ROWS, _BATCH_BYTES = 512, 4 << 20
# The template of a disambiguation page, or of a list of namesakes, in the largest editions: for a piece of a dump
# that came without its templates (`disambiguation.py` asks the templates themselves).
_DISAMBIGUATION = re.compile(
    r"^(?:disambig|dab$|disamb$|hndis|geodis|roaddis|schooldis|[\w -]+ disambiguation$|set index|sia$|surname"
    r"|given name$|begriffsklärung|homonymie|desambiguación|desambiguação|disambigua|ujednoznacznienie|förgrening)"
)
_ABOUT_ITSELF = re.compile(
    r"<noinclude\b[^>]*>.*?(?:</noinclude>|\Z)|<nowiki>.*?(?:</nowiki>|\Z)", re.DOTALL | re.IGNORECASE
)


class Rows:
    """Makes rows of `PARSED` from the pages of one wiki."""

    def __init__(self, site: Site, *, lead_only: bool) -> None:
        from lxml import etree

        self._site, self._names, self._lead_only = site, site.names, lead_only
        self._read, self._error = etree.fromstring, etree.XMLSyntaxError
        # No entity beyond XML's own five is resolved, none is fetched; a page may be larger than libxml2's default.
        self._parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=True)

    def row(self, element: bytes, skipped: str | None) -> dict[str, Any]:
        """One page.

        Args:
            element: `<page>…</page>`, or its beginning where it is skipped.
            skipped: why the page is not read; None: it is.
        """
        if skipped:
            return _skipped(element, skipped)
        try:
            element.decode("utf-8")  # strictly: a page with other bytes is no page with question marks
        except UnicodeDecodeError:
            return _skipped(element, NOT_UTF8)
        try:
            page = self._read(element, self._parser)
        except self._error:
            return _skipped(element, NOT_XML)
        parts = {child.tag: child for child in page}  # of several revisions the last
        title, page_id = _text(parts.get("title")), _text(parts.get("id")).strip()
        if not title or not _PAGE_ID.fullmatch(page_id):
            return _skipped(element, NO_ID)
        told = _text(parts.get("ns")).strip()
        namespace = int(told) if _NAMESPACE.fullmatch(told) else _namespace_of(title, self._names)
        redirect = parts.get("redirect")
        row = _empty(len(element)) | {
            "wiki_page_id": int(page_id),
            "wiki_title": title,
            "redirect_to": redirect.get("title") if redirect is not None else None,
            "namespace": namespace,
        }
        text = next((_text(child) for child in parts.get("revision", ()) if child.tag == "text"), "")
        if redirect is None and namespace == TEMPLATE_NAMESPACE:
            row["is_disambiguation"] = "__DISAMBIG__" in text and "__DISAMBIG__" in _ABOUT_ITSELF.sub("", text)
        elif redirect is None and namespace == 0:
            row |= self._article(title, text)
        return row

    def _article(self, title: str, text: str) -> dict[str, Any]:
        article = parse_article(text, self._names, sections=not self._lead_only)
        return {
            "display_title": _display_title(article, title),
            "is_disambiguation": _is_disambiguation(article, title),
            "lead": article.lead,
            "sections": [{"name": name, "text": body} for name, body in article.sections],
            "categories": article.categories,
            "evidence": kinds_of(article, title),
            "year": year_of(article, title),
            "templates": _called(article, self._site),
        }


def batches(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Rows of `PARSED` as Arrow batches of a few megabytes."""
    held: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        held.append(row)
        size += row["xml_bytes"]
        if len(held) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(held, schema=PARSED)
            held, size = [], 0
    if held:
        yield pa.RecordBatch.from_pylist(held, schema=PARSED)


def _text(element: Any) -> str:
    return "" if element is None else element.text or ""


def _empty(xml_bytes: int) -> dict[str, Any]:
    return {
        "display_title": None,
        "redirect_to": None,
        "is_disambiguation": False,
        "lead": "",
        "sections": [],
        "categories": [],
        "evidence": [],
        "year": None,
        "templates": [],
        "skipped": None,
        "xml_bytes": xml_bytes,
    }


def _skipped(element: bytes, reason: str) -> dict[str, Any]:
    return _empty(len(element)) | {
        "wiki_page_id": None,
        "wiki_title": shorten(element[:200]),
        "namespace": None,
        "skipped": reason,
    }


def _namespace_of(title: str, names: Names) -> int:
    """0, or -1 for any other: dumps before 2010 have no <ns> and tell it by the title's prefix."""
    prefix, colon, _ = title.partition(":")
    return -1 if colon and prefix.strip().lower() in names.files | names.categories | names.others else 0


def _called(article: Article, site: Site) -> list[str]:
    """Names of the templates that an article calls, lower case, sorted, without their namespace."""
    prefixes = {"template", site.namespaces.get(TEMPLATE_NAMESPACE, "template").lower()}

    def name(template: Template) -> str:
        spelled = template.fields.get("1", "") if template.name in prefixes else template.name
        return " ".join(spelled.lower().replace("_", " ").split())

    return sorted({name(template) for template in article.templates} - {""})


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
            return shown if shown not in (title, split_title(title)[0]) else None
    return None


def _is_disambiguation(article: Article, title: str) -> bool:
    return (
        "DISAMBIG" in article.magic_words
        or title.lower().endswith("(disambiguation)")
        or any(_DISAMBIGUATION.match(template.name) for template in article.templates)
    )
