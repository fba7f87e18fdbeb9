"""Descriptions written from facts alone: instant, deterministic, and free of invention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from kellm_features.knowledge.engines.base import Answer, Completion, Prompt
from kellm_features.knowledge.facts import Event, ItemFacts, UserFacts, indefinite
from kellm_features.knowledge.text import cut_to_tokens, estimate_tokens, join_and, take_sentences
from kellm_features.settings import GenerateSettings

FAVOURITE_GENRES = 3
MIN_RATED = 3
"""Ratings of a genre before it counts as disliked: one bad film says little."""
DISLIKED_SHARE = 1 / 3
"""A genre is disliked where at most this share of its rated items was liked."""
LIKED_TITLES = 8
DISLIKED_TITLES = 3
SAID_ALREADY = 0.6
"""A sentence of the lead is left out where this share of its words stands in the first sentence already."""


class TemplateEngine:
    """Says what the catalogue, the linked page and the history tell, most telling facts first."""

    model_id = "template"
    revision = "1"
    sampling = "none"
    source: Literal["llm", "template"] = "template"
    shard_size = 4096

    def __init__(self, settings: GenerateSettings | None = None) -> None:
        """Needs no settings; takes them as every engine's factory does."""

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """One text per request, within `max_tokens` estimated tokens; the same facts give the same text."""
        for place, request in enumerate(requests):
            facts = request.facts
            text = (
                describe_item(facts, max_tokens) if isinstance(facts, ItemFacts) else describe_user(facts, max_tokens)
            )
            yield place, Completion(text)


def describe_item(facts: ItemFacts, max_tokens: int) -> str:
    """Title, year, genres and factors in one sentence, then what the page's lead goes on to say.

    The first sentence is written even where it alone exceeds the budget's estimate; then it is cut at a word.
    """
    genres = [genre.lower() for genre in facts.genres if genre.casefold() not in facts.page_genre.casefold()]
    kind = list(facts.before_noun) + ([join_and(genres)] if genres and not facts.page_genre else [])
    noun = " ".join([*kind, facts.noun]) + (f" ({', '.join(genres)})" if genres and facts.page_genre else "")
    after = "".join(f"{' ' if place == 0 else ', '}{phrase}" for place, phrase in enumerate(facts.after_noun))
    first = _ended(f"{facts.name} is {indefinite(noun)} {noun}{after}")
    rest = max_tokens - estimate_tokens(first)
    if rest < 0:
        return cut_to_tokens(first, max_tokens)
    more = take_sentences((s for s in facts.sentences if not _said_already(s, first)), rest - 1)
    return f"{first} {more}" if more else first


def _ended(sentence: str) -> str:
    """With one full stop at most: "... Shall We Dance?", "... starring Robert Downey Jr."."""
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _said_already(sentence: str, first: str) -> bool:
    """Whether most words of a sentence stand in the first one: "It stars ..." after "... starring ..."."""
    words, said = (set(re.findall(r"\w+", text.casefold())) for text in (sentence, first))
    return len(words & said) >= SAID_ALREADY * len(words)


def describe_user(facts: UserFacts, max_tokens: int) -> str:
    """Who the user is, the genres and decades that are liked, liked titles, then what is disliked.

    Liked titles are the best rated, the newest first among equals, and stand without their years: the decades tell.
    """
    subject = facts.who[0].upper() + facts.who[1:]
    if not facts.events:
        return f"{subject} without a known history."
    liked = [event for event in facts.events if event.liked]
    disliked = [event for event in facts.events if not event.liked]
    taste = _genre_taste(facts.events)
    opening = f"{subject} who likes {join_and(taste) + ' ' if taste else ''}{facts.plural}{_period(liked)}."
    if not liked:
        opening = f"{subject} who has liked none of {len(facts.events)} {facts.plural} so far."
    closing = []
    if genres := _disliked_genres(facts.events):
        closing.append(f"Rarely likes {join_and(genres)} {facts.plural}.")
    if disliked:
        closing.append(_ended(f"Disliked {join_and(e.title for e in _ranked(disliked, worst=True)[:DISLIKED_TITLES])}"))
    names = [event.title for event in _ranked(liked)[:LIKED_TITLES]]
    for count in range(len(names), -1, -1):
        middle = [_ended(f"Liked {join_and(names[:count])}")] if count else []
        text = " ".join([opening, *middle, *closing])
        if estimate_tokens(text) <= max_tokens:
            return text
    return cut_to_tokens(text, max_tokens)


def _ranked(events: Sequence[Event], worst: bool = False) -> list[Event]:
    """By rating, best (or worst) first; the newest first among equals and where there are no ratings."""
    sign = 1 if worst else -1
    newest_first = list(reversed(events))
    return sorted(newest_first, key=lambda event: sign * event.rating if event.rating is not None else 0.0)


def _counts(events: Sequence[Event]) -> tuple[Counter[str], Counter[str]]:
    seen = Counter(genre for event in events for genre in event.genres)
    liked = Counter(genre for event in events if event.liked for genre in event.genres)
    return seen, liked


def _genre_taste(events: Sequence[Event]) -> list[str]:
    """The genres liked most often, then by share of likes, then by name."""
    seen, liked = _counts(events)
    order = sorted(liked, key=lambda genre: (-liked[genre], -liked[genre] / seen[genre], genre))
    return [genre.lower() for genre in order[:FAVOURITE_GENRES]]


def _disliked_genres(events: Sequence[Event]) -> list[str]:
    """Genres met often enough and seldom liked, the worst first."""
    seen, liked = _counts(events)
    bad = [g for g in seen if seen[g] >= MIN_RATED and liked[g] <= DISLIKED_SHARE * seen[g]]
    return [genre.lower() for genre in sorted(bad, key=lambda g: (liked[g] / seen[g], -seen[g], g))[:2]]


def _period(liked: Sequence[Event]) -> str:
    """The one or two decades that most of the liked items come from."""
    decades = Counter(event.year // 10 * 10 for event in liked if event.year is not None)
    if not decades:
        return ""
    (first, count), *others = sorted(decades.items(), key=lambda pair: (-pair[1], -pair[0]))
    both = [first] if count > decades.total() / 2 or not others else [first, others[0][0]]
    return f" of the {join_and(f'{decade}s' for decade in sorted(both))}"
