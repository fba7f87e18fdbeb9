"""Only the pages that are wanted, through the index of a multistream dump."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kellm_features.errors import DataError
from kellm_features.schemas import PAGES
from kellm_spark.dump.bzip2 import AGAIN, stream
from kellm_spark.dump.check import Site, check_dump
from kellm_spark.dump.disambiguation import articles_of
from kellm_spark.dump.files import open_file
from kellm_spark.dump.pages import pages_in
from kellm_spark.dump.rows import PARSED_DDL, Rows, batches
from kellm_spark.session import spark_reason

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_ID = re.compile(rb"<id>\s*(\d{1,18})\s*</id>")
TASKS = 32
"""Of `read_streams`, which does not know how many streams there will be."""


def read_index(spark: SparkSession, index: str | Path) -> DataFrame:
    """A multistream index: stream_offset (byte of the dump), wiki_page_id, wiki_title, of all namespaces.

    A line that is not `offset:page id:title` has null in stream_offset.
    """
    from pyspark.sql import functions as sf

    line = sf.regexp_extract
    frame = spark.read.text(str(index)).where(sf.length(sf.trim("value")) > 0)
    title = line("value", r"^\d+:\d+:(.+)$", 1)
    # Indexes of Wikimedia's escape titles as XML does; a title itself never holds such an entity.
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#039;", "'"), ("&amp;", "&")):
        title = sf.replace(title, sf.lit(entity), sf.lit(character))
    return frame.select(
        sf.expr(r"try_cast(regexp_extract(value, '^(\\d+):(\\d+):(.+)$', 1) as bigint)").alias("stream_offset"),
        sf.expr(r"try_cast(regexp_extract(value, '^(\\d+):(\\d+):(.+)$', 2) as bigint)").alias("wiki_page_id"),
        title.alias("wiki_title"),
    )


def read_streams(spark: SparkSession, dump: str | Path, index: str | Path, wanted_titles: DataFrame) -> DataFrame:
    """The articles and redirects of a multistream dump that have one of the wanted titles.

    Only the streams that hold them are read and decompressed. Redirects are rows, not followed: ask again for the
    titles they lead to. Disambiguation pages are told by their own text and the names of their templates.

    Args:
        spark: the session.
        dump: `…multistream.xml.bz2`, at the same path on every machine, or a URI.
        index: its `…multistream-index.txt.bz2`, packed or not.
        wanted_titles: wiki_title, exactly as pages spell them.

    Returns:
        `schemas.PAGES`, namespace 0 only, in no particular order.

    Raises:
        DataError: see `check_dump`. An index that does not fit shows when the rows are made: use it inside
            `session.data_errors()`.
    """
    from pyspark.sql import functions as sf

    site = check_dump(dump)
    lines = check_index(read_index(spark, index), str(index))
    wanted = lines.join(wanted_titles.select(sf.col("wiki_title")).distinct(), "wiki_title", "left_semi")
    return articles_of(parse_streams(spark, str(dump), site, wanted, tasks=TASKS)).select(*PAGES.names)


def check_index(index: DataFrame, path: str) -> DataFrame:
    """The index as given, once all of its lines are found to be lines of an index.

    Raises:
        DataError: it cannot be read, is empty, or is something else.
    """
    from pyspark.sql import functions as sf

    try:
        told = index.agg(sf.count("*").alias("lines"), sf.count("stream_offset").alias("read")).first()
    except Exception as error:  # py4j's errors and pyspark's share no base
        raise DataError(
            f"{path} cannot be read ({spark_reason(error)[:200]}): the index of a multistream dump was expected; "
            f"{AGAIN}"
        ) from error
    assert told is not None
    if not told["lines"] or told["lines"] > told["read"]:
        raise DataError(
            f"{path} is no multistream index: {told['lines'] - told['read']:,} of its {told['lines']:,} lines are not "
            "of the form  offset:page id:title"
        )
    return index


def parse_streams(
    spark: SparkSession, dump: str, site: Site, wanted: DataFrame, *, tasks: int, lead_only: bool = False
) -> DataFrame:
    """Wanted pages of one dump, skipped ones too.

    Args:
        spark: the session.
        dump: the multistream file.
        site: the dump's wiki.
        wanted: lines of its index, from `read_index`.
        tasks: partitions of the result.
        lead_only: leave the sections out.

    Returns:
        `rows.PARSED`; the first row of a stream carries the bytes of the whole stream.
    """
    from pyspark.sql import functions as sf

    streams = wanted.groupBy("stream_offset").agg(sf.sort_array(sf.collect_set("wiki_page_id")).alias("page_ids"))
    # With a number, as adaptive execution would fold these few bytes into one task.
    return streams.repartition(tasks, "stream_offset").mapInArrow(_reader(dump, site, lead_only), PARSED_DDL)


def _reader(dump: str, site: Site, lead_only: bool) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def rows(wanted: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
        made = Rows(site, lead_only=lead_only)
        with open_file(dump) as file:
            for batch in wanted:
                for offset, page_ids in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    missing = set(page_ids)
                    text = stream(file, dump, offset)
                    taken = len(text)
                    for element, skipped in pages_in([(text, True)]):
                        # The first <id> is the page's; the others are of its revision and its author.
                        found = _ID.search(element)
                        if found and int(found[1]) in missing:
                            missing.remove(int(found[1]))
                            yield made.row(element, skipped) | {"xml_bytes": taken}
                            taken = 0
                    if missing:
                        raise DataError(
                            f"{dump} has no page {min(missing)} in the stream at byte {offset:,}, where its index says "
                            "so: they do not belong together; take both from one dump"
                        )

    def read(wanted: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from batches(rows(wanted))

    return read
