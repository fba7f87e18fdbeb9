"""Descriptions of a catalogue, or profiles of users, written to a folder: `kellm generate-spark` and spark-submit."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kellm_features import __version__
from kellm_features.errors import ArtifactError, ConfigError, DataError, EngineError, KellmError
from kellm_features.knowledge.engines import GROUP
from kellm_features.knowledge.generate import LOCAL_ENGINES
from kellm_features.knowledge.inputs import domain_of
from kellm_features.settings import Settings
from kellm_spark.descriptions.histories import histories
from kellm_spark.descriptions.shards import SCHEMAS, TOLD_DDL, ShardTask, Side, shard_writer
from kellm_spark.descriptions.tables import (
    in_shards,
    item_rows,
    read_descriptions,
    read_interactions,
    read_items,
    read_users,
    user_rows,
)
from kellm_spark.descriptions.work import Work, work_folder
from kellm_spark.session import follow, spark_reason
from kellm_spark.storage import MANIFEST, Folder, split_hash_of, write_sorted

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 2048
"""What the engine for servers takes at a time: 64 rounds of its 32 requests in flight."""
MOST_GROWTH = 8
"""Shards of so many times `ROWS_PER_SHARD` are those of a trial: a whole table would run in a trial's few tasks."""
PAIRS_PER_ROW = 20
"""A description weighs what so many pairs weigh: `write_sorted` counts pairs."""
DEAD_LETTERS = "_dead_letters"
"""Folder in the output; the underscore keeps it out of the table."""
INPUTS: dict[Side, tuple[str, ...]] = {
    "item": ("items", "links", "pages"),
    "user": ("users", "interactions", "items", "descriptions"),
}
"""What each side reads. Links and pages may both be missing."""


@dataclass(frozen=True)
class GenerateJob:
    """One catalogue, or one table of users, to one folder of texts."""

    side: Side
    inputs: Mapping[str, str]
    """Name (see `INPUTS`) -> Parquet or, of items and users, CSV, wherever Spark can read."""
    out: str
    """Folder of Parquet, wherever Spark can write."""
    work: str | None = None
    """Folder that keeps completions and finished shards; None: `OUT.work`."""
    shards: int | None = None
    """None: as many as the work folder has, or one per 2048 rows."""
    overwrite: bool = False
    """Replace a folder that is not this job's, which is one whose manifest names the same side and work folder."""


def run_generate_job(session: SparkSession, job: GenerateJob, settings: Settings) -> dict[str, Any]:
    """Write all texts; return the manifest, which also lies in the folder as `_manifest.json`.

    An id keeps its shard, and a shard that was finished with the same rows and settings is taken as it is. Of the
    others, what the work folder holds of completions is not asked for again. The output appears, or is replaced, when
    every row has its text; `_dead_letters` in it holds the requests that failed for good, whose rows have another
    engine's text, and which the next run asks for again.

    Args:
        session: reads, runs and writes.
        job: where rows come from and texts go to.
        settings: sections generate and, for users, data.split, history and run.seed, which decide what is history.

    Raises:
        ConfigError: an input is missing, a setting is not accepted here, or the table has outgrown its shards.
        DataError: a path is wrong, the output exists and is not this job's, or the inputs do not fit together.
        EngineError: the engine is unknown, failed for good, or answered nothing in this run, which then leaves the
            output as it is; what was finished is kept for the next run.
        SchemaError: a column is missing or of another type.
    """
    from pyspark.errors import AnalysisException

    started = time.perf_counter()
    _check(job, settings)
    settings = _with_model_path(settings)
    work = Work(work_folder(job.out, job.work))
    task = ShardTask(job.side, settings, domain_of(settings), work, run=uuid.uuid4().hex)
    shards = task.work.shards(job.side, job.shards)
    folder = _folder(session, job, task.work)
    key = f"{job.side}_id"
    try:
        with worker_errors():
            described, rows = _rows(session, job, settings)
            count = described.count()
            if not count:
                raise DataError(f"{job.inputs[f'{job.side}s']} has no rows: there is nothing to describe")
            if shards and job.shards is None and count > shards * ROWS_PER_SHARD * MOST_GROWTH:
                raise ConfigError(
                    f"{task.work.folder} has {shards} shards, and {count:,} rows would make only as many tasks: name "
                    "another --work or --out, where all texts are asked for again, or accept it with "
                    f"--shards {shards}"
                )
            shards = shards or -(-count // ROWS_PER_SHARD)
            task.work.begin(job.side, shards)
            task.work.tidy()
            with follow(session, f"describe {job.side}s", shards):
                written = in_shards(rows, key, shards).mapInArrow(shard_writer(task), TOLD_DDL).collect()
            told = {row["shard"]: json.loads(row["told"]) for row in written}
            tables = _tables(task.work, {row["shard"]: row["key"] for row in written})
            texts = session.read.parquet(*tables)
            _check_answered(texts, list(told.values()), settings.generate.max_failures)
            write_sorted(texts.select(SCHEMAS[job.side].names), folder.staging, [key], count * PAIRS_PER_ROW)
            _write_dead_letters(texts, job.side, f"{folder.staging}/{DEAD_LETTERS}")
    except AnalysisException as error:  # no such path, or Spark Connect met an output that exists
        paths = "; ".join(f"{name}: {path}" for name, path in (*job.inputs.items(), ("out", job.out)))
        raise DataError(f"{spark_reason(error)} ({paths})") from error
    manifest = {
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "side": job.side,
        **{name: job.inputs.get(name) for name in INPUTS[job.side]},
        "work": str(task.work.folder),
        "domain": task.domain.name,
        "engine": task.engine,
        "model": settings.generate.model,
        "max_tokens": task.max_tokens,
        "factors": settings.generate.factors,
        "split_hash": split_hash_of(job.inputs["interactions"]) if job.side == "user" else None,
        **_sums(list(told.values())),
        "shards": shards,
        "shards_skipped": sum(not of_shard["run"] for of_shard in told.values()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if manifest["rows"] != count:
        folder.discard()
        raise DataError(f"{count:,} rows were to be described and {manifest['rows']:,} were: did an input change?")
    folder.write_json(MANIFEST, manifest)
    folder.publish()
    return manifest


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn an error of this project that a worker raised into itself, in one line.

    Python workers hand back a trace as text; the error is found in it by its name.
    """
    from pyspark.errors import AnalysisException, PySparkException

    try:
        yield
    except AnalysisException:
        raise
    except PySparkException as error:
        found = re.search(r"kellm_features\.errors\.(\w+): (.+)", str(error))
        if not found:
            raise
        known = {kind.__name__: kind for kind in (ArtifactError, ConfigError, DataError, EngineError)}
        kind = known.get(found.group(1), KellmError)
        raise kind(found.group(2).strip()) from error


def _check(job: GenerateJob, settings: Settings) -> None:
    """Refuse what can be told before Spark reads anything."""
    missing = [name for name in INPUTS[job.side] if name not in job.inputs and name not in ("links", "pages")]
    if ("links" in job.inputs) != ("pages" in job.inputs):
        missing.append("pages" if "links" in job.inputs else "links")
    other = [name for name in job.inputs if name not in INPUTS[job.side]]
    if missing or other:
        told = ", ".join([*(f"--{name} is missing" for name in missing), *(f"--{name} is not read" for name in other)])
        raise ConfigError(f"--side {job.side}: {told}; it reads {', '.join(f'--{n}' for n in INPUTS[job.side])}")
    if job.shards is not None and job.shards < 1:
        raise ConfigError(f"--shards is {job.shards}; accepted: 1 or more")
    generate = settings.generate
    if generate.budget_tokens is not None:
        raise ConfigError(
            f"generate.budget_tokens is {generate.budget_tokens}: tasks on several machines cannot keep one budget; "
            "leave it out, and describe a part of the table first"
        )
    if not generate.resume:
        work = work_folder(job.out, job.work)
        raise ConfigError(f"generate.resume is false: to forget finished texts remove {work}, and leave resume out")
    installed = sorted(entry.name for entry in entry_points(group=GROUP))
    name = generate.engine if job.side == "item" else generate.user_engine
    if name not in installed:
        raise EngineError(f"there is no engine {name!r}; installed are: {', '.join(installed)}")
    limit = "limit" if job.side == "item" else "user_limit"
    if limit in generate.model_fields_set and getattr(generate, limit) is not None:
        logger.warning(
            "generate.%s is %d, which this job does not read: all rows go to the engine %r; for fewer, give fewer rows",
            limit,
            getattr(generate, limit),
            name,
        )


def _with_model_path(settings: Settings) -> Settings:
    """The settings with a local model's path made absolute: executors start in other folders, and would take a
    relative one for a hub id."""
    generate = settings.generate
    model = Path(generate.model).expanduser()
    if not LOCAL_ENGINES & {generate.engine, generate.user_engine, generate.fallback_engine} or not model.exists():
        return settings
    found = generate.model_copy(update={"model": str(model.absolute())})
    return settings.model_copy(update={"generate": found})


def _folder(session: SparkSession, job: GenerateJob, work: Work) -> Folder:
    """The output, which may be replaced where its manifest names this job. Spark Connect can replace none."""
    try:
        return Folder(session, job.out, overwrite=job.overwrite)
    except DataError:
        told = _manifest(session, job.out)
        if (told.get("side"), told.get("work")) != (job.side, str(work.folder)):
            raise
        return Folder(session, job.out, overwrite=True)


def _manifest(session: SparkSession, out: str) -> dict[str, Any]:
    """Of the job that wrote the folder; empty where none did."""
    jvm: Any = getattr(session, "_jvm", None)
    if jvm is None:
        return {}
    path = jvm.org.apache.hadoop.fs.Path(f"{out.rstrip('/')}/{MANIFEST}")
    files = path.getFileSystem(session._jsc.hadoopConfiguration())
    if not files.exists(path):
        return {}
    stream = files.open(path)
    try:
        told = json.loads(bytes(stream.readAllBytes()))
    except ValueError:
        return {}
    finally:
        stream.close()
    return told if isinstance(told, dict) else {}


def _check_answered(texts: DataFrame, told: Sequence[Mapping[str, Any]], max_failures: int) -> None:
    """Refuse to publish what a run wrote whose engine answered nothing: most likely it was not there.

    Requests that fail whatever is done, and are asked for again by each run, are fewer than `max_failures` beside
    texts of the engine's: they stop nothing.
    """
    from pyspark.sql import functions as sf

    failed = sum(of_shard["dead_letters"] for of_shard in told)  # a shard that has any is never skipped
    generated = sum(of_shard["run"].get("generated", 0) for of_shard in told)
    of_engine = failed + sum(of_shard["by_source"].get("llm", 0) for of_shard in told)
    if generated or not failed or failed < min(max_failures, of_engine):
        return
    reason = texts.agg(sf.max("failed_reason")).first()
    assert reason is not None
    raise EngineError(
        f"nothing was generated in this run, and {failed:,} requests failed, one with: {reason[0]}. The output stays "
        "as it is; run again when the engine answers, or, where these requests can never be answered, raise "
        f"generate.max_failures (it is {max_failures})"
    )


def _rows(session: SparkSession, job: GenerateJob, settings: Settings) -> tuple[DataFrame, DataFrame]:
    """What is to be described, and its rows with all that prompts are made of; checked, and not computed yet."""
    paths = job.inputs
    items = read_items(session, paths["items"])
    if job.side == "item":
        return items, item_rows(session, items, paths.get("links"), paths.get("pages"))
    users = read_users(session, paths["users"])
    interactions = read_interactions(session, paths["interactions"], users, items)
    descriptions = read_descriptions(session, paths["descriptions"], items)
    return users, user_rows(users, histories(interactions, settings), items, descriptions)


def _tables(work: Work, keys: Mapping[int, str]) -> list[str]:
    """The tables of all shards, each being the one that this run asked for."""
    for shard, key in sorted(keys.items()):
        if work.finished(shard, key) is None:
            raise DataError(
                f"{work.table(shard)} is not what this run's task wrote: the work folder has to be on a file system "
                "that the driver and all executors see, and one run at a time may use it; name one with --work"
            )
    # Not `as_uri`: Hadoop takes %20 for a name's own three characters.
    return [f"file://{work.table(shard)}" for shard in sorted(keys)]


def _write_dead_letters(texts: DataFrame, side: Side, path: str) -> None:
    """`schemas.DEAD_LETTERS`, in one file."""
    from pyspark.sql import functions as sf

    letters = texts.where("failed_reason is not null").select(
        sf.lit(side).alias("side"),
        sf.col(f"{side}_id").cast("string").alias("id"),
        sf.col("failed_hash").alias("prompt_hash"),
        sf.col("failed_model").alias("model_id"),
        sf.col("failed_reason").alias("reason"),
    )
    letters.repartition(1).sortWithinPartitions("id").write.parquet(path)


def _sums(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all shards: of the rows, and of what this run asked for."""
    runs = [of_shard["run"] for of_shard in told]
    by_source: Counter[str] = Counter()
    models: dict[str, str] = {}
    for of_shard in told:
        by_source.update(of_shard["by_source"])
        models |= of_shard["models"]
    kept = ("rows", "dead_letters", "prompt_tokens", "completion_tokens")
    asked = ("generated", "cache_hits", "asked_again", "unfit_answers", "ungrounded_answers")
    return {
        **{name: sum(of_shard[name] for of_shard in told) for name in kept},
        "by_source": dict(by_source.most_common()),
        "models": models,
        **{name: sum(run.get(name, 0) for run in runs) for name in asked},
        "worker_seconds": round(sum(run.get("seconds", 0.0) for run in runs), 1),
    }
