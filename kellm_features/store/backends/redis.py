"""Versions in Redis: single server, Sentinel or Cluster.

Stock layout: the hash that Feast keeps per entity, with the fields of `VIEW_vNUMBER` beside those of other versions
and views. Packed layout: one string per id. The catalog is one string, and a second one its token, so that a reader
asks for the token with every request at the price of a few bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import mmh3
import pyarrow as pa
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from kellm_features.errors import StoreError, first_line
from kellm_features.store import packed, wire
from kellm_features.store.backends import Id, Namespace, Rows, resp
from kellm_features.store.backends.resp import Batch, Command
from kellm_features.store.catalog import Catalog, parse_catalog
from kellm_features.store.repo import OnlineConfig, redis_address

T = TypeVar("T")

_FAILURES = (redis.RedisError, RedisClusterException, OSError)
"""What redis-py raises; the cluster's exception is none of its own family."""

LEASE_S = 30
"""A publisher that stops renewing its lease has lost it after this long; it renews three times as often."""
WRITE_ROWS = 1000
"""Rows per pipeline: a few MB of 384-d vectors."""
SCAN_COUNT = 5000
RETRIES = 2
"""Attempts after the first to connect or to ask."""

# A Redis at its maxmemory refuses SET, but not in a script that has begun to write: each begins with a DEL, so that
# a full store can still be rolled back and pruned.

# Compare-and-set of the catalog: KEYS catalog, token; ARGV what is expected ('' for nothing), the new one, its token.
_SWAP = """
local seen = redis.call('GET', KEYS[1])
if (seen or '') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
return 1
"""
_ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"
_RENEW = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) else return 0 end"
)

_HELD: set[bytes] = set()
"""Leases of this process."""


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
        _HELD.add(token)
        stop = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(token, stop), name="kellm-lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            stop.set()
            renewal.join()
            _HELD.discard(token)
            with suppress(StoreError):  # the lease ends by itself, and an error of the publish must not be hidden
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
        return reader.rows(self._send(reader.batches(ids)))

    async def fetch_async(self, namespace: Namespace, ids: Sequence[Id]) -> Rows:
        """The same without blocking the event loop."""
        if self._config.redis_type == "redis_cluster":
            return await asyncio.to_thread(self.fetch, namespace, ids)
        reader = self._reader(namespace)
        batches = reader.batches(ids)
        try:
            try:
                answers = await resp.through_pool_async(self._async_pool(), batches)
            except redis.ConnectionError:
                # Cut while it lay idle, which redis.asyncio, other than redis-py's sockets, finds out by using it.
                answers = await resp.through_pool_async(self._async_pool(), batches)
        except _FAILURES as error:
            raise self._silent(error) from error
        return reader.rows(answers)

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

    async def aclose(self) -> None:
        """Give back the connections of the running event loop."""
        client = self._asyncs.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose(close_connection_pool=True)

    def _write_stock(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        keys = self._keys(namespace).encode(batch.column(namespace.spec.join_key).to_pylist())
        time_field, time = _time_field(namespace), wire.encode_timestamp(event_us)
        now = wire.decode_timestamp(time)
        there = self._send([Batch((b"HGET", None, time_field), [keys])])
        fresh = _first_of_each(keys, [seen is None or wire.decode_timestamp(seen) < now for seen in there])
        if not fresh:
            return 0
        part = batch.take(pa.array(fresh)) if len(fresh) < len(batch) else batch
        fields = _fields(namespace)
        columns = [wire.encode_column(part.column(name), kind) for name, kind in namespace.spec.features]
        names = [fields[name] for name, _ in namespace.spec.features]
        parts = [b"HSET", None, time_field, time, *[part for name in names for part in (name, None)]]
        self._send([Batch(parts, [[keys[place] for place in fresh], *columns])])
        return len(fresh)

    def _write_packed(self, namespace: Namespace, batch: pa.RecordBatch, event_us: int) -> int:
        prefix = packed.key_prefix(self._project, namespace.name)
        keys = [prefix + key for key in packed.encode_ids(batch.column(namespace.spec.join_key).to_pylist())]
        there = packed.event_times(self._send([Batch((b"GETRANGE", None, b"0", b"7"), [keys])]))
        now = event_us / 1e6
        fresh = _first_of_each(keys, [seen is None or seen < now for seen in there])
        if not fresh:
            return 0
        part = batch.take(pa.array(fresh)) if len(fresh) < len(batch) else batch
        vector, *others = namespace.spec.features
        tails = [wire.encode_column(part.column(name), kind) for name, kind in others]
        rows = packed.encode_rows(part.column(vector[0]), event_us, tails)
        self._send([Batch((b"SET", None, None), [[keys[place] for place in fresh], rows])])
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
        return self._send([Batch(command) for command in commands])

    def _send(self, batches: Sequence[Batch]) -> list[Any]:
        """The answers to batches of commands sent in one go."""
        client = self._connected()
        if isinstance(client, RedisCluster):
            commands = [command for batch in batches for command in batch.commands()]
            return self._guarded(lambda: _through_cluster(client, commands))
        return self._guarded(lambda: resp.through_pool(client.connection_pool, batches))

    def _async_pool(self) -> Any:
        """Connections of the running event loop."""
        loop = asyncio.get_running_loop()
        client = self._asyncs.get(loop)
        if client is None:
            for closed in [known for known in self._asyncs if known.is_closed()]:
                del self._asyncs[closed]
            client = self._asyncs[loop] = _connect_async(self._config)
        return client.connection_pool

    def _ask(self, question: Callable[[Any], T]) -> T:
        client = self._connected()
        return self._guarded(lambda: question(client))

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except _FAILURES as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> StoreError:
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            return StoreError(
                f"{self.where} is full ({first_line(error)}): raise its maxmemory or delete old versions with  kellm "
                f"prune, and try again; what is served is unchanged"
            )
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
        return bool(self._ask(lambda client: client.eval(_ACQUIRE, 1, self._lease, token, LEASE_S * 1000)))

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
        if not _is_running(int(words[2]), held):
            self._ask(lambda client: client.eval(_RELEASE, 1, self._lease, held))
            return True
        return False


def _is_running(pid: int, lease: bytes) -> bool:
    """Whether the holder of a lease of this machine lives. Process ids repeat: a restarted container has its own."""
    if pid == os.getpid():
        return lease in _HELD
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Reader(ABC):
    """Commands and answers of one namespace."""

    def __init__(self, token: bytes, project: str, namespace: Namespace, keys: wire.EntityKeys) -> None:
        self._ask_token = Batch((b"GET", token))
        self._keys = keys
        self._prefix = packed.key_prefix(project, namespace.name)
        self._fields = (_fields(namespace)[namespace.spec.features[0][0]], _time_field(namespace))

    @abstractmethod
    def batches(self, ids: Sequence[Id]) -> list[Batch]:
        """What asks for the token and the rows."""

    @abstractmethod
    def rows(self, answers: list[Any]) -> Rows:
        """What was answered."""


class _StockReader(_Reader):
    def batches(self, ids: Sequence[Id]) -> list[Batch]:
        return [self._ask_token, Batch((b"HMGET", None, *self._fields), [self._keys.encode(ids)])]

    def rows(self, answers: list[Any]) -> Rows:
        token, *rows = answers
        moments = {time: wire.decode_timestamp(time) for time in {row[1] for row in rows} if time is not None}
        return Rows(token, [row[0] for row in rows], [moments.get(row[1]) for row in rows])


class _PackedReader(_Reader):
    def batches(self, ids: Sequence[Id]) -> list[Batch]:
        prefix = self._prefix
        keys = [prefix + key for key in packed.encode_ids(ids)]
        return [self._ask_token, Batch((b"MGET", *keys))] if keys else [self._ask_token]

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
    addresses = []
    for place, part in enumerate(config.connection_string.split(","), start=1):
        name, sign, value = part.partition("=")
        if sign:
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
        elif redis_address(part):
            host, port = part.split(":")
            addresses.append((host, int(port)))
        else:  # not shown: it may be the end of a password
            raise StoreError(
                f"part {place} of online_store.connection_string is neither host:port nor option=value, as in "
                f"redis:6379,password=word: it is cut at each comma, so that a password must not hold one"
            )
    if not addresses:
        raise StoreError("online_store.connection_string names no host:port, as in redis:6379")
    return addresses, {"socket_connect_timeout": 5, "socket_timeout": 30, **options}


def _retries() -> ExponentialBackoff:
    """Waits between attempts: a request that cannot be answered says so within a second, not redis-py's ten."""
    return ExponentialBackoff(cap=0.2, base=0.02)


def _connect(config: OnlineConfig) -> redis.Redis | RedisCluster:
    addresses, options = _options(config)
    if config.redis_type == "redis_cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*address) for address in addresses], **options)
    options.setdefault("retry", Retry(_retries(), RETRIES))
    if config.redis_type == "redis_sentinel":
        master: redis.Redis = redis.Sentinel(addresses, **options).master_for(config.sentinel_master)
        return master
    (host, port), *_ = addresses
    return redis.Redis(host=host, port=port, **options)


def _connect_async(config: OnlineConfig) -> redis.asyncio.Redis:
    addresses, options = _options(config)
    options.setdefault("retry", AsyncRetry(_retries(), RETRIES))
    if config.redis_type == "redis_sentinel":
        master: redis.asyncio.Redis = redis.asyncio.Sentinel(addresses, **options).master_for(config.sentinel_master)
        return master
    (host, port), *_ = addresses
    return redis.asyncio.Redis(host=host, port=port, **options)
