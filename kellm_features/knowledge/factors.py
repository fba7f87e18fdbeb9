"""One text per factor: the JSON schema that is asked for, and the answer checked against it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core

from kellm_features.knowledge.text import squeeze

MOST_CHARACTERS = 400
"""Of one factor's text: a few sentences. Without a limit a small model fills the whole answer with one factor."""
_NOTHING = re.compile(
    r"(?:n/?a|none|null|unknown|not (?:given|known|mentioned|specified|stated|told).*|-*)\.?", re.IGNORECASE
)
_LONGEST_LINE = 2000
"""Characters: a line beyond them is no factor, but a model that loops."""


def factor_schema(factors: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer: an object with one string per factor, in the domain's order, and nothing else."""
    return {
        "type": "object",
        "properties": {factor: {"type": "string", "maxLength": MOST_CHARACTERS} for factor in factors},
        "required": list(factors),
        "additionalProperties": False,
    }


def parse_factors(answer: str, factors: Sequence[str], *, cut_off: bool = False) -> dict[str, str]:
    """The factors that an answer tells, in the domain's order; empty where it keeps to no known form.

    An answer under the schema is such an object. Of an engine that does not decode under it, an object with chat
    around it and lines "factor: text" are read too. Names of factors are matched without case; whatever is no factor
    of the domain, no text, or says that nothing is known, is left out.

    Args:
        answer: as the engine gave it.
        factors: of the domain.
        cut_off: the token limit ended it. The text in the making is left out: it may end within a name.
    """
    told = _from_json(answer) or _from_lines(answer.splitlines()[: -1 if cut_off else None])
    by_name = {_plain(name): value for name, value in told.items()}
    found = {}
    for factor in factors:
        value = by_name.get(_plain(factor))
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ", ".join(value)
        text = squeeze(value)[:MOST_CHARACTERS].strip(" \"',{}*") if isinstance(value, str) else ""
        if text and not _NOTHING.fullmatch(text):
            found[factor] = text
    return found


def factors_as_prose(name: str, factors: Mapping[str, str]) -> str:
    """Factors as one text to encode and to read: "Heat (1995). Genre: crime. Director: Michael Mann."."""
    parts = [f"{factor[0].upper()}{factor[1:]}: {text}" for factor, text in factors.items()]
    return " ".join(
        part if part.endswith((".", "!", "?")) else f"{part}." for part in ([name, *parts] if name else parts)
    )


def _from_json(answer: str) -> dict[str, Any]:
    start = answer.find("{")
    if start < 0:
        return {}
    text = answer[start:]
    for candidate in (text[: text.rfind("}") + 1], text):
        try:
            tree = pydantic_core.from_json(candidate, allow_partial=True)
        except ValueError:
            continue
        if isinstance(tree, dict):
            return tree
    return {}


def _from_lines(lines: Sequence[str]) -> dict[str, str]:
    pairs = (line.lstrip(" \t*-•.0123456789").partition(":") for line in lines if len(line) <= _LONGEST_LINE)
    return {name: text for name, colon, text in pairs if colon and text.strip()}


def _plain(name: str) -> str:
    return re.sub(r"[^\w/]+", " ", name).strip().casefold()
