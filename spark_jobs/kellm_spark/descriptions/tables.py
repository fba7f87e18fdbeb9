"""What is to be described, as one row per item or user with all that its prompt is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kellm_features.errors import DataError, SchemaError
from kellm_features.schemas import INTERACTIONS
from kellm_spark.linking.job import read_pages
from kellm_spark.storage import read_table
from kellm_spark.tables import check_columns, check_items

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

MOST_BROADCAST = 2_000_000
"""Page ids that are sent to every executor, 16 MB, so that only linked pages are shuffled."""
_INTEGERS = ("tinyint", "smallint", "int", "bigint")


def read_items(session: SparkSession, path: str) -> DataFrame:
    """The catalogue: item_id (bigint or string), title, year (int or null), genres (array, empty where unknown).

    Args:
        session: reads it.
        path: Parquet or CSV with item_id and title; year, and genres as a list or as text with | between them, may be
            missing.

    Raises:
        SchemaError: no item_id or no title.
        DataError: an item without id or title, an id that stands twice, or a year that is none.
    """
    from pyspark.sql import functions as sf

    frame = read_table(session, path, ids=("item_id",))
    check_items(frame, ("item_id", "title"))
    types = dict(frame.dtypes)
    genres = sf.array().cast("array<string>")
    if "genres" in types:
        told = sf.col("genres") if types["genres"].startswith("array") else sf.split("genres", r"\|")
        genres = sf.coalesce(sf.filter(told.cast("array<string>"), lambda genre: genre.isNotNull()), genres)
    year = sf.lit(None).cast("int")
    if "year" in types:
        year = sf.col("year").try_cast("int")
        if types["year"] not in ("tinyint", "smallint", "int"):
            _check_years(frame.select("item_id", sf.col("year").alias("told"), year.alias("year")))
    return frame.select(
        _id(frame, "item_id"),
        sf.col("title").cast("string").alias("title"),
        year.alias("year"),
        genres.alias("genres"),
    )


def read_users(session: SparkSession, path: str) -> DataFrame:
    """The users: user_id (bigint or string); gender, age, occupation (strings, null where unknown or missing).

    Raises:
        SchemaError: no user_id.
        DataError: a user without id, or an id that stands twice.
    """
    from pyspark.sql import functions as sf

    frame = read_table(session, path, ids=("user_id",))
    check_columns(frame, "users", ["user_id"])
    told = frame.agg(sf.count("*"), sf.count("user_id"), sf.count_distinct("user_id")).first()
    assert told is not None
    rows, ids, distinct = told
    if ids < rows or distinct < ids:
        raise DataError(
            f"users: {rows:,} rows hold {rows - ids:,} without user_id and {distinct:,} different ones; "
            "each user may stand once"
        )
    known = [
        (sf.col(name) if name in frame.columns else sf.lit(None)).cast("string").alias(name)
        for name in ("gender", "age", "occupation")
    ]
    return frame.select(_id(frame, "user_id"), *known)


def read_interactions(session: SparkSession, path: str, users: DataFrame, items: DataFrame) -> DataFrame:
    """`schemas.INTERACTIONS` as the stage `ingest` wrote them.

    Raises:
        SchemaError: a column is missing, or ids are of another type than those of users and items.
        DataError: an item that the catalogue lacks.
    """
    frame = session.read.parquet(path)
    check_columns(frame, "interactions", INTERACTIONS.names)
    frame = frame.select(_id(frame, "user_id"), _id(frame, "item_id"), "rating", "liked", "event_timestamp", "split")
    _same_type(frame, "interactions", users, "users", "user_id")
    _same_type(frame, "interactions", items, "items", "item_id")
    unknown = frame.join(items, "item_id", "left_anti").select("item_id").first()
    if unknown is not None:
        raise DataError(
            f"interactions: item {unknown[0]!r} is not in the catalogue; give the items that were ingested with them"
        )
    return frame


def read_descriptions(session: SparkSession, path: str, items: DataFrame) -> DataFrame:
    """item_id and description of items, as this job or the stage `generate` wrote them.

    Raises:
        SchemaError: a column is missing, or ids are of another type than those of the items.
        DataError: an item stands twice.
    """
    frame = session.read.parquet(_inside(path, "item_descriptions.parquet"))
    check_columns(frame, "descriptions", ["item_id", "description"])
    frame = frame.select(_id(frame, "item_id"), "description")
    _same_type(frame, "descriptions", items, "items", "item_id")
    twice = frame.groupBy("item_id").count().where("count > 1").first()
    if twice is not None:  # each event of the item would
        raise DataError(f"descriptions: item {twice[0]!r} stands {twice[1]} times; each may stand once")
    return frame


def item_rows(session: SparkSession, items: DataFrame, links: str | None, pages: str | None) -> DataFrame:
    """Items with the text of their pages, which goes from the pages' partitions to the items' and nowhere else.

    Args:
        session: reads.
        items: see `read_items`.
        links: folder of `kellm link`, or the stage's; None: every prompt is closed-book.
        pages: folder of `kellm wiki`, or the stage's.

    Returns:
        item_id, title, year, genres, and pages: array of structs with wiki_title, lead and sections, the best link
        first.

    Raises:
        SchemaError: a column is missing, or ids are of two types.
        DataError: a page that an item is linked to is missing, or stands twice.
    """
    from pyspark.sql import functions as sf

    if links is None or pages is None:
        none = "array<struct<wiki_title:string,lead:string,sections:array<struct<name:string,text:string>>>>"
        return items.withColumn("pages", sf.array().cast(none))
    told = session.read.parquet(_inside(links, "links.parquet"))
    check_columns(told, "links", ["item_id", "wiki_page_id", "link_score"])
    told = told.where("wiki_page_id is not null").select(_id(told, "item_id"), "wiki_page_id", "link_score")
    _same_type(told, "links", items, "items", "item_id")
    told = told.join(items, "item_id", "left_semi")
    texts = read_pages(session, pages).select("wiki_page_id", "wiki_title", "lead", "sections")
    wanted = told.select("wiki_page_id").distinct()
    if _check_linked(wanted, texts, pages) <= MOST_BROADCAST:
        wanted = sf.broadcast(wanted)
    texts = texts.join(wanted, "wiki_page_id", "left_semi")
    of_item = (
        told.join(texts, "wiki_page_id")
        .select(
            "item_id",
            sf.struct(
                (-sf.col("link_score")).alias("by_score"), "wiki_page_id", "wiki_title", "lead", "sections"
            ).alias("page"),
        )
        .groupBy("item_id")
        .agg(sf.sort_array(sf.collect_list("page")).alias("ranked"))
    )
    best_first = sf.transform(
        sf.coalesce("ranked", sf.array()),
        lambda page: sf.struct(*(page[name].alias(name) for name in ("wiki_title", "lead", "sections"))),
    )
    return items.join(of_item, "item_id", "left").select(
        "item_id", "title", "year", "genres", best_first.alias("pages")
    )


def user_rows(users: DataFrame, history: DataFrame, items: DataFrame, descriptions: DataFrame) -> DataFrame:
    """Users with their histories and the descriptions of the items in them.

    Args:
        users: see `read_users`.
        history: see `histories.histories`.
        items: see `read_items`.
        descriptions: item_id and description; an item may lack one.

    Returns:
        user_id, gender, age, occupation, and events: array of structs with title, year, genres, rating, liked and
        description, in time order, empty where nothing is known.
    """
    from pyspark.sql import functions as sf

    event = ("title", "year", "genres", "rating", "liked", "description")
    of_user = (
        history.join(items, "item_id")
        .join(descriptions, "item_id", "left")
        .select("user_id", sf.struct("position", *event).alias("event"))
        .groupBy("user_id")
        .agg(sf.sort_array(sf.collect_list("event")).alias("known"))
    )
    events = sf.transform(
        sf.coalesce("known", sf.array()), lambda known: sf.struct(*(known[name].alias(name) for name in event))
    )
    return users.join(of_user, "user_id", "left").select(
        "user_id", "gender", "age", "occupation", events.alias("events")
    )


def in_shards(rows: DataFrame, key: str, shards: int) -> DataFrame:
    """The rows with their shard, each shard whole in one partition and sorted by id.

    A shard is the id's xxHash64 modulo the number of shards: an id keeps its shard whatever else is in the table.
    """
    from pyspark.sql import functions as sf

    shard = sf.pmod(sf.xxhash64(sf.col(key).cast("string")), sf.lit(shards)).cast("int")
    numbered = rows.withColumn("shard", shard)
    if hasattr(numbered, "repartitionById"):  # since Spark 4.1: a shard a task
        spread = numbered.repartitionById(shards, "shard")
    else:  # some tasks get two shards or more, some none
        spread = numbered.repartition(shards, "shard")
    return spread.sortWithinPartitions("shard", key)


def _check_years(years: DataFrame) -> None:
    """Refuse values of `told` of which `year` holds nothing; a missing one may be missing."""
    from pyspark.sql import functions as sf

    lost = years.where("told is not null and year is null")
    found = lost.agg(sf.count("*"), sf.min(sf.struct("item_id", sf.col("told").cast("string")))).first()
    assert found is not None
    rows, first = found
    if rows:
        raise DataError(
            f"items: year is {first[1]!r} of item {first[0]!r}, and no whole number in {rows:,} rows; leave unknown "
            "years empty"
        )


def _check_linked(wanted: DataFrame, texts: DataFrame, where: str) -> int:
    """Refuse links to pages that are missing or stand twice; return how many pages are linked."""
    from pyspark.sql import functions as sf

    standing = texts.select("wiki_page_id").join(wanted, "wiki_page_id", "left_semi").groupBy("wiki_page_id").count()
    told = (
        wanted.join(standing, "wiki_page_id", "left")
        .agg(
            sf.count("*").alias("rows"),
            sf.min(sf.when(sf.col("count").isNull(), sf.col("wiki_page_id"))).alias("missing"),
            sf.min(sf.when(sf.col("count") > 1, sf.col("wiki_page_id"))).alias("twice"),
        )
        .first()
    )
    assert told is not None
    for page, what in ((told["missing"], "is not there"), (told["twice"], "stands twice")):
        if page is not None:
            raise DataError(f"{where}: page {page}, to which an item is linked, {what}: link the items to these pages")
    return int(told["rows"])


def _id(frame: DataFrame, name: str) -> Column:
    from pyspark.sql import functions as sf

    return sf.col(name).cast("bigint" if dict(frame.dtypes)[name] in _INTEGERS else "string").alias(name)


def _same_type(frame: DataFrame, table: str, other: DataFrame, other_table: str, name: str) -> None:
    seen, wanted = dict(frame.dtypes)[name], dict(other.dtypes)[name]
    if seen != wanted:
        raise SchemaError(
            f"{table}: {name} is {seen}, and {wanted} in {other_table}: ids must be of one type, bigint or string"
        )


def _inside(path: str, name: str) -> str:
    """The table in a stage's folder, or the path itself."""
    inside = Path(path) / name
    return str(inside) if inside.exists() else path
