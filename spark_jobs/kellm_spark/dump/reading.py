"""All pages of a dump, in parallel inside each file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from kellm_spark.dump.check import Site, check_parts
from kellm_spark.dump.disambiguation import resolve_pages
from kellm_spark.dump.files import find_parts, size_of
from kellm_spark.dump.pages import Split, plan_splits, read_pages
from kellm_spark.dump.rows import PARSED_DDL, Rows, batches

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SPLIT_BYTES = {"bz2": 2 << 20, "xml": 8 << 20}
"""Of a small dump, about 8 MB of text: tasks of a second or two, to spread and to show progress by."""
LARGER_AFTER, LARGEST = 64, 8
"""With more splits than this they grow, up to so many times: the block that straddles two is decompressed twice, and
a full enwiki (25 GB) stays at 1,500 tasks."""


def read_dump(spark: SparkSession, path: Path | str | Sequence[Path | str]) -> DataFrame:
    """The articles and redirects of a MediaWiki XML dump.

    The dump's own <siteinfo> says what its namespaces are called; redirects come from the <redirect> elements;
    disambiguation pages are those whose templates hold `__DISAMBIG__`. Templates are not expanded, and of several
    revisions of a page the last one counts.

    Pages that are not well-formed are left out, and the dump is read twice: `job.run_wiki_job` counts what it skips,
    refuses a dump with too much of it, and reads once.

    Args:
        spark: the session.
        path: `.xml` or `.xml.bz2` (one stream or many), a folder or a glob pattern of them, or several; at the same
            path on every machine, or a URI.

    Returns:
        `schemas.PAGES`, namespace 0 only, in no particular order.

    Raises:
        DataError: a file is missing, empty, not a MediaWiki dump, not UTF-8, cut off, or declares a document type.
            Damage in the middle shows when the rows are made: use it inside `session.data_errors()`.
    """
    parts = find_parts([path] if isinstance(path, str | Path) else path)
    return resolve_pages(parse_dump(spark, split_parts(parts), check_parts(parts)))


def split_parts(parts: Sequence[str]) -> list[Split]:
    """The ranges in which the parts of a dump are read, one a task."""
    sizes = {part: size_of(part) for part in parts}
    unit = {part: SPLIT_BYTES["bz2" if part.endswith(".bz2") else "xml"] for part in parts}
    growth = min(max(sum(size / unit[part] for part, size in sizes.items()) / LARGER_AFTER, 1), LARGEST)
    return [split for part, size in sizes.items() for split in plan_splits({part: size}, round(unit[part] * growth))]


def parse_dump(spark: SparkSession, splits: Sequence[Split], site: Site, *, lead_only: bool = False) -> DataFrame:
    """Every page of the given ranges, skipped ones too.

    Returns:
        `rows.PARSED`, one partition a split.
    """
    frame = spark.range(0, len(splits), 1, len(splits))
    return frame.mapInArrow(_reader(list(splits), site, lead_only), PARSED_DDL)


def _reader(
    splits: list[Split], site: Site, lead_only: bool
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def read(numbers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = Rows(site, lead_only=lead_only)
        yield from batches(
            rows.row(element, skipped)
            for batch in numbers
            for number in batch.column(0).to_pylist()
            for element, skipped in read_pages(splits[number])
        )

    return read
