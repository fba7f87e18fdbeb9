"""A language model's answer made fit to store, or found unfit."""

from __future__ import annotations

import re

from kellm_features.knowledge.engines.base import Completion
from kellm_features.knowledge.text import split_sentences, squeeze

MIN_WORDS = 6
MIN_DISTINCT = 0.6
"""Distinct word triples among all: 1.0 in ordinary prose, below 0.5 once a model loops."""
REPEATED = 0.6
"""A sentence with this share of its word triples already said is dropped."""

_OPENER = re.compile(r"^(?:sure|certainly|of course|here(?:'s| is| are))\b[^.:!]{0,120}[:!]\s*", re.IGNORECASE)
_MARKUP = re.compile(r"[*_#`]{1,3}")
_ECHO = re.compile(
    r"</?(?:page|history|descriptions)>|your task is to|based on the text above|as an ai\b", re.IGNORECASE
)


def clean(completion: Completion) -> str:
    """The answer as plain prose: without chat openers, markup, sentences said before, or a cut-off last sentence.

    Empty where the model said nothing usable: too few words, an echo of the prompt, or a loop.
    """
    text = _OPENER.sub("", squeeze(_MARKUP.sub("", completion.text)))
    sentences = split_sentences(text)
    cut_off = bool(sentences) and not sentences[-1].rstrip("\"'”’)").endswith((".", "!", "?"))
    if cut_off and (len(sentences) > 1 or completion.finish_reason == "length"):
        rest = sentences.pop()
        if not sentences:
            # A single long sentence: end it at its last clause rather than lose it.
            head = rest.rpartition(", ")[0]
            sentences = [f"{head}."] if len(head.split()) >= MIN_WORDS else []
    kept: list[str] = []
    said: set[tuple[str, ...]] = set()
    for sentence in sentences:
        triples = _triples(sentence)
        if triples and sum(t in said for t in triples) >= REPEATED * len(triples):
            continue
        said.update(triples)
        kept.append(sentence)
    answer = " ".join(kept)
    return "" if _unfit(answer) else answer


def _unfit(text: str) -> bool:
    if len(text.split()) < MIN_WORDS or _ECHO.search(text):
        return True
    triples = _triples(text)
    return len(set(triples)) < MIN_DISTINCT * len(triples)


def _triples(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return list(zip(words, words[1:], words[2:], strict=False))
