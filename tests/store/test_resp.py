"""Requests as whole blobs, against redis-py's own packing and its own way to read answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import redis
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from kellm_features.store.backends.resp import Batch, through_pool, through_pool_async

pytestmark = pytest.mark.redis
ROWS = st.lists(st.tuples(st.binary(max_size=200), st.binary(max_size=9)), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.binary(max_size=9), st.binary(max_size=9), ROWS)
def test_packed_as_redis_py_packs_it(before: bytes, between: bytes, rows: list[tuple[bytes, bytes]]) -> None:
    batch = Batch((b"HSET", before, None, between, None), list(zip(*rows, strict=True)))
    commands = [(b"HSET", before, one, between, other) for one, other in rows]
    assert batch.commands() == commands
    assert len(batch) == len(rows)
    assert batch.packed() == b"".join(redis.Connection().pack_commands(commands))


def test_one_command_and_none() -> None:
    assert Batch((b"GET", b"100%d")).packed() == b"*2\r\n$3\r\nGET\r\n$5\r\n100%d\r\n"
    assert Batch((b"GET", b"k")).commands() == [(b"GET", b"k")]
    assert (Batch((b"GET", None), [[]]).packed(), len(Batch((b"GET", None), [[]]))) == (b"", 0)


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def client(request, redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port, db=9001, protocol=request.param) as client:
        client.flushdb()
        yield client


def filled(client: redis.Redis) -> tuple[list[Batch], list[object]]:
    """Requests, and their answers as redis-py's pipeline has them: far more bytes than one packet, nulls, lists."""
    keys = [b"%d" % place for place in range(700)]
    client.mset({key: key * 500 for key in keys[::2]})
    client.hset("h", mapping={"a": 1})
    batches = [Batch((b"GET", None), [keys]), Batch((b"MGET", *keys)), Batch((b"HMGET", b"h", b"a", b"b"))]
    pipeline = client.pipeline(transaction=False)
    for batch in batches:
        for command in batch.commands():
            pipeline.execute_command(*command)
    return batches, pipeline.execute()


def test_answers(client: redis.Redis) -> None:
    batches, answers = filled(client)
    assert through_pool(client.connection_pool, batches) == answers


def test_answers_in_an_event_loop(client: redis.Redis) -> None:
    batches, answers = filled(client)

    async def ask() -> list[object]:
        options = client.connection_pool.connection_kwargs
        async with redis.asyncio.Redis(port=options["port"], db=9001, protocol=options["protocol"]) as other:
            return await through_pool_async(other.connection_pool, batches)

    assert asyncio.run(ask()) == answers


@pytest.mark.parametrize("place", [0, 2])
def test_an_error_among_the_answers_is_raised_and_leaves_no_answers_behind(client: redis.Redis, place: int) -> None:
    client.set("text", "x")
    batches = [Batch((b"GET", None), [[b"text"] * 4])]
    batches.insert(place, Batch((b"HGET", b"text", b"field")))
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        through_pool(client.connection_pool, batches)
    assert through_pool(client.connection_pool, [Batch((b"GET", b"text"))]) == [b"x"]
