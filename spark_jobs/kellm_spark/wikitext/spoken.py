"""Templates that stand for a part of the sentence, and the text that they stand for.

The names are those of the English Wikipedia, but for one rule that other editions share: a template that ends in a
language code, such as `{{lang-fr|...}}`, `{{val-en|...}}` or `{{vol-lv|...}}`, shows its argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kellm_spark.wikitext.marks import BAR, GAP

_FIXED = {
    "nbsp": " ", "space": " ", "spaces": " ", "thinsp": " ", "snd": " – ", "spnd": " – ", "spaced ndash": " – ",
    "spaced en dash": " – ", "ndash": "–", "en dash": "–", "dash": "–", "mdash": "—", "em dash": "—", "mdashb": "—",
    "'": "'", "'s": "'s", "`": "'", "' \"": "'\"", "\" '": "\"'", "-\"": "\"", "!": "|", "=": "=", "(!": "{|",
    "!)": "|}", "!-": "|-", "pi": "π", "shy": "", "·": " · ", "dot": " · ", "•": " • ", "bullet": " • ",
}  # fmt: skip
# Which of its arguments a template shows; -1 is the last one.
_ARGUMENT = {
    **dict.fromkeys(
        "nowrap nobr small smaller big abbr tooltip angbr vanchor nihongo linktext em strong mvar sup sub ill illm sic "
        "vr sc smallcaps flag flagu flagcountry plainlist flatlist quote quotation blockquote cquote midsize".split(),
        0,
    ),
    "visible anchor": 0, "not a typo": 0, "film title": 0, "interlanguage link": 0,
    "langx": 1, "script": 1, "lang": -1, "rtl-lang": -1, "transl": -1, "transliteration": -1,
}  # fmt: skip
_PREFIX = {
    **{ship: f"{ship.upper()} " for ship in ("uss", "hms", "hmas", "hmcs", "rms", "ss", "ms", "mv", "uscgc")},
    "us$": "US$", "usd": "US$", "£": "£", "gbp": "£", "€": "€", "eur": "€", "¥": "¥", "₹": "₹", "inr": "₹", "a$": "A$",
    "circa": "c. ", "c.": "c. ", "e": "×10",
}  # fmt: skip
_JOINED = {
    "ship": " ", "oldstyledate": " ", "chem": "", "chem2": "", "ubl": ", ", "hlist": ", ", "unbulleted list": ", ",
}  # fmt: skip
_JOINED_AT_MOST = {"ship": 2, "oldstyledate": 2}
_FUNCTIONS = frozenset({"formatnum", "lc", "uc", "lcfirst", "ucfirst"})
_LANGUAGE = re.compile(r"(?!ipa|audio|cite)[^\W\d_]{3,5}-[a-z]{2,3}(?:-[a-z]{2,8})*")
_RANGE = frozenset({"to", "-", "–", "and", "or", "by", "x", "×", "+/-", "±"})
_NUMBER = re.compile(r"[-−+]?[\d.,/]+")
_LINK = re.compile(r"\[\[[^\[\]]*\]\]")


def spoken(inner: str) -> str:
    """The text that a template stands for, or GAP.

    Args:
        inner: what stands between its braces, its own templates resolved.
    """
    name, bar, rest = inner.partition("|")
    key = " ".join(name.lower().replace("_", " ").split())
    if not bar:
        function, colon, _ = key.partition(":")
        if colon and function in _FUNCTIONS:  # {{formatnum:3003}}
            return name.partition(":")[2].strip()
        return _FIXED.get(key, GAP)
    if not (key in _ARGUMENT or key in _PREFIX or key in _JOINED or key in _COMPOSED or _LANGUAGE.fullmatch(key)):
        return GAP
    values, named = _arguments(rest)
    if key in _COMPOSED:
        text = _COMPOSED[key](values, named)
    elif not values:
        text = named.get("text") or named.get("quote") or ""
    elif key in _JOINED:
        text = _JOINED[key].join(values[: _JOINED_AT_MOST.get(key)])
    elif key in _PREFIX:
        text = _PREFIX[key] + values[0]
    else:
        text = values[min(_ARGUMENT.get(key, 0), len(values) - 1)]
    return text.strip() or GAP


def _arguments(rest: str) -> tuple[list[str], dict[str, str]]:
    """Arguments without a name (or with a number for one), and those with a name."""
    if "[[" in rest:
        rest = _LINK.sub(lambda link: link[0].replace("|", BAR), rest)
    values: list[str] = []
    named: dict[str, str] = {}
    for part in rest.split("|"):
        name, sign, value = part.replace(BAR, "|").partition("=")
        if not sign or {"[", "<", "{"} & set(name):
            values.append(part.replace(BAR, "|").strip())
        elif name.strip().isdecimal():
            values.append(value.strip())
        else:
            named[name.strip().lower()] = value.strip()
    return values, named


def _converted(values: list[str], _: dict[str, str]) -> str:
    """{{convert|5|km|mi}}, {{convert|60|to|70|km}}, {{convert|5|ft|6|in}}."""
    whole = len(values) > 3 and (
        values[1] in _RANGE or (_NUMBER.fullmatch(values[2]) is not None and not _NUMBER.fullmatch(values[3]))
    )
    return " ".join(values[: 4 if whole else 2])


def _fraction(values: list[str], _: dict[str, str]) -> str:
    """{{frac|2}} is 1/2, {{frac|1|4}} is 1/4, {{frac|3|1|2}} is 3 1/2."""
    if len(values) == 1:
        return f"1/{values[0]}"
    return " ".join([*values[:-2], "/".join(values[-2:])])


def _as_of(values: list[str], named: dict[str, str]) -> str:
    return named.get("alt") or ("as of " if "lc" in named else "As of ") + "".join(values[:1])


def _value(values: list[str], named: dict[str, str]) -> str:
    return " ".join([*values[:1], named.get("u") or named.get("ul") or ""])


_COMPOSED: dict[str, Callable[[list[str], dict[str, str]], str]] = {
    "convert": _converted,
    "cvt": _converted,
    "frac": _fraction,
    "sfrac": _fraction,
    "as of": _as_of,
    "val": _value,
}
