"""What `kellm serve` costs and whether its answers stay of one version; appends rows to benchmarks/data/serve.csv.

python benchmarks/bench_serve.py soak --seconds 300 [--connections 8] [--rate 300] [--layout packed]
python benchmarks/bench_serve.py peers --seconds 20 --turns 3

Redis, the server, and the load (load_http.py) are processes of their own on this machine; ids are Zipf-distributed.
`soak` promotes and rolls back once a second while it asks; each vector tells its version and its id, so every row of
every answer is checked. `peers` puts the formats and `feast serve` (stock Redis layout, stock Feast, one worker) side
by side on one connection, the turns interleaved. `server_cpu_ms` is CPU time of the server's process tree per request;
Redis' own is apart. `rss_mib` is the server's resident memory every ten seconds.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from bench_place import append_rows, provenance
from load_http import ID_BASE

from kellm_features.store.backends import Namespace, open_backend, update
from kellm_features.store.catalog import Version, ViewVersion, utc_now
from kellm_features.store.http_formats import ARROW, JSON, RAW
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.repo import REDIS_TYPE, read_online_config

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
PROJECT = "bench"
VIEW = ITEM_EMBEDDING.name
COLUMNS = (
    "op server layout format items dim ids connections workers rate seconds turn requests requests_s errors".split()
)
COLUMNS += "p50_ms p99_ms p999_ms max_ms server_cpu_ms redis_cpu_ms client_cpu_ms answer_bytes".split()
COLUMNS += "versions flips mixed wrong rss_mib reasons".split()
COLUMNS += "machine cores python feast redis fastapi uvicorn commit date".split()
MIB = 1024 * 1024
RSS_EVERY_S = 10
BODIES = 500
"""Different requests that a load sends in turn."""

FEAST_REPO = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float32

item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
item_knowledge_embedding = FeatureView(
    name="item_knowledge_embedding", entities=[item], schema=[Field(name="embedding", dtype=Array(Float32))],
    ttl=timedelta(0), source=FileSource(path="none.parquet", timestamp_field="event_timestamp"),
)
"""


def main() -> None:
    """Run the subcommand that the options name."""
    options = parse()
    with ExitStack() as stack:
        options.stack = stack
        options.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serve-")))
        options.redis_port, options.redis = stack.enter_context(redis(options.folder))
        rows = options.call(options)
    append_rows(options.out, COLUMNS, rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="soak | peers")
    for name, call, seconds, connections, items in (("soak", soak, 300, 8, 100_000), ("peers", peers, 20, 1, 20_000)):
        sub = commands.add_parser(name)
        sub.set_defaults(call=call, op=name)
        sub.add_argument("--seconds", type=float, default=seconds, help="of each measured run")
        sub.add_argument("--connections", type=int, default=connections)
        sub.add_argument("--items", type=int, default=items)
        sub.add_argument("--dim", type=int, default=384)
        sub.add_argument("--ids", type=int, default=100, help="of one request")
        sub.add_argument("--rate", type=float, default=0.0, help="requests per second; 0: as fast as they are answered")
        sub.add_argument("--workers", type=int, default=1)
        sub.add_argument("--layout", choices=("packed", "stock"), default="packed")
        sub.add_argument("--turns", type=int, default=3, help="interleaved runs of each peer")
        sub.add_argument("--commit", help="what is measured, where git cannot tell")
        sub.add_argument("--out", type=Path, default=HERE / "data" / "serve.csv")
    return parser.parse_args()


def soak(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One long run under promotions and rollbacks."""
    port, server = kellm(options)
    body = requests(options, RAW)
    load(options, port, {**body, "seconds": 3, "rate": 0})  # warms up
    stop, flips, rss = threading.Event(), [0], [memory_mib(server)]

    def flip() -> None:
        backend = open_backend(read_online_config(options.folder / "kellm"))
        while not stop.wait(1.0):
            update(
                backend,
                lambda catalog: catalog.rollback(utc_now()) if flips[0] % 2 else catalog.promote("v1", utc_now()),
            )
            flips[0] += 1

    def watch() -> None:
        while not stop.wait(RSS_EVERY_S):
            rss.append(memory_mib(server))

    threads = [threading.Thread(target=work) for work in (flip, watch)]
    for thread in threads:
        thread.start()
    try:
        row = measured(options, "kellm", port, server, body, RAW)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    row |= {"flips": flips[0], "rss_mib": " ".join(f"{value:.1f}" for value in [*rss, memory_mib(server)])}
    print(json.dumps(row, indent=1))
    return [row]


def peers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The formats and Feast's own server in turns."""
    feast_port, feast = feast_server(options)
    servers = [("feast", feast_port, feast, JSON)]
    for layout in ("packed", "stock"):
        options.layout = layout
        port, server = kellm(options)
        servers += [(f"kellm {layout}", port, server, kind) for kind in (RAW, ARROW, JSON)]
    specs = {
        name: feast_requests(options) if name == "feast" else requests(options, kind) for name, _, _, kind in servers
    }
    for name, port, _, kind in servers:
        spec = specs[name] if name == "feast" else requests(options, kind)
        load(options, port, {**spec, "seconds": 2, "rate": 0})
    rows = []
    for turn in range(1, options.turns + 1):
        for name, port, server, kind in random.Random(turn).sample(servers, len(servers)):
            spec = specs[name] if name == "feast" else requests(options, kind)
            rows.append(measured(options, name.split()[0], port, server, spec, kind) | {"turn": turn})
            rows[-1]["layout"] = name.partition(" ")[2] or "stock"
            print(
                {
                    key: rows[-1][key]
                    for key in "server layout format requests_s p50_ms server_cpu_ms answer_bytes errors".split()
                }
            )
    return rows


def measured(
    options: argparse.Namespace, name: str, port: int, server: psutil.Process, spec: dict[str, Any], kind: str
) -> dict[str, Any]:
    """One row: a load, and the CPU that the server and Redis spent meanwhile."""
    before, redis_before = cpu_s(server), cpu_s(options.redis)
    told = load(options, port, spec)
    spent, redis_spent = cpu_s(server) - before, cpu_s(options.redis) - redis_before
    return {
        **{key: getattr(options, key) for key in "op layout items dim ids connections workers rate seconds".split()},
        "server": name,
        "format": {RAW: "raw", ARROW: "arrow", JSON: "json"}[kind],
        **told,
        "server_cpu_ms": round(spent * 1000 / max(told["requests"], 1), 3),
        "redis_cpu_ms": round(redis_spent * 1000 / max(told["requests"], 1), 3),
        **provenance("feast", "redis", "fastapi", "uvicorn", commit=options.commit),
    }


def load(options: argparse.Namespace, port: int, spec: dict[str, Any]) -> dict[str, Any]:
    """Run the load generator in its own process."""
    path = options.folder / "load.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, str(HERE / "load_http.py"), str(port), str(path)]
    told: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told


def requests(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Requests for raw ids, as the load generator takes them; raw answers are checked row by row."""
    bodies = [base64.b64encode(ids.astype("<i8").tobytes()).decode() for ids in zipf_ids(options)]
    headers = {"Content-Type": RAW, "Accept": kind}
    keys = {key: getattr(options, key) for key in ("connections", "seconds", "rate")}
    path = f"/v1/views/{VIEW}/embeddings"
    return {**keys, "path": path, "headers": headers, "bodies": bodies, "check": kind == RAW}


def feast_requests(options: argparse.Namespace) -> dict[str, Any]:
    """The same ids as Feast's server takes them."""
    bodies = [
        base64.b64encode(
            json.dumps({"features": [f"{VIEW}:embedding"], "entities": {"item_id": ids.tolist()}}).encode()
        ).decode()
        for ids in zipf_ids(options)
    ]
    keys = {key: getattr(options, key) for key in ("connections", "seconds", "rate")}
    headers = {"Content-Type": JSON}
    return {**keys, "path": "/get-online-features", "headers": headers, "bodies": bodies, "check": False}


def zipf_ids(options: argparse.Namespace) -> np.ndarray:
    """(BODIES, ids) int64: popularity falls with the rank, 1 / rank."""
    weights = 1 / np.arange(1, options.items + 1)
    rng = np.random.default_rng(5)
    return rng.choice(options.items, (BODIES, options.ids), p=weights / weights.sum()).astype(np.int64)


def vectors(options: argparse.Namespace, version: int) -> np.ndarray:
    """(items, dim) float32: version, id in two digits, noise."""
    rng = np.random.default_rng(version)
    matrix = rng.standard_normal((options.items, options.dim), dtype=np.float32)
    ids = np.arange(options.items)
    matrix[:, 0], matrix[:, 1], matrix[:, 2] = version, ids % ID_BASE, ids // ID_BASE
    return matrix


def kellm(options: argparse.Namespace) -> tuple[int, psutil.Process]:
    """A repository with two versions on Redis, v2 served after v1, and `kellm serve` over it."""
    repo = options.folder / ("kellm" if options.op == "soak" else f"kellm-{options.layout}")
    repo.mkdir()
    project = f"{PROJECT}_{options.layout}"
    (repo / "feature_store.yaml").write_text(
        f"project: {project}\nonline_store:\n  type: {REDIS_TYPE}\n  layout: {options.layout}\n"
        f'  connection_string: "127.0.0.1:{options.redis_port}"\n'
    )
    backend = open_backend(read_online_config(repo))
    now = utc_now()
    for number in (1, 2):
        space = Namespace(project, ITEM_EMBEDDING, number, "int64", options.layout, options.dim)
        matrix = vectors(options, number)
        for start in range(0, options.items, 10_000):
            ids = range(start, min(start + 10_000, options.items))
            rest = pa.RecordBatch.from_pylist([{"item_id": key} for key in ids], ITEM_EMBEDDING.arrow("int64"))
            flat = pa.array(matrix[ids.start : ids.stop].ravel())
            lists = pa.FixedSizeListArray.from_arrays(flat, options.dim).cast(pa.list_(pa.float32()))
            place = rest.schema.get_field_index("embedding")
            backend.write(space, rest.set_column(place, "embedding", lists), int(now.timestamp() * 1e6))
        view = ViewVersion(
            number=number, file="", rows=options.items, event=now, created=now, content="", layout=options.layout,
            dim=options.dim,
        )  # fmt: skip
        name = f"v{number}"
        version = Version(name=name, state="writing", id_type="int64", started_at=now, views={VIEW: view})
        update(
            backend,
            lambda catalog, name=name, version=version: catalog.begin(version).finish(name, now).promote(name, now),
        )
    backend.close()
    command = [str(BIN / "kellm"), "serve", "--repo", str(repo), "--view", VIEW, "--port", "0"]
    process = options.stack.enter_context(
        running([*command, "--workers", str(options.workers)], stdout=subprocess.PIPE)
    )
    found = re.search(r":(\d+)$", process.stdout.readline().decode().strip())
    if not found:
        raise SystemExit("kellm serve did not start")
    await_port(int(found[1]))
    return int(found[1]), psutil.Process(process.pid)


def feast_server(options: argparse.Namespace) -> tuple[int, psutil.Process]:
    """`feast serve` over the same vectors, written by Feast itself."""
    import pandas as pd
    from feast import FeatureStore

    repo = options.folder / "feast"
    repo.mkdir()
    (repo / "feature_store.yaml").write_text(
        f"project: stock\nregistry: registry.db\nprovider: local\nentity_key_serialization_version: 3\n"
        f'online_store:\n  type: redis\n  connection_string: "127.0.0.1:{options.redis_port}"\n'
        "offline_store:\n  type: duckdb\n"
    )
    (repo / "definitions.py").write_text(FEAST_REPO)
    subprocess.run([str(BIN / "feast"), "apply", "--skip-source-validation"], cwd=repo, check=True, capture_output=True)
    store = FeatureStore(str(repo))
    matrix = vectors(options, 1)
    for start in range(0, options.items, 5000):
        ids = np.arange(start, min(start + 5000, options.items))
        frame = pd.DataFrame({"item_id": ids, "embedding": list(matrix[ids])})
        store.write_to_online_store(VIEW, frame.assign(event_timestamp=pd.Timestamp.now("UTC")))
    port = free_port()
    command = [str(BIN / "feast"), "serve", "--port", str(port), "--no-access-log", "--max-requests", "0"]
    process = options.stack.enter_context(running(command, cwd=repo, stdout=subprocess.DEVNULL))
    await_port(port)
    return port, psutil.Process(process.pid)


@contextmanager
def redis(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """A Redis of our own, nothing persisted."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with running(command, stdout=subprocess.DEVNULL) as process:
        await_port(port)
        yield port, psutil.Process(process.pid)


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process until the end of the block."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stderr=told, **options)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)
            if process.stdout:
                process.stdout.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_port(port: int) -> None:
    """Until something listens there."""
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def tree(process: psutil.Process) -> list[psutil.Process]:
    """The process and its children."""
    return [process, *process.children(recursive=True)]


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process tree that no member leaves meanwhile."""
    return sum(sum(member.cpu_times()[:2]) for member in tree(process))


def memory_mib(process: psutil.Process) -> float:
    """Resident memory of a process tree."""
    return sum(member.memory_info().rss for member in tree(process)) / MIB


if __name__ == "__main__":
    main()
