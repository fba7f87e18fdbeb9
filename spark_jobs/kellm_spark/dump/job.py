"""A dump, written to a folder of pages: what `kellm wiki --dump`, spark-submit and the stage of a run do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from kellm_features import __version__
from kellm_features.errors import ConfigError, DataError
from kellm_spark.dump.check import Site, check_parts
from kellm_spark.dump.disambiguation import resolve_pages
from kellm_spark.dump.files import find_parts, size_of
from kellm_spark.dump.reading import parse_dump, split_parts
from kellm_spark.dump.tally import Tally, tally
from kellm_spark.dump.wanted import parse_wanted
from kellm_spark.session import data_errors, follow, get_session, spark_reason
from kellm_spark.storage import MANIFEST, SAME_BYTES, Folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from kellm_features.settings import SparkSettings

XML_PER_FILE = 1 << 30
"""Bytes of XML whose rows make one file, of 60 to 120 MB: a full enwiki becomes about 100 files."""
XML_OF_BZ2 = 4
"""Bytes of XML in a byte of bz2, roughly."""

Items = Callable[["SparkSession"], "DataFrame"]
"""Reads a catalogue: item_id, title, year."""


@dataclass(frozen=True)
class WikiJob:
    """One dump to one folder of pages."""

    dumps: tuple[str, ...]
    """Paths, folders, glob patterns or URIs of `.xml` and `.xml.bz2`."""
    out: str
    """Folder of Parquet, wherever Spark can write."""
    lead_only: bool = False
    """Leave `sections` empty."""
    index: str | None = None
    """Of the one multistream dump; None: the one that lies beside each part. For a catalogue only."""
    domain: str = "movies"
    """What a catalogue's items are."""
    overwrite: bool = False


def run_wiki_job(job: WikiJob, settings: SparkSettings, catalogue: Items | None = None) -> dict[str, Any]:
    """Read and write the pages; return the manifest, which also lies in the folder as `_manifest.json`.

    Args:
        job: what to read and where to write.
        settings: of the session.
        catalogue: when given, only pages that its items could link to are read, through the multistream index.

    Raises:
        DataError: a file is no whole dump, the output exists, or see `tally`.
    """
    from pyspark.errors import AnalysisException

    if job.index and catalogue is None:
        raise ConfigError("--index is for reading the pages of a catalogue's items alone: add --catalogue")
    started = time.perf_counter()
    parts = find_parts(job.dumps)
    session = get_session(settings)
    folder = Folder(session, job.out, overwrite=job.overwrite)
    if folder.remote:
        raise DataError("kellm wiki needs a session in this process, not Spark Connect; there call read_dump")
    site = check_parts(parts)
    parsed = Folder(session, f"{folder.path}.parsed", overwrite=True)  # never published
    try:
        with data_errors():
            if catalogue is None:
                _parse_all(session, parts, site, parsed.staging, job.lead_only)
                read = [parsed.staging]
            else:
                read = parse_wanted(
                    session,
                    parts,
                    site,
                    catalogue(session),
                    parsed.staging,
                    job.domain,
                    job.index,
                    lead_only=job.lead_only,
                )
            told, written = write_pages(session, read, folder.staging, parts, files_for(parts) if not catalogue else 1)
    except AnalysisException as error:  # no such path
        folder.discard()
        raise DataError(f"{spark_reason(error)} (dump: {', '.join(job.dumps)}; out: {job.out})") from error
    except BaseException:
        folder.discard()
        raise
    finally:
        parsed.discard()
    manifest = {
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dumps": [{"path": part, "bytes": size_of(part)} for part in parts],
        "wiki": {"dbname": site.dbname, "language": site.language},
        "catalogue": catalogue is not None,
        "lead_only": job.lead_only,
        **{key: value for key, value in asdict(told).items() if key != "example"},
        **written,
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder.write_json(MANIFEST, manifest)
    folder.publish()
    return manifest


def write_run(
    session: SparkSession, parts: Sequence[str], parsed: str, out: str, lead_only: bool = False
) -> tuple[Tally, dict[str, Any]]:
    """The pages of a run: `parsed` is a folder for rows on their way, which the caller removes; see `write_pages`."""
    site = check_parts(parts)
    with data_errors():
        _parse_all(session, parts, site, parsed, lead_only)
        return write_pages(session, [parsed], out, parts, files_for(parts))


def files_for(parts: Sequence[str]) -> int:
    """Files of the table: it depends on the dump alone, so that the same dump makes the same files."""
    xml = sum(size_of(part) * (XML_OF_BZ2 if part.endswith(".bz2") else 1) for part in parts)
    return 1 + xml // XML_PER_FILE


def write_pages(
    session: SparkSession, parsed: Sequence[str], out: str, parts: Sequence[str], files: int
) -> tuple[Tally, dict[str, Any]]:
    """Parsed rows to `schemas.PAGES`, sorted by page id within each file.

    Returns:
        What was met, and of what was written: rows, redirects, disambiguations, dated, evidence (kind -> pages).

    Raises:
        DataError: see `tally`.
    """
    rows = session.read.parquet(*parsed)
    told = tally(rows, parts[0] if len(parts) == 1 else f"{PurePath(parts[0]).name} … ({len(parts)} files)")
    pages = resolve_pages(rows).repartition(files, "wiki_page_id").sortWithinPartitions("wiki_page_id")
    pages.write.options(**SAME_BYTES, compression="zstd").parquet(out)
    return told, _written(session.read.parquet(out))


def _parse_all(session: SparkSession, parts: Sequence[str], site: Site, parsed: str, lead_only: bool) -> None:
    splits = split_parts(parts)
    with follow(session, "wiki", len(splits)):
        parse_dump(session, splits, site, lead_only=lead_only).write.parquet(parsed)


def _written(pages: DataFrame) -> dict[str, Any]:
    from pyspark.sql import functions as sf

    told = pages.agg(
        sf.count("*").alias("rows"),
        sf.count("redirect_to").alias("redirects"),
        sf.count_if("is_disambiguation").alias("disambiguations"),
        sf.count("year").alias("dated"),
    ).first()
    assert told is not None
    kinds = pages.select(sf.explode("evidence").alias("kind")).groupBy("kind").count().collect()
    return {
        **{key: int(value) for key, value in told.asDict().items()},
        "evidence": {row["kind"]: row["count"] for row in sorted(kinds, key=lambda row: (-row["count"], row["kind"]))},
    }
