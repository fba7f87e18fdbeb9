"""SWING pairs of a file, written to a folder: what `kellm swing --interactions` and spark-submit run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kellm_features import __version__
from kellm_features.errors import ConfigError, DataError
from kellm_spark.session import data_errors, follow, get_session, spark_reason
from kellm_spark.storage import MANIFEST, Folder, read_table, split_hash_of, write_sorted
from kellm_spark.swing.parameters import Side, SwingOptions
from kellm_spark.swing.plan import SwingPlan, plan_swing

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from kellm_features.settings import SparkSettings


@dataclass(frozen=True)
class SwingJob:
    """One table of interactions to one folder of pairs."""

    interactions: str
    """Parquet or CSV with user_id and item_id, wherever Spark can read."""
    out: str
    """Folder of Parquet, wherever Spark can write."""
    options: SwingOptions
    before: str | None = None
    """Rows at or after this moment are left out."""
    time_column: str | None = None
    split: str | None = None
    """Of a table with a column `split`: the part to use, or "all"; None: train."""
    overwrite: bool = False


def run_swing_job(job: SwingJob, settings: SparkSettings) -> dict[str, Any]:
    """Compute and write the pairs; return the manifest, which also lies in the folder as `_manifest.json`.

    Raises:
        DataError: a path is wrong, the output exists, or there is no pair.
        KellmError: see `swing_pairs`.
    """
    from pyspark.errors import AnalysisException

    started = time.perf_counter()
    session = get_session(settings)
    folder = Folder(session, job.out, overwrite=job.overwrite)
    try:
        with data_errors():
            frame = read_table(session, job.interactions, ids=("user_id", "item_id"))
            rows = frame
            split = job.split or ("train" if "split" in frame.columns else None)
            if split is not None and split != "all":
                rows = _of_split(frame, split)
            plan = plan_swing(rows, job.options, before=job.before, time_column=job.time_column)
            dropped = dict(plan.dropped)
            rows_in = plan.rows
            if rows is not frame:
                rows_in = frame.count()
                if rows_in > plan.rows:
                    dropped = {f"not in split {split}": rows_in - plan.rows, **dropped}
            with follow(session, f"swing {job.options.side}", plan.tasks):
                write_sorted(
                    plan.pairs, folder.staging, ["anchor_id", "rank"], most_rows=plan.targets * job.options.top_k
                )
        hubs = hubness(session.read.parquet(folder.staging))
    except AnalysisException as error:  # no such path, or Spark Connect met an output that exists
        raise DataError(f"{spark_reason(error)} (interactions: {job.interactions}; out: {job.out})") from error
    pairs = hubs.pop("rows")
    if not pairs:
        folder.discard()
        raise no_pair(job.options.side, plan)
    manifest = {
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "interactions": job.interactions,
        "split": split,
        "split_hash": split_hash_of(job.interactions),
        "before": job.before,
        **asdict(job.options),
        "mode": plan.mode,
        "rows_in": rows_in,
        "dropped": dropped,
        "targets": plan.targets,
        "capped_targets": plan.capped,
        "pairs": pairs,
        "hubness": hubs,
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder.write_json(MANIFEST, manifest)
    folder.publish()
    return manifest


def no_pair(side: Side, plan: SwingPlan) -> DataError:
    """The error for interactions in which nothing is similar to anything."""
    other = "users" if side == "item" else "items"
    used = plan.rows - sum(plan.dropped.values())
    took = ", ".join(f"{n:,} {reason}" for reason, n in plan.dropped.items())
    return DataError(
        f"swing found no {side} pair: no two {side}s share two {other} in {used:,} interactions"
        + (f" (left out: {took})" if took else "")
        + "; give more interactions or widen the filters"
    )


def hubness(pairs: DataFrame) -> dict[str, Any]:
    """How top-1 neighbours concentrate.

    Returns:
        rows; anchors, those with a neighbour; distinct_top1, different neighbours at rank 1; max_top1, the anchors
        whose rank 1 is the same neighbour, at most, and hub, which one that is.
    """
    from pyspark.sql import functions as sf

    of_neighbor = pairs.groupBy("neighbor_id").agg(
        sf.count("*").alias("rows"), sf.count_if(sf.col("rank") == 1).alias("top1")
    )
    told = of_neighbor.agg(
        sf.sum("rows").alias("rows"),
        sf.sum("top1").alias("anchors"),
        sf.count_if(sf.col("top1") > 0).alias("distinct_top1"),
        sf.max("top1").alias("max_top1"),
        sf.max_by("neighbor_id", sf.struct("top1", "neighbor_id")).alias("hub"),
    ).first()
    assert told is not None
    return {key: 0 if value is None and key != "hub" else value for key, value in told.asDict().items()}


def _of_split(frame: DataFrame, split: str) -> DataFrame:
    from pyspark.sql import functions as sf

    if "split" not in frame.columns:
        raise ConfigError(f"--split {split} needs a column 'split'; seen: {', '.join(frame.columns)}")
    rows = frame.where(sf.col("split") == split)
    if rows.isEmpty():
        seen = [str(row[0]) for row in frame.select("split").distinct().orderBy("split").limit(10).collect()]
        raise ConfigError(f"--split {split}: no row has it; seen: {', '.join(seen) or 'no rows'}; or take --split all")
    return rows
