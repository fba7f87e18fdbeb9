"""Small text tools that prompts, facts and answers share: token estimates, sentences, safe data, titles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token: measured with SmolLM2's tokenizer, 4.0 on the leads of film pages and 3.0 on cast lists, so
that a prompt full of names is a quarter longer than estimated."""

_ABBREVIATIONS = r"(?:\b(?:Mr|Mrs|Ms|Dr|Jr|Sr|St|vs|No|Vol|Lt|Col|Gen|Prof)|\b[A-Z]|\.[A-Za-z])"
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z0-9À-ÖØ-Þ])")
_ARTICLE = re.compile(
    r"^(?P<head>[^(]+), (?P<article>The|A|An|Le|La|Les|L'|Il|El|Los|Las|Der|Die|Das|Un|Une)(?P<aka> \(.*\))?$"
)
_BRACKETED = re.compile(r"\[(/?[A-Z_]{3,})\]")
_YEAR_AT_END = re.compile(r"\s*\((?P<year>\d{4})\)\s*$")


def estimate_tokens(text: str) -> int:
    """Tokens that a language model will make of a text, estimated as UTF-8 bytes / 4, rounded up."""
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def squeeze(text: str) -> str:
    """The text on one line, runs of white space made one blank."""
    return " ".join(text.split())


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order, each on one line.

    Rule-based: a sentence ends at . ! or ? before white space and a capital or digit, unless an initial or one of a
    few abbreviations stands before the stop.
    """
    pieces: list[str] = []
    for part in _SENTENCE_END.split(squeeze(text)):
        if pieces and re.search(_ABBREVIATIONS + r"\.$", pieces[-1]):
            pieces[-1] += " " + part
        elif part:
            pieces.append(part)
    return pieces


def take_sentences(sentences: Iterable[str], tokens: int) -> str:
    """As many leading sentences as fit a budget of estimated tokens, joined by blanks; may be empty."""
    taken = ""
    for sentence in sentences:
        longer = f"{taken} {sentence}" if taken else sentence
        if estimate_tokens(longer) > tokens:
            break
        taken = longer
    return taken


def cut_to_tokens(text: str, tokens: int) -> str:
    """The text cut to a budget of estimated tokens: at a sentence end, or at a word where no sentence fits."""
    text = squeeze(text)
    if estimate_tokens(text) <= tokens:
        return text
    whole = take_sentences(split_sentences(text), tokens)
    if whole:
        return whole
    kept = text.encode()[: tokens * BYTES_PER_TOKEN].decode(errors="ignore")
    return kept.rpartition(" ")[0] or kept


def as_data(text: str) -> str:
    """Text from outside made safe to stand between delimiters.

    Angle brackets become ‹ and ›, so that it can neither close its delimiter nor spell a chat template's control
    token such as <|im_start|>; nor can capitals in square brackets, such as [INST], which they become as well. Control
    characters are dropped.
    """
    text = _BRACKETED.sub(r"‹\1›", text.replace("<", "‹").replace(">", "›"))
    return "".join(c for c in text if c.isprintable() or c == "\n")


def bare_title(title: str) -> str:
    """A catalogue title as people write it: "Godfather, The (1972)" → "The Godfather"."""
    bare = _YEAR_AT_END.sub("", squeeze(title)) or squeeze(title)
    match = _ARTICLE.match(bare)
    if not match:
        return bare
    article = match["article"]
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{match['head']}{match['aka'] or ''}"


def titled(title: str, year: int | None) -> str:
    """The title with its year where it is known: "The Godfather (1972)"."""
    return f"{title} ({year})" if year is not None else title


def join_and(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    items = list(parts)
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)
