"""A version published from Spark: the offline partition written by Spark, the online rows by its workers.

Rows go from each partition straight into the online store (`mapInArrow`); nothing passes through the driver but
counts. They are read from the partition that was written, so that a task that is tried again, or a publish that is
run again after a kill, sees the same rows, and writes those only that are not there yet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kellm_features.errors import DataError, SchemaError, StoreError
from kellm_features.store.catalog import Version
from kellm_features.store.distributed import Publishing, Table, publishing
from kellm_features.store.layout import (
    CREATED_TIMESTAMP,
    EMBEDDED_AT,
    EVENT_TIMESTAMP,
    IS_DELETED,
    VIEWS,
    IdType,
    ViewSpec,
)
from kellm_spark.session import data_errors
from kellm_spark.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)
EMBEDDING_VIEWS = {spec.name: spec for spec in VIEWS if spec.holds_embeddings}
COUNTS_DDL = "rows bigint, written bigint"
OPTIONAL = ("model_id", "content_hash")


def publish_embeddings(
    session: SparkSession,
    frames: Mapping[str, DataFrame],
    repo: Path | str,
    *,
    version: str,
    data: str | None = None,
) -> Version:
    """Publish embeddings as a new version beside what is served; `rollout.promote` serves it.

    Args:
        session: reads and writes.
        frames: embedding view -> item_id or user_id (bigint or string, unique) and embedding (array<float> of one
            length); model_id and content_hash where there are any.
        repo: the Feast repository. Its online store must be a Redis.
        version: the version's name.
        data: folder or URI of the offline partitions; None takes `data/` of the repository, which every executor
            must then see under the same path.

    Returns:
        The version, published and not promoted.

    Raises:
        SchemaError: a column is missing or of another type.
        DataError: ids are null or appear twice, or vectors are null or of several lengths.
        StoreError: see `store.distributed.publishing`. What is served is unchanged.
    """
    unknown = [view for view in frames if view not in EMBEDDING_VIEWS]
    if unknown or not frames:
        raise StoreError(f"views {unknown or 'none'}: embeddings are published as {' or '.join(EMBEDDING_VIEWS)}")
    id_types = {view: _id_type(frame, EMBEDDING_VIEWS[view]) for view, frame in frames.items()}
    if len(set(id_types.values())) > 1:
        raise SchemaError(f"ids are {id_types}: all ids of a version must be of one type")
    with data_errors():
        tables = {view: _measure(frame, EMBEDDING_VIEWS[view]) for view, frame in frames.items()}
    id_type = next(iter(id_types.values()))
    created = datetime.now(UTC).replace(microsecond=0)
    with (
        publishing(Path(repo), tables, version=version, id_type=id_type, created=created, data=data) as job,
        data_errors(),
    ):
        rows = {view: _publish_view(session, job, frame, view) for view, frame in frames.items()}
        done = job.finish(rows)
    logger.info("published version %s: %s rows", version, rows)
    return done


def _publish_view(session: SparkSession, job: Publishing, frame: DataFrame, view: str) -> int:
    """Write the partition where it is not there, and its rows online; the number of rows that are served."""
    from pyspark.sql import functions as sf

    spec = EMBEDDING_VIEWS[view]
    if not _is_there(session, job.folder(view)):
        folder = Folder(session, job.folder(view), overwrite=False)
        _partition(session, job, frame, spec).write.options(compression="zstd").parquet(folder.staging)
        folder.publish()
    names = [spec.join_key, *(name for name, _ in spec.features)]
    live = session.read.parquet(job.folder(view)).where(~sf.col(IS_DELETED)).select(names)
    # Spark sends the function to its workers as it sends any: the store's password goes with it.
    told = live.mapInArrow(job.writer(view), COUNTS_DDL).agg(sf.sum("rows"), sf.sum("written")).first()
    assert told is not None
    logger.info("%s: %s of %s rows were written, the others were there", view, told[1], told[0])
    return int(told[0] or 0)


def _partition(session: SparkSession, job: Publishing, frame: DataFrame, spec: ViewSpec) -> DataFrame:
    """The rows in the partition's columns, and a null row for each id of the version before that this one lacks."""
    from pyspark.sql import functions as sf

    held = job.version.views[spec.name]
    present = {name for name in OPTIONAL if name in frame.columns}
    rows = frame.select(
        spec.join_key,
        sf.col("embedding").cast("array<float>").alias("embedding"),
        sf.lit(job.version.name).alias("embedding_version"),
        *((sf.col(name) if name in present else sf.lit(None)).cast("string").alias(name) for name in OPTIONAL),
        sf.lit(int(held.event.timestamp())).cast("bigint").alias(EMBEDDED_AT),
        sf.lit(held.event).cast("timestamp").alias(EVENT_TIMESTAMP),
        sf.lit(held.created).cast("timestamp").alias(CREATED_TIMESTAMP),
        sf.lit(False).alias(IS_DELETED),
    )
    before = job.replaced(spec.name)
    if before is None:
        return rows
    gone = session.read.parquet(before).select(spec.join_key).join(rows, spec.join_key, "left_anti").distinct()
    kept = {spec.join_key, EVENT_TIMESTAMP, CREATED_TIMESTAMP, IS_DELETED}
    nulls = {name: sf.lit(None).cast(rows.schema[name].dataType) for name in rows.columns if name not in kept} | {
        EVENT_TIMESTAMP: sf.lit(held.event).cast("timestamp"),
        CREATED_TIMESTAMP: sf.lit(held.created).cast("timestamp"),
        IS_DELETED: sf.lit(True),
    }
    return rows.unionByName(gone.withColumns(nulls))


def _id_type(frame: DataFrame, spec: ViewSpec) -> IdType:
    types = dict(frame.dtypes)
    missing = [name for name in (spec.join_key, "embedding") if name not in types]
    if missing:
        raise SchemaError(f"{spec.name} lacks the column {' and '.join(missing)}; seen: {', '.join(types)}")
    if types["embedding"] not in ("array<float>", "array<double>"):
        raise SchemaError(f"{spec.name}: embedding is {types['embedding']}; accepted: array<float>, array<double>")
    kinds: dict[str, IdType] = {"bigint": "int64", "string": "string"}
    if types[spec.join_key] not in kinds:
        raise SchemaError(f"{spec.name}: {spec.join_key} is {types[spec.join_key]}; accepted: bigint, string")
    return kinds[types[spec.join_key]]


def _measure(frame: DataFrame, spec: ViewSpec) -> Table:
    """Rows and length of the vectors, after a look at what no version may hold."""
    from pyspark.sql import functions as sf

    size = sf.size("embedding")
    told = frame.agg(
        sf.count("*"),
        sf.count(spec.join_key),
        sf.count_distinct(spec.join_key),
        sf.count(sf.when(sf.col("embedding").isNotNull(), 1)),
        sf.min(size),
        sf.max(size),
    ).first()
    assert told is not None
    rows, keys, distinct, vectors, shortest, longest = told
    if not rows:
        raise DataError(f"{spec.name} holds no rows: there is nothing to publish")
    if keys < rows:
        raise DataError(f"{spec.name}: {rows - keys:,} rows have no {spec.join_key}: drop them first")
    if distinct < keys:
        twice = frame.groupBy(spec.join_key).count().where("count > 1").first()
        raise DataError(
            f"{spec.name}: {keys - distinct:,} ids appear more than once ({spec.join_key} "
            f"{twice[0]!r} for one): keep one row per id"
            if twice
            else f"{spec.name}: ids appear more than once"
        )
    if vectors < rows or shortest != longest or not longest:
        raise DataError(
            f"{spec.name}: {rows - vectors:,} embeddings are null and the others have {shortest} to {longest} "
            f"components: all must be of one length, above 0"
        )
    return Table(rows=int(rows), dim=int(longest))


def _is_there(session: SparkSession, path: str) -> bool:
    from pyspark.errors import AnalysisException

    try:
        return bool(session.read.parquet(path).columns)
    except AnalysisException:
        return False
