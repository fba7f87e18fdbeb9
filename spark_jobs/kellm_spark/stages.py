"""The Spark stages of a run: `swing`, `wiki` and `link`. Input and output only; the work is in its own modules."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from kellm_features.resources import mini_wiki_dump
from kellm_features.schemas import LINKS, PAGES, PAIRS, TableSchema
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport
from kellm_spark.dump.files import find_parts
from kellm_spark.dump.job import write_run
from kellm_spark.linking import LinkOptions, link_items, overrides_frame
from kellm_spark.linking.job import link_counts
from kellm_spark.session import follow, get_session
from kellm_spark.storage import write_sorted
from kellm_spark.swing import Side, SwingOptions, plan_swing, swing_parameters
from kellm_spark.swing.job import hubness, no_pair

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)


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
    ).first()
    assert seen is not None
    notes: dict[str, Any] = {"preset": settings.preset, **asdict(parameters), "top_k": settings.top_k}
    rows_out = 0
    sides: tuple[Side, ...] = ("item", "user")
    for side in sides:
        plan = plan_swing(
            used,
            SwingOptions(
                side=side,
                parameters=parameters,
                top_k=settings.top_k,
                max_witnesses=settings.max_witnesses,
                min_user_items=settings.min_user_items,
                max_user_items=settings.max_user_items,
                max_item_users=settings.max_item_users,
                mode=settings.mode,
            ),
        )
        path = ctx.out / f"{side}_pairs.parquet"
        with follow(spark, f"swing {side}", plan.tasks):
            _write(plan.pairs, path, PAIRS, ["anchor_id", "rank"], most_rows=plan.targets * settings.top_k)
        hubs = hubness(spark.read.parquet(str(path)))
        rows, anchors = hubs.pop("rows"), hubs.pop("anchors")
        if not rows:
            raise no_pair(side, plan)
        rows_out += rows
        notes |= {f"{side}_pairs": rows, f"{side}_anchors": anchors, f"{side}s_seen": plan.targets}
        notes |= {f"{side}_hubness": hubs, f"{side}s_capped": plan.capped}
        logger.info("swing %s: %d pairs of %d anchors", side, rows, anchors)
    dropped = {"not in train": int(seen["not_train"]), "not liked": int(seen["not_liked"]), **plan.dropped}
    return StageReport(int(seen["rows"]), rows_out, {k: v for k, v in dropped.items() if v}, notes=notes)


def run_wiki(ctx: StageContext) -> StageReport:
    """The dump's articles and redirects: `pages.parquet` (`schemas.PAGES`)."""
    spark = get_session(ctx.settings.spark)
    out, parsed = ctx.out / "pages.parquet", ctx.work / "parsed"
    shutil.rmtree(parsed, ignore_errors=True)  # of a run that was killed
    try:
        parts = [str(path) for path in ctx.files.values()]
        told, written = write_run(spark, parts, str(parsed), str(out), ctx.settings.wiki.lead_only)
    finally:
        shutil.rmtree(parsed, ignore_errors=True)
    PAGES.check(ds.dataset(out, format="parquet").schema, str(out))
    names = [path.name for path in ctx.files.values()]
    notes = {"dump": names[0] if len(names) == 1 else names, **written}
    return StageReport(told.pages, notes.pop("rows"), told.dropped, notes=notes)


def run_link(ctx: StageContext) -> StageReport:
    """Each item's page, or why it has none: `links.parquet` (`schemas.LINKS`); of articles, each page of an item."""
    settings = ctx.settings.link
    spark = get_session(ctx.settings.spark)
    items = spark.read.parquet(str(ctx.input("ingest", "items.parquet")))
    pages = spark.read.parquet(str(ctx.input("wiki", "pages.parquet")))
    options = LinkOptions(
        domain=settings.domain,
        method=settings.method,
        year_tolerance=settings.year_tolerance,
        min_similarity=settings.min_similarity,
        max_links=settings.max_links,
    )
    overrides = overrides_frame(spark, ctx.files["overrides"]) if "overrides" in ctx.files else None
    out = ctx.out / "links.parquet"
    rows = _write(link_items(items, pages, options, overrides), out, LINKS, ["item_id", "wiki_page_id"], most_rows=0)
    told = link_counts(spark.read.parquet(str(out)))
    logger.info("link: %d of %d items have a page", told["linked"], told["items"])
    return StageReport(told["items"], rows, notes=told)


def link_files(settings: Settings) -> dict[str, Path]:
    """The decisions of a person, where there are any."""
    return {"overrides": settings.link.overrides} if settings.link.overrides else {}


def wiki_files(settings: Settings) -> dict[str, Path]:
    """The files of the dump that `wiki` reads: those set, or the sample Wikipedia."""
    dump = settings.wiki.dump
    if dump is None:
        return {"dump": mini_wiki_dump()}
    parts = find_parts([dump] if isinstance(dump, Path) else dump)
    return {"dump" if len(parts) == 1 else f"dump {n}": Path(part) for n, part in enumerate(parts, 1)}


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    """Value -> rows, most frequent first, nulls left out."""
    found = pc.value_counts(values.drop_null()).to_pylist()
    return {row["values"]: row["counts"] for row in sorted(found, key=lambda row: (-row["counts"], row["values"]))}


def _write(frame: DataFrame, path: Path, schema: TableSchema, order: list[str], most_rows: int) -> int:
    """Write a table (see `write_sorted`), check what was written, and return its rows."""
    write_sorted(frame, str(path), order, most_rows)
    written = ds.dataset(path, format="parquet")
    schema.check(written.schema, str(path))
    return int(written.count_rows())
