"""What every way of linking asks of its tables: items that stand once, pages with their redirects resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kellm_features.errors import DataError, SchemaError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_DOUBLINGS = 2
"""Redirects to redirects are slips that bots mend: chains of up to four are followed."""


def check_items(items: DataFrame, columns: Sequence[str]) -> int:
    """Refuse items that cannot be linked; return their number.

    Raises:
        SchemaError: a column is missing.
        DataError: an item has no id or title, or an id is repeated.
    """
    from pyspark.sql import functions as sf

    check_columns(items, "items", columns)
    seen = items.agg(
        sf.count("*").alias("rows"),
        sf.count_distinct("item_id").alias("ids"),
        sf.count_if(sf.col("item_id").isNull()).alias("no_id"),
        sf.count_if(sf.col("title").isNull()).alias("no_title"),
    ).first()
    assert seen is not None
    if seen["no_id"] or seen["no_title"]:
        raise DataError(
            f"items: {seen['no_id']:,} rows without item_id and {seen['no_title']:,} without title, of "
            f"{seen['rows']:,}; every item needs both"
        )
    if seen["ids"] != seen["rows"]:
        raise DataError(f"items: {seen['rows']:,} rows hold {seen['ids']:,} different item_id; each may stand once")
    return int(seen["rows"])


def links_ddl(items: DataFrame) -> str:
    """`schemas.LINKS` in Spark's words, item_id being of the items' type."""
    id_type = dict(items.dtypes)["item_id"]
    return (
        f"item_id {id_type}, wiki_page_id bigint, wiki_title string, link_score double, method string, "
        "runner_up string, reason string"
    )


def check_columns(frame: DataFrame, table: str, columns: Sequence[str]) -> None:
    """Raise SchemaError unless the table has these columns."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise SchemaError(
            f"{table}: column {', '.join(map(repr, missing))} is missing; seen: {', '.join(frame.columns)}; "
            f"needed: {', '.join(columns)}"
        )


def redirects(pages: DataFrame) -> DataFrame:
    """Where redirects lead in the end.

    Args:
        pages: wiki_title and redirect_to (null where a page is none).

    Returns:
        alias and wiki_title, each alias once. A target that is no page of the table is among them, and so is a
        redirect in a loop.
    """
    from pyspark.sql import functions as sf

    hops = pages.where("redirect_to is not null").select(
        sf.col("wiki_title").alias("alias"),
        sf.trim(sf.regexp_replace(sf.split("redirect_to", "#")[0], "_", " ")).alias("wiki_title"),
    )
    for _ in range(_DOUBLINGS):
        further = hops.select(sf.col("alias").alias("wiki_title"), sf.col("wiki_title").alias("further"))
        hops = hops.join(further, "wiki_title", "left").select(
            "alias", sf.coalesce("further", "wiki_title").alias("wiki_title")
        )
    return hops


def aliases(pages: DataFrame) -> DataFrame:
    """wiki_title, and `aliases`: the titles of all redirects that lead to it."""
    from pyspark.sql import functions as sf

    return redirects(pages).groupBy("wiki_title").agg(sf.collect_set("alias").alias("aliases"))
