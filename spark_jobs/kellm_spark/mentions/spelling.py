"""Titles and names as units, by which a name is found in a title: words, or single characters where none are spaced.

The form is the same for both sides, so that a name is in a title where its units are, one after the other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kellm_spark.naming import exact_fold

_UNSPACED = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u309f"  # Hiragana
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
)
_KATAKANA = "\u30a0-\u30fa\u30fc-\u30ff"
"""A run of Katakana is a word: it ends where the script does. The middle dot between names is punctuation."""
# Vowel signs are no letters to Python's \w, and would tear the words of Indic scripts apart.
_MARKS = "".join(chr(code) for code in range(0x0300, 0x1D00) if unicodedata.category(chr(code)).startswith("M"))
_UNIT = re.compile(
    r"(?P<initials>(?:(?<!\w)[^\W\d_]\.\s?){2,}(?:[^\W\d_](?!\w))?)"  # U.S., J. R. R.
    rf"|(?P<character>[{_UNSPACED}])|(?P<katakana>[{_KATAKANA}]+)"
    rf"|(?P<word>(?:(?![{_UNSPACED}{_KATAKANA}])[^\W_{_MARKS}][{_MARKS}]*)+)|(?P<sign>&)"
)
_BREAK = re.compile(r"[,;:!?…|/()\[\]{}<>\"“”„«»—、。，；：！？（）「」『』《》【】]|\s[-–]\s|[-–]{2}|\.\s|\.$")
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_MAX_ACRONYM = 6
_HEADLINE_LOWER = 0.25
"""A title in which fewer of the telling words are in lower case is a headline: its capitals tell nothing."""

# Words that name nothing by themselves. Short on purpose: only those that stand in titles of every subject and are,
# or redirect to, pages (films and songs are called by them). Capital letters, the catalogue's own counts
# (`link.FREQUENT`), and what a page's text says of its name do the rest, in any language.
_STOP_WORDS = frozenset(
    # English: articles, pronouns, prepositions, conjunctions, auxiliaries, question words
    "a an the this that these those i me my we us our you your he him his she her it its they them their who whom "
    "whose what which when where why how and or but nor so yet if then than as because while though until unless of "
    "in on at by for with from to into onto over under up down out off about above after again against along amid "
    "among around before behind below beneath beside between beyond despite during except inside like near outside "
    "past per since through throughout toward towards via versus vs within without is are was were be been being am "
    "do does did done has have had having can could will would shall should may might must not no yes all any both "
    "each every either neither few many more most much other others another some such own same one only just now "
    "here there ever never always also too very s t re ll ve d m "
    # numbers, days, months
    "zero two three four five six seven eight nine ten hundred thousand million billion second third monday tuesday "
    "wednesday thursday friday saturday sunday january february march april june july august september october "
    "november december today tomorrow yesterday day days week month year years "
    # German, French, Spanish, Italian, Portuguese, Dutch: articles, prepositions, conjunctions
    "der die das den dem des ein eine und oder von vom zu zum zur mit im ist nicht le la les l un une du et ou au aux "
    "en dans sur pour par est el los las del y o con por para que il lo gli di e da nel os um uma em na ao van het een "
    "te op ter "
    # Russian
    "и в во не на я с со как а то что он она они мы вы но да за из по от до к о об у же бы для при или это".split()
)
_STOP_CHARACTERS = frozenset(
    # Chinese and Japanese words that are pages or redirects and stand in titles of every subject
    "我们 你们 他们 她们 它们 自己 大家 什么 怎么 怎样 如何 为何 为什么 哪里 哪些 这个 那个 这些 那些 这里 没有 不是 "
    "可以 可能 不能 必须 应该 一个 一些 一种 今天 明天 昨天 现在 时候 所有 因为 所以 但是 如果 我們 你們 他們 什麼 "
    "怎麼 為什麼 這個 那個 沒有 "
    "する こと もの これ それ どれ なに です ます から まで".split()
)
_NUMBER_CHARACTERS = re.compile(r"[\d〇零一二三四五六七八九十百千万萬亿億两兩第年月日号號时時分秒个個次]+$")


@dataclass(frozen=True)
class Spelled:
    """A text's units in order."""

    units: tuple[str, ...]
    """As written."""
    keys: tuple[str, ...]
    """As compared: without case and accents; acronyms keep their capitals, so that "US" is not "us"."""
    breaks: frozenset[int]
    """Places of the units that a comma, stop, bracket or dash stands before."""

    @property
    def key(self) -> str:
        """The units run together. A word stands between blanks: a word is never found inside another."""
        return "".join(map(_marked, self.keys))

    @cached_property
    def solid(self) -> int:
        """Units that are no stop words."""
        return self.weight(0, len(self.keys))

    def weight(self, start: int, stop: int) -> int:
        """Units from `start` up to `stop` that are no stop words."""
        return sum(not is_stop_word(key) for key in self.keys[start:stop])

    @property
    def is_name(self) -> bool:
        """Whether this can name anything: no stop words, numbers or single letters alone."""
        joined = "".join(self.keys)
        return (
            bool(self.solid)
            and len(joined) > 1
            and not (joined in _STOP_CHARACTERS or _NUMBER_CHARACTERS.match(joined))
        )

    @property
    def tokens(self) -> list[str]:
        """What a title must have if it has this name: words that are no stop words, and pairs of unspaced characters.

        Each once, in order.
        """
        found = []
        for place, key in enumerate(self.keys):
            if not _CHARACTER.match(key):
                found += [] if is_stop_word(key) else [key]
            elif place + 1 < len(self.keys) and _CHARACTER.match(self.keys[place + 1]):
                found.append(key + self.keys[place + 1])
        return list(dict.fromkeys(found))

    @cached_property
    def ends(self) -> dict[int, int]:
        """Where a unit ends in `key` -> the number of units up to there."""
        found, end = {}, 0
        for count, key in enumerate(self.keys, 1):
            end += len(_marked(key))
            found[end] = count
        return found

    @cached_property
    def telling_case(self) -> bool:
        """Whether capitals tell names from words here: not in a headline, nor where all letters are of one case."""
        told = [
            unit[0].islower()
            for place, (unit, key) in enumerate(zip(self.units, self.keys, strict=True))
            if place and place not in self.breaks and has_case(unit) and key == key.lower() and not is_stop_word(key)
        ]
        return any(map(has_capital, self.units)) and sum(told) >= max(1, _HEADLINE_LOWER * len(told))


def spell(text: str, *, title: bool = False) -> Spelled:
    """Split a text into units.

    Args:
        text: a name, or a title.
        title: this is a title: where all of it is in capitals, none of its words is an acronym for that.
    """
    text = unicodedata.normalize("NFKC", text)
    shouting = title and not any(map(str.islower, text)) and len(text.split()) > 1
    units: list[str] = []
    keys: list[str] = []
    breaks: set[int] = set()
    end = 0
    for found in _UNIT.finditer(text):
        gap = text[end : found.start()]
        # The stop of an initial ends no sentence.
        if units and _BREAK.search(gap) and not (gap.strip() == "." and len(units[-1]) == 1):
            breaks.add(len(units))
        unit, end = found[0], found.end()
        if found["initials"]:
            unit = "".join(filter(str.isalpha, unit))
        units.append(unit)
        keys.append(_unit_key(unit, acronyms=not shouting))
    return Spelled(tuple(units), tuple(keys), frozenset(breaks))


def is_stop_word(key: str) -> bool:
    """A word of the stop list, a number, or a single letter; an acronym is none, whatever it spells."""
    return key in _STOP_WORDS or key.isdigit() or (len(key) == 1 and not _CHARACTER.match(key))


def has_case(unit: str) -> bool:
    """Whether the unit's script has capital letters."""
    return unit.lower() != unit.upper()


def has_capital(unit: str) -> bool:
    """Whether a capital letter stands anywhere in the unit: "iPhone" is as much a name as "Paris"."""
    return unit != unit.lower()


def first_small(units: Sequence[str]) -> tuple[str, ...]:
    """The units with the first letter small: MediaWiki gives every title a capital there."""
    return (units[0][:1].lower() + units[0][1:], *units[1:])


def _unit_key(unit: str, *, acronyms: bool) -> str:
    if unit == "&":
        return "and"
    if _CHARACTER.match(unit):
        return unit
    if acronyms and 2 <= len(unit) <= _MAX_ACRONYM and unit.isupper():
        return exact_fold(unit).upper()
    # In scripts without capitals the marks that `exact_fold` takes off are no accents: バ is not ハ.
    return exact_fold(unit) if has_case(unit) else unit


def _marked(key: str) -> str:
    return key if _CHARACTER.match(key) else f" {key} "
