"""Private-use characters that carry what one step knows to a later one; none ever leaves the package.

They stand in U+E000..U+E0FF. A page that holds such a character of its own gets U+FFFD for it: they have no agreed
meaning, and a reader sees an empty box.
"""

from __future__ import annotations

import re

_MARKUP = "[]{}|'<>=*#:;!_~-"
_FIRST = 0xE000
GUARD = {ord(char): _FIRST + place for place, char in enumerate(_MARKUP)}
"""Markup characters inside <nowiki> pass every step as these."""
GAP = "\ue0fe"
"""Where something was dropped inside a text: the brackets and commas around it may go with it."""
BAR = "\ue0ff"
"""A bar inside a link, which parts no template arguments."""
HEADING = "\ue0f0"
"""HEADING plus a heading's level (U+E0F1..U+E0F6) starts its line."""

_UNGUARD = {code: char for char, code in GUARD.items()}
_AGAIN = {code: f"<nowiki>{chr(char)}</nowiki>" for char, code in GUARD.items()}
_ANY = re.compile("[\ue000-\ue0ff]")


def without_marks(text: str) -> str:
    """The text with U+FFFD for every character that would be taken for a mark."""
    return _ANY.sub("\ufffd", text) if _ANY.search(text) else text


def unguarded(text: str) -> str:
    """The text with its <nowiki> characters as they were, and without any other mark."""
    return _ANY.sub("", text.translate(_UNGUARD)) if _ANY.search(text) else text


def as_source(text: str) -> str:
    """The text as wikitext again, to be stripped another time."""
    return _ANY.sub("", text.translate(_AGAIN)) if _ANY.search(text) else text
