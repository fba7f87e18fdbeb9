"""Comments, <nowiki>, and the tags whose content is no prose."""

from __future__ import annotations

import re

from kellm_spark.wikitext.marks import GAP, GUARD

_DROPPED = (
    "ref|math|chem|ce|gallery|timeline|score|syntaxhighlight|source|imagemap|hiero|graph|mapframe|maplink|templatedata|"
    "templatestyles|style|script|categorytree|inputbox|references|includeonly|indicator"
)
_OPEN = re.compile(rf"<!--|<(nowiki|pre|{_DROPPED})\b([^<>]*)>", re.IGNORECASE)


def without_tags(text: str) -> str:
    """Drop comments and tags with content that is no prose; guard what stands in <nowiki>.

    A tag without its end is left as it is; a comment without its end runs to the end of the page, as in MediaWiki.
    """
    if "<" not in text:
        return text
    out: list[str] = []
    done = 0
    closers: dict[str, re.Pattern[str]] = {}
    absent: set[str] = set()  # closing tags that do not occur any more: looked for once
    position = 0
    while found := _OPEN.search(text, position):
        start, position = found.span()
        tag = (found[1] or "").lower()
        if not tag:
            end = text.find("-->", position)
            out.append(text[done:start])
            done = position = end + 3 if end >= 0 else len(text)
            # A comment alone on its line takes the line with it: what stands around it is one paragraph.
            if text[start - 1 : start] in ("", "\n") and text[done : done + 1] == "\n":
                done = position = done + 1
            continue
        if found[2].rstrip().endswith("/"):  # <ref name="x" />
            out += [text[done:start], "" if tag == "nowiki" else GAP]
            done = position
            continue
        if tag in absent:
            continue
        closer = closers.setdefault(tag, re.compile(rf"</{tag}\s*>", re.IGNORECASE))
        stop = closer.search(text, position)
        if stop is None:
            absent.add(tag)
            continue
        content = text[position : stop.start()]
        out += [text[done:start], content.translate(GUARD) if tag in ("nowiki", "pre") else GAP]
        done = position = stop.end()
    out.append(text[done:])
    return "".join(out)
