"""The Spark stages of a run: `swing`, `wiki` and `link`. Input and output only; the work is in its own modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from kellm_features.errors import DataError
from kellm_features.resources import mini_wiki_dump
from kellm_features.schemas import LINKS, PAGES, PAIRS, TableSchema
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport
from kellm_spark.dump import read_dump
from kellm_spark.linking import link_items
from kellm_spark.session import data_errors, get_session
from kellm_spark.swing import Side, swing_pairs, swing_parameters

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

ROWS_PER_FILE = 4_000_000
"""A file of pairs of this size is about 40 MB."""


def run_swing(ctx: StageContext) -> StageReport:
    """SWING pairs of both sides from train rows: `item_pairs.parquet`, `user_pairs.parquet` (`schemas.PAIRS`)."""
    from pyspark.sql import functions as sf

    settings = ctx.settings.swing
    parameters = swing_parameters(settings.preset, settings.alpha, settings.alpha1, settings.beta)
    spark = get_session(ctx.settings.spark)
    interactions = spark.read.parquet(str(ctx.input("ingest", "interactions.parquet")))
    # Nothing of the valid and test rows may reach the pairs that the model is trained on.
    train, liked = sf.col("split") == "train", sf.col("liked") if settings.positives_only else sf.lit(True)
    used = interactions.where(train & liked).select("user_id", "item_id")
    seen = interactions.agg(
        sf.count("*").alias("rows"),
        sf.count_if(~train).alias("not_train"),
        sf.count_if(train & ~liked).alias("not_liked"),
        *(sf.count_distinct(sf.when(train & liked, sf.col(f"{side}_id"))).alias(side) for side in ("item", "user")),
    ).first()
    assert seen is not None
    notes: dict[str, Any] = {
        "preset": settings.preset,
        "alpha": parameters.alpha,
        "alpha1": parameters.alpha1,
        "beta": parameters.beta,
        "top_k": settings.top_k,
    }
    rows_out = 0
    sides: tuple[Side, ...] = ("item", "user")
    for side in sides:
        pairs = swing_pairs(
            used,
            side=side,
            preset=settings.preset,
            alpha=settings.alpha,
            alpha1=settings.alpha1,
            beta=settings.beta,
            top_k=settings.top_k,
            min_user_items=settings.min_user_items,
            max_user_items=settings.max_user_items,
        )
        path = ctx.out / f"{side}_pairs.parquet"
        rows = _write(pairs, path, PAIRS, ["anchor_id", "rank"], most_rows=seen[side] * settings.top_k)
        if not rows:
            raise DataError(
                f"swing found no {side} pair: no two {side}s share two "
                f"{'users' if side == 'item' else 'items'} in {seen['rows'] - seen['not_train'] - seen['not_liked']:,} "
                "train rows; give more interactions, or set swing.positives_only=false"
            )
        rows_out += rows
        hubs = _hubness(path)
        notes |= {f"{side}_pairs": rows, f"{side}_anchors": hubs.pop("anchors"), f"{side}s_seen": seen[side]}
        notes[f"{side}_hubness"] = hubs
        logger.info("swing %s: %d pairs of %d anchors", side, rows, notes[f"{side}_anchors"])
    dropped = {"not in train": int(seen["not_train"]), "not liked": int(seen["not_liked"])}
    return StageReport(int(seen["rows"]), rows_out, {k: v for k, v in dropped.items() if v}, notes=notes)


def run_wiki(ctx: StageContext) -> StageReport:
    """The dump's articles and redirects: `pages.parquet` (`schemas.PAGES`)."""
    from pyspark.sql import Observation

    spark = get_session(ctx.settings.spark)
    path = ctx.files["dump"]
    seen = Observation("dump")
    out = ctx.out / "pages.parquet"
    with data_errors():
        pages = read_dump(spark, path, seen)
        rows = _write(pages, out, PAGES, ["wiki_page_id"], most_rows=0)
    total, other = int(seen.get["pages"]), int(seen.get["other_namespaces"])
    if not rows:
        raise DataError(
            f"{path} holds {total:,} pages and none of them is an article (namespace 0): take a pages-articles dump"
        )
    told = ds.dataset(out, format="parquet").to_table(["redirect_to", "is_disambiguation", "evidence", "year"])
    notes = {
        "dump": path.name,
        "redirects": rows - told["redirect_to"].null_count,
        "disambiguations": pc.sum(told["is_disambiguation"]).as_py(),
        "dated": rows - told["year"].null_count,
        "evidence": _counts(pc.list_flatten(told["evidence"])),
    }
    return StageReport(total, rows, {"other namespaces": other} if other else {}, notes=notes)


def run_link(ctx: StageContext) -> StageReport:
    """Each item's page, or why it has none: `links.parquet` (`schemas.LINKS`)."""
    settings = ctx.settings.link
    spark = get_session(ctx.settings.spark)
    items = spark.read.parquet(str(ctx.input("ingest", "items.parquet")))
    pages = spark.read.parquet(str(ctx.input("wiki", "pages.parquet")))
    links = link_items(
        items,
        pages,
        domain=settings.domain,
        year_tolerance=settings.year_tolerance,
        min_similarity=settings.min_similarity,
    )
    out = ctx.out / "links.parquet"
    rows = _write(links, out, LINKS, ["item_id"], most_rows=0)
    told = ds.dataset(out, format="parquet").to_table(["method", "reason"])
    linked = rows - told["method"].null_count
    logger.info("link: %d of %d items have a page", linked, rows)
    notes = {
        "linked": linked,
        "coverage": linked / rows if rows else 0.0,
        "methods": _counts(told["method"]),
        "reasons": _counts(told["reason"]),
    }
    return StageReport(rows, rows, notes=notes)


def wiki_files(settings: Settings) -> dict[str, Path]:
    """The dump that `wiki` reads: the one set, or the sample Wikipedia."""
    return {"dump": settings.wiki.dump or mini_wiki_dump()}


def _hubness(path: Path) -> dict[str, int]:
    """How top-1 neighbours concentrate: anchors with one, distinct ones among these, and the most anchors of one."""
    top = ds.dataset(path, format="parquet").to_table(["neighbor_id"], filter=pc.field("rank") == 1)
    shared = pc.value_counts(top["neighbor_id"]).field("counts")
    most = pc.max(shared).as_py() if len(shared) else 0
    return {"anchors": top.num_rows, "distinct_top1": len(shared), "max_top1": most}


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    """Value -> rows, most frequent first, nulls left out."""
    found = pc.value_counts(values.drop_null()).to_pylist()
    return {row["values"]: row["counts"] for row in sorted(found, key=lambda row: (-row["counts"], row["values"]))}


def _write(frame: DataFrame, path: Path, schema: TableSchema, order: list[str], most_rows: int) -> int:
    """Write a table as a folder of Parquet files, each sorted, all rows of one key in one file; return its rows.

    Args:
        most_rows: an upper bound of the rows; decides the number of files (a single one is sorted as a whole).
    """
    files = 1 + most_rows // ROWS_PER_FILE
    frame.repartition(files, order[0]).sortWithinPartitions(*order).write.option("compression", "zstd").parquet(
        str(path)
    )
    written = ds.dataset(path, format="parquet")
    schema.check(written.schema, str(path))
    return int(written.count_rows())
