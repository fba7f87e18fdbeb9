"""A person's word on links, which wins over the linker: item -> page, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kellm_features.errors import DataError
from kellm_features.overrides import NO_PAGE, read_overrides
from kellm_spark.tables import redirects

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_SHOWN = 5


def overrides_frame(session: SparkSession, path: Path) -> DataFrame:
    """The decisions in a file as a table: item_id, page (both string).

    Raises:
        DataError: see `read_overrides`.
    """
    return session.createDataFrame(read_overrides(path).decisions(), "item_id string, page string")


def override_links(items: DataFrame, pages: DataFrame, overrides: DataFrame, *, one_page: bool) -> DataFrame:
    """The links that a person has decided.

    Args:
        items: item_id.
        pages: `schemas.PAGES`.
        overrides: item_id and page (both string); those of items that are not there are left out.
        one_page: whether an item has one page at most.

    Returns:
        `schemas.LINKS`: method "override" and score 1, or for `none` no page and reason "override".

    Raises:
        DataError: a page that is not among the pages, or two for an item that is to have one.
    """
    from pyspark.sql import functions as sf

    decided = items.select("item_id", sf.col("item_id").cast("string").alias("text")).join(
        overrides.select(sf.col("item_id").alias("text"), "page"), "text"
    )
    several = overrides.groupBy("item_id").agg(sf.sort_array(sf.collect_set("page")).alias("pages"))
    twice = several.where("size(pages) > 1").orderBy("item_id").first() if one_page else None
    if twice is not None:
        raise DataError(f"overrides: item {twice['item_id']} has {' and '.join(twice['pages'])}; one page is accepted")
    wanted = decided.where(sf.col("page") != NO_PAGE).select("page").distinct()
    own = pages.where("redirect_to is null").select("wiki_title", "wiki_page_id")
    titles = (
        own.select(sf.col("wiki_title").alias("page"), "wiki_title")
        .union(redirects(pages))
        .where(~sf.col("page").rlike(r"^\d+$"))
    )
    by_id = pages.select(sf.col("wiki_page_id").cast("string").alias("page"), sf.col("wiki_title").alias("alias"))
    named = titles.union(
        by_id.join(redirects(pages), "alias", "left").select("page", sf.coalesce("wiki_title", "alias"))
    )
    known = named.join(wanted, "page", "left_semi").join(own, "wiki_title").select("page", "wiki_page_id", "wiki_title")
    unknown = [row.page for row in wanted.join(known, "page", "left_anti").orderBy("page").limit(_SHOWN).collect()]
    if unknown:
        raise DataError(
            f"overrides: no page {', '.join(map(repr, unknown))} among the pages; an id, an exact title or "
            "none is accepted"
        )
    return decided.join(known, "page", "left").select(
        "item_id",
        "wiki_page_id",
        "wiki_title",
        sf.when(sf.col("wiki_page_id").isNotNull(), 1.0).otherwise(0.0).alias("link_score"),
        sf.when(sf.col("wiki_page_id").isNotNull(), "override").alias("method"),
        sf.lit(None).cast("string").alias("runner_up"),
        sf.when(sf.col("wiki_page_id").isNull(), "override").alias("reason"),
    )
