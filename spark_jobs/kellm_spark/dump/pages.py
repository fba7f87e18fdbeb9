"""The page elements of one range of a dump file, in memory that one page bounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from kellm_features.errors import DataError
from kellm_spark.dump.bzip2 import blocks
from kellm_spark.dump.files import open_file

MAX_PAGE_BYTES = 8 << 20
"""MediaWiki takes pages of 2 MiB ($wgMaxArticleSize); escaped as XML they may be four times as long."""
TOO_LARGE = f"larger than {MAX_PAGE_BYTES >> 20} MiB"
UNCLOSED = "no </page>"
_OPEN, _CLOSE = b"<page>", b"</page>"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Split:
    """A range of a dump file. A page belongs to the split in which it begins."""

    path: str
    start: int
    end: int
    size: int
    """Of the whole file, in bytes."""


def plan_splits(sizes: dict[str, int], split_bytes: int) -> list[Split]:
    """Ranges of about `split_bytes` over files of these sizes (path -> bytes), in order."""
    found = []
    for path, size in sizes.items():
        count = max(round(size / split_bytes), 1)
        edges = [size * n // count for n in range(count + 1)]
        found += [Split(path, start, end, size) for start, end in pairwise(edges)]
    return found


def read_pages(split: Split) -> Iterator[tuple[bytes, str | None]]:
    """The pages that begin in a split.

    Yields:
        `<page>…</page>`, and None; or the beginning of one that is not read, and the reason.

    Raises:
        DataError: the file is gone or damaged.
    """
    with open_file(split.path) as file:
        try:
            if split.path.endswith(".bz2"):
                found = blocks(file, split.path, split.start, split.size)
                yield from pages_in((text, begin < split.end) for begin, text in found)
            else:
                file.seek(split.start)
                yield from pages_in(_chunks(iter(lambda: file.read(_CHUNK), b""), split.end - split.start))
        except OSError as error:
            raise DataError(f"{split.path} cannot be read at byte {split.start:,} or later ({error})") from error


def _chunks(read: Iterator[bytes], length: int) -> Iterator[tuple[bytes, bool]]:
    for chunk in read:
        if length > 0:
            yield chunk[:length], True
        if len(chunk) > length:
            yield chunk[max(length, 0) :], False
        length -= len(chunk)


def pages_in(chunks: Iterable[tuple[bytes, bool]]) -> Iterator[tuple[bytes, str | None]]:
    """Pages of text that comes in pieces, each with whether pages that begin in it are wanted; see `read_pages`.

    In a dump every < of a text is escaped, so that <page> is the tag wherever it stands.
    """
    text = b""
    ours = 0  # pages that begin before this place are wanted
    for chunk, wanted in chunks:
        text += chunk
        if wanted:
            ours = len(text)
        place = 0
        while True:
            start = text.find(_OPEN, place)
            if start < 0:
                place = max(place, len(text) - len(_OPEN) + 1)  # the tag may go on in the next piece
                break
            if start >= ours:
                place = start
                break
            after = start + len(_OPEN)
            close = text.find(_CLOSE, after)
            again = text.find(_OPEN, after, close if close >= 0 else len(text))
            if again >= 0:
                yield text[start : start + 200], UNCLOSED
                place = again
            elif close < 0 and len(text) - start > MAX_PAGE_BYTES:
                yield text[start : start + 200], TOO_LARGE
                place = after
            elif close < 0:
                place = start
                break
            else:
                place = close + len(_CLOSE)
                yield (
                    (text[start : start + 200], TOO_LARGE)
                    if place - start > MAX_PAGE_BYTES
                    else (text[start:place], None)
                )
        text, ours = text[place:], ours - place
        if ours <= 0 and not wanted:
            return
    if ours > 0 and text.startswith(_OPEN):
        yield text[:200], UNCLOSED
