"""The pages that a catalogue's items could link to, and what those pages lead to, through multistream indexes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

from kellm_features.errors import DataError
from kellm_spark.dump.check import Site
from kellm_spark.dump.files import find_index
from kellm_spark.dump.rows import TEMPLATE_NAMESPACE
from kellm_spark.dump.streams import check_index, parse_streams, read_index
from kellm_spark.session import follow

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

ROUNDS = 3
"""Titles, then the targets of redirects and the templates called, then the targets of redirects among those."""
_STREAMS_PER_TASK, _MOST_TASKS = 16, 2048


def parse_wanted(
    session: SparkSession,
    parts: Sequence[str],
    site: Site,
    items: DataFrame,
    folder: str,
    domain: str,
    index: str | None = None,
    *,
    lead_only: bool = False,
) -> list[str]:
    """Write the pages that items could link to as `rows.PARSED`; return the folders they lie in.

    Args:
        session: the session.
        parts: multistream dumps.
        site: their wiki.
        items: item_id, title, year.
        folder: where to write; it does not exist yet.
        domain: what the items are.
        index: of the one part; None: the index that lies beside each part.
        lead_only: leave the sections out.

    Raises:
        DataError: a part has no index, or one that does not fit.
    """
    from kellm_spark.linking import linkable_titles

    titles = _write_indexes(session, parts, f"{folder}/index", index)
    wanted = linkable_titles(items, titles.select("wiki_title").distinct(), domain=domain)
    done: list[str] = []
    for number in range(1, ROUNDS + 1):
        target = f"{folder}/round-{number}"
        if not _parse_round(session, parts, site, titles, wanted, target, lead_only):
            break
        done.append(target)
        wanted = _led_to(session.read.parquet(*done), titles, site)
    if not done:
        raise DataError(
            f"none of the catalogue's titles is a page of {parts[0]}"
            + (f" or of the other {len(parts) - 1} parts" if len(parts) > 1 else "")
            + ": take the dump of a wiki in the catalogue's language, or read it whole without --catalogue"
        )
    return done


def _write_indexes(session: SparkSession, parts: Sequence[str], folder: str, index: str | None) -> DataFrame:
    """part (its number), stream_offset, wiki_page_id, wiki_title: the text is parsed once for all rounds."""
    from pyspark.sql import functions as sf

    if index and len(parts) > 1:
        raise DataError(f"--index {index} is of one dump, and {len(parts)} are given: leave it out, or name one dump")
    for number, part in enumerate(parts):
        path = index or find_index(part)
        if path is None:
            raise DataError(
                f"{part} has no multistream index beside it: put its …multistream-index….txt.bz2 there, name it with "
                "--index, or read the dump whole without --catalogue"
            )
        frame = check_index(read_index(session, path), path)
        frame.withColumn("part", sf.lit(number)).write.mode("append").parquet(folder)
    return session.read.parquet(folder)


def _parse_round(
    session: SparkSession,
    parts: Sequence[str],
    site: Site,
    titles: DataFrame,
    wanted: DataFrame,
    target: str,
    lead_only: bool,
) -> bool:
    """Read the streams of some titles; whether there was one."""
    from pyspark.sql import functions as sf

    found = titles.join(wanted.distinct(), "wiki_title", "left_semi")
    counted = found.groupBy("part").agg(sf.count_distinct("stream_offset").alias("streams")).collect()
    streams = {row["part"]: row["streams"] for row in counted}
    if not streams:
        return False
    frames = []
    tasks = 0
    for number, count in sorted(streams.items()):
        spread = min(count // _STREAMS_PER_TASK + 1, _MOST_TASKS)
        index = found.where(sf.col("part") == number)
        frames.append(parse_streams(session, parts[number], site, index, tasks=spread, lead_only=lead_only))
        tasks += spread
    with follow(session, "wiki streams", tasks):
        reduce(lambda one, other: one.union(other), frames).write.parquet(target)
    return True


def _led_to(parsed: DataFrame, titles: DataFrame, site: Site) -> DataFrame:
    """The titles that parsed pages lead to and that are not among them: wiki_title."""
    from pyspark.sql import functions as sf

    targets = parsed.where("redirect_to is not null").select(sf.col("redirect_to").alias("wiki_title"))
    called = parsed.select(sf.explode("templates").alias("template")).distinct()
    # First letters, and in practice all others, may be written either way in a call.
    space = site.namespaces.get(TEMPLATE_NAMESPACE, "Template").lower()
    of_templates = titles.where(sf.lower("wiki_title").startswith(f"{space}:")).select(
        "wiki_title", sf.lower(sf.substr("wiki_title", sf.lit(len(space) + 2))).alias("template")
    )
    templates = of_templates.join(called, "template", "left_semi").select("wiki_title")
    return targets.union(templates).distinct().join(parsed.select("wiki_title"), "wiki_title", "left_anti")
