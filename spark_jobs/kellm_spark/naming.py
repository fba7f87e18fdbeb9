"""Titles as keys: the names that an item or a page may go by, and one spelling for all ways to write a name."""

from __future__ import annotations

import html
import re
import unicodedata

from kellm_spark.numbers import digits, plain_amounts

_ARTICLE = (
    r"The|An?|La|Le|Les|El|Los|Las|Lo|Il|Gli|I|L'|Un|Une|Una|Uno|Der|Die|Das|Den|Det|De|Het|En|Ett|Ein|Eine|O|Os|As"
    r"|Um|Uma"
)
_MOVED_ARTICLE = re.compile(rf"^(.*\S),\s+({_ARTICLE})$", re.IGNORECASE)
_TRAILING_YEAR = re.compile(r"\s*\((?:18|19|20)\d\d\)\s*$")
_ALIAS = re.compile(r"(?<=\S)\s*\(([^()]*)\)")  # "(500) Days of Summer" begins with its own name
_ALIAS_PREFIX = re.compile(r"(?:^|(?<=[,/;])\s*)(?:a\.?\s?k\.?\s?a\.?|also known as)\s+", re.IGNORECASE)
_ALIAS_BREAK = re.compile(r"\s*(?:/|;|, (?=a\.?k\.?a\.?\b))\s*", re.IGNORECASE)
_NO_ALIAS = re.compile(r"^(?:(?:18|19|20)\d\d.*|tv|v|mini|video|short|film|movie|\d+)$", re.IGNORECASE)
_SUBTITLE = re.compile(r"\s*(?::(?=\s)| - | – | — )\s*")
# "Robert A. Heinlein's The Puppet Masters", "Tales from the Crypt Presents: Demon Knight"
_OWNER = re.compile(r"^(?P<owner>[^:]+?)(?:'s|s'|\s+presents:?)\s+(?P<rest>\S.*)$", re.IGNORECASE)
_NO_OWNER = {"the", "a", "an", "my", "our", "your", "his", "her", "their", "its", "this", "that", "what", "who", "it",
             "there", "here", "let", "he", "she"}  # fmt: skip
_KIND_TAIL = re.compile(
    r"\s*(?::| -| –)\s+The (?:Movie|Film|Motion Picture|Documentary|Novel|Book|Game)$", re.IGNORECASE
)
_LEADING = {"the", "a", "an", "la", "le", "les", "el", "los", "las", "il", "lo", "gli", "l", "der", "das", "den", "det",
            "het", "ein", "eine", "un", "une", "una", "uno"}  # fmt: skip
_SHORT_FORMS = {"dr": "doctor", "mr": "mister", "mrs": "missus", "st": "saint", "vs": "versus", "jr": "junior",
                "sgt": "sergeant", "lt": "lieutenant"}  # fmt: skip
_FOLDS = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i",
                        "³": " 3", "²": " 2", "½": " 1/2", "’": "'", "‘": "'", "`": "'"})  # fmt: skip
_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+")
_COUNTED = re.compile(r"(?:part|pt|episode|chapter|volume|vol) \d+")
_SERIAL = re.compile(r" \d+$")


def item_names(title: str) -> list[str]:
    """The names that a catalogue's title stands for, the main one first.

    "Matrix, The (1999)" gives "The Matrix"; "City of Lost Children, The (Cité des enfants perdus, La)" gives "The City
    of Lost Children" and "La Cité des enfants perdus"; "Hard 8 (a.k.a. Sydney, a.k.a. Hard Eight)" gives three names.
    """
    title = _TRAILING_YEAR.sub("", html.unescape(title).strip())
    names = [" ".join(_ALIAS.sub(" ", title).split())]
    for inside in _ALIAS.findall(title):
        names += [alias for alias in _aliases(inside) if alias and not _NO_ALIAS.match(alias)]
    return list(dict.fromkeys(name for name in map(_forward, names) if name))


def _aliases(inside: str) -> list[str]:
    known_as = _ALIAS_PREFIX.search(inside.strip())
    pieces = [_ALIAS_PREFIX.sub("", piece).strip() for piece in _ALIAS_BREAK.split(inside.strip())]
    if known_as:  # "(a.k.a. All I Wanna Do, The Hairy Bird)": a list, but for a comma that moved an article
        whole = pieces
        pieces = []
        for piece in whole:
            pieces += [piece] if _MOVED_ARTICLE.match(piece) else [piece, *piece.split(", ")]
    return pieces


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

    Accents, case and punctuation fold away; "&" and "+" are "and", "Dr." is "doctor"; numbers are digits however they
    are written; a leading article, "Part", "Episode" and "Volume" before a number, and ": The Movie" are dropped. A
    name of nothing else keeps its words.
    """
    told = plain_amounts(_plain(_KIND_TAIL.sub("", name)).replace("&", " and ").replace("+", " and "))
    words = _WORD.findall(_APOSTROPHE.sub("", told))
    kept = words[1:] if len(words) > 1 and words[0] in _LEADING else words
    return " ".join(digits([_SHORT_FORMS.get(word, word) for word in kept]) or words)


def leading_article(name: str) -> str | None:
    """The article in front of a name, or None: what `key` drops."""
    words = _WORD.findall(_plain(name))
    return words[0] if len(words) > 1 and words[0] in _LEADING else None


def parts(name: str) -> tuple[str, str] | None:
    """What stands before the first and what behind the last subtitle mark; None where there is none.

    "Star Wars: Episode V - The Empire Strikes Back" gives "Star Wars" and "The Empire Strikes Back".
    """
    pieces = _pieces(name)
    return (pieces[0], pieces[-1]) if len(pieces) > 1 else None


def is_numbered_part(name: str) -> bool:
    """Whether a subtitle counts: "Star Wars: Episode IV - A New Hope", "Che: Part One"."""
    return any(_COUNTED.match(key(piece)) for piece in _pieces(name)[1:])


def unowned(name: str) -> str | None:
    """The name without whose it is: "The Puppet Masters" of "Robert A. Heinlein's The Puppet Masters".

    An owner is a name of two words or more, or one before a title with its own article: "Disney's The Kid", but not
    "Schindler's List". None where there is no owner.
    """
    found = _OWNER.match(_plain_quotes(name))
    if not found:
        return None
    owner, rest = found["owner"].split(), found["rest"]
    if owner[0].lower() in _NO_OWNER:
        return None
    return rest if len(owner) > 1 or leading_article(rest) else None


def serial_key(name: str) -> str | None:
    """Series and subtitle without the number between: "Candyman 2: Farewell to the Flesh" is "candyman|farewell …"."""
    split = parts(name)
    if split is None:
        return None
    head, tail = key(split[0]), key(split[1])
    return f"{_SERIAL.sub('', head)}|{tail}" if head and tail else None


def numerals(name_key: str) -> list[str]:
    """The numbers in a key, sorted: sequels differ in nothing else."""
    return sorted(_NUMBER.findall(name_key))


def compact(name_key: str) -> str:
    """A key without blanks: "Mouse Hunt" and "MouseHunt" are one name."""
    return name_key.replace(" ", "")


def _pieces(name: str) -> list[str]:
    return [piece for piece in _SUBTITLE.split(_KIND_TAIL.sub("", name)) if piece]


def _plain_quotes(name: str) -> str:
    return name.replace("’", "'").replace("‘", "'")


def _plain(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.lower().translate(_FOLDS))
    return "".join(char for char in decomposed if not unicodedata.combining(char))
