"""An article in its parts: lead, sections, categories, templates."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from kellm_spark.wikitext.flat import MAGIC, flat, is_quiet
from kellm_spark.wikitext.links import Names, without_links
from kellm_spark.wikitext.marks import GAP, HEADING, unguarded, without_marks
from kellm_spark.wikitext.sections import is_address_list, is_skipped
from kellm_spark.wikitext.tables import without_tables
from kellm_spark.wikitext.tags import without_tags
from kellm_spark.wikitext.templates import Template, without_templates

_HEADING_LINE = re.compile(r"\n=[^\n]*")
_SECTION = re.compile(r"^={1,2}[^=\n][^\n]*=", re.MULTILINE)
_TABLE_BEGINS = re.compile(r"^[ \t:*]*\{\|", re.MULTILINE)
_TABLE_ENDS = re.compile(r"^[ \t]*\|\}(?!\})", re.MULTILINE)
_CONTENT_TAGS = "nowiki|pre|ref|math|chem|gallery|timeline|score|syntaxhighlight|source|imagemap|templatedata|poem"
_TAG_BEGINS = re.compile(rf"<(?:{_CONTENT_TAGS})\b[^<>]*(?<!/)>", re.IGNORECASE)
_TAG_ENDS = re.compile(rf"</(?:{_CONTENT_TAGS})\s*>", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_TEMPLATE_NAME = re.compile(r"\{\{\s*+([^{}|\[\]<>\n#:]{1,255}+)")
_INFOBOX = re.compile(
    r"^(?:info(?:box|boks|bokss|kast|kaste|skreine|taula|caixa|kutija|polje)\b|ficha de |info/|карточка\b|картка\b"
    r"|(?:automatic )?(?:taxobox|taxoboks|speciesbox))|\b(?:infobox|bilgi kutusu)$"
)
_DATE = re.compile(r"(?<!\d)(1[5-9]\d\d|20\d\d)(?!\d)")


@dataclass(frozen=True)
class Article:
    """What a page says."""

    lead: str
    sections: list[tuple[str, str]]
    """Level-2 headings with the text below them; lists of references and links are left out."""
    categories: list[str]
    """Without namespace, in order, each once."""
    templates: list[Template]
    """Templates outside other templates, in order: infobox, notices, DISPLAYTITLE."""
    magic_words: frozenset[str]
    """Such as `DISAMBIG`."""


def plain_text(wikitext: str, names: Names | None = None) -> str:
    """What a reader sees of a piece of wikitext, headings as plain lines."""
    if is_quiet(wikitext):
        return wikitext.rstrip()
    text = without_tables(without_templates(without_tags(_clean(wikitext))))
    return flat(_with_plain_headings(without_links(text, names or Names()), marked=False))


def parse_article(wikitext: str, names: Names | None = None, *, sections: bool = True) -> Article:
    """Lead, sections, categories and top-level templates of a page.

    Args:
        wikitext: the page's source, XML entities already resolved.
        names: the wiki's namespace names.
        sections: False leaves `Article.sections` empty and strips the lead alone; of what stands below it, categories,
            magic words and the names of templates (not their arguments) are found.
    """
    names = names or Names()
    end_of_lead = None if sections else _end_of_lead(wikitext)
    if end_of_lead is not None:
        return _with_what_is_below(parse_article(wikitext[:end_of_lead], names), wikitext[end_of_lead:], names)
    templates: list[Template] = []
    tagless = without_tags(_clean(wikitext))
    text = without_tables(without_templates(tagless, templates))
    lead = ""
    found: list[tuple[str, str]] = []
    name: str | None = None
    start = 0
    for level, title, begin, end in [*_headings(text), (2, "", len(text), len(text))]:
        if level > 2:
            continue
        if name is None:
            lead = _prose(text[start:begin], names)
            if not sections:
                break
        elif not is_skipped(name) and not is_address_list(text[start:begin]):
            body = _prose(text[start:begin], names)
            if body:
                found.append((name, body))
        name, start = flat(without_links(title, names)), end
    categories = [_category(category) for category in names.category_links.findall(text)]
    return Article(
        lead=lead,
        sections=found,
        categories=list(dict.fromkeys(categories)),
        templates=templates,
        magic_words=frozenset(MAGIC.findall(tagless)) if "__" in tagless else frozenset(),
    )


def _end_of_lead(wikitext: str) -> int | None:
    """Where the first section begins; None where that takes a closer look: a heading inside something else."""
    heading = _SECTION.search(wikitext)
    if heading is None:
        return None
    lead = wikitext[: heading.start()]
    closed = all(lead.count(one) == lead.count(other) for one, other in (("{{", "}}"), ("[[", "]]"), ("<!--", "-->")))
    closed = closed and len(_TABLE_BEGINS.findall(lead)) == len(_TABLE_ENDS.findall(lead))
    return heading.start() if closed and len(_TAG_BEGINS.findall(lead)) == len(_TAG_ENDS.findall(lead)) else None


def _with_what_is_below(lead: Article, below: str, names: Names) -> Article:
    below = _COMMENT.sub("", below)
    found = [_category(category) for category in names.category_links.findall(below)]
    return Article(
        lead=lead.lead,
        sections=[],
        categories=list(dict.fromkeys([*lead.categories, *found])),
        templates=[*lead.templates, *map(Template, dict.fromkeys(_TEMPLATE_NAME.findall(below)))],
        magic_words=lead.magic_words | frozenset(MAGIC.findall(below)) if "__" in below else lead.magic_words,
    )


def infobox(article: Article) -> Template | None:
    """The first infobox of a page, if it has one, under the names that the larger editions give it."""
    return next((template for template in article.templates if _is_infobox(template.name)), None)


@lru_cache(maxsize=1 << 12)
def _is_infobox(name: str) -> bool:
    return _INFOBOX.search(name) is not None


def first_year(wikitext: str) -> int | None:
    """The earliest-standing year 1500-2099 in a date, a template such as `{{Film date|1995|11|22}}`, or text."""
    found = _DATE.search(unguarded(without_tags(_clean(wikitext))))
    return int(found.group()) if found else None


def texts(fields: Iterable[str], template: Template | None) -> dict[str, str]:
    """The named fields of a template as plain text, empty ones left out."""
    found = {name: plain_text(template.fields[name]) for name in fields if template and name in template.fields}
    return {name: value for name, value in found.items() if value}


@lru_cache(maxsize=1 << 16)
def _category(link: str) -> str:
    """The name in a link to a category; a few of them are on most pages."""
    return flat(link.replace("_", " "))


def _clean(wikitext: str) -> str:
    return without_marks(wikitext.replace("\r\n", "\n"))


def _prose(text: str, names: Names) -> str:
    """A section's text, subheadings as plain lines where something stands below them."""
    text = without_links(text, names)
    if "\n=" not in text:
        return flat(text)
    return flat(_with_plain_headings(text, marked=True), headings=True)


def _headings(text: str) -> list[tuple[int, str, int, int]]:
    """Level, raw title, start and end of every heading line."""
    found = []
    for line in _HEADING_LINE.finditer("\n" + text):
        bare = line[0][1:].rstrip(f" \t{GAP}")
        level = min(len(bare) - len(bare.lstrip("=")), len(bare) - len(bare.rstrip("=")), (len(bare) - 1) // 2, 6)
        if level:
            found.append((level, bare[level:-level].strip(), line.start(), line.end() - 1))
    return found


def _with_plain_headings(text: str, *, marked: bool) -> str:
    """Heading lines without their equals signs, marked with their level on demand."""
    out: list[str] = []
    done = 0
    for level, title, begin, end in _headings(text):
        out += [text[done:begin], chr(ord(HEADING) + level) if marked else "", title]
        done = end
    return "".join([*out, text[done:]])
