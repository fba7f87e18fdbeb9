"""Versions in Redis: single server, Sentinel or Cluster.

Stock layout: the hash that Feast keeps per entity, with the fields of `VIEW_vNUMBER` beside those of other versions
and views. Packed layout: one string per id. The catalog is one string, and a second one its token, so that a reader
asks for the token with every request at the price of a few bytes.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import mmh3
import pyarrow as pa
import redis
import redis.asyncio
from redis.cluster import ClusterNode, RedisCluster

from kellm_features.errors import StoreError, first_line
from kellm_features.store import packed, wire
from kellm_features.store.backends import Id, Namespace, Rows
from kellm_features.store.catalog import Catalog, parse_catalog
from kellm_features.store.repo import OnlineConfig, redis_address

Command = tuple[bytes | str, ...]
T = TypeVar("T")

LEASE_S = 30
"""A publisher that stops renewing its lease has lost it after this long; it renews three times as often."""
WRITE_ROWS = 1000
"""Rows per pipeline: a few MB of 384-d vectors."""
SCAN_COUNT = 5000

# Compare-and-set of the catalog: KEYS catalog, token; ARGV what is expected ('' for nothing), the new one, its token.
_SWAP = """
local seen = redis.call('GET', KEYS[1])
if (seen or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"
_RENEW = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) else return 0 end"
)


class RedisBackend:
    """The online store of a repository whose feature_store.yaml names Redis."""

    def __init__(self, config: OnlineConfig) -> None:
        self.where = config.where
        self._config = config
        self._project = config.project
        # One slot for both in a cluster: the part in braces is hashed.
        root = f"kellm:{{{config.project}}}"
        self._catalog, self._token, self._lease = (f"{root}:{name}".encode() for name in ("catalog", "token", "lease"))
        self._client: redis.Redis | RedisCluster | None = None
        self._pid = 0
        self._guard = threading.Lock()
        self._asyncs: dict[Any, redis.asyncio.Redis] = {}
        self._readers: dict[Namespace, _Reader] = {}

    def catalog(self) -> Catalog:
        """The catalog; an empty one where nothing was ever published."""
        (body,) = self._run([(b"GET", self._catalog)])
        return parse_catalog(body, self.where)

    def token(self) -> bytes | None:
        """What the catalog's state is told by; None where there is no catalog."""
        (token,) = self._run([(b"GET", self._token)])
        return None if token is None else bytes(token)

    def swap(self, before: Catalog, after: Catalog) -> bool:
        """Replace the catalog if it still is `before`; whether it was."""
        expected = b"" if before.revision == 0 else before.model_dump_json().encode()
        arguments = (expected, after.model_dump_json().encode(), after.token())
        return bool(self._ask(lambda client: client.eval(_SWAP, 2, self._catalog, self._token, *arguments)))

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Be the store's only publisher, or say who is. A dead publisher's lease ends by itself."""
        mine = f"{socket.gethostname()} process {os.getpid()} since {datetime.now(UTC):%H:%M:%S} UTC {uuid.uuid4().hex}"
        token = mine.encode()
        if not self._acquire(token):
            (held,) = self._run([(b"GET", self._lease)])
            if not held or not self._abandoned(held) or not self._acquire(token):
                who = " ".join((held or b"unknown").decode().split()[:-1])
                raise StoreError(
                    f"another publish into {self.where} is running ({who}): wait for it and try again; if it was "
                    f"killed, its claim ends within {LEASE_S} s"
                )
        stop = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(token, stop), name="kellm-lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            stop.set()
            renewal.join()
            self._ask(lambda client: client.eval(_RELEASE, 1, self._lease, token))

    def write(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        """Write rows that are not there yet; how many were not."""
        written = 0
        for start in range(0, len(batch), WRITE_ROWS):
            part = batch.slice(start, WRITE_ROWS)
            written += (self._write_packed if namespace.layout == "packed" else self._write_stock)(
                namespace, part, event_us
            )
        return written

    def fetch(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """Embeddings and the token, read together."""
        reader = self._reader(namespace)
        return reader.rows(self._run(reader.commands(ids)))

    async def fetch_async(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """The same without blocking the event loop."""
        reader = self._reader(namespace)
        return reader.rows(await self._run_async(reader.commands(ids)))

    def drop(self, namespace: Namespace) -> int:
        """Delete a namespace: its strings, or its fields in the entities' hashes."""
        if namespace.layout == "packed":
            prefix = packed.key_prefix(self._project, namespace.name)
            return self._delete(prefix, lambda keys: [(b"UNLINK", key) for key in keys])
        fields = [*_fields(namespace).values(), _time_field(namespace)]
        prefix = self._keys(namespace).prefix
        return self._delete(prefix, lambda keys: [(b"HDEL", key, *fields) for key in keys], self._project.encode())

    def clear(self) -> None:
        """Delete the catalog."""
        self._run([(b"DEL", key) for key in (self._token, self._catalog)])

    def close(self) -> None:
        """Give the connections back."""
        with self._guard:
            client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def _write_stock(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        keys = self._keys(namespace).encode(batch.column(namespace.spec.join_key).to_pylist())
        time_field, time = _time_field(namespace), wire.encode_timestamp(event_us)
        now = wire.decode_timestamp(time)
        there = self._run([(b"HGET", key, time_field) for key in keys])
        fresh = _first_of_each(keys, [seen is None or wire.decode_timestamp(seen) < now for seen in there])
        if not fresh:
            return 0
        part = batch.take(pa.array(fresh)) if len(fresh) < len(batch) else batch
        fields = _fields(namespace)
        columns = [wire.encode_column(part.column(name), kind) for name, kind in namespace.spec.features]
        names = [fields[name] for name, _ in namespace.spec.features]
        self._run(
            [
                (
                    b"HSET",
                    keys[place],
                    time_field,
                    time,
                    *[part for pair in zip(names, row, strict=True) for part in pair],
                )
                for place, row in zip(fresh, zip(*columns, strict=True), strict=True)
            ]
        )
        return len(fresh)

    def _write_packed(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        prefix = packed.key_prefix(self._project, namespace.name)
        keys = [prefix + key for key in packed.encode_ids(batch.column(namespace.spec.join_key).to_pylist())]
        there = packed.event_times(self._run([(b"GETRANGE", key, b"0", b"7") for key in keys]))
        now = event_us / 1e6
        fresh = _first_of_each(keys, [seen is None or seen < now for seen in there])
        if not fresh:
            return 0
        part = batch.take(pa.array(fresh)) if len(fresh) < len(batch) else batch
        vector, *others = namespace.spec.features
        tails = [wire.encode_column(part.column(name), kind) for name, kind in others]
        rows = packed.encode_rows(part.column(vector[0]), event_us, tails)
        self._run([(b"SET", keys[place], row) for place, row in zip(fresh, rows, strict=True)])
        return len(fresh)

    def _delete(self, prefix: bytes, commands: Callable[[list[bytes]], list[Command]], suffix: bytes = b"") -> int:
        """Apply commands to all keys of a prefix; the sum of what they say they deleted, rows counted once."""
        pattern = _literal(prefix) + b"*" + _literal(suffix)
        gone = 0
        keys: list[bytes] = []
        scan = self._ask(lambda client: iter(client.scan_iter(match=pattern, count=SCAN_COUNT)))
        while True:
            key = self._guarded(lambda: next(scan, None))
            if key is not None:
                keys.append(key)
            if keys and (key is None or len(keys) >= SCAN_COUNT):
                gone += sum(1 for answer in self._run(commands(keys)) if answer)
                keys = []
            if key is None:
                return gone

    def _reader(self, namespace: Namespace) -> _Reader:
        reader = self._readers.get(namespace)
        if reader is None:
            if len(self._readers) > 100:  # versions come and go in a process that lives long
                self._readers.clear()
            kind = _PackedReader if namespace.layout == "packed" else _StockReader
            reader = self._readers[namespace] = kind(self._token, self._project, namespace, self._keys(namespace))
        return reader

    def _keys(self, namespace: Namespace) -> wire.EntityKeys:
        return wire.EntityKeys(namespace.spec.join_key, namespace.id_type, self._project.encode())

    def _run(self, commands: list[Command]) -> list[Any]:
        """The answers to commands sent in one go."""
        client = self._connected()
        if isinstance(client, RedisCluster):
            return self._guarded(lambda: _through_cluster(client, commands))
        return self._guarded(lambda: _through_pool(client.connection_pool, commands))

    async def _run_async(self, commands: list[Command]) -> list[Any]:
        import asyncio

        if self._config.redis_type == "redis_cluster":
            return await asyncio.to_thread(self._run, commands)
        loop = asyncio.get_running_loop()
        client = self._asyncs.get(loop)
        if client is None:
            for closed in [known for known in self._asyncs if known.is_closed()]:
                del self._asyncs[closed]
            client = self._asyncs[loop] = _connect_async(self._config)
        try:
            pool = client.connection_pool
            connection = await pool.get_connection()
            try:
                await connection.send_packed_command(connection.pack_commands(commands))
                return [await connection.read_response(disable_decoding=True) for _ in commands]
            except BaseException:  # answers may be under way: the connection is not to be used again
                await connection.disconnect(nowait=True)
                raise
            finally:
                await pool.release(connection)
        except redis.RedisError as error:
            raise self._silent(error) from error

    def _ask(self, question: Callable[[Any], T]) -> T:
        client = self._connected()
        return self._guarded(lambda: question(client))

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (redis.RedisError, OSError) as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.where} did not answer ({type(error).__name__}: {first_line(error)}): check that it runs and that "
            f"online_store.connection_string holds its address and password"
        )

    def _connected(self) -> redis.Redis | RedisCluster:
        if self._client is None or self._pid != os.getpid():  # a fork must not share its parent's sockets
            with self._guard:
                if self._client is None or self._pid != os.getpid():
                    self._client = self._guarded(lambda: _connect(self._config))
                    self._pid = os.getpid()
                    self._asyncs = {}
        return self._client

    def _acquire(self, token: bytes) -> bool:
        return bool(self._ask(lambda client: client.set(self._lease, token, nx=True, px=LEASE_S * 1000)))

    def _renew(self, token: bytes, stop: threading.Event) -> None:
        while not stop.wait(LEASE_S / 3):
            try:
                self._ask(lambda client: client.eval(_RENEW, 1, self._lease, token, LEASE_S * 1000))
            except StoreError:  # the publish itself will meet the same trouble and tell
                continue

    def _abandoned(self, held: bytes) -> bool:
        """Whether the lease is of a process of this machine that is no more; it is then released."""
        words = held.decode(errors="replace").split()
        if len(words) < 3 or words[0] != socket.gethostname() or not words[2].isdigit():
            return False
        try:
            os.kill(int(words[2]), 0)
        except ProcessLookupError:
            self._ask(lambda client: client.eval(_RELEASE, 1, self._lease, held))
            return True
        except PermissionError:
            return False
        return False


class _Reader:
    """Commands and answers of one namespace."""

    def __init__(self, token: bytes, project: str, namespace: Namespace, keys: wire.EntityKeys) -> None:
        self._ask_token: Command = (b"GET", token)
        self._keys = keys
        self._prefix = packed.key_prefix(project, namespace.name)
        self._fields = (_fields(namespace)[namespace.spec.features[0][0]], _time_field(namespace))

    def commands(self, ids: Sequence[Id]) -> list[Command]:
        raise NotImplementedError

    def rows(self, answers: list[Any]) -> Rows:
        raise NotImplementedError


class _StockReader(_Reader):
    def commands(self, ids: Sequence[Id]) -> list[Command]:
        vector, time = self._fields
        return [self._ask_token, *[(b"HMGET", key, vector, time) for key in self._keys.encode(ids)]]

    def rows(self, answers: list[Any]) -> Rows:
        token, *rows = answers
        moments = {time: wire.decode_timestamp(time) for time in {row[1] for row in rows} if time is not None}
        return Rows(token, [row[0] for row in rows], [moments.get(row[1]) for row in rows])


class _PackedReader(_Reader):
    def commands(self, ids: Sequence[Id]) -> list[Command]:
        prefix = self._prefix
        keys = [prefix + key for key in packed.encode_ids(ids)]
        return [self._ask_token, (b"MGET", *keys)] if keys else [self._ask_token]

    def rows(self, answers: list[Any]) -> Rows:
        values = answers[1] if len(answers) > 1 else []
        return Rows(answers[0], values, packed.event_times(values))


def _fields(namespace: Namespace) -> dict[str, bytes]:
    """Feature -> its field in the entity's hash (feast.infra.online_stores.helpers._mmh3)."""
    names = (name for name, _ in namespace.spec.features)
    return {name: struct.pack("<I", mmh3.hash(f"{namespace.name}:{name}", signed=False)) for name in names}


def _time_field(namespace: Namespace) -> bytes:
    return f"_ts:{namespace.name}".encode()


def _first_of_each(keys: list[bytes], wanted: list[bool]) -> list[int]:
    """Places of the wanted keys, each key once."""
    seen: set[bytes] = set()
    places = []
    for place, (key, want) in enumerate(zip(keys, wanted, strict=True)):
        if want and key not in seen:
            seen.add(key)
            places.append(place)
    return places


def _literal(text: bytes) -> bytes:
    """A glob pattern that matches just this text: lengths in a key may happen to be `*` or `[`."""
    return b"".join(
        b"\\" + byte if byte in b"*?[]\\^" else byte for byte in (text[i : i + 1] for i in range(len(text)))
    )


def _through_pool(pool: Any, commands: list[Command]) -> list[Any]:
    """Send commands over one connection and read their answers: redis-py's pipeline without its bookkeeping."""
    connection = pool.get_connection()
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        read = connection.read_response
        return [read(disable_decoding=True) for _ in commands]
    except BaseException:  # answers may be under way: the connection is not to be used again
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _through_cluster(client: RedisCluster, commands: list[Command]) -> list[Any]:
    """The same over all nodes; an MGET of keys in many slots becomes one GET each."""
    pipeline = client.pipeline()
    for command in commands:
        if command[0] == b"MGET":
            for key in command[1:]:
                pipeline.execute_command("GET", key)
        else:
            pipeline.execute_command(command[0].decode() if isinstance(command[0], bytes) else command[0], *command[1:])
    answers = iter(pipeline.execute())
    return [[next(answers) for _ in c[1:]] if c[0] == b"MGET" else next(answers) for c in commands]


def _options(config: OnlineConfig) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Addresses and options of a connection string, read as Feast reads it."""
    options: dict[str, Any] = {}
    for part in config.connection_string.split(","):
        name, sign, value = part.partition("=")
        if sign:
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
    addresses = []
    for part in redis_address(config.connection_string).split(","):
        host, _, port = part.rpartition(":")
        if not host or not port.isdigit():
            raise StoreError(f"online_store.connection_string names {part!r}: expected host:port, as in redis:6379")
        addresses.append((host, int(port)))
    return addresses, {"socket_connect_timeout": 5, "socket_timeout": 30, **options}


def _connect(config: OnlineConfig) -> redis.Redis | RedisCluster:
    addresses, options = _options(config)
    if config.redis_type == "redis_cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*address) for address in addresses], **options)
    if config.redis_type == "redis_sentinel":
        master: redis.Redis = redis.Sentinel(addresses, **options).master_for(config.sentinel_master)
        return master
    (host, port), *_ = addresses
    return redis.Redis(host=host, port=port, **options)


def _connect_async(config: OnlineConfig) -> redis.asyncio.Redis:
    addresses, options = _options(config)
    if config.redis_type == "redis_sentinel":
        master: redis.asyncio.Redis = redis.asyncio.Sentinel(addresses, **options).master_for(config.sentinel_master)
        return master
    (host, port), *_ = addresses
    return redis.asyncio.Redis(host=host, port=port, **options)
