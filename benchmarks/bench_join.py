"""What a historical join of training events with item embeddings costs, beside Feast; appends to benchmarks/data.

python benchmarks/bench_join.py [--events 1000000 --items 200000 --dim 384 --versions 2 --turns 2]

`feast_duckdb` is `get_historical_features(...).to_arrow()` on the duckdb offline store, the cheapest of Feast's
answers that holds vectors; `ours_index` is `training_join(...)`; `ours_rows` is that and `.take()`, one vector a row
as Feast gives them. Each run is a process of its own. `cpu_s`, `wall_s` and `peak_mib` are of the whole process
with its imports, `work_cpu_s` and `work_wall_s` of the join alone, events in memory. `equal`: all rows came back
and their vectors have the bits of the first run's; compared after the costs were taken.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from bench_place import append_rows, provenance

from kellm_features.store.layout import ITEM_EMBEDDING

ROOT = Path(__file__).resolve().parents[1]
COSTS = "cpu_s wall_s peak_mib work_cpu_s work_wall_s".split()
FIELDS = ["events", "items", "dim", "versions", "impl", "turn", *COSTS, "rows_out", "found", "vectors", "equal"]
FIELDS += "machine cores memory_gib python feast duckdb pyarrow numpy commit date".split()
T0 = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
DAYS = 10
"""Between two versions."""
ROW_GROUP = 16_384
"""As `kellm publish` writes them."""
ROWS_AT_ONCE = 20_000
YAML = """\
project: bench
provider: local
registry: registry.db
online_store: {type: sqlite, path: online.db}
offline_store: {type: duckdb}
entity_key_serialization_version: 3
"""
DEFINITIONS = """\
from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Array, Float32

item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
source = FileSource(
    path=str(Path(__file__).parent / "data" / "item_knowledge_embedding"),
    file_format=ParquetFormat(),
    timestamp_field="event_timestamp",
    created_timestamp_column="created_timestamp",
)
view = FeatureView(
    name="item_knowledge_embedding",
    entities=[item],
    ttl=timedelta(0),
    schema=[Field(name="embedding", dtype=Array(Float32))],
    source=source,
)
"""

Row = dict[str, object]
Vectors = Callable[[], Iterator[npt.NDArray[np.float32]]]
"""(N, E) of the next events, in the events' order, NaN where an event has none."""


def main() -> None:
    """Make the data, run every implementation in turn, append the rows."""
    options = parse()
    if options.worker:
        work(options.worker, options.folder, options.report)
        return
    with tempfile.TemporaryDirectory(prefix="bench-join-") as name:
        folder = Path(name)
        make_data(folder, options)
        apply = [sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli()", "apply"]
        subprocess.run(apply, cwd=folder, check=True, capture_output=True)
        rows: list[Row] = []
        digests: list[object] = []
        for turn in range(1, options.turns + 1):
            for impl in random.sample(list(IMPLS), len(IMPLS)):
                cost = run(impl, folder)
                digests.append(cost.pop("digest"))
                equal = digests[-1] == digests[0] and cost["rows_out"] == options.events
                rows.append(shape(options) | {"impl": impl, "turn": turn} | cost | {"equal": equal})
                print(*(f"{key} {rows[-1][key]}" for key in ("impl", *COSTS, "rows_out", "equal")), flush=True)
    told = provenance("feast", "duckdb", "pyarrow", "numpy", commit=options.commit)
    append_rows(options.out, FIELDS, (row | told for row in rows))
    print(f"{len(rows)} rows appended to {options.out.name}")
    for impl in ("ours_index", "ours_rows"):
        for cost in ("work_cpu_s", "cpu_s", "peak_mib"):
            feast, ours = (np.mean([float(str(r[cost])) for r in rows if r["impl"] == i]) for i in (PEER, impl))
            print(f"{PEER} / {impl}: {feast / ours:.1f} x {cost}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--versions", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "data" / "join.csv", help="CSV to append to")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--worker", choices=IMPLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def shape(options: argparse.Namespace) -> Row:
    """What was joined, as columns."""
    return {name: getattr(options, name) for name in ("events", "items", "dim", "versions")}


def make_data(folder: Path, options: argparse.Namespace) -> None:
    """A Feast repository, a partition every `DAYS` days, and events of any item from a day before the first on.

    Items are drawn uniformly, one event in a hundred of an item that has no embedding: popularity would only leave
    fewer distinct vectors.
    """
    rng = np.random.default_rng(options.seed)
    (folder / "feature_store.yaml").write_text(YAML)
    (folder / "definitions.py").write_text(DEFINITIONS)
    data = folder / "data" / ITEM_EMBEDDING.name
    data.mkdir(parents=True)
    schema = ITEM_EMBEDDING.arrow("int64")
    for version in range(options.versions):
        vectors = rng.standard_normal((options.items, options.dim), dtype=np.float32)
        ends = pa.array(np.arange(options.items + 1) * options.dim, pa.int32())
        when = pa.scalar(T0 + datetime.timedelta(days=DAYS * version), schema.field("event_timestamp").type)
        stamp = pa.repeat(when, options.items)
        columns = {name: pa.nulls(options.items, schema.field(name).type) for name in schema.names}
        columns["item_id"] = pa.array(np.arange(options.items))
        columns["embedding"] = pa.ListArray.from_arrays(ends, pa.array(vectors.ravel()))
        columns["embedding_version"] = pa.repeat(f"v{version}", options.items)
        columns |= {"event_timestamp": stamp, "created_timestamp": stamp, "is_deleted": pa.repeat(False, options.items)}
        table = pa.table(columns, schema=schema)
        pq.write_table(table, data / f"v{version}.parquet", compression="zstd", row_group_size=ROW_GROUP)
    seconds = rng.integers(-86_400, DAYS * options.versions * 86_400, options.events)
    events = pa.table(
        {
            "place": pa.array(np.arange(options.events)),
            "item_id": pa.array(rng.integers(0, options.items + options.items // 100, options.events)),
            "event_timestamp": pa.array(
                (int(T0.timestamp()) + seconds) * 1_000_000 + rng.integers(0, 1_000_000, options.events)
            ).cast(pa.timestamp("us", tz="UTC")),
        }
    )
    pq.write_table(events, folder / "events.parquet")


def run(impl: str, folder: Path) -> Row:
    """What one implementation cost, in a process of its own."""
    report = folder / f"{impl}.json"
    command = [sys.executable, __file__, "--worker", impl, "--folder", str(folder), "--report", str(report)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{impl} ended with {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(report.read_text()))


def work(impl: str, folder: Path, report: Path) -> None:
    """In the measured process: join, note the costs, then digest the vectors."""
    join = IMPLS[impl](folder)
    began = time.perf_counter(), cpu_seconds()
    found, vectors = join()
    ended = time.perf_counter(), cpu_seconds()
    costs = {
        "cpu_s": ended[1],
        "wall_s": time.time() - psutil.Process().create_time(),
        "peak_mib": peak_mib(),
        "work_cpu_s": ended[1] - began[1],
        "work_wall_s": ended[0] - began[0],
    }
    digest, rows_out = hashlib.sha256(), 0
    for some in vectors():
        digest.update(np.where(np.isnan(some), np.float32(np.nan), some).tobytes())  # NaN of one kind
        rows_out += len(some)
    told = {name: round(value, 2) for name, value in costs.items()}
    report.write_text(json.dumps(told | found | {"rows_out": rows_out, "digest": digest.hexdigest()}))


def cpu_seconds() -> float:
    """Of this process from its start, and of its children that ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def peak_mib() -> float:
    """Largest resident memory of this process. `ru_maxrss` begins with that of the starting process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


Join = Callable[[], tuple[dict[str, int], Vectors]]


def feast_duckdb(folder: Path) -> Join:
    """Feast, with events as the DataFrame that it asks for. Rows come in any order: `place` tells which is which."""
    import pandas as pd
    from feast import FeatureStore

    events = pd.read_parquet(folder / "events.parquet")
    store = FeatureStore(str(folder))

    def join() -> tuple[dict[str, int], Vectors]:
        answer = store.get_historical_features(events, ["item_knowledge_embedding:embedding"]).to_arrow()

        def vectors() -> Iterator[npt.NDArray[np.float32]]:
            lists = answer["embedding"].combine_chunks()
            assert lists.type.value_type == pa.float32()
            dim = len(next(value for value in lists if value.is_valid))
            order = np.argsort(answer["place"].to_numpy())
            assert (answer["place"].to_numpy()[order] == np.arange(len(events))).all()
            for start in range(0, len(order), ROWS_AT_ONCE):
                some = lists.take(pa.array(order[start : start + ROWS_AT_ONCE]))
                rows = np.full((len(some), dim), np.nan, dtype=np.float32)
                rows[some.is_valid().to_numpy(zero_copy_only=False)] = some.flatten().to_numpy().reshape(-1, dim)
                yield rows

        return {"found": len(answer) - answer["embedding"].null_count}, vectors

    return join


def ours(folder: Path, *, rows: bool) -> Join:
    """`training_join`, with `.take()` of all rows at once or without."""
    from kellm_features.store.join import training_join

    events = pq.read_table(folder / "events.parquet")

    def join() -> tuple[dict[str, int], Vectors]:
        joined = training_join(events, folder)
        taken = joined.take() if rows else None

        def vectors() -> Iterator[npt.NDArray[np.float32]]:
            for start in range(0, len(joined), ROWS_AT_ONCE):
                some = slice(start, start + ROWS_AT_ONCE)
                yield joined.take(some) if taken is None else taken[some]

        return {"found": int(joined.found.sum()), "vectors": len(joined.values)}, vectors

    return join


PEER = "feast_duckdb"
IMPLS: dict[str, Callable[[Path], Join]] = {
    PEER: feast_duckdb,
    "ours_index": lambda folder: ours(folder, rows=False),
    "ours_rows": lambda folder: ours(folder, rows=True),
}


if __name__ == "__main__":
    main()
