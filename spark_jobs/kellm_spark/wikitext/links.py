"""Links: replaced by what they show; files and links to other languages dropped; categories found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from kellm_spark.wikitext.marks import GAP
from kellm_spark.wikitext.templates import MAX_KEPT_DEPTH

_FLAT_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_BRACKETS = re.compile(r"\[\[|\]\](?:\](?!\]))?")
_PIPE_TRICK = re.compile(r" ?\([^()]*\)$|,.*$")
"""`[[Alien (film)|]]` shows "Alien"."""
_INTERWIKI = re.compile(r"^(?:[a-z]{2,3}(?:-[a-z]{2,12}){0,2}|simple)$")
# A wiki may call its files by more names than the two that a dump tells.
_FILE = re.compile(
    r"\.(?:jpe?g|png|svg|gif|webp|tiff?|xcf|og[gva]|webm|mp3|wav|flac|midi?|pdf|djvu)\s*$", re.IGNORECASE
)


@dataclass(frozen=True)
class Names:
    """Names of a wiki's namespaces that change what a link does, lower case."""

    files: frozenset[str] = frozenset({"file", "image", "media"})
    categories: frozenset[str] = frozenset({"category"})
    others: frozenset[str] = frozenset()
    """Every other namespace: `[[Help:Links]]` is a link with visible text."""

    @classmethod
    def of(cls, namespaces: dict[int, str]) -> Names:
        """From the dump's own <siteinfo>: namespace number -> local name. English names work everywhere."""
        local = {number: name.lower() for number, name in namespaces.items() if name}
        return cls(
            files=cls.files | {local[n] for n in (-2, 6) if n in local},
            categories=cls.categories | {local[n] for n in (14,) if n in local},
            others=frozenset(name for n, name in local.items() if n not in (-2, 6, 14)),
        )

    @cached_property
    def category_links(self) -> re.Pattern[str]:
        """Matches `[[Category:Name]]` and `[[Category:Name|key]]`; the first group is the name."""
        words = "|".join(re.escape(name).replace(r"\ ", "[ _]") for name in sorted(self.categories))
        return re.compile(rf"\[\[[ _]*+(?:{words})[ _]*+:([^\[\]|\n]{{1,255}}+)(?:\||\]\])", re.IGNORECASE)


def without_links(text: str, names: Names) -> str:
    """Replace links by what they show; drop files, categories and links to other languages."""
    if "[[" not in text:
        return text
    text = _FLAT_LINK.sub(lambda link: _shown(link[1], names), text)  # nearly all of them
    if "[[" not in text:
        return text
    stack: list[list[str]] = [[]]
    done = 0
    for token in _BRACKETS.finditer(text):
        stack[-1].append(text[done : token.start()])
        done = token.end()
        if token[0] == "[[":
            stack.append([])
        elif len(stack) == 1:
            stack[-1].append(token[0])
        else:
            inner, rest = "".join(stack.pop()), token[0][2:]
            if rest and "[" in inner:  # [[File:a.jpg|[http://b c]]]
                inner, rest = inner + rest, ""
            stack[-1] += [_shown(inner, names) if len(stack) <= MAX_KEPT_DEPTH else "", rest]
    stack[-1].append(text[done:])
    return "[[".join("".join(out) for out in stack)


def _shown(inner: str, names: Names) -> str:
    target, bar, label = inner.partition("|")
    if ":" in target:
        prefix, _, rest = target.partition(":")
        space = prefix.strip().lower().replace("_", " ")
        if space in names.files or space in names.categories or (space and bar and _FILE.search(rest)):
            return GAP
        if not bar and space not in names.others and _INTERWIKI.match(prefix.strip()):
            return GAP
    if bar:
        if "|" in label:
            label = label.rpartition("|")[2]
        return label or _PIPE_TRICK.sub("", " ".join(target.rpartition(":")[2].split()))
    return target.removeprefix(":").strip()
