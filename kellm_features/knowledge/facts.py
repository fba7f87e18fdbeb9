"""What is known of an item or a user, in structured form: read from the tables and off the linked page."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kellm_features.knowledge.domain import NAME, Domain, FactRule, expand_pattern
from kellm_features.knowledge.text import bare_title, join_and, split_sentences, squeeze, titled

NO_GENRE = frozenset({"", "unknown", "(no genres listed)", "none", "other"})
_BOILERPLATE = frozenset(
    {
        "references",
        "external links",
        "see also",
        "notes",
        "further reading",
        "bibliography",
        "sources",
        "footnotes",
    }
)
_DEFINITION = re.compile(r"\b(?:is|was|are) (?:an?|the)\b")


@dataclass(frozen=True)
class Page:
    """The text of a Wikipedia page: lead, and sections by name in page order."""

    title: str
    lead: str
    sections: tuple[tuple[str, str], ...] = ()

    @property
    def has_text(self) -> bool:
        """Whether there is anything to ground a description on."""
        return bool(self.lead.strip() or any(text.strip() for _, text in self.sections))

    def ordered(self, preferred: Sequence[str]) -> list[tuple[str, str]]:
        """Lead first, then the preferred sections, then the others; reference sections never."""
        rank = {name.casefold(): place for place, name in enumerate(preferred)}
        kept = [(name, text) for name, text in self.sections if name.casefold() not in _BOILERPLATE and text.strip()]
        kept.sort(key=lambda section: rank.get(section[0].casefold(), len(rank)))
        return ([("", self.lead)] if self.lead.strip() else []) + kept


@dataclass(frozen=True)
class ItemFacts:
    """What the template engine says of an item."""

    noun: str
    title: str
    """As people write it, without the year."""
    year: int | None
    genres: tuple[str, ...]
    page_genre: str = ""
    """What kind of item the page calls it: "slasher". Finer than a catalogue's genres."""
    before_noun: tuple[str, ...] = ()
    """Phrases that stand before the noun: "American", "slasher"."""
    after_noun: tuple[str, ...] = ()
    """Phrases that follow it: "directed by John Lasseter"."""
    sentences: tuple[str, ...] = ()
    """Of the linked pages' leads: the first one of each, then the others; without a defining first sentence that the
    phrases already tell."""
    by_factor: tuple[tuple[str, str], ...] = ()
    """Factor and text, of what was read off the page and of the catalogue's genres."""

    @property
    def name(self) -> str:
        """Title and year."""
        return titled(self.title, self.year)


@dataclass(frozen=True)
class Event:
    """One event of a user's history."""

    title: str
    year: int | None
    genres: tuple[str, ...]
    rating: float | None
    liked: bool

    @property
    def name(self) -> str:
        """Title and year."""
        return titled(self.title, self.year)


@dataclass(frozen=True)
class UserFacts:
    """What the template engine says of a user."""

    plural: str
    who: str
    """ "a male viewer (technician, aged 24)", or "a viewer" where nothing is known."""
    events: tuple[Event, ...]
    """History in time order."""


def item_facts(
    domain: Domain,
    title: str,
    year: int | None,
    genres: Sequence[str],
    pages: Sequence[Page] = (),
) -> ItemFacts:
    """Collect an item's facts.

    Args:
        domain: its rules say what is read off a page and how it is said.
        title: of the catalogue.
        year: of the catalogue, where known.
        genres: of the catalogue.
        pages: the linked pages, the best first. Phrases come from the first alone: what the others are about, the
            item only mentions.
    """
    before: list[str] = []
    after: list[str] = []
    page_genre = ""
    found = (
        {"genre": ", ".join(known_genres(genres))} if known_genres(genres) and "genre" in domain.item.factors else {}
    )
    for rule in domain.facts:
        if pages and (value := find_fact(rule, pages[0])):
            (before if rule.before_noun else after).append(rule.phrase.format(value=value))
            page_genre = value if rule.factor == "genre" else page_genre
            found[rule.factor] = value
    leads = [split_sentences(page.lead) for page in pages]
    if leads and leads[0] and after and _DEFINITION.search(leads[0][0]):
        leads[0] = leads[0][1:]
    # Every page says in its first sentence what it is about.
    sentences = [*(lead[0] for lead in leads if lead), *(sentence for lead in leads for sentence in lead[1:])]
    return ItemFacts(
        noun=domain.noun,
        title=bare_title(title),
        year=year,
        genres=known_genres(genres),
        page_genre=page_genre,
        before_noun=tuple(before),
        after_noun=tuple(after),
        sentences=tuple(sentences),
        by_factor=tuple((factor, found[factor]) for factor in domain.item.factors if factor in found),
    )


def known_genres(genres: Sequence[str]) -> tuple[str, ...]:
    """The genres without blanks and placeholders such as MovieLens's "unknown"."""
    return tuple(genre.strip() for genre in genres if genre.strip().casefold() not in NO_GENRE)


def find_fact(rule: FactRule, page: Page) -> str:
    """The value of one factor on a page, in words ("Joel Coen and Ethan Coen"); empty where none is found."""
    values = list(dict.fromkeys(_values(rule, page)))
    # "Tucci" beside "Stanley Tucci" is the same person.
    whole = [v for v in values if not any(v != other and f" {v} " in f" {other} " for other in values)]
    return join_and(whole[: rule.limit])


def _values(rule: FactRule, page: Page) -> Iterator[str]:
    lead = squeeze(page.lead)
    for pattern in rule.patterns:
        if match := _compiled(pattern).search(lead):
            yield from re.split(r",? and |, ", match["value"])
            break
    if rule.section:
        for name, text in page.sections:
            if name.casefold() == rule.section.casefold():
                for line in text.splitlines():
                    if match := re.match(rf"\W*(?P<value>{NAME})", line):
                        yield match["value"]


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(expand_pattern(pattern))


_GENDERS = {"m": "male", "f": "female", "male": "male", "female": "female"}
_NO_OCCUPATION = frozenset({"", "other", "none", "unknown", "not specified", "other or not specified"})


def who(consumer: str, gender: str | None, age: str | None, occupation: str | None) -> str:
    """A user's demographics as a noun phrase, of what is known: "a female viewer (writer, aged 25-34)", "a viewer"."""
    sex = _GENDERS.get((gender or "").strip().casefold(), "")
    job = squeeze(occupation or "")
    years = squeeze(age or "")
    details = [job] if job.casefold() not in _NO_OCCUPATION else []
    details += [f"aged {years}"] if years else []
    noun = f"{sex} {consumer}" if sex else consumer
    return f"{indefinite(noun)} {noun}" + (f" ({', '.join(details)})" if details else "")


def indefinite(phrase: str) -> str:
    """ "a" or "an", by the first letter: right for the words that occur here."""
    return "an" if phrase[:1].casefold() in "aeiou" else "a"
