"""Wikitext to plain text, in linear time on any input.

Wikitext has no grammar: this reads what a reader of an article would see and drops the rest. Each step is one
pass: comments, references and other dropped tags; templates and tables (a stack of open braces); links (a stack
of open brackets); then flat markup. What is opened and never closed is kept as text, as MediaWiki does.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# Markup characters inside <nowiki> become private-use characters until the very end.
_MARKUP = "[]{}|'<>=*:_~-"
_GUARD = {ord(char): 0xE000 + place for place, char in enumerate(_MARKUP)}
_UNGUARD = {code: char for char, code in _GUARD.items()}
_GUARDED = re.compile("[\ue000-\ue0fe]")

_DROPPED_TAGS = (
    "ref|math|chem|gallery|timeline|score|syntaxhighlight|source|imagemap|hiero|graph|mapframe|maplink|templatedata|"
    "style|script|categorytree|inputbox|references"
)
_OPEN_TAG = re.compile(rf"<!--|<(nowiki|pre|{_DROPPED_TAGS})\b([^<>]*)>", re.IGNORECASE)
_BRACES = re.compile(r"\{\{|\}\}")
_TABLES = re.compile(r"^[ \t:*]*\{\||^[ \t]*\|\}", re.MULTILINE)
_LINK = re.compile(r"\[\[[^\[\]]*\]\]")
_LINK_BAR = "\ue0ff"
_BRACKETS = re.compile(r"\[\[|\]\]")
_HEADING_LINE = re.compile(r"^=[^\n]*$", re.MULTILINE)
# Possessive: without a closing bracket, two greedy runs would try every way to share the line.
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]]*+[ \t]*+([^\[\]\n]*+)\]", re.IGNORECASE)
_QUOTES = re.compile(r"'{2,}")
_LINE_BREAK = re.compile(r"<(?:br|hr)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_MAGIC = re.compile(r"__[A-Z]{3,}__")
_LIST_MARK = re.compile(r"^(?:[*#:;]+[ \t]*|-{4,}[ \t]*)", re.MULTILINE)
# What dropped templates leave behind: "( ; )", "word ,", runs of blanks, and empty lines.
_EMPTY_PARENS = re.compile(r"[ \t]\([ \t,;:/–—]*\)")
_OPEN_PAREN = re.compile(r"\([ \t]*[,;:][ \t,;:]*")
_BLANK_BEFORE = re.compile(r"[ \t]+([,.;:)](?:\s|$))", re.MULTILINE)
_BLANKS = re.compile(r"[ \t\u00a0]{2,}|[\t\u00a0]")
_LINES = re.compile(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+")
_PIPE_TRICK = re.compile(r" ?\([^()]*\)$|,.*$")
"""`[[Alien (film)|]]` shows "Alien"."""
_INTERWIKI = re.compile(r"^:?[a-z]{2,3}(?:-[a-z]{2,12}){0,2}$")

_MAX_KEPT_DEPTH = 24
"""Templates nested deeper are dropped even where their argument is text: keeps the work linear."""
# Templates that stand for a part of the sentence, and which of their arguments is that text.
_TEXT_ARGUMENT = {
    "lang": -1, "langx": 1, "transl": -1, "transliteration": -1, "nowrap": 0, "nobr": 0, "small": 0, "smaller": 0,
    "big": 0, "abbr": 0, "tooltip": 0, "angbr": 0, "visible anchor": 0, "vanchor": 0, "nihongo": 0, "not a typo": 0,
    "sic": 0, "linktext": 0, "em": 0, "strong": 0, "mvar": 0, "sup": 0, "sub": 0, "ship": 1, "film title": 0,
    "convert": -2, "cvt": -2, "circa": -3, "c.": -3, "ill": 0, "interlanguage link": 0, "illm": 0,
}  # fmt: skip
_TEXT_TEMPLATE = {
    "nbsp": " ", "space": " ", "snd": " – ", "spnd": " – ", "spaced ndash": " – ", "spaced en dash": " – ",
    "ndash": "–", "en dash": "–", "mdash": "—", "em dash": "—", "'": "'", "'s": "'s", "`": "'", "!": "|", "=": "=",
    "pi": "π", "shy": "", "dash": "–", "·": " · ", "•": " • ", "bullet": " • ",
}  # fmt: skip

_SKIPPED_SECTIONS = {
    "references", "notes", "footnotes", "external links", "see also", "further reading", "bibliography", "citations",
    "sources", "notes and references", "references and notes", "works cited",
}  # fmt: skip
_DATE = re.compile(r"(?<!\d)(1[89]\d\d|20\d\d)(?!\d)")


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


@dataclass
class Template:
    """One template call at the top level of a page: its name (lower case) and its raw arguments."""

    name: str
    fields: dict[str, str] = field(default_factory=dict)
    """Argument name (lower case), or "1", "2", ... where it has none -> raw wikitext."""


@dataclass(frozen=True)
class Article:
    """What a page says."""

    lead: str
    sections: list[tuple[str, str]]
    """Level-2 headings with the text below them; lists of references and links are left out."""
    categories: list[str]
    """Without namespace, in order, each once."""
    templates: list[Template]
    """Templates outside other templates, in order: infobox, notices, DISPLAYTITLE."""
    magic_words: frozenset[str]
    """Such as `DISAMBIG`."""


def plain_text(wikitext: str, names: Names | None = None) -> str:
    """What a reader sees of a piece of wikitext, headings as plain lines."""
    text = _links(_tables(_braces(_tags(wikitext), None)), names or Names(), [])
    return _flat(_without_marks(text))


def parse_article(wikitext: str, names: Names | None = None) -> Article:
    """Lead, sections, categories and top-level templates of a page.

    Args:
        wikitext: the page's source, XML entities already resolved.
        names: the wiki's namespace names.
    """
    templates: list[Template] = []
    categories: list[str] = []
    tagless = _tags(wikitext)
    text = _links(_tables(_braces(tagless, templates)), names or Names(), categories)
    lead = ""
    sections: list[tuple[str, str]] = []
    name: str | None = None
    start = 0
    for level, title, begin, end in [*_headings(text), (2, "", len(text), len(text))]:
        if level > 2:
            continue
        if name is None:
            lead = _flat(_without_marks(text[start:begin]))
        elif name.lower() not in _SKIPPED_SECTIONS:
            body = _flat(_without_marks(text[start:begin]))
            if body:
                sections.append((name, body))
        name, start = _flat(title), end
    return Article(
        lead=lead,
        sections=sections,
        categories=list(dict.fromkeys(categories)),
        templates=templates,
        magic_words=frozenset(word.strip("_") for word in _MAGIC.findall(tagless)),
    )


def infobox(article: Article) -> Template | None:
    """The first infobox of a page, if it has one."""
    return next((t for t in article.templates if t.name.startswith("infobox")), None)


def first_year(wikitext: str) -> int | None:
    """The earliest-standing year 1800-2099 in a date, a template such as `{{Film date|1995|11|22}}`, or text."""
    found = _DATE.search(_tags(wikitext))
    return int(found.group()) if found else None


def _tags(text: str) -> str:
    """Drop comments and tags with content that is no prose; guard what stands in <nowiki>."""
    if "<" not in text:
        return text
    out: list[str] = []
    done = 0
    closers: dict[str, re.Pattern[str]] = {}
    absent: set[str] = set()  # closing tags that do not occur any more: looked for once
    position = 0
    while found := _OPEN_TAG.search(text, position):
        tag = (found[1] or "").lower()
        attributes = found[2] or ""
        position = found.end()
        if tag and attributes.rstrip().endswith("/"):  # <ref name="x" />
            out.append(text[done : found.start()])
            done = position
            continue
        if tag in absent:
            continue
        if tag:
            closer = closers.setdefault(tag, re.compile(rf"</{tag}\s*>", re.IGNORECASE))
            end = closer.search(text, position)
            stop = (end.start(), end.end()) if end else None
        else:
            place = text.find("-->", position)
            stop = (place, place + 3) if place >= 0 else None
        if stop is None:
            absent.add(tag)
            continue
        out.append(text[done : found.start()])
        if tag in ("nowiki", "pre"):
            out.append(text[position : stop[0]].translate(_GUARD))
        done = position = stop[1]
    out.append(text[done:])
    return "".join(out)


def _headings(text: str) -> list[tuple[int, str, int, int]]:
    """Level, raw title, start and end of every heading line."""
    found = []
    for line in _HEADING_LINE.finditer(text):
        bare = line[0].rstrip(" \t")
        level = min(len(bare) - len(bare.lstrip("=")), len(bare) - len(bare.rstrip("=")), (len(bare) - 1) // 2, 6)
        if level:
            found.append((level, bare[level:-level].strip(), line.start(), line.end()))
    return found


def _without_marks(text: str) -> str:
    """Heading lines without their equals signs."""
    out: list[str] = []
    done = 0
    for _, title, begin, end in _headings(text):
        out += [text[done:begin], title]
        done = end
    return "".join([*out, text[done:]])


def _braces(text: str, templates: list[Template] | None) -> str:
    """Drop templates, but for those that stand for text; collect the outermost ones."""
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
            if templates is not None and len(stack) == 1:
                templates.append(_template(text[start : token.start()]))
            if len(stack) <= _MAX_KEPT_DEPTH:
                stack[-1][1].append(_spoken("".join(inner)))
    stack[-1][1].append(text[done:])
    return "{{".join("".join(out) for _, out in stack)  # what never closed is text


def _tables(text: str) -> str:
    """Drop tables, nested ones with their outer one; a table without an end is kept as text."""
    if "{|" not in text:
        return text
    out: list[str] = []
    open_at: list[int] = []
    done = 0
    for token in _TABLES.finditer(text):
        if token[0].endswith("{|"):
            open_at.append(token.start())
        elif open_at:
            start = open_at.pop()
            if not open_at:
                out.append(text[done:start])
                done = token.end()
    return "".join([*out, text[done:]])


def _spoken(inner: str) -> str:
    """The text that a template stands for, or nothing. `inner` has its own templates resolved."""
    name, bar, rest = inner.partition("|")
    key = name.strip().lower().replace("_", " ")
    if not bar:
        return _TEXT_TEMPLATE.get(key, "")
    if key not in _TEXT_ARGUMENT and not key.startswith("lang-"):
        return ""
    if "[[" in rest:  # the bar of a link parts no arguments
        rest = _LINK.sub(lambda link: link[0].replace("|", _LINK_BAR), rest)
    arguments = [part.replace(_LINK_BAR, "|") for part in rest.split("|") if "=" not in part.partition("[[")[0]]
    which = _TEXT_ARGUMENT.get(key, 0)
    if not arguments:
        return ""
    if which == -2:  # {{convert|5|km}}
        return " ".join(part.strip() for part in arguments[:2])
    if which == -3:
        return "c. " + arguments[0].strip()
    if which == -1:
        return arguments[-1].strip()
    return arguments[min(which, len(arguments) - 1)].strip()


def _template(source: str) -> Template:
    """Split a template's source at the bars of its own level."""
    parts: list[str] = []
    depth = last = 0
    for token in re.finditer(r"\{\{|\}\}|\[\[|\]\]|\|", source):
        if token[0] in ("{{", "[["):
            depth += 1
        elif token[0] in ("}}", "]]"):
            depth = max(depth - 1, 0)
        elif not depth:
            parts.append(source[last : token.start()])
            last = token.end()
    parts.append(source[last:])
    name = parts[0].strip()
    template = Template(name=re.sub(r"[\s_]+", " ", name).lower())
    if ":" in name:  # {{DISPLAYTITLE:''Alien''}}
        function, _, value = name.partition(":")
        template = Template(name=function.strip().lower(), fields={"1": value.strip()})
    count = len(template.fields)
    for part in parts[1:]:
        key, sign, value = part.partition("=")
        if sign and not {"[", "{", "<"} & set(key):
            template.fields[key.strip().lower()] = value.strip()
        else:
            count += 1
            template.fields[str(count)] = part.strip()
    return template


def _links(text: str, names: Names, categories: list[str]) -> str:
    """Replace links by what they show; drop files and links to other languages; collect categories."""
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
            stack[-1].append("]]")
        else:
            inner = "".join(stack.pop())
            shown = _shown(inner, names, categories)
            stack[-1].append(shown if len(stack) <= _MAX_KEPT_DEPTH else "")
    stack[-1].append(text[done:])
    return "[[".join("".join(out) for out in stack)


def _shown(inner: str, names: Names, categories: list[str]) -> str:
    target, bar, label = inner.partition("|")
    prefix, colon, rest = target.partition(":")
    space = prefix.strip().lower().replace("_", " ")
    if colon and space in names.files:
        return ""
    if colon and space in names.categories:
        categories.append(_flat(rest.replace("_", " ")))
        return ""
    if colon and not bar and _INTERWIKI.match(prefix.strip()) and space not in names.others:
        return ""
    if bar:
        label = label.rpartition("|")[2] if "|" in label else label
        return label or _PIPE_TRICK.sub("", " ".join(target.rpartition(":")[2].split()))
    return target.removeprefix(":").strip()


def _flat(text: str) -> str:
    """Flat markup, entities and white space."""
    if "[" in text:
        text = _EXTERNAL.sub(r"\1", text).replace("[[", "").replace("]]", "")  # halves that met no partner
    if "''" in text:
        text = _QUOTES.sub(_apostrophes, text)
    if "<" in text:
        text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    if "__" in text:
        text = _MAGIC.sub("", text)
    text = _LIST_MARK.sub("", text)
    if "&" in text:
        text = html.unescape(text)
    text = _BLANKS.sub(" ", text)
    if "(" in text:
        text = _OPEN_PAREN.sub("(", _EMPTY_PARENS.sub("", text))
    text = _BLANK_BEFORE.sub(r"\1", text)
    text = _LINES.sub("\n\n", text).strip()
    return text.translate(_UNGUARD) if _GUARDED.search(text) else text


def _apostrophes(run: re.Match[str]) -> str:
    """Two, three and five are markup; the others carry apostrophes of the text."""
    size = len(run[0])
    return "'" if size == 4 else "'" * max(size - 5, 0)


def texts(fields: Iterable[str], template: Template | None) -> dict[str, str]:
    """The named fields of a template as plain text, empty ones left out."""
    found = {name: plain_text(template.fields[name]) for name in fields if template and name in template.fields}
    return {name: value for name, value in found.items() if value}
