"""Refuse what is no whole MediaWiki dump before anything is written, and learn whose dump it is."""

from __future__ import annotations

import bz2
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kellm_features.errors import DataError
from kellm_spark.dump.bzip2 import AGAIN, last_text
from kellm_spark.dump.files import open_file, size_of
from kellm_spark.wikitext import Names, plain_text

HEAD_BYTES = 1 << 20
"""<siteinfo> of the largest wiki takes 20 kB."""
_TAIL_BYTES = 4096
_CLOSED = b"</mediawiki>"
_OTHER_FORMATS = {b"\x1f\x8b": "gzip", b"7z": "7z", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip", b"\xfd7zX": "xz"}


@dataclass(frozen=True)
class Site:
    """What a dump's <siteinfo> says of its wiki."""

    dbname: str
    """Such as `enwiki`; empty where the dump does not say."""
    language: str
    """`xml:lang`, such as `en`; empty where the dump does not say."""
    namespaces: dict[int, str] = field(default_factory=dict)
    """Number -> local name."""

    @property
    def names(self) -> Names:
        """The namespaces that change what a link does."""
        return Names.of(self.namespaces)


def check_parts(parts: Sequence[str]) -> Site:
    """Check every part (`check_dump`) and that all are of one wiki.

    Raises:
        DataError: a part is no whole dump, or two are of different wikis.
    """
    first = check_dump(parts[0])
    for part in parts[1:]:
        site = check_dump(part)
        for what in ("dbname", "language", "namespaces"):
            if getattr(site, what) != getattr(first, what):
                seen, other = (
                    value if isinstance(value := getattr(s, what), str) else f"{len(value)} of their own"
                    for s in (first, site)
                )
                raise DataError(
                    f"{parts[0]} and {part} are of different wikis ({what}: {seen or 'none'} and {other or 'none'}): "
                    "read each wiki by itself"
                )
    return first


def check_dump(path: str | Path) -> Site:
    """Refuse a file that is no whole MediaWiki dump; return what it says of its wiki.

    It reads the head and the end. What lies between is checked as it is read: every block of bz2 has a checksum.

    Raises:
        DataError: the file is missing, empty, not a MediaWiki dump, not UTF-8, cut off, declares a document type, or
            does not name its namespaces.
    """
    path = str(path)
    size = size_of(path)
    if not size:
        raise DataError(f"{path} is empty (0 bytes): a MediaWiki dump was expected; {AGAIN}")
    with open_file(path) as file:
        start = file.read(16)
    other = next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None)
    if other:
        raise DataError(f"{path} is compressed as {other}: decompress it, or take the .bz2 of the same dump")
    compressed = start.startswith(b"BZh")
    if compressed != path.endswith(".bz2"):
        seen = "bz2-compressed" if compressed else f"not bz2 (it starts with {start[:8]!r})"
        raise DataError(f"{path} is {seen}, which its name does not say: rename it (….xml or ….bz2)")
    site = _check_head(path, _head(path, compressed))
    with open_file(path) as file:
        if compressed:
            tail = last_text(file, path, size, _TAIL_BYTES)
        else:
            file.seek(max(size - _TAIL_BYTES, 0))
            tail = file.read()
    if not tail.rstrip().endswith(_CLOSED):
        raise DataError(f"{path} is cut off: it ends with {shorten(tail[-60:])} and not with </mediawiki>; {AGAIN}")
    return site


def shorten(seen: bytes) -> str:
    """The beginning of some bytes, quoted, in one line."""
    text = " ".join(seen.decode("utf-8", "replace").split())
    return repr(text[:60])


def _head(path: str, compressed: bool) -> bytes:
    try:
        with open_file(path) as file:
            if not compressed:
                return file.read(HEAD_BYTES)
            with bz2.open(file) as text:
                return text.read(HEAD_BYTES)
    except EOFError:
        raise DataError(f"{path} is cut off: its bz2 stream has no end; {AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path} is not readable bz2 ({error}); {AGAIN}") from error


def _check_head(path: str, head: bytes) -> Site:
    before_pages = head.partition(b"<page>")[0]
    if before_pages.startswith((b"\xff\xfe", b"\xfe\xff")) or b"<\0m\0e\0d\0i\0a\0" in before_pages[:4096]:
        raise DataError(f"{path} is UTF-16: a MediaWiki dump is UTF-8; convert it with  iconv -f UTF-16 -t UTF-8")
    found = re.search(rb"<mediawiki[\s>][^>]*", before_pages)
    if not found:
        raise DataError(
            f"{path} is not a MediaWiki dump: it starts with {shorten(head[:60])} and <mediawiki> was expected; take "
            "a pages-articles file from dumps.wikimedia.org, or one made by Special:Export"
        )
    if b"<!DOCTYPE" in before_pages or b"<!ENTITY" in before_pages:
        raise DataError(f"{path} declares a document type, which a MediaWiki dump never does: it is not read")
    declared = re.search(rb"<\?xml[^>]*encoding=[\"']([^\"']+)", before_pages)
    if declared and declared[1].lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise DataError(f"{path} declares the encoding {declared[1].decode('latin-1')}: a MediaWiki dump is UTF-8")
    language = re.search(rb"xml:lang=[\"']([^\"']*)", found[0])
    dbname = re.search(rb"<dbname>([^<]*)</dbname>", before_pages)
    namespaces = re.findall(rb'<namespace key="(-?\d+)"[^>]*?(?:/>|>([^<]*)</namespace>)', before_pages)
    site = Site(
        dbname=_text(path, dbname[1]) if dbname else "",
        language=_text(path, language[1]) if language else "",
        namespaces={int(key): plain_text(_text(path, name)) for key, name in namespaces},
    )
    if not site.namespaces and site.language.partition("-")[0] != "en":
        raise DataError(
            f"{path} has no <siteinfo> with <namespaces>, and its language is "
            f"{repr(site.language) if site.language else 'not given'}: without them its categories and files cannot be "
            'told from links (only xml:lang="en" is known without); take the head of the original dump'
        )
    return site


def _text(path: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({shorten(value)} in its <siteinfo>): convert it with iconv") from error
