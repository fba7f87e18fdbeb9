"""bz2 files from the middle: every block by itself, so that one file is read by many tasks.

A block of bz2 (up to 900 kB of text) begins with a mark of 48 bits at any bit, not byte, and ends where the next mark
begins. Cut out, shifted to a byte and given a head and an end, it is a bz2 file of its own for the C library, which
checks its CRC. What lies between blocks is checked here, so that no damage passes as an early end.

Hadoop's reader, which Spark would use, splits bz2 too, in Java.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterator
from typing import BinaryIO

from kellm_features.errors import DataError

_BLOCK = 0x314159265359
_END = 0x177245385090
_MARK_BITS, _CRC_BITS = 48, 32
_WINDOW = 1 << 20
_FALSE_MARKS = 2
"""A mark turns up by chance once in 35 TB: a block that ends early is tried with this many marks more."""
MAX_STREAM_BYTES = 256 << 20
"""A stream of a multistream dump holds a hundred pages, 1 to 2 MB."""
AGAIN = "fetch it again, or compare its checksum with the one published beside it"


def _cores(mark: int) -> list[tuple[int, bytes, int]]:
    """For each shift of a mark in its first byte: the five bytes that it fills whole, and where they begin."""
    cores = []
    for shift in range(8):
        spread = (mark << (8 - shift)).to_bytes(7, "big")
        cores.append((shift, spread[1:6], mark))
    return cores


_CORES = _cores(_BLOCK) + _cores(_END)


class _Marks:
    """The marks of a file from a byte on, and the bytes from the last one asked for on."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.file = file
        self.base = start  # offset in the file of data[0]
        self.data = b""
        self.searched = 0  # marks that end before this place of data are in `found`
        self.found: list[tuple[int, bool]] = []  # bit in the file, is it an end
        self.ended = False
        file.seek(start)

    def next(self) -> tuple[int, bool] | None:
        while not self.found and not self.ended:
            self._read()
        return self.found.pop(0) if self.found else None

    def bits(self, begin: int, end: int) -> int:
        """The bits from one place of the file to another, as a number."""
        first, last = begin // 8 - self.base, (end + 7) // 8 - self.base
        number = int.from_bytes(self.data[first:last], "big") >> (-end % 8)
        return number & ((1 << (end - begin)) - 1)

    def forget(self, bit: int) -> None:
        """Bytes before this bit are not asked for again."""
        gone = min(bit // 8 - self.base, self.searched)
        if gone > _WINDOW:
            self.data, self.base, self.searched = self.data[gone:], self.base + gone, self.searched - gone

    def _read(self) -> None:
        more = self.file.read(_WINDOW)
        self.ended = not more
        self.data += more
        begin = max(self.searched - 7, 0)
        found = []
        for shift, core, mark in _CORES:
            place = self.data.find(core, begin)
            while place >= 0:
                bit = (self.base + place - 1) * 8 + shift
                # Found in full only where all its bytes are there, and once.
                whole = place >= 1 and (bit + _MARK_BITS + 7) // 8 - self.base <= len(self.data)
                unseen = (bit + _MARK_BITS + 7) // 8 - self.base > self.searched
                if whole and unseen and self.bits(bit, bit + _MARK_BITS) == mark:
                    found.append((bit, mark == _END))
                place = self.data.find(core, place + 1)
        self.searched = len(self.data)
        self.found += sorted(found)


def blocks(file: BinaryIO, path: str, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The blocks that begin at or after a byte, to the end of the file: the byte where each begins, and its text.

    Args:
        file: opened for reading; it is moved about.
        path: its name, for messages.
        start: byte to begin at; 0 or anywhere.
        size: of the file, in bytes.

    Raises:
        DataError: the file is damaged or cut off.
    """
    marks = _Marks(file, max(start - 1, 0))  # a byte more: a mark's core begins in its second byte
    mark = marks.next()
    while mark is not None and mark[0] < start * 8:
        mark = marks.next()
    if start == 0 and (mark is None or mark[0] != 32):
        raise DataError(f"{path} is not readable bz2: no block begins at its start; {AGAIN}")
    while mark is not None:
        begin, is_end = mark
        if is_end:
            mark = marks.next()
            after = -(-(begin + _MARK_BITS + _CRC_BITS) // 8)  # the next stream's head of 4 bytes, or the file's end
            expected = size if mark is None else mark[0] / 8 - 4
            if after != expected:
                raise _damaged(path, after, size, f"{'the end' if mark is None else 'a stream'} was expected there")
            continue
        text, mark = _block(marks, begin, path, size)
        yield begin // 8, text
        marks.forget(mark[0])


def _block(marks: _Marks, begin: int, path: str, size: int) -> tuple[bytes, tuple[int, bool]]:
    """The text of the block that begins at a bit, and the mark that ends it."""
    for _ in range(1 + _FALSE_MARKS):
        mark = marks.next()
        if mark is None:
            break
        count = mark[0] - begin
        bits = marks.bits(begin, mark[0])
        crc = bits >> (count - _MARK_BITS - _CRC_BITS) & 0xFFFFFFFF
        # With a single block, the CRC of the stream is that of the block.
        whole = (bits << (_MARK_BITS + _CRC_BITS)) | (_END << _CRC_BITS) | crc
        count += _MARK_BITS + _CRC_BITS
        data = (whole << (-count % 8)).to_bytes((count + 7) // 8, "big")
        decompressor = bz2.BZ2Decompressor()
        try:
            text = decompressor.decompress(b"BZh9" + data)
        except (OSError, ValueError):
            continue
        if decompressor.eof and not decompressor.unused_data:
            return text, mark
    raise _damaged(path, begin // 8, size, "the block that begins there cannot be decompressed")


def last_text(file: BinaryIO, path: str, size: int, wanted: int) -> bytes:
    """The end of the text of a bz2 file, `wanted` bytes or all that its last blocks hold.

    Raises:
        DataError: the file is damaged there or cut off.
    """
    # A compressed block takes 0.9 MB at most: four windows hold several, or the file is no bz2.
    marks = _Marks(file, max(size - 4 * _WINDOW, 0))
    starts = []
    while mark := marks.next():
        if not mark[1]:
            starts.append(mark[0] // 8)
    tail, count = b"", 1
    while True:
        tail = b"".join(text for _, text in blocks(file, path, starts[-count] if starts else 0, size))
        if len(tail) >= wanted or count >= len(starts):
            return tail[-wanted:]
        count = min(2 * count, len(starts))  # the very last stream may hold </mediawiki> alone


def stream(file: BinaryIO, path: str, offset: int) -> bytes:
    """The text of the one stream that begins at a byte.

    Raises:
        DataError: none begins there, or it is damaged.
    """
    file.seek(offset)
    decompressor = bz2.BZ2Decompressor()
    text = []
    room = MAX_STREAM_BYTES
    try:
        while not decompressor.eof and (data := file.read(1 << 18)):
            text.append(decompressor.decompress(data, room))
            room -= len(text[-1])
            if room <= 0:
                raise DataError(
                    f"{path}: the bz2 stream at byte {offset:,} holds more than {MAX_STREAM_BYTES >> 20} MiB, where "
                    "those of a multistream dump hold a hundred pages; take the multistream form of the dump"
                )
    except OSError as error:
        raise DataError(
            f"{path} has no bz2 stream at byte {offset:,} ({error}), where its index says so: they do not belong "
            "together; take both from one dump"
        ) from error
    if not decompressor.eof:
        raise DataError(
            f"{path} has no whole bz2 stream at byte {offset:,}, where its index says so: it is cut off, or index and "
            "dump do not belong together; take both from one dump"
        )
    return b"".join(text)


def _damaged(path: str, place: int, size: int, why: str) -> DataError:
    return DataError(f"{path} is damaged or cut off at byte {place:,} of {size:,}: {why}; {AGAIN}")
