"""Titles as keys: the names that an item may go by, and one spelling for all ways to write a name."""

from __future__ import annotations

import re
import unicodedata

_ARTICLE = (
    r"The|An?|La|Le|Les|El|Los|Las|Lo|Il|Gli|I|L'|Un|Une|Una|Uno|Der|Die|Das|Den|Det|De|Het|En|Ett|Ein|Eine|O|Os|As"
    r"|Um|Uma"
)
_MOVED_ARTICLE = re.compile(rf"^(.*\S),\s+({_ARTICLE})$", re.IGNORECASE)
_TRAILING_YEAR = re.compile(r"\s*\((?:18|19|20)\d\d\)\s*$")
_ALIAS = re.compile(r"\(([^()]*)\)")
_ALIAS_PREFIX = re.compile(r"^(?:a\.?\s?k\.?\s?a\.?|also known as)\s+", re.IGNORECASE)
_NO_ALIAS = re.compile(r"^(?:(?:18|19|20)\d\d.*|tv|v|mini|video|short|film|movie|\d+)$", re.IGNORECASE)
_SUBTITLE = re.compile(r"\s*(?::| - | – )\s*")
_LEADING = {"the", "a", "an", "la", "le", "les", "el", "los", "las", "il", "lo", "l", "der", "das"}
_PARTS = {"part", "pt", "episode", "chapter", "vol", "volume", "no"}
_ROMAN = {name: str(value) for value, name in enumerate("ii iii iv v vi vii viii ix x xi xii xiii xiv xv".split(), 2)}
_FOLDS = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i",
                        "³": " 3", "²": " 2", "½": " 1/2", "’": "'", "`": "'"})  # fmt: skip
_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+")


def item_names(title: str) -> list[str]:
    """The names that a catalogue's title stands for, the main one first.

    "Matrix, The (1999)" gives "The Matrix"; "City of Lost Children, The (Cité des enfants perdus, La)" gives "The City
    of Lost Children" and "La Cité des enfants perdus".
    """
    title = _TRAILING_YEAR.sub("", title.strip())
    main = " ".join(_ALIAS.sub(" ", title).split())
    aliases = [_ALIAS_PREFIX.sub("", alias.strip()) for alias in _ALIAS.findall(title)]
    names = [main, *(alias for alias in aliases if alias and not _NO_ALIAS.match(alias))]
    return list(dict.fromkeys(name for name in map(_forward, names) if name))


def _forward(name: str) -> str:
    moved = _MOVED_ARTICLE.match(name)
    if not moved:
        return name
    return f"{moved[2]}{'' if moved[2].endswith(chr(39)) else ' '}{moved[1]}"


def exact_fold(name: str) -> str:
    """Lower case without accents, blanks run together: two spellings that no reader would call different."""
    return " ".join(_plain(name).split())


def key(name: str) -> str:
    """The form under which names are joined.

    Accents, case and punctuation fold away, "&" is "and", roman numerals are digits (but for the first word, as in
    "X-Men" or "V for Vendetta"), a leading article and "Part", "Episode", "Volume" are dropped. A name of nothing else
    keeps its words.
    """
    words = _WORD.findall(_APOSTROPHE.sub("", _plain(name).replace("&", " and ")))
    kept = words[1:] if len(words) > 1 and words[0] in _LEADING else words
    kept = [word if place == 0 else _ROMAN.get(word, word) for place, word in enumerate(kept)]
    short = [word for place, word in enumerate(kept) if place == 0 or word not in _PARTS]
    return " ".join(short or words)


def leading_article(name: str) -> str | None:
    """The article in front of a name, or None: what `key` drops."""
    words = _WORD.findall(_plain(name))
    return words[0] if len(words) > 1 and words[0] in _LEADING else None


def short_key(name: str) -> str | None:
    """The key of what stands before a subtitle ("Star Wars" of "Star Wars: Episode IV"), or None without one."""
    head, *rest = _SUBTITLE.split(name, maxsplit=1)
    return key(head) or None if rest else None


def numerals(name_key: str) -> list[str]:
    """The numbers in a key, sorted: sequels differ in nothing else."""
    return sorted(_NUMBER.findall(name_key))


def _plain(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.lower().translate(_FOLDS))
    return "".join(char for char in decomposed if not unicodedata.combining(char))
