"""Requests to a Redis that are made and read as a whole: redis-py's connections without its work per command.

For 500 commands at a time redis-py takes longer to pack each, and to hand out its answer, than the rest of a read
takes together. Connections, reconnecting, passwords, TLS and Sentinel stay redis-py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Command = tuple[bytes, ...]


@dataclass(frozen=True)
class Batch:
    """Commands that differ in some parts only."""

    parts: Sequence[bytes | None]
    """The parts of a command; None is filled from the next column."""
    columns: Sequence[Sequence[bytes]] = ()
    """N values for each None. No columns: one command."""

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns else 1

    def commands(self) -> list[Command]:
        """The commands one by one."""
        rows = zip(*self.columns, strict=True) if self.columns else iter([()])
        return [tuple(next(values) if part is None else part for part in self.parts) for values in map(iter, rows)]

    def packed(self) -> bytes:
        """All commands in Redis's protocol."""
        slots = [b"$%d\r\n%b\r\n" if part is None else _bulk(part) for part in self.parts]
        head = b"*%d\r\n" % len(slots)
        if not self.columns:
            return head + b"".join(slots)
        slots = [
            slot if part is None else slot.replace(b"%", b"%%") for slot, part in zip(slots, self.parts, strict=True)
        ]
        told = [column for values in self.columns for column in (map(len, values), values)]
        return b"".join(map((head + b"".join(slots)).__mod__, zip(*told, strict=True)))


def _bulk(part: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(part), part)


def through_pool(pool: Any, batches: Sequence[Batch]) -> list[Any]:
    """Send commands over one connection and read their answers.

    Raises:
        redis.RedisError: the connection failed, or one of the answers is an error.
    """
    request, count = b"".join([batch.packed() for batch in batches]), sum(map(len, batches))
    connection = pool.get_connection()
    try:
        connection.send_packed_command([request])
        answers: list[Any] = []
        while len(answers) < count:
            answers.append(connection.read_response(disable_decoding=True))
            answers += _parsed(connection, count - len(answers))
        return answers
    except BaseException:  # answers may be under way: the connection is not to be used again
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


async def through_pool_async(pool: Any, batches: Sequence[Batch]) -> list[Any]:
    """The same on a pool of redis.asyncio."""
    request, count = b"".join([batch.packed() for batch in batches]), sum(map(len, batches))
    connection = await pool.get_connection()
    try:
        await connection.send_packed_command([request])
        answers: list[Any] = []
        while len(answers) < count:
            answers.append(await connection.read_response(disable_decoding=True))
            answers += _parsed(connection, count - len(answers))
        return answers
    except BaseException:  # as above
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)


def _parsed(connection: Any, most: int) -> list[Any]:
    """Answers that came with the one read last, straight from hiredis.

    This reaches behind redis-py's public names; where it does not find what it looks for (no hiredis, RESP3 with its
    push messages, another redis-py), it returns none, and each answer is read in redis-py's own way.
    """
    reader = getattr(getattr(connection, "_parser", None), "_reader", None)
    gets: Callable[[bool], Any] | None = getattr(reader, "gets", None)
    answers: list[Any] = []
    if gets is None or str(getattr(connection, "protocol", "")) != "2":
        return answers
    while len(answers) < most:
        answer = gets(False)
        if type(answer) is object or answer is False:  # redis-py's and hiredis' own mark for: no whole answer yet
            break
        if isinstance(answer, Exception):
            raise answer
        answers.append(answer)
    return answers
