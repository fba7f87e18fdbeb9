"""What was read and what was left out; and when that is too little to go on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kellm_features.errors import DataError
from kellm_spark.dump.bzip2 import AGAIN
from kellm_spark.dump.pages import TOO_LARGE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

MOST_MALFORMED_SHARE = 0.01
MOST_MALFORMED = 5
"""So many malformed pages are counted in a dump of any size; more only up to their share."""


@dataclass(frozen=True)
class Tally:
    """Pages of a dump, by what became of them."""

    pages: int
    """All that were met."""
    other_namespaces: int
    skipped: dict[str, int]
    """Reason -> pages that were not read."""
    xml_bytes: int
    """Of XML taken in."""
    example: str
    """The beginning of a malformed page; empty where there is none."""

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> pages that are no rows."""
        return {**({"other namespaces": self.other_namespaces} if self.other_namespaces else {}), **self.skipped}


def tally(parsed: DataFrame, source: str) -> Tally:
    """Count the rows of `rows.PARSED`, and refuse what would make a misleading table.

    Args:
        parsed: written rows; they are read twice.
        source: the dump's name, for messages.

    Raises:
        DataError: a page is there twice, no page is an article, or too many are malformed.
    """
    from pyspark.sql import functions as sf

    of_kind = parsed.groupBy("skipped", (sf.col("namespace") == 0).alias("article")).agg(
        sf.count("*").alias("pages"), sf.sum("xml_bytes").alias("xml_bytes"), sf.min("wiki_title").alias("example")
    )
    found = of_kind.collect()
    skipped = {
        reason: sum(row.pages for row in found if row.skipped == reason)
        for reason in sorted({row.skipped for row in found if row.skipped})
    }
    malformed = {reason: count for reason, count in skipped.items() if reason != TOO_LARGE}
    told = Tally(
        pages=sum(row.pages for row in found),
        other_namespaces=sum(row.pages for row in found if not row.skipped and not row.article),
        skipped=skipped,
        xml_bytes=sum(row.xml_bytes for row in found),
        example=min((row.example for row in found if row.skipped in malformed), default=""),
    )
    bad = sum(malformed.values())
    if bad > max(MOST_MALFORMED, MOST_MALFORMED_SHARE * told.pages) or (bad and bad == told.pages):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in malformed.items())
        raise DataError(
            f"{source}: {bad:,} of {told.pages:,} pages cannot be read ({counts}), as in {told.example}; up to "
            f"{MOST_MALFORMED_SHARE:.0%} are skipped and counted, more is a damaged dump or one in another encoding "
            f"than UTF-8: {AGAIN}"
        )
    if not any(row.article for row in found if not row.skipped):
        seen = "".join(f", {count:,} skipped: {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{source} holds {told.pages:,} pages and none of them is an article (namespace 0){seen}: take a "
            "pages-articles dump"
        )
    _refuse_twice(parsed, source)
    return told


def _refuse_twice(parsed: DataFrame, source: str) -> None:
    from pyspark.sql import functions as sf

    seen: Any = (
        parsed.where("skipped is null")
        .groupBy("wiki_page_id")
        .agg(sf.count("*").alias("times"), sf.min("wiki_title").alias("title"))
        .where("times > 1")
        .orderBy("wiki_page_id")
        .first()
    )
    if seen is not None:
        raise DataError(
            f"{source}: page {seen.wiki_page_id} ({seen.title!r}) is there {seen.times} times; the plain and the "
            "multistream form of a dump hold the same pages: name one of them, and each part once"
        )
