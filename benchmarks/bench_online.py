"""Filling an online store and reading from it, beside stock Feast; appends rows to benchmarks/data/online.csv.

python benchmarks/bench_online.py [--items 200000] [--dims 64 384] [--turns 2] [--requests 300] [--only fill read]

fill     `materialize` of stock Feast (duckdb offline) against `publish` of ours, into Redis and SQLite. Each run is a
         process of its own, in a shuffled order; definitions are applied before. `cpu_s` and `wall_s` are of the whole
         process tree from start to end, imports included; `peak_mib` is its largest resident memory; `server_cpu_s` is
         what the Redis server spent meanwhile. `bytes_per_item`: what its used_memory grew by.
read     vectors of some ids as one float32 matrix: all impls in turns within one process, milliseconds per request.
float16  what the packed layout does to unit vectors and to their ten nearest neighbours.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from bench_place import append_rows, provenance
from peers_online import VIEW

from kellm_features.store.definitions import apply_definitions
from kellm_features.store.rollout import promote

DATA = Path(__file__).resolve().parent / "data"
PEERS = Path(__file__).with_name("peers_online.py")
PROJECT = "bench"
FIELDS = "op impl store items dim ids turn requests cpu_s server_cpu_s wall_s peak_mib bytes_per_item".split()
FIELDS += "cpu_p20_ms cpu_p50_ms cpu_p80_ms wall_p20_ms wall_p50_ms wall_p80_ms exact".split()
FIELDS += "max_abs_error rms_cosine_error max_cosine_error overlap_at_10".split()
FIELDS += "machine cores memory_gib python feast redis hiredis redis_server commit date".split()
Row = dict[str, Any]

YAML = """\
project: {project}
provider: local
registry: data/registry.db
online_store:
  type: {type}
  {place}
offline_store:
  type: duckdb
entity_key_serialization_version: 3
"""
DEFINITIONS = """\
from pathlib import Path
from kellm_features.store.views import knowledge_objects
globals().update(knowledge_objects(Path(__file__).parent / "data"))
"""
NAMESPACE = """\
from pathlib import Path
from feast import FeatureView, Field, FileSource
from feast.types import Array, Float32
from kellm_features.store.views import item_entity
item = item_entity()
source = FileSource(path=str(Path(__file__).parent / "data" / "VIEW"), timestamp_field="event_timestamp")
schema = [Field(name="embedding", dtype=Array(Float32))]
view = FeatureView(name="VIEW_v1", entities=[item], schema=schema, source=source)
""".replace("VIEW", VIEW)
"""Stock Feast's own view over what ours wrote as version 1."""


@dataclass(frozen=True)
class Impl:
    """One way to fill an online store."""

    name: str
    store: str
    type: str
    call: str
    db: int = 0
    layout: str = ""


OURS = "kellm_features.store"
IMPLS = (
    Impl("feast", "redis", "redis", "feast", 0),
    Impl("ours_stock", "redis", f"{OURS}.redis.KellmRedisOnlineStore", "kellm", 1),
    Impl("ours_packed", "redis", f"{OURS}.redis.KellmRedisOnlineStore", "kellm", 2, "packed"),
    Impl("feast", "sqlite", "sqlite", "feast"),
    Impl("ours_stock", "sqlite", f"{OURS}.sqlite.KellmSqliteOnlineStore", "kellm"),
)
READS = {
    "redis": {
        "feast": ("redis-feast", "feast"),
        "feast_on_ours": ("redis-namespace", "feast"),
        "ours_feast_stock": ("redis-ours_stock", "feast"),
        "ours_feast_packed": ("redis-ours_packed", "feast"),
        "ours_reader_stock": ("redis-ours_stock", "reader"),
        "ours_reader_packed": ("redis-ours_packed", "reader"),
        "ours_async_stock": ("redis-ours_stock", "async"),
        "ours_async_packed": ("redis-ours_packed", "async"),
    },
    "sqlite": {
        "feast": ("sqlite-feast", "feast"),
        "ours_feast": ("sqlite-ours_stock", "feast"),
        "ours_reader": ("sqlite-ours_stock", "reader"),
        "ours_async": ("sqlite-ours_stock", "async"),
    },
}
"""Store -> impl -> (repository, how it is asked)."""


def main() -> None:
    """Run what the options name."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench-online-", dir=options.scratch) as folder, redis_server() as server:
        told = where(server, options.commit)
        if "float16" in options.only:
            row = {"op": "float16", "impl": "ours_packed", "items": 20_000, "dim": 384, "ids": 2000}
            row |= call("float16", queries=2000, items=20_000, dim=384)
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
            append_rows(options.out, FIELDS, [row | told])
        if {"fill", "read"}.isdisjoint(options.only):
            return
        for dim in options.dims:
            root = Path(folder) / str(dim)
            filled = fill(options, server, root, dim)
            if "fill" in options.only:
                append_rows(options.out, FIELDS, [row | told for row in filled])
                table(filled, "cpu_s peak_mib wall_s server_cpu_s bytes_per_item".split())
            if "read" in options.only:
                rows = read(options, root, dim)
                append_rows(options.out, FIELDS, [row | told for row in rows])
                table(rows, "ids cpu_p50_ms wall_p50_ms exact".split())
            server.flushall()
            shutil.rmtree(root)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 384])
    parser.add_argument("--stores", nargs="+", choices=tuple(READS), default=list(READS))
    parser.add_argument("--turns", type=int, default=2, help="runs of each impl of `fill`")
    parser.add_argument("--requests", type=int, default=300, help="of each impl and size of `read`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500], help="ids per request")
    parser.add_argument("--only", nargs="+", choices=("fill", "read", "float16"), default=["fill", "read", "float16"])
    parser.add_argument("--out", type=Path, default=DATA / "online.csv", help="CSV to append to")
    parser.add_argument("--scratch", type=Path, help="folder for repositories; default: the system's")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    return parser.parse_args()


def fill(options: argparse.Namespace, server: redis.Redis, root: Path, dim: int) -> list[Row]:
    """Fill every store from the same rows, some turns; the last of each stays for the reads."""
    artefact, partition = root / "item_embeddings.parquet", root / "partition.parquet"
    root.mkdir()
    call("artefact", path=str(artefact), partition=str(partition), items=options.items, dim=dim)
    port = server.connection_pool.connection_kwargs["port"]
    chosen = [impl for impl in IMPLS if impl.store in options.stores]
    rows: list[Row] = []
    for turn in range(1, (options.turns if "fill" in options.only else 1) + 1):
        for impl in random.sample(chosen, len(chosen)):
            repo = root / f"{impl.store}-{impl.name}"
            shutil.rmtree(repo, ignore_errors=True)
            write_repo(repo, impl, port)
            apply_definitions(repo, [VIEW], "int64")
            arguments = {"repo": str(repo)}
            if impl.call == "kellm":
                arguments["artefact"] = str(artefact)
            else:
                (repo / "data" / VIEW).mkdir(parents=True)
                (repo / "data" / VIEW / partition.name).hardlink_to(partition)
            if impl.store == "redis":
                with redis.Redis(port=port, db=impl.db) as database:
                    database.flushdb()
            before = server_state(server)
            row: Row = {"op": "fill", "impl": impl.name, "store": impl.store, "items": options.items, "dim": dim}
            row |= {"turn": turn} | run(impl.call, arguments)
            after = server_state(server)
            if impl.store == "redis":
                row["server_cpu_s"] = round(after[0] - before[0], 2)
                row["bytes_per_item"] = round((after[1] - before[1]) / options.items)
            else:
                files = repo.glob("data/online.db*")
                row["bytes_per_item"] = round(sum(path.stat().st_size for path in files) / options.items)
            if impl.call == "kellm":
                promote(repo, force=True)
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
            rows.append(row)
    namespace = Impl("namespace", "redis", "redis", "", 1)
    write_repo(root / "redis-namespace", namespace, port, NAMESPACE)
    apply_definitions(root / "redis-namespace", [], "int64")
    return rows


def write_repo(repo: Path, impl: Impl, port: int, definitions: str = DEFINITIONS) -> None:
    """A Feast repository with the online store of an impl."""
    repo.mkdir(parents=True)
    place = "path: data/online.db"
    if impl.store == "redis":
        place = f'connection_string: "127.0.0.1:{port},db={impl.db}"'
    if impl.layout:
        place += f"\n  layout: {impl.layout}"
    (repo / "feature_store.yaml").write_text(YAML.format(project=PROJECT, type=impl.type, place=place))
    (repo / "definitions.py").write_text(definitions)
    (repo / "data" / VIEW).mkdir(parents=True) if definitions == NAMESPACE else None


def read(options: argparse.Namespace, root: Path, dim: int) -> list[Row]:
    """Reads of each store; percentiles per impl and request size."""
    rows: list[Row] = []
    for store, impls in ((store, READS[store]) for store in options.stores):
        answer = call(
            "read",
            repos={impl: str(root / repo) for impl, (repo, _) in impls.items()},
            kinds={impl: kind for impl, (_, kind) in impls.items()},
            items=options.items,
            dim=dim,
            sizes=options.sizes,
            rounds=options.requests,
        )
        for size in options.sizes:
            for impl in impls:
                row: Row = {"op": "read", "impl": impl, "store": store, "items": options.items, "dim": dim, "ids": size}
                row |= {"requests": options.requests, "exact": answer["exact"][impl]}
                for name, values in zip(
                    ("cpu", "wall"), zip(*answer["samples"][impl][str(size)], strict=True), strict=True
                ):
                    deciles = statistics.quantiles(values, n=10)
                    row |= {f"{name}_p{p}_ms": round(deciles[p // 10 - 1], 3) for p in (20, 50, 80)}
                rows.append(row)
    return rows


def run(name: str, arguments: Row) -> Row:
    """Run one of the peers to its end and count its whole process tree."""
    started, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    answer = call(name, **arguments)
    wall, ended = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
    return {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2), "peak_mib": round(answer["peak_mib"], 1)}


def call(name: str, **arguments: Any) -> Row:
    """The answer of one of the peers."""
    command = [sys.executable, str(PEERS), name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: Row = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextmanager
def redis_server() -> Iterator[redis.Redis]:
    """A Redis of our own on a free loopback port, nothing persisted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            client = redis.Redis(port=port)
            try:
                await_server(client)
                yield client
            finally:
                server.terminate()


def await_server(client: redis.Redis) -> None:
    """Wait until it answers."""
    deadline = time.monotonic() + 20
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def server_state(server: redis.Redis) -> tuple[float, int]:
    """CPU seconds that the server spent so far, and the memory it uses now."""
    info = server.info()
    return info["used_cpu_user"] + info["used_cpu_sys"], info["used_memory"]


def table(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print the rows' figures (means over turns), and how many times less than stock Feast's the first cost is."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["store"], row["dim"], row.get("ids"), row["impl"]), []).append(row)
    shown = [name for name in names if name != "ids"]
    costs = [name for name in shown if name != "exact"]
    print(f"{'store':7}{'dim':>4}{'ids':>5} {'impl':20}" + "".join(f"{name:>16}" for name in shown) + "   feast / it")
    for key, group in cases.items():
        peer = cases[(*key[:3], "feast")]
        mean = {name: _mean(group, name) for name in costs}
        cells = [f"{mean[n]:16.3f}" if n in costs else f"{all(r[n] for r in group)!s:>16}" for n in shown]
        ratios = [f"{_mean(peer, n) / mean[n]:.1f}x {n}" for n in costs if mean[n] > 0]
        print(f"{key[0]:7}{key[1]:4}{key[2] or '':>5} {key[3]:20}" + "".join(cells) + "   " + ", ".join(ratios))


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return statistics.fmean(values) if values else 0.0


def where(server: redis.Redis, commit: str | None) -> Row:
    """Machine, versions, commit and date."""
    told: Row = provenance("feast", "redis", "hiredis", commit=commit)
    return told | {"redis_server": server.info("server")["redis_version"]}


if __name__ == "__main__":
    main()
