"""What kind of thing a page is about, and its year, from its title, infobox and categories.

The words are those of the English Wikipedia; a page of another edition simply carries less evidence.
"""

from __future__ import annotations

import re
from functools import lru_cache

from kellm_spark.wikitext import Article, first_year, infobox

_PERSON = (
    r"person|actor|actress|writer|author|poet|biography|officeholder|politician|scientist|artist|royalty|saint|athlete"
    r"|sportsperson|boxer|[\w ]+ biography|military person|criminal|academic|philosopher|comedian|comics creator|chef"
    r"|model|monarch|president|prime minister|cricketer|wrestler|golfer|nfl player|nobility|noble|clergy|pope|engineer"
    r"|architect|economist|astronaut|journalist|youtube personality|religious biography|pharaoh"
)
# The words after "Infobox"; the first kind that fits counts, so characters stand before what they appear in.
_INFOBOX = (
    ("character", r"(?:[\w ]+ )?character|fictional [\w ]+|superhero(?: team)?"),
    ("species", r"(?:[\w ]* )?(?:taxobox|taxoboks|speciesbox)|taxobox|taxoboks|speciesbox|\w*ta(?:x|ks)onom\w*"),
    ("event", r"[\w ]*(?:festival|contest|conflict|tournament|election|ceremony)|event|spaceflight|olympic[\w ]*|games"
     r"|holiday|earthquake|hurricane|football match|concert|news event|wrestling event"),
    ("award", r"[\w ]*awards?"),
    ("organization", r"company|organi[sz]ation|university|school|football club|[\w ]*political party|government agency"
     r"|television (?:channel|station|network)|tv (?:channel|station)|broadcast[\w ]*|record label|publisher"
     r"|sports (?:conference|league|team)|union|law firm|airline|dotcom company|network|hospital|national military"),
    ("periodical", r"magazine|journal|newspaper"),
    ("film series", r"film series|(?:media )?franchise"),
    ("television", r"television[\w ]*|tv[\w ]*|reality (?:tv|show)|anime|animanga[\w /]*"),
    ("film", r"film|movie|hollywood cartoon|short film|filme|película"),
    ("book", r"book|books|novel|short story|comic|comic book[\w ]*|graphic novel|manga|poem|play|novella|book series"),
    ("song", r"song|single|musical composition|anthem"),
    ("album", r"album|álbum|ep|soundtrack"),
    ("band", r"musical artist|band|orchestra|musical ensemble"),
    ("game", r"video ?game[\w ]*|vg[\w ]*|game|board ?game|card game|tabletop game"),
    ("person", _PERSON),
    ("settlement", r"settlement|city|town|village|uk place|french commune|german location|italian comune|municipality"
     r"|country|u\.?s\.? (?:state|county)|province[\w ]*|former country|islands?|region|river|mountain|lake|building"
     r"|venue|airport|continent|state|county|body of water|body|bridge|station|historic site|nrhp|protected area|park"),
    ("language", r"language(?: family)?"),
    ("software", r"software|website|os|operating system|programming language|file format"),
    ("disease", r"disease|medical condition(?: \(new\))?"),
)  # fmt: skip
_INFOBOX_KINDS = [(kind, re.compile(rf"(?:{words})(?:\b|$)")) for kind, words in _INFOBOX]
_INFOBOX_WORD = re.compile(r"^(?:info\w*|ficha de)[ :/-]*|[ -]*infobox$")
# What stands at the end of a category's name, its first preposition and what follows being cut off: "Films" of
# "Films based on novels", "American novels" of "American novels adapted into films".
_CATEGORY_KINDS = [
    (kind, re.compile(rf"\b(?:{words})$", re.IGNORECASE))
    for kind, words in (
        ("film", r"films?"),
        ("film series", r"film series|film franchises"),
        ("television", r"television (?:series|shows?|programs?|programmes?|miniseries)(?: debuts| endings)?|TV series"),
        ("book", r"novels?|books?|short stories|novellas|plays|(?<!symphonic )poems|comics debuts|graphic novels"),
        ("song", r"songs?|(?<!['’]s )singles|compositions"),
        ("album", r"albums?|soundtracks"),
        ("band", r"musical groups(?: (?:dis|re)?established)?|bands|musical (?:duos|trios|quartets|quintets)"),
        ("game", r"video games|board games|card games"),
        ("person", r"births|deaths|living people"),
        ("character", r"characters|fictional [\w -]+"),
        ("species", r"species|fauna|flora|animals described"),
        ("event", r"battles|festivals|elections|conflicts"),
        (
            "settlement",
            r"populated places(?: established)?|cities|towns|villages|municipalities|capitals|countries",
        ),
    )
]
_AFTER_HEAD = re.compile(
    r" (?:of|in|on|by|from|for|about|with|at|to|that|which|whose|based|set|shot|directed|produced|scored|written"
    r"|adapted|developed|published|featuring|starring|recorded|inspired|composed|filmed|released|using|involving|introduced"
    r"|established|disestablished|originally)\b.*"
)
# The plain noun in the title's parentheses: "Casino (1995 film)", "Emma (novel)", "Alien (soundtrack)".
_TITLE_KINDS = [
    (kind, re.compile(rf"\b(?:{words})$", re.IGNORECASE))
    for kind, words in (
        ("film series", "film series|franchise"),
        ("television", "tv series|television series|miniseries|tv program|tv programme|tv show|anime"),
        ("film", "film|movie"),
        ("book", "novel|book|short story|novella|play|comics|comic book|manga|poem|book series|novel series"),
        ("song", "song|composition"),
        ("album", "album|soundtrack|EP"),
        ("band", "band|musician|singer|rapper|group"),
        ("game", "video game|game|video game series"),
        ("character", "character"),
        ("person", "actor|actress|director|filmmaker|writer|author|politician|footballer|composer|artist"),
        ("periodical", "magazine|journal|newspaper"),
    )
]
_DEFINITION = re.compile(r"\b(?:is|was|are|were) (?:an?|the|one of the) ([^.;:(]{1,200})")
_DEFINED_YEAR = re.compile(r"\b(?:is|was|are|were) (?:an?|the) (1[5-9]\d\d|20\d\d) ")
_DEFINITION_LENGTH = 400
_NOUN_ENDS = re.compile(
    r"[,\u2013\u2014]| (?:of|to|by|from|for|in|on|at|about|with|that|which|who|whose|based|directed|written|produced|"
    r"starring|created|released|published|composed|performed|recorded|adapted|set|made|and|or) "
)
_DEFINING = [
    (kind, re.compile(rf"\b(?:{words})\b", re.IGNORECASE))
    for kind, words in (
        ("film series", "franchise|(?:film|movie) series|trilogy|tetralogy"),
        ("television", "television|tv|miniseries|sitcom|soap opera"),
        ("film", "films?|movies?|motion picture|documentary|cartoon|featurette|mockumentary|short subject"),
        ("book", "novel|novella|book|short story|stage play|play|memoir|poem|comic book|manga|autobiography"),
        ("song", "song|single"),
        ("album", "album|soundtrack|mixtape"),
        ("game", "video game|board game|card game|role-playing game"),
        ("band", "band|musical group|singer|rapper|musician"),
    )
]
_LIST_TITLE = re.compile(r"^lists? of ", re.IGNORECASE)
_PARENTHESES = re.compile(r"^(.*?)\s+\(([^()]*)\)$")
_YEAR = re.compile(r"(?<!\d)(1[5-9]\d\d|20\d\d)(?!\d)")
_YEAR_CATEGORY = re.compile(
    r"^(1[5-9]\d\d|20\d\d) (?:[\w'-]+ )*?(?:films?|novels?|books|songs|singles|albums|EPs|video games|plays|works|"
    r"short stories|television (?:series|show) debuts|debut novels|compositions|poems|musicals|operas|essays|"
    r"comics debuts)$"
)
_DATE_FIELDS = (
    "released", "release_date", "release date", "release", "orig_pub_date", "pub_date", "publication_date",
    "publication date", "published", "first_aired", "first aired", "premiere", "premiere_date", "air_date", "airdate",
    "written", "composed", "first_run", "date_premiere",
)  # fmt: skip


def split_title(title: str) -> tuple[str, str]:
    """A page title without its disambiguator, and the disambiguator: ("Casino", "1995 film").

    Parentheses that tell nothing apart, as in "(500) Days of Summer", are part of the title.
    """
    found = _PARENTHESES.match(title)
    return (found[1], found[2]) if found else (title, "")


def kinds_of(article: Article, title: str) -> list[str]:
    """The kinds of thing that title, infobox and categories speak for, strongest evidence first, each once.

    A list of things is a "list", whatever its categories hold; a film may be called "List of Lovers".
    """
    box = infobox(article)
    if box is None and _LIST_TITLE.match(title):
        return ["list"]
    named = title_kind(title)
    kinds = [named] if named else []
    if box:
        kinds += _infobox_kinds(box.name)
    of_categories = {kind for name in article.categories for kind in _category_kinds(name)}
    kinds += [kind for kind, _ in _CATEGORY_KINDS if kind in of_categories]
    return list(dict.fromkeys(kinds))


@lru_cache(maxsize=1 << 12)
def _infobox_kinds(name: str) -> tuple[str, ...]:
    subject = _INFOBOX_WORD.sub("", name) or name
    return tuple(kind for kind, words in _INFOBOX_KINDS if words.match(subject))[:1]


@lru_cache(maxsize=1 << 16)
def _category_kinds(name: str) -> frozenset[str]:
    """What a category holds; a few of them are on most pages."""
    head = _AFTER_HEAD.sub("", name)
    return frozenset(kind for kind, words in _CATEGORY_KINDS if words.search(head))


def title_kind(title: str) -> str | None:
    """The kind that a title's parentheses name: "film" for "Casino (1995 film)"."""
    disambiguator = split_title(title)[1]
    return next((kind for kind, words in _TITLE_KINDS if words.search(disambiguator)), None)


def year_of(article: Article, title: str) -> int | None:
    """The year in which a work came out: of several, as of a series that ran from 1999 to 2007, the first.

    Read from the title's parentheses, else the infobox's date, else the earliest "NNNN films" category. Years before
    1500 are not told from other numbers.
    """
    told = _YEAR.search(split_title(title)[1])
    if told:
        return int(told[1])
    box = infobox(article)
    for name in _DATE_FIELDS:
        if box and name in box.fields:
            year = first_year(box.fields[name])
            if year:
                return year
    return min((int(found[1]) for name in article.categories if (found := _YEAR_CATEGORY.match(name))), default=None)


def defined_as(lead: str) -> str | None:
    """The kind that the first sentence gives its subject, in English: "book" for "Emma is a novel by Jane Austen".

    None where it has no such sentence, or one without a word for a kind.
    """
    found = _DEFINITION.search(lead, 0, _DEFINITION_LENGTH)
    if not found:
        return None
    noun = _NOUN_ENDS.split(found[1], maxsplit=1)[0]
    return next((kind for kind, words in _DEFINING if words.search(noun)), None)


def defined_year(lead: str) -> int | None:
    """The year in such a sentence: 1957 for "The Seventh Seal is a 1957 Swedish film"."""
    found = _DEFINED_YEAR.search(lead, 0, _DEFINITION_LENGTH)
    return int(found[1]) if found else None
