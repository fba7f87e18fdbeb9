"""Flat markup: quotes, tags, lists, entities, white space, and the punctuation around what was dropped."""

from __future__ import annotations

import html
import re

from kellm_spark.wikitext.marks import GAP, HEADING, unguarded, without_marks

# Possessive: without a closing bracket, two greedy runs would try every way to share the line.
_EXTERNAL = re.compile(r"\[(?:https?:|ftps?:|mailto:|(?=//))[^\s\[\]]*+[ \t]*+([^\[\]\n]*+)\]", re.IGNORECASE)
_QUOTES = re.compile(r"'{2,}")
_BREAK = re.compile(
    r"</?(?:br|hr|p|div|li|ul|ol|dl|dt|dd|tr|td|th|table|caption|center|blockquote|poem|h[1-6])\b[^<>]*>\n?",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
MAGIC = re.compile(r"__([^\W\d_]{3,}+)__")
_LIST_MARK = re.compile(r"\n(?:[*#:;]+[ \t]*|-{4,})")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_CONVERSION = re.compile(r"-\{([^{}]*+)\}-")
_LINES = re.compile(r"\n{3,}")
_QUIET = re.compile(r"[^\W_][^_\[\]{}<>|&=~*#\n\r\t\u00a0\ue000-\uf8ff]*")
_SHORT = 200
# Around a gap: "(GAP; GAP)", "(GAP, text", "text; GAP)", "word GAP, text". A run is short, and taken as a whole.
_GAP_RUN = re.compile(rf"[ \t\u00a0,;:/–—(){GAP}]*+")
_SEPARATORS = rf"[ \t\u00a0,;:{GAP}]"
_EMPTY_PARENS = re.compile(rf"\([ \t\u00a0,;:/–—{GAP}]*\)")
_AFTER_OPEN = re.compile(rf"\({_SEPARATORS}+")
_BEFORE_CLOSE = re.compile(rf"(?<!{_SEPARATORS}){_SEPARATORS}+\)")
_BETWEEN = re.compile(rf"{_SEPARATORS}+")


def flat(text: str, headings: bool = False) -> str:
    """Flat markup, entities and white space of a text without templates, tables and links.

    Args:
        text: the text.
        headings: it holds lines that start with HEADING marks; those with nothing below them are left out.
    """
    if is_quiet(text):
        return text.rstrip()
    text = "\n" + text
    if "[" in text:
        text = _EXTERNAL.sub(lambda link: link[1] or GAP, text)
        text = text.replace("[[", "").replace("]]", "")  # halves that met no partner
    if "''" in text:
        text = _QUOTES.sub(_apostrophes, text)
    if "<" in text:
        text = _TAG.sub("", _BREAK.sub("\n", text))
    if "__" in text:
        text = MAGIC.sub(lambda word: "" if word[1].isupper() else word[0], text)
    text = _LIST_MARK.sub("\n", text)
    if "-{" in text:
        text = _CONVERSION.sub(_variant, text)
    if GAP in text:
        text = _without_gaps(text.replace("&nbsp;", "\u00a0"))
    if headings:
        text = _without_empty_headings(text)
    text = unguarded(text)
    if "&" in text:
        text = without_marks(_ENTITY.sub(lambda entity: html.unescape(entity[0]), text))
    return _spaced(text)


def is_quiet(text: str) -> bool:
    """Whether a short text is one line that no markup can be in, as most titles, categories and names are."""
    return len(text) < _SHORT and _QUIET.fullmatch(text) is not None and "''" not in text and "  " not in text


def _spaced(text: str) -> str:
    """Single blanks, none at the ends of lines, and at most one empty line."""
    text = text.replace("\t", " ").replace("\u00a0", " ")
    while "  " in text:
        text = text.replace("  ", " ")
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    if "\n\n\n" in text:
        text = _LINES.sub("\n\n", text)
    return text.strip()


def _apostrophes(run: re.Match[str]) -> str:
    """Two, three and five are markup; the others carry apostrophes of the text."""
    size = len(run[0])
    return "'" if size == 4 else "'" * max(size - 5, 0)


def _variant(conversion: re.Match[str]) -> str:
    """`-{zh-hans:a; zh-hant:b}-` shows its first variant, `-{a}-` shows a, `-{H|...}-` and `-{T|...}-` nothing."""
    flag, bar, rules = conversion[1].rpartition("|")
    if bar and flag.strip() not in ("A", "R", "") and not flag.strip().startswith("zh"):
        return GAP
    first = rules.partition(";")[0]
    variant, colon, value = first.partition(":")
    return (value if colon and variant.strip().isascii() else first).strip() or GAP


def _without_gaps(text: str) -> str:
    out: list[str] = []
    done = 0
    while (gap := text.find(GAP, done)) >= 0:
        start = gap
        while start > done and text[start - 1] in " \t\u00a0,;:/–—()":
            start -= 1
        run = _GAP_RUN.match(text, start)
        end = run.end() if run else gap + 1
        out += [text[done:start], _closed_up(text[start:end], text[end : end + 1])]
        done = end
    return "".join([*out, text[done:]])


def _closed_up(run: str, following: str) -> str:
    """A run of blanks and punctuation with gaps in it, as if nothing had stood there."""
    run = _EMPTY_PARENS.sub(_gap_if_any, run)
    run = _AFTER_OPEN.sub(lambda part: "(" if GAP in part[0] else part[0], run)
    run = _BEFORE_CLOSE.sub(lambda part: ")" if GAP in part[0] else part[0], run)
    run = _BETWEEN.sub(_one_separator, run)
    return run.rstrip(" \t\u00a0") if following in ("", ".", "!", "?") else run


def _gap_if_any(parentheses: re.Match[str]) -> str:
    return GAP if GAP in parentheses[0] else parentheses[0]


def _one_separator(part: re.Match[str]) -> str:
    """Of "GAP, GAP, " the first comma stays, and a blank."""
    run = part[0]
    if GAP not in run:
        return run
    mark = next((char for char in run if char in ",;:"), "")
    blank = " " if any(char in " \t\u00a0" for char in run) else ""
    return mark + blank


def _without_empty_headings(text: str) -> str:
    """Lines of deeper headings with no text below them, their own subheadings included, are left out."""
    kept: list[str] = []
    below = 7  # the level of the nearest kept heading below
    has_text = False
    for line in reversed(text.split("\n")):
        level = ord(line[0]) - ord(HEADING) if line else 0
        if not 1 <= level <= 6:
            has_text = has_text or bool(line.strip())
            kept.append(line)
        elif has_text or level < below < 7:
            kept.append(line[1:])
            below, has_text = level, False
    return "\n".join(reversed(kept))
