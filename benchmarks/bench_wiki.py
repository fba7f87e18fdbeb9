"""What reading a MediaWiki dump costs; appends rows to benchmarks/data.

python benchmarks/bench_wiki.py speed --dump DUMP --copies 4 --turns 2
python benchmarks/bench_wiki.py memory --dump DUMP --copies 1 4 16
python benchmarks/bench_wiki.py indexed --dump DUMP --catalogue PATH

DUMP is a multistream dump; `--copies N` makes one bz2 file of its pages N times, renumbered. Every measured run is a
process of its own on local[2]. `wall_s` and `cpu_s` are of its whole tree from start to end; `work_s` and
`work_cpu_s` begin with the session up. `mb_s` is MB of XML over `work_s`.

xml_source: Spark's own reader, told the schema, into title, ns, id, redirect and text; with Java's full compiler,
which it likes better than our sessions' settings. ours_columns: our reader into the same columns. ours_lead,
ours_rows: our reader, with wikitext turned to plain text (of leads; of all), categories, evidence and years. These
four hand their rows to Spark's `noop` sink. ours: `kellm wiki`, which also counts, resolves, sorts and writes.
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import pyarrow as pa
from bench_place import append_rows, provenance

from kellm_features.usage import measure

DATA = Path(__file__).resolve().parent / "data"
PLACE = ["machine", "cores", "memory_gib", "python", "pyspark", "commit", "date"]
COSTS = ["work_s", "work_cpu_s", "wall_s", "cpu_s", "peak_mib"]
FIELDS = {
    "speed": ["dataset", "copies", "xml_mb", "bz2_mb", "pages", "impl", "turn", "mb_s", "cpu_mb_s", *COSTS, "rows_out"],
    "memory": ["dataset", "copies", "xml_mb", "bz2_mb", "pages", "impl", "mb_s", *COSTS, "rows_out"],
    "indexed": ["dataset", "impl", "xml_mb_read", "xml_mb", *COSTS, "rows_out"],
}
IMPLS = ["xml_source", "ours_columns", "ours_lead", "ours_rows", "ours"]
COLUMNS = (
    "title string, ns int, id bigint, redirect struct<_title: string>, revision struct<text: struct<_VALUE: string>>"
)
PAGES_PER_STREAM = 100
Row = dict[str, Any]


def main() -> None:
    """Run the subcommand that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*FIELDS, "one"])
    parser.add_argument("--dump", type=Path, required=True)
    parser.add_argument("--name", default="enwiki-films", help="of the dump in the rows")
    parser.add_argument("--copies", type=int, nargs="+", default=[4])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--impl", action="append", choices=IMPLS)
    parser.add_argument("--catalogue", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, help="of `one`: the Parquet folder")
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(one(options.impl[0], options.dump, options.out, options.catalogue)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-wiki-") as folder:
        {"speed": speed, "memory": memory, "indexed": indexed}[options.what](options, Path(folder))


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Implementations in turn on the same file, in another order every turn."""
    dump, size = multiply(options.dump, options.copies[0], folder)
    impls = options.impl or IMPLS
    for turn in range(options.turns):
        for impl in impls if turn % 2 == 0 else impls[::-1]:
            row = run(impl, dump, folder / "out")
            row |= {"mb_s": round(size["xml_mb"] / row["work_s"], 1)}
            row |= {"cpu_mb_s": round(size["xml_mb"] / row["work_cpu_s"], 1)}
            append(options, {"copies": options.copies[0], **size, "impl": impl, "turn": turn + 1, **row})


def memory(options: argparse.Namespace, folder: Path) -> None:
    """The same command on more and more copies."""
    for copies in sorted(options.copies):
        dump, size = multiply(options.dump, copies, folder)
        for impl in options.impl or ["ours"]:
            row = run(impl, dump, folder / "out")
            row["mb_s"] = round(size["xml_mb"] / row["work_s"], 1)
            append(options, {"copies": copies, **size, "impl": impl, **row})
        dump.unlink()


def indexed(options: argparse.Namespace, folder: Path) -> None:
    """The pages of a catalogue's items through the index, and the whole dump."""
    rows = {
        "ours_indexed": run("ours", options.dump, folder / "out", options.catalogue),
        "ours": run("ours", options.dump, folder / "out"),
    }
    for impl, row in rows.items():
        append(options, {"impl": impl, "xml_mb": rows["ours"]["xml_mb_read"], **row})


def run(impl: str, dump: Path, out: Path, catalogue: Path | None = None) -> Row:
    """One process, measured."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "one", "--impl", impl, "--dump", str(dump), "--out", str(out)]
    command += ["--catalogue", str(catalogue)] if catalogue else []
    with measure(own=False) as usage:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{impl}: {done.stderr[-2000:]}")
    told: Row = json.loads(done.stdout.splitlines()[-1])
    row = told | {"wall_s": usage.seconds, "cpu_s": usage.cpu_seconds, "peak_mib": usage.peak_mib}
    return {key: round(value, 2) for key, value in row.items()}


def one(impl: str, dump: Path, out: Path, catalogue: Path | None) -> Row:
    """One implementation in this process."""
    from pyspark.sql import Observation
    from pyspark.sql import functions as sf

    from kellm_features.settings import SparkSettings
    from kellm_spark.dump.job import WikiJob, run_wiki_job
    from kellm_spark.session import get_session, stop_session

    conf = {"spark.driver.extraJavaOptions": "-Dlog4j2.level=ERROR"} if impl == "xml_source" else {}
    settings = SparkSettings(master="local[2]", conf=conf)
    session = get_session(settings)
    session.range(2).count()
    told: Row = {}
    with measure() as usage:
        if impl == "ours":
            items = None
            if catalogue:
                from kellm_features.cli.catalogue import read_catalogue

                def items(spark: Any) -> Any:
                    return read_catalogue(spark, str(catalogue))

            manifest = run_wiki_job(WikiJob((str(dump),), str(out)), settings, items)
            told = {"xml_mb_read": manifest["xml_bytes"] / 1e6, "rows_out": manifest["rows"]}
        else:
            seen = Observation("rows")
            rows = read(impl, session, dump).observe(seen, sf.count("*").alias("rows"))
            rows.write.format("noop").mode("overwrite").save()
            told = {"rows_out": seen.get["rows"]}
    stop_session()
    return told | {"work_s": usage.seconds, "work_cpu_s": usage.cpu_seconds}


def read(impl: str, session: Any, dump: Path) -> Any:
    """The rows of a reader."""
    from kellm_spark.dump.check import check_parts
    from kellm_spark.dump.reading import parse_dump, split_parts

    if impl == "xml_source":
        return session.read.format("xml").option("rowTag", "page").schema(COLUMNS).load(str(dump))
    if impl == "ours_columns":
        return ours_columns(session, dump)
    parts = [str(dump)]
    return parse_dump(session, split_parts(parts), check_parts(parts), lead_only=impl == "ours_lead")


def ours_columns(session: Any, dump: Path) -> Any:
    """Our reader into the columns of the XML source."""
    from kellm_spark.dump.check import check_dump
    from kellm_spark.dump.pages import read_pages
    from kellm_spark.dump.reading import split_parts

    check_dump(dump)
    splits = split_parts([str(dump)])
    text = pa.struct([("text", pa.struct([("_VALUE", pa.string())]))])
    columns = [("title", pa.string()), ("ns", pa.int32()), ("id", pa.int64())]
    schema = pa.schema([*columns, ("redirect", pa.struct([("_title", pa.string())])), ("revision", text)])

    def read(numbers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from lxml import etree

        parser = etree.XMLParser(resolve_entities=False, huge_tree=True)
        for number in (number for batch in numbers for number in batch.column(0).to_pylist()):
            rows = []
            for element, _ in read_pages(splits[number]):
                page = etree.fromstring(element, parser)
                to = page.find("redirect")
                rows.append(
                    {
                        "title": page.findtext("title"),
                        "ns": int(page.findtext("ns")),
                        "id": int(page.findtext("id")),
                        "redirect": None if to is None else {"_title": to.get("title")},
                        "revision": {"text": {"_VALUE": page.findtext("revision/text")}},
                    }
                )
                if len(rows) == 512:
                    yield pa.RecordBatch.from_pylist(rows, schema=schema)
                    rows = []
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return session.range(0, len(splits), 1, len(splits)).mapInArrow(read, COLUMNS)


def multiply(source: Path, copies: int, folder: Path) -> tuple[Path, Row]:
    """One multistream file of the source's pages so many times, every copy with page ids of its own; and its size."""
    with bz2.open(source) as file:
        text = file.read()
    head, pages = text[: text.index(b"  <page>")], re.findall(rb"  <page>.*?</page>\n", text, re.DOTALL)
    texts = [b"".join(pages[n : n + PAGES_PER_STREAM]) for n in range(0, len(pages), PAGES_PER_STREAM)]
    path = folder / f"copies-{copies}-multistream.xml.bz2"
    with path.open("wb") as out, Pool(2) as pool:
        out.write(bz2.compress(head))
        for stream in pool.imap(_renumbered, ((part, copy) for copy in range(copies) for part in texts), chunksize=16):
            out.write(stream)
        out.write(bz2.compress(b"</mediawiki>\n"))
    xml = len(head) + sum(map(len, texts)) * copies
    return path, {
        "xml_mb": round(xml / 1e6, 1),
        "bz2_mb": round(path.stat().st_size / 1e6, 1),
        "pages": len(pages) * copies,
    }


def _renumbered(job: tuple[bytes, int]) -> bytes:
    text, copy = job
    first = re.compile(rb"(</ns>\s*<id>)(\d+)")
    return bz2.compress(first.sub(lambda found: found[1] + b"%d" % (int(found[2]) + copy * 10**9), text))


def append(options: argparse.Namespace, row: Row) -> None:
    """Add a row to the table of what is measured, and print it."""
    row |= {"dataset": options.name, **provenance("pyspark", commit=options.commit)}
    append_rows(DATA / f"wiki_{options.what}.csv", [*FIELDS[options.what], *PLACE], [row])
    print(*(f"{key} {row.get(key)}" for key in FIELDS[options.what]), sep=", ", flush=True)


if __name__ == "__main__":
    main()
