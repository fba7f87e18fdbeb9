"""Dumps written by hand, in each of the forms that they are published in."""

from __future__ import annotations

import bz2
import html
from pathlib import Path

SITEINFO = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ltg">
  <siteinfo>
    <sitename>Vikipedeja</sitename>
    <dbname>ltgwiki</dbname>
    <namespaces>
      <namespace key="-2" case="first-letter">Medeja</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Fails</namespace>
      <namespace key="10" case="first-letter">Taiss</namespace>
      <namespace key="14" case="first-letter">Kategoreja</namespace>
    </namespaces>
  </siteinfo>
"""
NAMESPACES = {-2: "Medeja", 0: "", 6: "Fails", 10: "Taiss", 14: "Kategoreja"}
END = "</mediawiki>\n"


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
DUMP = SITEINFO + "".join(PAGES) + END


def write(folder: Path, kind: str, pages: list[str] | None = None, head: str = SITEINFO) -> Path:
    """A dump of these pages as `xml`, `bz2` (one stream) or `multistream`, with the index of the last."""
    pages = PAGES if pages is None else pages
    dump = head + "".join(pages) + END
    if kind == "xml":
        path = folder / "wiki.xml"
        path.write_text(dump, encoding="utf-8")
    elif kind == "bz2":
        path = folder / "wiki.xml.bz2"
        path.write_bytes(bz2.compress(dump.encode()))
    else:  # the way Wikimedia does it: header, hundreds of pages a stream, footer, each a stream of its own
        path = folder / "wiki-multistream.xml.bz2"
        data, index = bz2.compress(head.encode()), ""
        for n in range(0, len(pages), 7):
            for text in pages[n : n + 7]:
                page_id, title = (text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0] for tag in ("id", "title"))
                index += f"{len(data)}:{page_id}:{title}\n"
            data += bz2.compress("".join(pages[n : n + 7]).encode())
        path.write_bytes(data + bz2.compress(END.encode()))
        (folder / "wiki-multistream-index.txt.bz2").write_bytes(bz2.compress(index.encode()))
    return path
