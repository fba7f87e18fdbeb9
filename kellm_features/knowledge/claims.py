"""What in a text can be looked up: its names, years and numbers."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["name", "year", "number"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A mention of a name, a year or a number: `text[start:end]`.

    Mentions with one `key` are one claim: "Toy Story" and "TOY STORY", "Robin Williams" and a later "Williams".
    """

    start: int
    end: int
    kind: Kind
    key: str
    """What is looked up: folded words, joined by blanks. Where a possessive ends within a name stands a |:
    "mann|heat" for "Mann's Heat", which is a name or two. A decade is its first year and an s: "1990s"."""


_UNITS = "one two three four five six seven eight nine ten eleven twelve".split()
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_ROMANS = {"ii": 2, "iii": 3, "iv": 4, "vi": 6, "vii": 7, "viii": 8, "ix": 9, "xi": 11, "xii": 12, "xiii": 13}
_NUMBERS = {word: str(n) for n, word in enumerate([*_UNITS, *_TEENS], 1)}
_NUMBERS |= {word: str(10 * n) for n, word in enumerate(_TENS, 2)}
_NUMBERS |= {word: f"{n}{('st', 'nd', 'rd', 'th')[min(n, 4) - 1]}" for n, word in enumerate(_ORDINALS, 1)}
# i, v and x are initials more often than numbers.
_SAME = _NUMBERS | {word: str(n) for word, n in _ROMANS.items()} | {"&": "and"}

_LISTS = {
    "months and days": "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday",
    "peoples and languages": "african american arabic argentine asian australian austrian belgian brazilian british "
    "canadian cantonese chinese christian cuban czech danish dutch english european finnish french german greek hebrew "
    "hindi hungarian indian iranian irish israeli italian jamaican japanese jewish korean latin mandarin mexican "
    "muslim norwegian persian polish portuguese roman romanian russian scottish serbian soviet spanish swedish swiss "
    "taiwanese turkish vietnamese welsh yiddish",
    "genres": "action adventure animated animation biographical biography biopic childrens comedies comedy crime "
    "documentaries documentary drama dramas dramedy family fantasy fi fiction film films gangster historical history "
    "horror independent indie melodrama mockumentary music musical musicals mystery noir parody romance romantic "
    "satire sci science scifi short silent slasher sport sports superhero suspense thriller thrillers tv war western "
    "westerns",
    "what a text is about": "cast character characters cinema cinematography critic critics dvd fan fans genre genres "
    "i movie movies ok overall plot release released screenplay sequel series star stars story style synopsis theme "
    "themes title titled video viewer viewers year",
    "forms of address": "dr jr mr mrs ms sr",
    "roles": "actor actors actress actresses author composer director directors filmmaker producer producers "
    "screenwriter screenwriters writer writers",
}
_ROLES = frozenset(_LISTS["roles"].split())
_NO_NAME = frozenset(word for words in _LISTS.values() for word in words.split())
# Words that open a sentence and stand before a name, as in "With Robin Williams".
_OPENERS = frozenset(
    """
    a about above across additionally after against all along alongside also although amid among an and another any
    appearing are around as at based because before behind being below beside besides between both but by can
    comparable considered created critically despite directed disliked do due during each edited either enter
    especially even ever every everyone expect explore fans featured features featuring few finally following for
    from full further furthermore given has have he her here his how however if in including indeed inspired instead
    into is it its join joined joining just key known later led less let like liked likewise loosely made main many
    meanwhile memorable more moreover most much my named near nearly neither never nevertheless next no nor not
    notable notably now of off often on once one only or other others our over part perhaps portrayed primarily
    produced rarely released renowned see set several she shot similar similarly simply since so some soon starring
    still such supported supporting take than that the their then there these they this those though three through
    throughout thus to today together toward towards two ultimately under unlike until up upon us very veteran was
    we well were what whatever when whenever where whereas whether which while who whose why will with within
    without written yet you young your
    """.split()
)
ARTICLES = ("the", "a", "an")

_ABBREVIATIONS = r"(?:Mrs?|Ms|Dr|Jr|Sr|St|Lt|Col|Gen|Prof|Sgt|Capt|Rev|Vol|No|vs)\."
_ATOM = rf"(?:{_ABBREVIATIONS}|(?:[A-Z]\.){{1,8}}(?!\w)|[A-Z][A-Za-z0-9]*(?:'[A-Za-z]+|-[A-Z0-9][A-Za-z0-9]*)*)"
_JOINERS = "of|the|de|del|della|der|des|di|du|el|la|las|le|les|los|da|dos|van|von|ten|ter|y|e|&|'n'"
_GAP = (
    rf"(?:(?<!\.)[ \t]+(?:(?:{_JOINERS})[ \t]+){{0,2}}"
    r"|(?<=\.)[ \t]?(?!(?:The|This|These|It|Its|In|He|His|She|Her|They|As|And|A|An|With|While)\b))"
)
# Before a year in parentheses stands a title, and more may join its words. Not "in": "Al Pacino in Heat (1995)".
_WIDE_GAP = rf"(?::?[ ]+(?:(?:{_JOINERS}|and|at|for|from|on|or|to|with)[ ]+){{0,3}})"
_NUMERAL = r"(?:[ ]\d{1,3}(?!\w|[.,]\d))?"
_DATED = rf"(?P<dated>{_ATOM}(?:{_WIDE_GAP}{_ATOM}){{0,14}}{_NUMERAL})(?=[ ]\([12]\d{{3}}\))"
_RUN = re.compile(rf"(?<![A-Za-z0-9-])(?<![A-Za-z]')(?:{_DATED}|{_ATOM}(?:{_GAP}{_ATOM}){{0,14}}{_NUMERAL})")
# A word that begins a text is its subject in "Jumanji is a fantasy film".
_DEFINED = re.compile(r"[ ](?:is|was)[ ](?:an?|the|one)\b")
_LEAD = re.compile(rf"([A-Z][a-z]*)[ ]+(?:(?:{_JOINERS})[ ]+)*(?=[A-Z])")
_POSSESSIVE = re.compile(r"(?<=[’']s)\s+")
_AFTER_STOP = re.compile(rf"(?:(?<![A-Za-z])[A-Z]\.|\b{_ABBREVIATIONS})$")
_BEFORE_CAPITAL = " \t\n\"'()[]*_#-|>"

_QUOTED = re.compile(r"\"(?P<title>[^\"\n]{1,100})\"|(?<![\w*])\*(?P<italic>[^*\n]{1,100})\*(?![\w*])")
_YEAR_BEHIND = re.compile(r"\s*\((?:[^()]*[, ])?[12]\d{3}\)$")
_STOPS = " ,.;:!?"
_TITLE_WORDS = 14
"""A quotation of more words is speech. Of 34,398 titles of Wikipedia's film pages, one has more."""

_COUNT = "|".join(w for w in _NUMBERS if w not in ("one", "first", "second"))  # a pronoun; "a first look"
_FIGURE = re.compile(
    r"(?<![\w.])(?P<from>1\d{3}|20\d\d)[-–](?P<to>\d\d)(?!\w)"
    r"|(?<!\w)(?P<figure>'?\d+(?:[.,]\d+)*)(?P<unit>st|nd|rd|th|'?s)?(?![^\W_])"
    rf"|\b(?P<word>(?:{_COUNT})(?:[- ](?:{'|'.join(_NUMBERS)}))?)\b"
)
_YEAR = re.compile(r"1\d{3}|20\d\d")

_FOLD = re.compile(r"\d+(?:[.,]\d+)*(?:st|nd|rd|th|s)?(?![^\W_])|[^\W_]+(?:'[^\W_]+)*|&")
_ACCENTS = re.compile("[\u0300-\u036f]")
_LATIN = {
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "«": '"',
    "»": '"',
    "ø": "o",
    "Ø": "O",
    "ł": "l",
    "Ł": "L",
    "đ": "d",
} | {"Đ": "D", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ð": "d", "þ": "th", "ı": "i"}


def plain(text: str) -> str:
    """The text without accents, quotation marks straight; case stays."""
    if text.isascii():
        return text
    # Character by character: five times as fast as normalizing a page, of which few characters are not ASCII.
    for char in {char for char in text if char > "\x7f"}:
        text = text.replace(char, _plain(char))
    return text


@functools.lru_cache(maxsize=1 << 14)
def _plain(char: str) -> str:
    return _LATIN.get(char) or _ACCENTS.sub("", unicodedata.normalize("NFKD", char))


def fold(text: str) -> list[str]:
    """A text's words as they are compared.

    Without case, accents, hyphens, stops, possessive endings and inner apostrophes; numbers are digits ("twelve" →
    "12", "III" → "3", "sixth" → "6th").
    """
    return [fold_word(word) for word in split_words(text)]


def split_words(text: str) -> list[str]:
    """A text's words without accents, in the case that they have there."""
    return _FOLD.findall(plain(text))


@functools.lru_cache(maxsize=1 << 16)
def fold_word(word: str) -> str:
    """One word of `split_words` as it is compared."""
    word = word.casefold()
    if word[0].isdigit():
        return word.replace(",", "")
    word = word.removesuffix("'s").replace("'", "")
    return _SAME.get(word, word)


def whole_decade(decade: str) -> str:
    """A decade with its century: "90s" → "1990s", "10s" → "2010s"."""
    return decade if len(decade) > 3 else f"{'20' if decade < '20' else '19'}{decade}"


def find_claims(text: str) -> list[Claim]:
    """Every mention of a name, year or number in a text, in order; mentions of one thing have one key.

    Names are runs of capitalised words ("Samuel L. Jackson", "Father of the Bride Part II") and titles in quotation
    marks or in Markdown's italics. No names are: a sentence's first word that is nowhere part of one; months, days,
    genres, nationalities, languages and roles ("Director"). Made for English: of a script without capitals it finds
    years and numbers alone.
    """
    shape = _shape(text)
    titles = list(_titles(text, shape))
    shape = _blank(shape, titles)
    names = [*titles, *_runs(text, shape)]
    claims = [*_as_claims(names), *_figures(_blank(shape, names))]
    return sorted(claims, key=_start)


def _start(mention: Claim | _Name) -> int:
    return mention.start


@dataclass(slots=True)
class _Name:
    start: int
    end: int
    key: str
    quoted: bool = False
    initial: bool = False
    """One word that opens a sentence: its capital says nothing."""

    @property
    def words(self) -> list[str]:
        return self.key.replace("|", " ").split()


def _shape(text: str) -> str:
    """The text in ASCII, as long as it was: what is a letter, a capital, a mark. For patterns alone."""
    return text if text.isascii() else "".join([c if c < "\x80" else _ascii(c) for c in text])


@functools.lru_cache(maxsize=4096)
def _ascii(char: str) -> str:
    if (known := plain(char)[:1]).isascii() and known:
        return known
    if char in "–‑":
        return "-"
    # A lone accent belongs to the letter before it.
    return ("X" if char.isupper() else "x") if char.isalpha() or _ACCENTS.match(char) else "|"


def _blank(shape: str, names: list[_Name]) -> str:
    """Bars in the names' places: neither a word nor a gap that a run could cross."""
    pieces: list[str] = []
    end = 0
    for name in sorted(names, key=_start):
        pieces += [shape[end : name.start], "|" * (name.end - name.start)]
        end = name.end
    return "".join([*pieces, shape[end:]])


def _key(text: str) -> str:
    """The folded name, without a leading article if it has more words."""
    key = " ".join(fold(text))
    for article in ARTICLES:
        key = key.removeprefix(f"{article} ")
    return key


def _titles(text: str, shape: str) -> Iterator[_Name]:
    for match in _QUOTED.finditer(shape):
        start, end = match.span("title" if match["title"] is not None else "italic")
        title = _YEAR_BEHIND.sub("", shape[start:end].rstrip(_STOPS)).rstrip(_STOPS)
        words = title.split()
        capitals = sum(word[0].isupper() or word[0].isdigit() for word in words)
        if 0 < len(words) <= _TITLE_WORDS and not words[0][0].islower() and 2 * capitals >= len(words):
            key = _key(text[start : start + len(title)])
            if key and not _YEAR.fullmatch(key):
                yield _Name(start, start + len(title), key, quoted=True)


def _runs(text: str, shape: str) -> Iterator[_Name]:
    for match in _RUN.finditer(shape):
        start, end = match.span()
        opens = _opens_sentence(shape, start)
        while (lead := _LEAD.match(shape, start, end)) and (
            lead[1].casefold() in _ROLES or (opens and lead[1].casefold() in _OPENERS)
        ):
            start = lead.end()
            opens = False
        owner, *owned = _POSSESSIVE.split(text[start:end])
        name = _Name(start, end, "|".join([_key(owner), *(" ".join(fold(part)) for part in owned)]))
        words = name.words
        if not words or all(word in _NO_NAME or word.isdigit() or word in ARTICLES for word in words):
            continue
        if len(words) == 1 and not match["dated"]:
            begins = not shape[:start].strip(_BEFORE_CAPITAL) and _DEFINED.match(shape, end)
            # McKean and "Mann's direction" are names wherever they stand.
            plain_word = shape[start + 1 : end].islower() and not shape[:end].endswith("'s")
            name.initial = words[0] in _OPENERS or (opens and plain_word and not begins)
        if len(name.key) > 1:
            yield name


def _opens_sentence(shape: str, start: int) -> bool:
    before = shape[max(0, start - 60) : start]
    stripped = before.rstrip(_BEFORE_CAPITAL)
    if not stripped:
        return True
    gap = before[len(stripped) :]
    if "\n" in gap:
        return True
    return "|" not in gap and stripped[-1] in ".!?" and not _AFTER_STOP.search(stripped)


def _as_claims(names: list[_Name]) -> Iterator[Claim]:
    """One key for all mentions of a name.

    The end of a name that stands before ("Hawn", after "Goldie Hawn") is that name again, and so is its first word.
    """
    ends: dict[str, str] = {}
    begins: dict[str, str] = {}
    alone = {name.key for name in names if not name.initial}
    for name in sorted(names, key=_start):
        words, key = name.words, name.key
        if not name.quoted:
            key = ends.get(key) or (not name.initial and begins.get(key)) or key
        if key in alone:
            yield Claim(name.start, name.end, "name", key)
        for n in range(1, len(words)):
            ends.setdefault(" ".join(words[n:]), key)
        if len(words) > 1 and not name.quoted and not words[1].isdigit():  # Scream is another film than Scream 2
            begins.setdefault(words[0], key)


def _figures(shape: str) -> Iterator[Claim]:
    for match in _FIGURE.finditer(shape):
        start, end = match.span()
        if first := match["from"]:
            yield Claim(start, start + 4, "year", first)
            if match["to"] > max(first[2:], "12"):  # 1998-12 is a month
                yield Claim(end - 2, end, "year", first[:2] + match["to"])
        elif match["word"]:
            yield Claim(start, end, "number", " ".join(fold(match["word"])))
        else:
            figure, unit = match["figure"].lstrip("'"), match["unit"] or ""
            short = match["figure"].startswith("'") and len(figure) == 2  # '90s
            if unit.endswith("s") and figure.endswith("0") and (short or _YEAR.fullmatch(figure)):
                yield Claim(start, end, "year", whole_decade(f"{figure}s"))
            elif not unit and _YEAR.fullmatch(figure):
                yield Claim(start, end, "year", figure)
            else:
                yield Claim(start, end, "number", figure.replace(",", "") + unit.strip("'"))
