"""`kellm wiki --dump`: a dump in, a folder of pages out, whole or not at all, with nothing left out in silence."""

from __future__ import annotations

import bz2
import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from kellm_features.errors import ConfigError, DataError
from kellm_features.schemas import PAGES as SCHEMA
from kellm_features.settings import Settings, SparkSettings
from kellm_spark.dump import read_streams
from kellm_spark.dump import reading as reading_module
from kellm_spark.dump.job import WikiJob, run_wiki_job
from kellm_spark.session import data_errors
from kellm_spark.stages import wiki_files
from kellm_spark.storage import MANIFEST

from .dumps import PAGES, page, write

pytestmark = pytest.mark.spark

FILLERS = [page(1000 + n, f"Filler {n}", "Some text. " * 9) for n in range(600)]


def run(out: Path, *dumps: Path, **more: Any) -> dict[str, Any]:
    catalogue = more.pop("catalogue", None)
    return run_wiki_job(WikiJob(tuple(map(str, dumps)), str(out), **more), SparkSettings(), catalogue)


def rows(out: Path) -> list[dict[str, Any]]:
    table = ds.dataset(out, format="parquet").to_table()
    SCHEMA.check(table.schema, str(out))
    return table.to_pylist()


def contents(out: Path) -> list[str]:
    return [sha256(part.read_bytes()).hexdigest() for part in sorted(out.glob("part-*"))]


def test_a_dump_to_sorted_pages_and_a_manifest(spark, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "in").mkdir()
    told = run(tmp_path / "out", write(tmp_path / "in", "multistream"))
    found = rows(tmp_path / "out")
    assert [row["wiki_page_id"] for row in found] == [1, 2, 3, 4, 6, *range(100, 160)]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == told
    assert told["wiki"] == {"dbname": "ltgwiki", "language": "ltg"}
    assert (told["pages"], told["rows"], told["other_namespaces"], told["skipped"]) == (66, 65, 1, {})
    assert (told["redirects"], told["disambiguations"], told["dated"]) == (1, 2, 2)
    assert told["evidence"] == {"book": 1, "film": 1}
    assert told["xml_bytes"] == sum(len(text.strip().encode()) for text in PAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    # Cut into other splits, other parts, other streams: the same bytes.
    monkeypatch.setattr(reading_module, "SPLIT_BYTES", {"bz2": 500, "xml": 3000})
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", "bz2", PAGES[40:])
    write(tmp_path / "parts", "xml", PAGES[:40])
    run(tmp_path / "again", tmp_path / "parts")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    run(tmp_path / "leads", tmp_path / "in", lead_only=True)
    assert rows(tmp_path / "leads") == [row | {"sections": []} for row in found]


SPOILT = [
    FILLERS[0].replace("Some text", "&bomb;"),
    FILLERS[1].replace("</page>", ""),
    FILLERS[2].replace("<id>1002</id>", ""),
    FILLERS[3].replace("Some text", "x" * (9 << 20), 1),
]


def test_what_is_skipped_is_counted_with_its_reason(spark, tmp_path: Path) -> None:
    told = run(tmp_path / "out", write(tmp_path, "bz2", [*SPOILT, *FILLERS[4:]]))
    assert told["skipped"] == {"larger than 8 MiB": 1, "no </page>": 1, "no title or id": 1, "not XML": 1}
    assert (told["pages"], told["rows"]) == (600, 596)
    assert [row["wiki_page_id"] for row in rows(tmp_path / "out")] == list(range(1004, 1600))


def latin(pages: list[str], folder: Path) -> Path:
    path = write(folder, "xml", pages)
    path.write_bytes(path.read_bytes().replace(b"Some", b"S\xf6me"))
    return path


REFUSED = {
    "too many": (
        lambda folder: write(folder, "xml", [text.replace("Some", "&x;") for text in FILLERS[:7]] + FILLERS[7:]),
        r"wiki\.xml: 7 of 600 pages cannot be read \(7 not XML\), as in '<page> <title>Filler 0",
    ),
    "not one": (lambda folder: latin(FILLERS[:3], folder), r"3 of 3 pages cannot be read \(3 not UTF-8\)"),
    "no article": (
        lambda folder: write(folder, "xml", [page(1, "Taiss:X", "", 10), page(2, "X", "y" * (9 << 20))]),
        r"holds 2 pages and none of them is an article \(namespace 0\), 1 skipped: larger than 8 MiB",
    ),
    "none": (lambda folder: write(folder, "xml", []), "holds 0 pages and none of them is an article"),
    "twice": (
        lambda folder: (write(folder, "xml", FILLERS[:9]), write(folder, "bz2", FILLERS[5:]), folder)[-1],
        r"page 1005 \('Filler 5'\) is there 2 times; the plain and the multistream form",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dump_that_would_mislead_writes_nothing(spark, tmp_path: Path, case: str) -> None:
    make, says = REFUSED[case]
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=says) as caught:
        run(tmp_path / "out", make(tmp_path / "in"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_damage_in_the_middle_is_told_and_writes_nothing(spark, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in", "multistream", FILLERS)
    data = path.read_bytes()
    middle = data.index(b"BZh9", len(data) // 2)
    path.write_bytes(data[: middle - 40] + data[middle:])  # a stream lost its end, those after it are whole
    with pytest.raises(DataError, match=r"multistream\.xml\.bz2 is damaged or cut off at byte [\d,]+ of"):
        run(tmp_path / "out", path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_is_replaced_on_request_only(spark, tmp_path: Path) -> None:
    path = write(tmp_path, "xml", FILLERS[:5])
    run(tmp_path / "out", path)
    before = contents(tmp_path / "out")
    write(tmp_path, "xml", FILLERS[:6])
    with pytest.raises(DataError, match=r"out exists; remove it, name another, or add --overwrite"):
        run(tmp_path / "out", path)
    with pytest.raises(DataError, match=r"none\.xml cannot be read"):
        run(tmp_path / "out", tmp_path / "none.xml", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert run(tmp_path / "out", path, overwrite=True)["rows"] == 6


def titles(spark, *names: str):
    return spark.createDataFrame([(name,) for name in names], "wiki_title string")


def spoil(path: Path, page_id: int) -> int:
    """Break the stream that holds a page, leaving all offsets as they are; return its offset."""
    index = bz2.decompress(path.with_name("wiki-multistream-index.txt.bz2").read_bytes()).decode()
    offset = next(int(line.split(":")[0]) for line in index.splitlines() if line.split(":")[1] == str(page_id))
    data = bytearray(path.read_bytes())
    data[offset + 40] ^= 255
    path.write_bytes(data)
    return offset


def test_only_the_streams_of_wanted_titles_are_read(spark, tmp_path: Path) -> None:
    path = write(tmp_path, "multistream")
    index = tmp_path / "wiki-multistream-index.txt.bz2"
    spoil(path, 130)  # never looked at
    wanted = titles(spark, "Heat & Dust", "Heat (Mann)", "Filler 0", "Filler 20", "No such page", "Sprīža:Heat")
    found = read_streams(spark, path, index, wanted).collect()
    assert sorted(row.wiki_page_id for row in found) == [2, 4, 100, 120]
    offset = spoil(path, 120)
    with pytest.raises(DataError, match=rf"at byte {offset:,}"), data_errors():
        read_streams(spark, path, index, wanted).collect()


@pytest.mark.parametrize(
    ("spoil_index", "says"),
    [
        (
            lambda text: text.replace("\n", "0\n", 0).replace(f"{text.split(':')[0]}:", "77:"),
            "no bz2 stream at byte 77",
        ),
        (lambda text: text.replace(":2:Heat", ":22:Heat"), "has no page 22 in the stream at byte"),
        (lambda text: text + "77,5,Heat\n", "is no multistream index: 1 of its 67 lines"),
        (lambda text: "", "is no multistream index: 0 of its 0 lines"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(spark, tmp_path: Path, spoil_index, says: str) -> None:
    path = write(tmp_path, "multistream")
    text = bz2.decompress((tmp_path / "wiki-multistream-index.txt.bz2").read_bytes()).decode()
    (tmp_path / "index.txt").write_text(spoil_index(text), encoding="utf-8")
    with pytest.raises(DataError, match=says), data_errors():
        read_streams(spark, path, tmp_path / "index.txt", titles(spark, "Heat & Dust")).collect()


def items(spark):
    return spark.createDataFrame(
        [(1, "Heat (1995)", 1995), (2, "Heat and Dust", 1983), (3, "Mann's Heat", None)],
        "item_id bigint, title string, year int",
    )


def test_a_catalogue_reads_what_its_items_could_link_to(spark, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pages = [
        *PAGES[:3],
        *FILLERS[:20],
        page(7, "Heat", "#REDIRECT [[Heat (thermodynamics)]]", redirect="Heat (thermodynamics)"),
        *FILLERS[20:40],
        page(8, "Heat (thermodynamics)", "Many things. {{Škiršona}}"),
        *FILLERS[40:60],
        page(9, "Taiss:Škiršona", "#REDIRECT [[Taiss:Dab X]]", 10, redirect="Taiss:Dab X"),
        *FILLERS[60:80],
        page(10, "Taiss:Dab X", "__DISAMBIG__", 10),
        *FILLERS[80:],
    ]
    path = write(tmp_path / "in", "multistream", pages)
    spoil(path, 1500)
    told = run(tmp_path / "out", path, catalogue=items)
    found = {row["wiki_title"]: row for row in rows(tmp_path / "out")}
    assert {"Heat", "Heat (1995 film)", "Heat & Dust", "Heat (thermodynamics)"} <= set(found)
    assert not any(title.startswith("Filler") for title in found)
    assert found["Heat (thermodynamics)"]["is_disambiguation"]
    assert not found["Heat (1995 film)"]["is_disambiguation"]
    assert told["xml_bytes"] < 40_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    (tmp_path / "in" / "wiki-multistream-index.txt.bz2").rename(tmp_path / "other.txt.bz2")
    with pytest.raises(DataError, match="has no multistream index beside it"):
        run(tmp_path / "none", path, catalogue=items)
    run(tmp_path / "named", path, catalogue=items, index=str(tmp_path / "other.txt.bz2"))
    assert contents(tmp_path / "named") == contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="add --catalogue"):
        run(tmp_path / "none", path, index="x")


def test_a_run_takes_a_list_a_folder_or_a_pattern(tmp_path: Path) -> None:
    paths = [write(tmp_path, kind, FILLERS[:2]) for kind in ("xml", "bz2")]
    both = {"dump 1": paths[0], "dump 2": paths[1]}
    for dump in (paths, tmp_path, tmp_path / "wiki*"):
        settings = Settings.model_validate({"wiki": {"dump": dump}})
        assert wiki_files(settings) == both
        assert settings.hash_of(["wiki"]) == Settings().hash_of(["wiki"])  # the files are hashed themselves
    assert wiki_files(Settings.model_validate({"wiki": {"dump": str(paths[0])}})) == {"dump": paths[0]}


def kellm(*words: str) -> subprocess.CompletedProcess[str]:
    code = "from kellm_features.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path, "multistream", [*PAGES, SPOILT[2]])
    done = kellm("wiki", "--dump", str(path), "--out", str(tmp_path / "out"), "--set", "spark.master=local[2]")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "out")) == 65
    said = " ".join(done.stdout.split())
    assert "pages in the dump 67" in said
    assert "skipped: no title or id −1" in said
    assert "MB of XML a second" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dump", "x.xml"], "--dump needs --out"),
        (["--overwrite", "--lead-only"], "--lead-only, --overwrite: only with --dump"),
        (["--dump", "x.xml", "--out", "y", "--index", "z"], "--index: only with --catalogue"),
        (["--dump", "none.xml", "--out", "y"], "none.xml cannot be read (No such file or directory)"),
    ],
)
def test_bad_requests_end_in_one_line(words: list[str], told: str) -> None:
    done = kellm("wiki", *words)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
