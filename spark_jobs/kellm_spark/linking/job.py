"""Links of a catalogue, written to a folder: what `kellm link --catalogue` and spark-submit run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kellm_features import __version__
from kellm_features.errors import DataError, SchemaError
from kellm_features.schemas import PAGES
from kellm_spark.linking.link import link_items
from kellm_spark.linking.options import LinkOptions
from kellm_spark.linking.overrides import overrides_frame
from kellm_spark.session import data_errors, spark_reason
from kellm_spark.storage import MANIFEST, Folder, write_sorted

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclass(frozen=True)
class LinkJob:
    """One catalogue and one table of pages to one folder of links."""

    catalogue: str
    """Where the items come from: for the manifest."""
    wiki: str
    """Folder that `kellm wiki` wrote, wherever Spark can read."""
    out: str
    """Folder of Parquet, wherever Spark can write."""
    options: LinkOptions
    overrides: Path | None = None
    """A person's decisions, see `kellm_features.overrides`."""
    overwrite: bool = False


def run_link_job(session: SparkSession, items: DataFrame, job: LinkJob) -> dict[str, Any]:
    """Link and write; return the manifest, which also lies in the folder as `_manifest.json`.

    Args:
        session: reads and writes.
        items: item_id, title and year (int or null) of the catalogue.
        job: where pages come from and links go to.

    Raises:
        DataError: a path is wrong, the output exists, or see `link_items`.
        SchemaError: a column is missing.
    """
    from pyspark.errors import AnalysisException

    started = time.perf_counter()
    folder = Folder(session, job.out, overwrite=job.overwrite)
    try:
        with data_errors():
            overrides = overrides_frame(session, job.overrides) if job.overrides else None
            links = link_items(items, read_pages(session, job.wiki), job.options, overrides)
            write_sorted(links, folder.staging, ["item_id", "wiki_page_id"], most_rows=items.count())
        told = link_counts(session.read.parquet(folder.staging))
    except AnalysisException as error:  # no such path, or Spark Connect met an output that exists
        raise DataError(f"{spark_reason(error)} (wiki: {job.wiki}; out: {job.out})") from error
    manifest = {
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "catalogue": job.catalogue,
        "wiki": job.wiki,
        "overrides": str(job.overrides) if job.overrides else None,
        **asdict(job.options),
        **told,
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder.write_json(MANIFEST, manifest)
    folder.publish()
    return manifest


def read_pages(session: SparkSession, path: str) -> DataFrame:
    """The pages that `kellm wiki` wrote, or those of a run's `wiki` folder.

    Raises:
        SchemaError: the table has other columns.
    """
    inside = Path(path) / "pages.parquet"
    pages = session.read.parquet(str(inside) if inside.exists() else path)
    missing = [name for name in PAGES.names if name not in pages.columns]
    if missing:
        raise SchemaError(
            f"{path}: column {', '.join(map(repr, missing))} is missing; seen: {', '.join(pages.columns)}; "
            "give the folder that  kellm wiki --dump … --out  wrote"
        )
    return pages


def link_counts(links: DataFrame) -> dict[str, Any]:
    """How many items a table of links has and links, by method, and by reason where it does not.

    Returns:
        items, linked, coverage (linked of items, 0 where there are none), links (rows with a page), methods and reasons
        (name -> rows, most frequent first).
    """
    from pyspark.sql import functions as sf

    rows = links.groupBy("method", "reason").agg(sf.count("*").alias("rows")).collect()
    ids = links.agg(
        sf.count_distinct("item_id").alias("items"),
        sf.count_distinct(sf.when(sf.col("wiki_page_id").isNotNull(), sf.col("item_id"))).alias("linked"),
    ).first()
    assert ids is not None
    methods = {row["method"]: row["rows"] for row in rows if row["method"] is not None}
    reasons = {row["reason"]: row["rows"] for row in rows if row["method"] is None}
    return {
        "items": ids["items"],
        "linked": ids["linked"],
        "coverage": ids["linked"] / ids["items"] if ids["items"] else 0.0,
        "links": sum(methods.values()),
        "methods": _by_count(methods),
        "reasons": _by_count(reasons),
    }


def _by_count(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
