"""What kind of thing a page is about, and its year, from its title, infobox and categories.

The words are those of the English Wikipedia; a page of another edition simply carries less evidence.
"""

from __future__ import annotations

import re

from kellm_spark.wikitext import Article, first_year, infobox, plain_text

_INFOBOX = (
    ("television", r"television|tv|reality (?:tv|show)|anime|animanga"),
    ("film", r"film|movie|hollywood cartoon|short film"),
    ("book", r"book|novel|short story|comic|graphic novel|manga|magazine|journal|poem|play\b"),
    ("song", r"song|single|musical composition|anthem"),
    ("album", r"album|ep\b|soundtrack"),
    ("band", r"musical artist|band|orchestra"),
    ("game", r"video ?game|vg\b|game\b|board game"),
    ("person", r"person|actor|writer|biography|officeholder|politician|scientist|artist|royalty|saint|athlete|sports"
     r"person|boxer|football biography|military person|criminal|academic|philosopher|comedian|chef|model|adult|monarch"
     r"|president|prime minister|baseball biography|basketball biography|cricketer|tennis biography|pageant|noble"),
    ("character", r"character|comics character|fictional"),
    ("settlement", r"settlement|city|town|village|uk place|french commune|german location|italian comune|municipality"
     r"|country|u\.?s\.? state|province|former country|islands?\b|region|river|mountain|lake|building|venue|airport"),
    ("organization", r"company|organi[sz]ation|university|school|football club|political party|government agency"),
    ("species", r"taxobox|speciesbox"),
)  # fmt: skip
_INFOBOX_KINDS = [(kind, re.compile(rf"^infobox (?:{words})")) for kind, words in _INFOBOX]
_CATEGORY_KINDS = [
    (kind, re.compile(words, re.IGNORECASE))
    for kind, words in (
        ("film", r"\bfilms?$|^films (?:directed|produced|based|set|shot|about|scored|with|by)\b"),
        ("television", r"\btelevision (?:series|shows?|programs?|programmes?|miniseries)\b|\bTV series\b"),
        ("book", r"\b(?:novels?|books?|short stories|novellas|plays|poems)$"),
        ("song", r"\b(?:songs?|singles)$"),
        ("album", r"\balbums?$"),
        ("band", r"\bmusical groups\b|\bbands$"),
        ("game", r"\bvideo games$"),
        ("person", r"\b(?:births|deaths|people)$"),
        ("settlement", r"\b(?:populated places|cities|towns|villages|municipalities|capitals)\b"),
    )
]
# "Novels adapted into films" and "Lists of films" name films and hold none.
_NO_KIND = re.compile(r"adapted into|^lists? of|\binspirations? for\b", re.IGNORECASE)
# The plain noun in the title's parentheses: "Casino (1995 film)", "Emma (novel)", "Alien (soundtrack)".
_TITLE_KINDS = [
    (kind, re.compile(rf"\b(?:{words})$", re.IGNORECASE))
    for kind, words in (
        ("film", "film|movie"),
        ("film series", "film series|franchise"),
        ("television", "tv series|television series|miniseries|tv program|tv programme"),
        ("book", "novel|book|short story|novella|play"),
        ("song", "song"),
        ("album", "album|soundtrack"),
        ("band", "band|musician|singer|rapper"),
        ("game", "video game|game"),
        ("character", "character"),
    )
]
_PARENTHESES = re.compile(r"^(.*?)\s+\(([^()]*)\)$")
_YEAR = re.compile(r"(?<!\d)(1[89]\d\d|20\d\d)(?!\d)")
_YEAR_CATEGORY = re.compile(
    r"^(1[89]\d\d|20\d\d) (?:[\w-]+ )*?(?:films?|novels?|books|songs|singles|albums|video games|plays|works|"
    r"short stories|television series debuts|television films|non-fiction books|children's books)\b"
)
_DATE_FIELDS = (
    "released", "release_date", "release date", "release", "pub_date", "publication_date", "publication date",
    "published", "first_aired", "first aired", "premiere",
)  # fmt: skip


def split_title(title: str) -> tuple[str, str]:
    """A page title without its disambiguator, and the disambiguator: ("Casino", "1995 film").

    Parentheses that tell nothing apart, as in "(500) Days of Summer", are part of the title.
    """
    found = _PARENTHESES.match(title)
    return (found[1], found[2]) if found else (title, "")


def kinds_of(article: Article, title: str) -> list[str]:
    """The kinds of thing that title, infobox and categories speak for, strongest evidence first, each once."""
    named = title_kind(title)
    kinds = [named] if named else []
    box = infobox(article)
    if box:
        kinds += [kind for kind, words in _INFOBOX_KINDS if words.match(box.name)][:1]
    telling = [name for name in article.categories if not _NO_KIND.search(name)]
    kinds += [kind for kind, words in _CATEGORY_KINDS if any(words.search(name) for name in telling)]
    return list(dict.fromkeys(kinds))


def title_kind(title: str) -> str | None:
    """The kind that a title's parentheses name: "film" for "Casino (1995 film)"."""
    disambiguator = split_title(title)[1]
    return next((kind for kind, words in _TITLE_KINDS if words.search(disambiguator)), None)


def year_of(article: Article, title: str) -> int | None:
    """The year of a work: from the title's parentheses, else the infobox's date, else a "NNNN films" category."""
    told = _YEAR.search(split_title(title)[1])
    if told:
        return int(told[1])
    box = infobox(article)
    for name in _DATE_FIELDS:
        if box and name in box.fields:
            year = first_year(box.fields[name])
            if year:
                return year
    years = [int(found[1]) for name in article.categories if (found := _YEAR_CATEGORY.match(plain_text(name)))]
    return min(years, default=None)
