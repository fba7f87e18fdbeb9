"""Tables, in wikitext's own syntax and in HTML's: dropped."""

from __future__ import annotations

import re

from kellm_spark.wikitext.marks import GAP

# A literal line feed first: the search engine then jumps from line to line.
_WIKI = re.compile(rf"\n[ \t:*{GAP}]*+(?:\{{\||\|\}}(?!\}}))")
_BOTH = re.compile(rf"{_WIKI.pattern}|</?table\b[^<>]*>", re.IGNORECASE)
_ROW = re.compile(rf"\n[ \t:*{GAP}]*+(?:\{{\||[|!])[^\n]*")


def without_tables(text: str) -> str:
    """Drop tables, nested ones with their outer one.

    Of a table without an end, which MediaWiki closes with the page, the lines that start cells are dropped: the
    prose behind it is worth more than a cell or two less.
    """
    has_html = "<table" in text or "<TABLE" in text
    if "{|" not in text and "|}" not in text and not has_html:
        return text
    text = "\n" + text
    stack: list[list[str]] = [[]]
    done = 0
    for token in (_BOTH if has_html else _WIKI).finditer(text):
        stack[-1].append(text[done : token.start()])
        done = token.end()
        if token[0].endswith("{|") or token[0][:2] in ("<t", "<T"):
            stack.append([])
            if token[0].endswith("{|"):
                done -= 2  # a row of its own, should the table never close
        elif len(stack) > 1:
            stack.pop()
            stack[-1].append(GAP)
    stack[-1].append(text[done:])
    whole, *unclosed = ("".join(out) for out in stack)
    return (whole + "".join(_ROW.sub("", "\n" + rest) for rest in unclosed)).removeprefix("\n")
