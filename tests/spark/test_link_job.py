"""`kellm link --catalogue`: catalogues in, a folder of links out; a person's word; and the paper's own method."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest

from kellm_features.cli.catalogue import read_catalogue
from kellm_features.errors import DataError, SchemaError
from kellm_features.schemas import LINKS
from kellm_spark.linking import LinkOptions, link_items
from kellm_spark.linking.edit_similarity import similarities
from kellm_spark.linking.job import LinkJob, run_link_job
from kellm_spark.storage import MANIFEST

pytestmark = pytest.mark.spark

PAGES = [
    {"wiki_page_id": 10, "wiki_title": "The Matrix", "evidence": ["film"], "year": 1999},
    {"wiki_page_id": 11, "wiki_title": "Heat (1995 film)", "evidence": ["film"], "year": 1995},
    {"wiki_page_id": 12, "wiki_title": "Heat (1986 film)", "evidence": ["film"], "year": 1986},
    {"wiki_page_id": 13, "wiki_title": "1917", "evidence": [], "year": None},
    {"wiki_page_id": 14, "wiki_title": "Matrix", "redirect_to": "The_Matrix#Plot", "evidence": [], "year": None},
    {"wiki_page_id": 15, "wiki_title": "Toy Story", "evidence": ["film"], "year": 1995},
]
LATEST = """movieId;title;genres
1;Toy Story (1995) ;Animation|Comedy
2;"Heat (1995)";Crime
3;"The ""Matrix"" (1999)";Action
"""


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    empty: dict[str, Any] = {"display_title": None, "redirect_to": None, "is_disambiguation": False, "lead": ""}
    rows = [{**empty, "sections": [], "categories": [], **row} for row in PAGES]
    frame = pd.DataFrame(rows).astype({"year": "Int32"})
    (tmp_path / "wiki").mkdir()
    frame.to_parquet(tmp_path / "wiki" / "part-0.parquet")
    return tmp_path / "wiki"


def linked(spark, catalogue: Path, wiki: Path, out: Path, **more: Any) -> tuple[dict[str, Any], dict[Any, Any]]:
    options = LinkOptions(**more.pop("options", {}))
    job = LinkJob(str(catalogue), str(wiki), str(out), options, **more)
    told = run_link_job(spark, read_catalogue(spark, str(catalogue)), job)
    table = ds.dataset(out, format="parquet").to_table()
    LINKS.check(table.schema, str(out))
    return told, {row["item_id"]: row for row in table.to_pylist()}


def test_movies_dat(spark, tmp_path: Path, wiki: Path) -> None:
    path = tmp_path / "movies.dat"
    path.write_bytes("7::Matrix, The (1999)::Action\n8::Café Nowhere (1980)::Drama\n".encode("latin-1"))
    told, rows = linked(spark, path, wiki, tmp_path / "out")
    assert (rows[7]["wiki_page_id"], rows[7]["method"]) == (10, "exact")
    assert rows[8]["reason"] == "no candidate"
    assert (told["items"], told["linked"], told["coverage"]) == (2, 1, 0.5)
    assert (told["methods"], told["reasons"]) == ({"exact": 1}, {"no candidate": 1})
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == told


def test_movies_csv_whatever_stands_between_its_fields(spark, tmp_path: Path, wiki: Path) -> None:
    for separator in ";,\t":
        path = tmp_path / f"movies{ord(separator)}.csv"
        path.write_text(LATEST.replace(";", separator))
        _, rows = linked(spark, path, wiki, tmp_path / f"out{ord(separator)}")
        assert {key: row["wiki_page_id"] for key, row in rows.items()} == {1: 15, 2: 11, 3: 10}


def test_any_table_with_ids_and_titles(spark, tmp_path: Path, wiki: Path) -> None:
    frame = pd.DataFrame({"item_id": ["a", "b"], "title": ["Heat", "Heat (1986)"], "year": [1995, None]})
    frame.astype({"year": "Int16"}).to_parquet(tmp_path / "items.parquet")
    _, rows = linked(spark, tmp_path / "items.parquet", wiki, tmp_path / "out")
    assert {key: row["wiki_page_id"] for key, row in rows.items()} == {"a": 11, "b": 12}
    frame.to_csv(tmp_path / "items.csv", index=False)
    _, rows = linked(spark, tmp_path / "items.csv", wiki, tmp_path / "again")
    assert {key: row["wiki_page_id"] for key, row in rows.items()} == {"a": 11, "b": 12}


def test_the_command_says_what_it_did(tmp_path: Path, wiki: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title,year\n1,Heat,1995\n2,Heat,1996\n3,Nowhere,1999\n")
    words = ["link", "--catalogue", "items.csv", "--wiki", "wiki", "--out", "links", "--year-tolerance", "0"]
    done = subprocess.run(
        [sys.executable, "-c", "from kellm_features.cli import main; main()", *words],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = {" ".join(line.split()[:-1]): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    assert (told["items"], told["linked (33.3 %)"], told["exact"], told["not linked"]) == ("3", "1", "1", "2")
    assert (told["year mismatch"], told["no candidate"], told["links:"]) == ("1", "1", "links")
    assert ds.dataset(tmp_path / "links", format="parquet").count_rows() == 3


def test_wrong_input_leaves_nothing(spark, tmp_path: Path, wiki: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("id,title\n1,Heat\n")
    with pytest.raises(SchemaError, match="column 'item_id' is missing; seen: id, title"):
        linked(spark, path, wiki, tmp_path / "out")
    with pytest.raises(DataError, match="cannot be read"):
        linked(spark, tmp_path / "none.parquet", wiki, tmp_path / "out")
    (tmp_path / "ratings.dat").write_text("1::2::5::978300760\n")
    with pytest.raises(DataError, match="line 1: 4 fields separated by '::', expected 3"):
        linked(spark, tmp_path / "ratings.dat", wiki, tmp_path / "out")
    path.write_text("item_id,title\n1,Heat\n")
    pd.read_csv(path).to_parquet(tmp_path / "items.parquet")
    with pytest.raises(SchemaError, match=r"'wiki_page_id'.* is missing; seen: item_id, title.*kellm wiki"):
        linked(spark, path, tmp_path / "items.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    linked(spark, path, wiki, tmp_path / "out")
    with pytest.raises(DataError, match="exists"):
        linked(spark, path, wiki, tmp_path / "out")


def write_overrides(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "overrides.csv"
    path.write_text("\n".join(["item_id,page,note", *lines]) + "\n")
    return path


def test_a_person_wins(spark, tmp_path: Path, wiki: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text(
        "item_id,title,year\n1,Heat,1995\n2,Toy Story,1995\n3,Nineteen Seventeen,2019\n4,Matrix,1970\n5,x,1\n"
    )
    decided = write_overrides(
        tmp_path, "1,Heat (1986 film),the other", "2,none,", "3,13,digits are an id", "4,Matrix,leads on", "99,10,gone"
    )
    told, rows = linked(spark, path, wiki, tmp_path / "out", overrides=decided)
    assert {key: row["wiki_page_id"] for key, row in rows.items()} == {1: 12, 2: None, 3: 13, 4: 10, 5: None}
    assert [rows[key]["method"] for key in (1, 2, 3, 4)] == ["override", None, "override", "override"]
    assert (rows[1]["link_score"], rows[2]["link_score"], rows[2]["reason"]) == (1.0, 0.0, "override")
    assert told["methods"] == {"override": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,No Such Page,"], "no page 'No Such Page' among the pages"),
        (["1,1917,"], "no page '1917'"),  # digits are an id, and no page has it
        (["1,10,", "1,11,"], "item 1 has 10 and 11; one page is accepted"),
        (["1,10,", "1,none,"], "item 1 has 10 and none"),
        (["1,,"], "page ''; both are needed"),
    ],
)
def test_overrides_that_cannot_be_obeyed(spark, tmp_path: Path, wiki: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title,year\n1,Heat,1995\n")
    with pytest.raises(DataError, match=message):
        linked(spark, path, wiki, tmp_path / "out", overrides=write_overrides(tmp_path, *lines))
    assert not (tmp_path / "out").exists()


def levenshtein(a: str, b: str) -> int:
    """The textbook's table, row by row."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


def test_edit_similarity_is_one_minus_the_distance_by_the_longer() -> None:
    random.seed(5)
    words = ["".join(random.choices("abc ", k=random.randint(1, 9))) for _ in range(40)]
    told = similarities(words, words)
    for i, a in enumerate(words):
        for j, b in enumerate(words):
            assert told[i, j] == pytest.approx(1 - levenshtein(a, b) / max(len(a), len(b)))


def test_the_papers_method_links_everything_to_the_nearest_title(spark, tmp_path: Path, wiki: Path) -> None:
    items = spark.createDataFrame([(1, "Matrix, The", 1999), (2, "Heat", 1995)], "item_id int, title string, year int")
    options = LinkOptions(method="edit-similarity")
    rows = {r.item_id: r for r in link_items(items, spark.read.parquet(str(wiki)), options).collect()}
    titles = [page["wiki_title"] for page in PAGES if "film" in page["evidence"]]
    for row, title in ((rows[1], "Matrix, The"), (rows[2], "Heat")):
        scores = sorted(((1 - levenshtein(title, t) / max(len(title), len(t)), t) for t in titles), reverse=True)
        assert row.link_score == pytest.approx(scores[0][0])
        assert row.method == "edit-similarity"
    assert rows[2].wiki_title != "Heat (1995 film)"  # it has no idea of years: this is why it is not the default
