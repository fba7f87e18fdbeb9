"""Numbers as a title writes them: "One Hundred and One", "Sixth", "III", "$1,000,000" all become digits."""

from __future__ import annotations

import re

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_UNITS += ["seventeen", "eighteen", "nineteen"]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
_ORDINAL = {word: f"{value}th" for value, word in enumerate(_ORDINALS, start=1)}
_SHORT_ORDINAL = re.compile(r"^(\d+)(?:st|nd|rd|th)$")
_ROMAN = {name: str(value) for value, name in enumerate("ii iii iv v vi vii viii ix x xi xii xiii xiv xv".split(), 2)}
_PARTS = {"part", "pt", "episode", "chapter", "vol", "volume", "no", "number"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DOLLARS = re.compile(r"\$\s?(\d+)")


def plain_amounts(text: str) -> str:
    """Without thousands' separators, and with the currency as it is spoken: "$1,000,000" -> "1000000 dollar"."""
    return _DOLLARS.sub(r"\1 dollar", _THOUSANDS.sub("", text)) if any(char.isdigit() for char in text) else text


def digits(words: list[str]) -> list[str]:
    """Number words, ordinals and roman numerals as digits; "Part", "Episode" and the like before a number are dropped.

    A roman numeral in first place is a word, as in "X-Men" or "V for Vendetta", and "I" is one after "Part" alone.

    Args:
        words: lower case, without punctuation.
    """
    found: list[str] = []
    place = 0
    while place < len(words):
        word = words[place]
        if word in _TENS and words[place + 1 : place + 2] and words[place + 1] in _ORDINALS[:9]:  # forty-second
            found.append(f"{_SMALL[word] + _ORDINALS.index(words[place + 1]) + 1}th")
            place += 2
            continue
        if word in _SMALL or word in _SCALES:
            value, place = _cardinal(words, place)
            found.append(str(value))
            continue
        if place and word in _ROMAN:
            word = _ROMAN[word]
        elif place and word == "i" and words[place - 1] in _PARTS:
            word = "1"
        elif word in _ORDINAL:
            word = _ORDINAL[word]
        elif short := _SHORT_ORDINAL.match(word):
            word = f"{short[1]}th"
        found.append(word)
        place += 1
    return [
        word
        for place, word in enumerate(found)
        if place == 0 or word not in _PARTS or not found[place + 1 : place + 2] or not found[place + 1][0].isdigit()
    ]


def _cardinal(words: list[str], place: int) -> tuple[int, int]:
    """The number whose words begin here, and the place behind it.

    "One hundred and one" is one number; "nineteen eighty four" are two that stand together, as in 1984.
    """
    total = current = 0
    last = 0  # what the word before was worth: a smaller unit may follow a larger one
    while place < len(words):
        word = words[place]
        if word in _SCALES:
            scale = _SCALES[word]
            if scale == 100 or not current:
                current = (current or 1) * scale
            else:
                current *= scale
            if scale > 100:
                total, current = total + current, 0
            last = scale
        elif word in _SMALL and (not last or last >= 100 or (last >= 20 and 0 < _SMALL[word] < 10)):
            current += _SMALL[word]
            last = _SMALL[word] or 1
        elif word == "and" and last >= 100 and place + 1 < len(words) and words[place + 1] in _SMALL:
            place += 1
            continue
        else:
            break
        place += 1
    return total + current, place
