"""Readers while versions are switched, published and pruned under them; appends rows to benchmarks/data/soak.csv.

python benchmarks/soak_rollout.py [--stores sqlite redis-stock redis-packed] [--seconds 60] [--items 2000] [--dim 64]

Two versions are promoted and rolled back in turn, with pauses of 5 to 50 ms and 300 ms after every fifth; beside them
one process publishes further versions and prunes them, as fast as it can. `--readers` processes ask an EmbeddingReader
for random ids, and one more asks Feast's own FeatureStore, all with pauses of `--pause-ms`: without any, the processes
wait for the processor and not for the store. Each vector says which version and id it is of.

A response is mixed where its rows are of two versions, or of another than it says; stale where its version was not
active at any moment between its request and its end. `visible_ms` is from the return of `promote` or `rollback`, for
each reader, to the end of its first response of that version, over the switches that 300 ms follow. All clocks are
CLOCK_MONOTONIC, which the processes of a machine share. `get_ms` is one request: where none is stale, a switch is seen
as late as a request under way and the next one take, with the wait for a processor. It ends with 1 where a response
was not what it should be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from bench_place import append_rows, provenance
from numpy.typing import NDArray

from kellm_features import schemas
from kellm_features.errors import KellmError
from kellm_features.store import rollout
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import REDIS_TYPE
from kellm_features.store.scaffold import write_feature_repo

OUT = Path(__file__).resolve().parent / "data" / "soak.csv"
STORES = ("sqlite", "redis-stock", "redis-packed")
NAMES = ("v1", "v2")
"""The versions that are switched; those published and pruned beside them begin with v3."""
PAUSE_S = (0.005, 0.05)
LONG_PAUSE_S, LONG_EVERY = 0.3, 5
TAGS = 3
"""Components that hold id % 2048, id // 2048 and the version: whole numbers that float16 keeps."""
BAD = "mixed wrong missing stale errors".split()
ANSWERS = ["responses", *BAD]
TIMES = "promote_p50_ms promote_p99_ms promote_max_ms".split()
GET = "get_p50_ms get_p99_ms get_p999_ms get_max_ms".split()
RSS = "rss_early_mib rss_end_mib".split()
"""Resident memory of the largest reader, a tenth of the time in and at the end."""
VISIBLE = "visible_p50_ms visible_p99_ms visible_max_ms".split()
FIELDS = ["store", "items", "dim", "ids", "readers", "pause_ms", "seconds", "switches", "published", "pruned", *ANSWERS]
FIELDS += [*VISIBLE, *GET, *RSS, *(f"feast_{name}" for name in (*ANSWERS, *VISIBLE, *GET, *RSS)), *TIMES]
FIELDS += "machine cores memory_gib python sqlite redis_server redis feast commit date".split()

Row = dict[str, Any]
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """What every process is told."""

    repo: Path
    folder: Path
    items: int
    dim: int
    ids: int
    seed: int
    pause_s: float
    seconds: float
    ready: Any
    """Barrier that all wait at once they are connected."""
    stop: Any
    """Event that ends them."""


def main() -> None:
    """Soak each store in turn."""
    options = parse()
    rows = []
    for store in options.stores:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder, online_store(store, Path(folder)) as online:
            rows.append(soak(store, Path(folder), online, options) | where(options))
        show(rows[-1])
    append_rows(options.out, FIELDS, rows)
    print(f"{len(rows)} rows appended to {options.out.name}")
    if any(row[name] or row[f"feast_{name}"] for row in rows for name in BAD):
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ids", type=int, default=50, help="ids per request")
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--pause-ms", type=float, default=2.0, help="of a reader between its requests")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV to append to")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    return parser.parse_args()


@contextmanager
def online_store(store: str, folder: Path) -> Iterator[str]:
    """The lines of `online_store` in feature_store.yaml, with a server where it takes one; empty for SQLite."""
    if store == "sqlite":
        yield ""
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if server.poll() is not None:
                raise SystemExit(f"redis-server ended with {server.returncode}")
            time.sleep(0.05)
        layout = store.removeprefix("redis-")
        yield f"  type: {REDIS_TYPE}\n  connection_string: 127.0.0.1:{port}\n  layout: {layout}\n"
        server.terminate()


def soak(store: str, folder: Path, online: str, options: argparse.Namespace) -> Row:
    """Run all processes for the time given, and count what the readers were answered."""
    repo = folder / "repo"
    write_feature_repo(repo)
    yaml = repo / "feature_store.yaml"
    if online:
        yaml.write_text(re.sub(r"(?m)^online_store:\n(  .*\n)+", f"online_store:\n{online}", yaml.read_text()))
    for number, name in enumerate(NAMES, start=1):
        rollout.publish(repo, artefact(folder, name, number, options.items, options.dim))
        rollout.promote(repo, name, force=True)

    context = multiprocessing.get_context("spawn")
    roles = [switch, publish, read_feast, *[read] * options.readers]
    ready, stop = context.Barrier(len(roles) + 1), context.Event()
    sizes = (options.items, options.dim, options.ids)
    told = [
        Job(repo, folder, *sizes, seed, options.pause_ms / 1e3, options.seconds, ready, stop)
        for seed in range(len(roles))
    ]
    processes = [context.Process(target=role, args=(job,)) for role, job in zip(roles, told, strict=True)]
    for process in processes:
        process.start()
    ready.wait(120)
    time.sleep(options.seconds)
    stop.set()
    for process in processes:
        process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise SystemExit(f"{store}: processes ended with {failed}")

    switches = np.load(folder / "0.npy")
    beside = json.loads((folder / "1.json").read_text())
    took = (switches["end"] - switches["start"]) * 1e3
    row: Row = {"store": store, "items": options.items, "dim": options.dim, "ids": options.ids}
    row |= {"readers": options.readers, "pause_ms": options.pause_ms, "seconds": options.seconds}
    row |= {"switches": len(switches), **beside}
    row |= dict(zip(TIMES, percentiles(took), strict=True))
    feast = answered(folder, [2], switches)
    row |= {f"feast_{name}": value for name, value in feast.items()} | answered(folder, range(3, len(roles)), switches)
    return row


def artefact(folder: Path, version: str, number: int, items: int, dim: int) -> dict[str, Path]:
    """The export of one version, on disk."""
    now = pa.array([datetime.datetime.now(datetime.UTC)] * items, schemas.TIMESTAMP)
    flat = pa.array(vectors(number, items, dim).ravel())
    table = pa.table(
        {
            "item_id": list(range(1, items + 1)),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
            "embedding_version": [version] * items,
            "model_id": ["soak"] * items,
            "content_hash": [f"{version}-{i}" for i in range(items)],
            "event_timestamp": now,
            "created_timestamp": now,
        }
    )
    path = folder / f"{version}.parquet"
    schemas.write_table(table, path, schemas.ITEM_EMBEDDINGS)
    return {ITEM_EMBEDDING.name: path}


def vectors(number: int, items: int, dim: int) -> Matrix:
    """(items, dim) float32 that float16 keeps: a row says which id and version it is of."""
    ids = np.arange(1, items + 1)[:, None]
    mixed = (ids * 31 + np.arange(dim) * 7 + number * 101) % 1999 - 999
    mixed[:, :TAGS] = np.hstack([ids % 2048, ids // 2048, np.full_like(ids, number)])
    return mixed.astype(np.float32)


def switch(job: Job) -> None:
    """Promote and roll back in turn; when each call began and returned, what it served, whether a long pause came."""
    rng = random.Random(job.seed)
    made: list[tuple[float, float, int, bool]] = []
    job.ready.wait()
    while not job.stop.is_set():
        start = time.monotonic()
        # v2 is active at first, so that v1 comes by a rollback.
        version = rollout.rollback(job.repo) if len(made) % 2 == 0 else rollout.promote(job.repo, "v2", force=True)
        end = time.monotonic()
        long = len(made) % LONG_EVERY == 0
        made.append((start, end, NAMES.index(version.name), long))
        time.sleep(LONG_PAUSE_S if long else rng.uniform(*PAUSE_S))
    kinds = [("start", float), ("end", float), ("version", int), ("long", bool)]
    np.save(job.folder / f"{job.seed}.npy", np.array(made, dtype=kinds))


def publish(job: Job) -> None:
    """Publish one version after the other, and prune the one before."""
    number, pruned = len(NAMES), 0
    job.ready.wait()
    while not job.stop.is_set():
        number += 1
        rollout.publish(job.repo, artefact(job.folder, f"v{number}", number, job.items, job.dim))
        pruned += len(rollout.prune(job.repo, 1))  # both that are switched were active lately, and stay
    told = {"published": number - len(NAMES), "pruned": pruned}
    (job.folder / f"{job.seed}.json").write_text(json.dumps(told))


def read(job: Job) -> None:
    """Ask our own reader."""
    with EmbeddingReader.from_repo(job.repo) as reader:

        def ask(ids: NDArray[np.int64]) -> tuple[str, Matrix, NDArray[np.bool_]]:
            got = reader.get(ids.tolist())
            return got.version, got.values, got.found

        ask_on(job, ask)


def read_feast(job: Job) -> None:
    """Ask Feast's client, which finds our online store by its name in feature_store.yaml."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(job.repo))
    columns = ["embedding", "embedding_version"]

    def ask(ids: NDArray[np.int64]) -> tuple[str, Matrix, NDArray[np.bool_]]:
        answer = store.get_online_features(
            [f"{ITEM_EMBEDDING.name}:{column}" for column in columns], [{"item_id": int(i)} for i in ids]
        ).to_dict()
        rows = [value or [np.nan] * job.dim for value in answer["embedding"]]
        told = {version for version in answer["embedding_version"] if version}
        values = np.array(rows, dtype=np.float32)
        found: NDArray[np.bool_] = np.asarray(~np.isnan(values).any(axis=1))
        return (str(told.pop()) if len(told) == 1 else "mixed"), values, found

    ask_on(job, ask)


def ask_on(job: Job, ask: Callable[[NDArray[np.int64]], tuple[str, Matrix, NDArray[np.bool_]]]) -> None:
    """Ask until told to stop; keep when, which version, and what was wrong."""
    rng = np.random.default_rng(job.seed)
    right = np.stack([vectors(number, job.items, job.dim) for number, _ in enumerate(NAMES, start=1)])
    ask(np.arange(1, 3))
    made = array("d")  # three numbers a response: what is kept must not look like a leak
    memory: list[float] = []
    early = time.monotonic() + job.seconds / 10
    errors: list[str] = []
    counts = dict.fromkeys(BAD, 0)
    job.ready.wait()
    while not job.stop.is_set():
        ids = rng.integers(1, job.items, job.ids, endpoint=True)
        start = time.monotonic()
        try:
            told, values, found = ask(ids)
        except KellmError as error:
            errors.append(str(error))
            continue
        end = time.monotonic()
        version = NAMES.index(told) if told in NAMES else -1
        numbers = set(values[found, TAGS - 1].tolist())
        counts["mixed"] += numbers != {float(version + 1)}
        counts["missing"] += int((~found).sum())
        counts["wrong"] += int((values[found] != right[version][ids[found] - 1]).any(axis=1).sum())
        made.extend((start, end, version))
        if end > early and not memory:
            memory.append(psutil.Process().memory_info().rss / 2**20)
        time.sleep(job.pause_s)
    memory.append(psutil.Process().memory_info().rss / 2**20)
    counts["errors"] = len(errors)
    rows = np.frombuffer(made).reshape(-1, 3)
    kept = np.rec.fromarrays([rows[:, 0], rows[:, 1], rows[:, 2].astype(int)], names="start,end,version")
    np.save(job.folder / f"{job.seed}.npy", kept)
    told_last = {"first_error": errors[:1], "memory": memory}
    (job.folder / f"{job.seed}.json").write_text(json.dumps(counts | told_last))


def answered(folder: Path, readers: Any, switches: Any) -> Row:
    """Counts over some readers, and how soon they saw a switch."""
    row: Row = dict.fromkeys(ANSWERS, 0)
    seen: list[float] = []
    took: list[float] = []
    memory: list[list[float]] = []
    for reader in readers:
        made = np.load(folder / f"{reader}.npy")
        told = json.loads((folder / f"{reader}.json").read_text())
        for error in told.pop("first_error"):
            print(f"reader {reader}: {error}")
        memory.append(told.pop("memory"))
        for name, count in told.items():
            row[name] += count
        row["responses"] += len(made)
        row["stale"] += stale(made, switches)
        seen += visible(made, switches)
        took += ((made["end"] - made["start"]) * 1e3).tolist()
    largest = [round(max(ends), 1) for ends in zip(*memory, strict=True)]
    figures = [*percentiles(seen), *percentiles(took, [50, 99, 99.9, 100]), *largest]
    return row | dict(zip((*VISIBLE, *GET, *RSS), figures, strict=True))


def stale(made: Any, switches: Any) -> int:
    """Responses whose version was not active at any moment of the request.

    A version is active from the beginning of the call that promotes it, at the earliest, to the return of the one
    that promotes the next, at the latest.
    """
    versions = np.append(1 - switches["version"][:1], switches["version"])
    begins, ends = np.append(-np.inf, switches["start"]), np.append(switches["end"], np.inf)
    first = np.searchsorted(ends, made["start"])  # the first that may still be active as the request begins
    last = np.searchsorted(begins, made["end"]) - 1  # the last that may be active as it ends
    return sum(
        version not in versions[low : high + 1] for version, low, high in zip(made["version"], first, last, strict=True)
    )


def visible(made: Any, switches: Any) -> list[float]:
    """Milliseconds from each switch that a long pause follows to the end of the first response of its version."""
    out = []
    for place in np.flatnonzero(switches["long"][:-1]):
        at = np.searchsorted(made["end"], switches["start"][place])
        after = np.flatnonzero(made["version"][at : at + 10_000] == switches["version"][place])
        if len(after):
            out.append(max(0.0, (made["end"][at + after[0]] - switches["end"][place]) * 1e3))
    return out


def percentiles(values: Any, wanted: Sequence[float] = (50, 99, 100)) -> list[float]:
    """The wanted percentiles; NaN where nothing was measured."""
    if not len(values):
        return [np.nan] * len(wanted)
    return [round(float(value), 3) for value in np.percentile(values, wanted)]


def where(options: argparse.Namespace) -> Row:
    """Machine, versions, commit and date."""
    server = shutil.which("redis-server")
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout if server else ""
    return {
        **provenance("redis", "feast", commit=options.commit),
        "sqlite": sqlite3.sqlite_version,
        "redis_server": found[1] if (found := re.search(r"v=(\S+)", said)) else "",
    }


def show(row: Row) -> None:
    """One store's figures as a table."""
    print(
        f"\n{row['store']}: {row['items']:,} items x {row['dim']}, {row['seconds']:g} s, {row['switches']:,} switches, "
        f"{row['published']} versions published and {row['pruned']} pruned"
    )
    names = [*ANSWERS, *VISIBLE, *GET, *RSS]
    print(f"{'':16}{row['readers']:>6} readers{'FeatureStore':>16}")
    for name in names:
        print(f"{name:16}{row[name]:>14,}{row[f'feast_{name}']:>16,}")
    print(", ".join(f"{name} {row[name]:,}" for name in TIMES), flush=True)


if __name__ == "__main__":
    main()
