"""What SWING costs, and how near capped scores come to exact ones; appends rows to benchmarks/data.

python benchmarks/bench_swing.py peers --interactions PATH --users 1000 [--side item] [--impl ours --impl sql]
python benchmarks/bench_swing.py growth --millions 5 10 20 --max-witnesses 500
python benchmarks/bench_swing.py caps --interactions PATH --caps 100 300 1000
python benchmarks/bench_swing.py ml1m --interactions PATH

Every measured run is a process of its own (`peers_swing.py`, or `kellm swing` for ml1m). `cpu_s` and `wall_s` are of
its whole process tree from start to end, sampled; `work_cpu_s` and `work_wall_s` begin with the
session up and warmed by a tiny table. `peak_mib` is resident memory summed over the tree. One unmeasured run
on the tiny table comes first, so that Numba finds its compiled code on disk, as all runs but the first ever do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from bench_place import append_rows, provenance
from peers_swing import IMPLS, MORE_IMPLS, RECFARM_CACHES, RECFARM_TOLERANCE, TOLERANCE, agreement, missing

from kellm_features.usage import measure

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "data"
PLACE = "machine cores memory_gib python pyspark numba commit date".split()
COSTS = "cpu_s wall_s peak_mib".split()
WORK = "work_cpu_s work_wall_s".split()
PEERS = ["dataset", "side", "users", "interactions", "impl", "turn", *COSTS, *WORK, "rows_out"]
PEERS += ["max_rel_diff", "shared_pairs", "error", "recfarm", *PLACE]
GROWTH = "millions users items interactions top_item_users side preset max_witnesses mode".split()
GROWTH += [
    *COSTS,
    *WORK,
    "worker_peak_mib",
    "worker_own_mib",
    "shuffle_mib",
    "rows_out",
    "to_linear",
    "work_to_linear",
    *PLACE,
]
CAPS = "dataset side preset cap anchors overlap_at_10 pairs found median_rel_error median_signed_error".split() + PLACE
ML1M = ["dataset", "side", "mode", "preset", "interactions", *COSTS, "rows_out", *PLACE]
ORDER = (*IMPLS, *MORE_IMPLS)
SAMPLE_EVERY_S = 0.2
MIB = 1024 * 1024
POPULARITY_OFFSET = 33.5
"""Of `power_law`: puts the first of 100,000 items before 58,000 of 300,000 users at 20 million interactions."""

Row = dict[str, object]
Ids = npt.NDArray[np.int64]


class FailedError(Exception):
    """A measured process that did not end well."""


def main() -> None:
    """Run the subcommand that the options name."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench-swing-") as folder:
        options.scratch = Path(folder)
        os.environ["TMPDIR"] = folder  # what a run that is cut off leaves behind goes with it
        try:
            options.call(options)
        except FailedError as error:
            raise SystemExit(str(error)) from error


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="peers | growth | caps | ml1m")

    def command(name: str, call: object, text: str, *, table: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(call=call)
        if table:
            sub.add_argument("--interactions", type=Path, required=True, help="Parquet with user_id and item_id")
            sub.add_argument("--name", help="of the table in the rows; default: its folder's")
        sub.add_argument("--out", type=Path, default=DATA / f"swing_{name}.csv", help="CSV to append to")
        sub.add_argument("--commit", help="what is measured, where git cannot tell")
        sub.add_argument("--timeout-s", type=float, default=3600.0, help="end a measured process after this")
        if name != "ml1m":
            sub.add_argument("--master", default="local[2]")
            sub.add_argument("--driver-memory", default="2g")
        return sub

    sub = command("peers", peers, "implementations side by side, on all or some users of a table")
    sub.add_argument("--users", type=int, help="the first so many of a seeded permutation; default: all")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--side", choices=("item", "user"), default="item")
    sub.add_argument("--impl", action="append", choices=("ours", *IMPLS, *MORE_IMPLS), help="repeatable")
    sub.add_argument("--threads", type=int, default=1, help="of recfarm: more take more CPU seconds")
    sub = command("growth", growth, "cost against the number of interactions", table=False)
    sub.add_argument("--millions", type=float, nargs="+", default=[5, 10, 20])
    sub.add_argument("--users", type=int, default=300_000)
    sub.add_argument("--items", type=int, default=100_000)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--max-witnesses", type=int, default=500)
    sub.add_argument("--side", choices=("item", "user"), default="item")
    sub.add_argument("--mode", choices=("auto", "csr", "block"), default="auto")
    sub.add_argument("--preset", default="pai-rec")
    sub = command("caps", caps, "capped against exact neighbours, of the anchors over the cap")
    sub.add_argument("--caps", type=int, nargs="+", default=[100, 300, 1000])
    sub.add_argument("--side", choices=("item", "user"), default="item")
    sub.add_argument("--preset", default="pai-rec")
    sub = command("ml1m", ml1m, "exact top 100 of a whole table through the command line, both sides and modes")
    sub.add_argument("--sides", nargs="+", choices=("item", "user"), default=["item", "user"])
    sub.add_argument("--modes", nargs="+", choices=("csr", "block"), default=["csr", "block"])
    sub.add_argument("--preset", default="pai-rec")
    sub.add_argument("--kellm", type=Path, default=Path(sys.executable).with_name("kellm"), help="the command to run")
    return parser.parse_args()


def peers(options: argparse.Namespace) -> None:
    """One process an implementation, on the same distinct rows, in a shuffled order; then check that they agree."""
    table = distinct(options.interactions)
    users = np.random.default_rng(options.seed).permutation(np.unique(table["user_id"]))[: options.users]
    table = table[table["user_id"].isin(users)]
    source, tiny = write(options.scratch / "subset.parquet", table), write_tiny(options.scratch)
    named = options.impl or list(IMPLS)
    chosen = [impl for impl in ORDER if impl in named or ("ours" in named and impl.startswith("ours"))]
    for impl in list(chosen):
        if remedy := missing(impl):
            print(f"{impl} skipped: {remedy}")
            chosen.remove(impl)
    if not chosen:
        return
    for impl in (impl for impl in chosen if impl.startswith("ours")):
        run_peer(impl, tiny, tiny, options)
    random.shuffle(chosen)
    told = {"dataset": dataset(options), "side": options.side, "users": len(users), "interactions": len(table)}
    print(f"{len(users):,} users, {len(table):,} interactions, in this order: {', '.join(chosen)}", flush=True)
    rows: dict[str, Row] = {}
    for turn, impl in enumerate(chosen, 1):
        rows[impl] = told | {"impl": impl, "turn": turn}
        try:
            rows[impl] |= run_peer(impl, source, tiny, options)
        except FailedError as error:
            rows[impl]["error"] = str(error)
        print(f"  {impl}: {rows[impl].get('error') or '{cpu_s} CPU s, {wall_s} s'.format(**rows[impl])}", flush=True)
    check(rows, options.scratch)
    told = where(options)
    if not RECFARM_CACHES.keys().isdisjoint(rows):
        told["recfarm"] = importlib.metadata.version("recfarm")
    append_rows(options.out, PEERS, (row | told for row in rows.values()))
    print_ratios(rows)
    if any("error" in row for row in rows.values()):
        raise SystemExit(1)


def run_peer(impl: str, source: Path, tiny: Path, options: argparse.Namespace) -> Row:
    """What one implementation cost; its pairs are left in the scratch folder under its name.

    Raises:
        FailedError: the process failed.
    """
    report = options.scratch / f"{impl}.json"
    warm_up = source == tiny
    out = options.scratch / (f"{impl}-warm-up" if warm_up else impl)
    command = [sys.executable, str(Path(__file__).with_name("peers_swing.py")), "--impl", impl]
    command += ["--interactions", str(source), "--tiny", str(tiny), "--out", str(out), "--report", str(report)]
    for name in ("side", "preset", "max_witnesses", "master", "driver_memory", "threads"):
        value = getattr(options, name, None)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    cost = run(command, options.timeout_s)
    told = json.loads(report.read_text())
    if "ended" in told:  # what came after was for the check alone
        cost["wall_s"] -= cost.pop("ended") - told.pop("ended")
    cost.pop("ended", None)
    cost |= told
    row: Row = {name: round(value, 2) for name, value in cost.items()}
    return row | {"rows_out": count(out)}


def check(rows: dict[str, Row], scratch: Path) -> None:
    """Compare every result with ours; one that disagrees keeps an error and loses its figures."""
    done = [impl for impl in ORDER if impl in rows and "error" not in rows[impl]]
    if not done or not done[0].startswith("ours"):
        print("not checked: no run of ours to compare with")
        return
    ours = pd.read_parquet(scratch / done[0])
    for impl in done[1:]:
        row = rows[impl]
        try:
            found = agreement(ours, pd.read_parquet(scratch / impl))
            limit = RECFARM_TOLERANCE if impl in RECFARM_CACHES else TOLERANCE
            if not found.max_rel_diff <= limit:
                raise ValueError(f"scores differ by {found.max_rel_diff:.2g} of their size, more than {limit:g}")
        except ValueError as error:
            row["error"] = f"disagrees with {done[0]}: {error}"
            print(f"  {impl}: {row['error']}")
            for name in (*COSTS, *WORK, "rows_out"):
                row.pop(name, None)
        else:
            row |= {"max_rel_diff": f"{found.max_rel_diff:.2g}", "shared_pairs": round(found.shared, 6)}
            print(
                f"  {impl} agrees with {done[0]}: scores to {found.max_rel_diff:.2g}, {found.shared:.4%} of its pairs"
            )


def print_ratios(rows: dict[str, Row]) -> None:
    """CPU seconds of each over those of each of ours."""
    done = {impl: row for impl, row in rows.items() if "cpu_s" in row}
    for ours in (impl for impl in done if impl.startswith("ours")):
        for impl, row in done.items():
            if not impl.startswith("ours"):
                whole, work = (float(str(row[k])) / float(str(done[ours][k])) for k in ("cpu_s", "work_cpu_s"))
                print(f"{impl} / {ours}: {whole:.1f} x the CPU seconds of the process tree, {work:.1f} x of the work")


def growth(options: argparse.Namespace) -> None:
    """One fresh process a size, smallest first; ratios are per interaction, to the smallest."""
    tiny = write_tiny(options.scratch)
    impl = f"ours_{options.mode}"
    run_peer(impl, tiny, tiny, options)
    first: Row = {}
    for millions in sorted(options.millions):
        users, items = power_law(round(millions * 1e6), options.users, options.items, options.seed)
        degrees = np.bincount(items, minlength=options.items)
        frame = pd.DataFrame({"user_id": users, "item_id": items})
        del users, items
        source = write(options.scratch / "interactions.parquet", frame)
        row: Row = {
            "millions": millions,
            "users": frame["user_id"].nunique(),
            "items": int(np.count_nonzero(degrees)),
            "interactions": len(frame),
            "top_item_users": int(degrees.max()),
        }
        del frame  # the machine is the measured process's
        for name in ("side", "preset", "max_witnesses", "mode"):
            row[name] = getattr(options, name)
        options.scratch = fresh(options.scratch)
        row |= run_peer(impl, source, tiny, options)
        first = first or row
        for name, ratio in (("cpu_s", "to_linear"), ("work_cpu_s", "work_to_linear")):
            each, base = (float(str(r[name])) / float(str(r["interactions"])) for r in (row, first))
            row[ratio] = round(each / base, 3)
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
        append_rows(options.out, GROWTH, [row | where(options)])
        source.unlink()


def caps(options: argparse.Namespace) -> None:
    """Neighbours under each cap against the exact ones, in one session, without timing."""
    from kellm_features.settings import SparkSettings
    from kellm_spark.session import get_session, stop_session
    from kellm_spark.swing import swing_pairs

    anchor, witness = ("item_id", "user_id") if options.side == "item" else ("user_id", "item_id")
    table = distinct(options.interactions)
    degrees = table.groupby(anchor)[witness].size()
    source = write(options.scratch / "interactions.parquet", table)
    session = get_session(SparkSettings(master=options.master, driver_memory=options.driver_memory))

    def pairs(cap: int | None) -> pd.DataFrame:
        found = swing_pairs(
            session.read.parquet(str(source)), side=options.side, preset=options.preset, max_witnesses=cap
        )
        target = options.scratch / f"pairs-{cap}"
        found.write.parquet(str(target))
        return pd.read_parquet(target)

    exact = pairs(None)
    rows: list[Row] = []
    for cap in options.caps:
        over = degrees.index[degrees > cap]
        told = {"dataset": dataset(options), "side": options.side, "preset": options.preset, "cap": cap}
        rows.append(told | nearness(exact[exact["anchor_id"].isin(over)], pairs(cap)) | where(options))
        print(*(f"{name} {rows[-1].get(name)}" for name in CAPS[3:10]), sep=", ", flush=True)
    stop_session()
    append_rows(options.out, CAPS, rows)


def nearness(exact: pd.DataFrame, capped: pd.DataFrame) -> Row:
    """Overlap of the first ten, and errors of those of the exact first ten that the capped neighbours hold."""
    ten = exact[exact["rank"] <= 10]
    if ten.empty:
        return {"anchors": 0}
    both = ten.merge(capped, on=["anchor_id", "neighbor_id"], suffixes=("", "_capped"))
    kept = both[both["rank_capped"] <= 10].groupby("anchor_id").size()
    overlap = kept.reindex(ten["anchor_id"].unique(), fill_value=0) / ten.groupby("anchor_id").size()
    error = both["score_capped"] / both["score"] - 1
    return {
        "anchors": len(overlap),
        "overlap_at_10": round(float(overlap.mean()), 4),
        "pairs": len(ten),
        "found": len(both),
        "median_rel_error": round(float(error.abs().median()), 4),
        "median_signed_error": round(float(error.median()), 4),
    }


def ml1m(options: argparse.Namespace) -> None:
    """`kellm swing` on a whole table, one process a side and mode."""
    tiny = write_tiny(options.scratch)
    interactions = pq.ParquetFile(options.interactions).metadata.num_rows
    commands = {(side, mode): options.scratch / f"{side}-{mode}" for side in options.sides for mode in options.modes}
    run([*swing_command(options, tiny, "item", "csr"), "--out", str(options.scratch / "warm-up")], options.timeout_s)
    for (side, mode), out in commands.items():
        command = [*swing_command(options, options.interactions, side, mode), "--out", str(out)]
        cost = run(command, options.timeout_s)
        row: Row = {"dataset": dataset(options), "side": side, "mode": mode, "preset": options.preset}
        row |= {"interactions": interactions, "rows_out": count(out)}
        row |= {name: round(cost[name], 2) for name in COSTS}
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
        append_rows(options.out, ML1M, [row | where(options)])


def swing_command(options: argparse.Namespace, source: Path, side: str, mode: str) -> list[str]:
    """`kellm swing`, but for --out."""
    command = [str(options.kellm), "swing", "--interactions", str(source), "--side", side, "--mode", mode]
    return [*command, "--preset", options.preset, "--top-k", "100"]


def power_law(interactions: int, n_users: int, n_items: int, seed: int) -> tuple[Ids, Ids]:
    """Distinct synthetic interactions, in no order: users of lognormal(0, 1) activity, items of 1/rank popularity.

    Returns:
        User and item of each, in 0..n_users-1 and 0..n_items-1; item 0 is the most popular.
    """
    draw = np.random.default_rng(seed)
    activity = np.cumsum(draw.lognormal(0.0, 1.0, n_users))
    popularity = np.cumsum(1 / (np.arange(1, n_items + 1) + POPULARITY_OFFSET))
    keys: Ids = np.zeros(0, dtype=np.int64)
    while len(keys) < interactions:
        size = int((interactions - len(keys)) * 1.05) + 1000
        users = np.searchsorted(activity, draw.random(size) * activity[-1], side="right")
        items = np.searchsorted(popularity, draw.random(size) * popularity[-1], side="right")
        keys = np.unique(np.concatenate([keys, users * n_items + items]))
    keys = draw.permutation(keys)[:interactions]
    return keys // n_items, keys % n_items


class Workers(threading.Thread):
    """Samples the resident memory of Spark's Python workers among this process's descendants, one by one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.peak = self.own = 0
        self.known: dict[tuple[int, float], bool] = {}  # pid and start: is it a worker?

    def run(self) -> None:
        me = psutil.Process()
        while not self.stopped.wait(SAMPLE_EVERY_S):
            for process in me.children(recursive=True):
                with suppress(psutil.Error):  # it ended between the listing and the reading
                    if self.is_worker(process):
                        memory = process.memory_info()
                        self.peak = max(self.peak, memory.rss)
                        # Without mapped files, which tasks of a host share; only Linux tells.
                        self.own = max(self.own, memory.rss - getattr(memory, "shared", 0))

    def is_worker(self, process: psutil.Process) -> bool:
        """Whether it is a Python worker, or the daemon that forks them, which is smaller."""
        key = (process.pid, process.create_time())
        if not self.known.get(key):  # asked again while it is not: a fork may not have reached its exec
            self.known[key] = any("pyspark.daemon" in part or "pyspark.worker" in part for part in process.cmdline())
        return self.known[key]


def run(command: Sequence[str], timeout_s: float) -> dict[str, float]:
    """Run a command to its end and count its whole process tree; "ended" is the time of day at its end.

    Raises:
        FailedError: it failed or took too long.
    """
    workers = Workers()
    with tempfile.TemporaryFile() as log:
        with measure(own=False) as usage:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            workers.start()
            try:
                code: int | None = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
                for child in [*psutil.Process().children(recursive=True)]:
                    with suppress(psutil.Error):
                        child.kill()
                process.wait()
            ended = time.time()
            workers.stopped.set()
            workers.join()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    if code is None:
        raise FailedError(f"took longer than {timeout_s:g} s")
    if code:
        print(said[-3000:], file=sys.stderr)
        raise FailedError(f"ended with {code}: {said.splitlines()[-1][:160] if said else 'no word'}")
    return {
        "cpu_s": usage.cpu_seconds,
        "wall_s": usage.seconds,
        "peak_mib": usage.peak_mib,
        "worker_peak_mib": workers.peak / MIB,
        "worker_own_mib": workers.own / MIB,
        "ended": ended,
    }


def distinct(path: Path) -> pd.DataFrame:
    """The distinct users and items of a Parquet table."""
    return pq.read_table(path, columns=["user_id", "item_id"]).to_pandas().drop_duplicates(ignore_index=True)


def write(path: Path, table: pd.DataFrame) -> Path:
    """A Parquet file of ids."""
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)
    return path


def write_tiny(folder: Path) -> Path:
    """A table that loads all code and costs nothing."""
    users, items = power_law(600, 60, 40, 0)
    return write(folder / "tiny.parquet", pd.DataFrame({"user_id": users, "item_id": items}))


def fresh(folder: Path) -> Path:
    """A new folder in this one."""
    return Path(tempfile.mkdtemp(dir=folder))


def count(folder: Path) -> int:
    """Rows of the Parquet files of a folder."""
    return sum(pq.ParquetFile(part).metadata.num_rows for part in folder.glob("*.parquet"))


def dataset(options: argparse.Namespace) -> str:
    """The name of the table in the rows."""
    return str(options.name or options.interactions.resolve().parent.name)


def where(options: argparse.Namespace) -> Row:
    """Machine, versions, commit and date."""
    return provenance("pyspark", "numba", commit=options.commit)


if __name__ == "__main__":
    main()
