"""Templates: collected where they stand outside others, and dropped or read out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from kellm_spark.wikitext.marks import GAP, as_source
from kellm_spark.wikitext.spoken import spoken

_BRACES = re.compile(r"\{\{|\}\}")
_SPLIT = re.compile(r"\{\{|\}\}|\[\[|\]\]|\|")
_BLANKS = re.compile(r"[\s_]+")
_MAX_NAME = 255
"""A page's title takes no more bytes in MediaWiki."""
MAX_KEPT_DEPTH = 24
"""Templates and links nested deeper are dropped even where their argument is text: keeps the work linear."""


@dataclass(frozen=True)
class Template:
    """One template call outside any other. Its arguments are split when they are first asked for."""

    source: str
    """What stands between its braces; comments and references are gone."""

    @cached_property
    def name(self) -> str:
        """Lower case, with plain blanks; of `{{DISPLAYTITLE:x}}` the part before the colon."""
        name = self.source[:_MAX_NAME].partition("|")[0].partition(":")[0]
        return _BLANKS.sub(" ", name).strip().lower()

    @cached_property
    def fields(self) -> dict[str, str]:
        """Argument name (lower case), or "1", "2", ... where it has none -> raw wikitext."""
        first, *others = self._parts()
        _, colon, value = first.partition(":")
        fields = {"1": value.strip()} if colon else {}
        count = len(fields)
        for part in others:
            key, sign, value = part.partition("=")
            if sign and not {"[", "{", "<"} & set(key):
                fields[key.strip().lower()] = value.strip()
            else:
                count += 1
                fields[str(count)] = part.strip()
        return fields

    def _parts(self) -> list[str]:
        """The source, parted at the bars of its own level."""
        source = as_source(self.source)
        parts: list[str] = []
        depth = last = 0
        for token in _SPLIT.finditer(source):
            if token[0] in ("{{", "[["):
                depth += 1
            elif token[0] in ("}}", "]]"):
                depth = max(depth - 1, 0)
            elif not depth:
                parts.append(source[last : token.start()])
                last = token.end()
        return [*parts, source[last:]]


def without_templates(text: str, collected: list[Template] | None = None) -> str:
    """Drop templates, but for those that stand for text.

    Args:
        text: wikitext without comments and references.
        collected: gets the outermost templates, in order.
    """
    if "{{" not in text:
        return text
    stack: list[tuple[int, list[str]]] = [(0, [])]  # where the inside starts, output so far inside
    done = 0
    for token in _BRACES.finditer(text):
        stack[-1][1].append(text[done : token.start()])
        done = token.end()
        if token[0] == "{{":
            stack.append((done, []))
        elif len(stack) == 1:
            stack[-1][1].append("}}")
        else:
            start, inner = stack.pop()
            if collected is not None and len(stack) == 1:
                collected.append(Template(text[start : token.start()]))
            stack[-1][1].append(spoken("".join(inner)) if len(stack) <= MAX_KEPT_DEPTH else GAP)
    stack[-1][1].append(text[done:])
    return "{{".join("".join(out) for _, out in stack)  # what never closed is text
