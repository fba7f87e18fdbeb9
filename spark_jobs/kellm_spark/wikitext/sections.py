"""Sections that say nothing about the page's subject: references, further reading, links."""

from __future__ import annotations

import re

from kellm_spark.wikitext.marks import GAP

# What a section of mere links between pages is called in the largest editions: nothing in its form tells it from a
# list of actors. English also has the others, which tell themselves elsewhere.
_NAMES = frozenset({
    "references", "notes", "footnotes", "external links", "see also", "further reading", "bibliography", "citations",
    "sources", "notes and references", "references and notes", "works cited",
    "siehe auch", "voir aussi", "articles connexes", "véase también", "vedi anche", "voci correlate", "ver também",
    "zie ook", "se även", "se også", "zobacz też", "viz také", "související články", "см. также", "дивіться також",
    "див. також", "katso myös", "lásd még", "kapcsolódó szócikkek", "ayrıca bakınız", "vegeu també", "関連項目",
    "参见", "參見", "같이 보기", "انظر أيضا", "جستارهای وابسته", "lihat pula", "xem thêm", "skatīt arī", "verīs taipoš",
})  # fmt: skip
# An item that starts with an address: `* [http://a.b The site]`; a line that is one; a category at the end of a page.
_ADDRESS_ITEM = re.compile(rf"[*#:;]+[ \t'\"„“«{GAP}]*+\[?(?:https?:)?//\w", re.IGNORECASE)
_ADDRESS = re.compile(r"\[(?:https?:)?//[^\]]*\]\W*|https?://\S+", re.IGNORECASE)
_PREFIXED_LINK = re.compile(r"\[\[[^\[\]|:]+:[^\[\]]*\]\]")


def is_skipped(name: str) -> bool:
    """The section's name says that it lists references or links."""
    return name.lower() in _NAMES


def is_address_list(text: str) -> bool:
    """Whether every line of a section is an item that starts with a web address, in any language.

    Lists of links between pages are not: a cast and the members of a band are such lists too. Nor are lists of books:
    an author's works look like a bibliography.

    Args:
        text: the section without templates and tables, its links not yet replaced.
    """
    seen = False
    for line in text.splitlines():
        item = line.strip(f" \t{GAP}")
        if not item or item.startswith("=") or _PREFIXED_LINK.fullmatch(item):
            continue
        if not (_ADDRESS_ITEM.match(item) or _ADDRESS.fullmatch(item)):
            return False
        seen = True
    return seen
