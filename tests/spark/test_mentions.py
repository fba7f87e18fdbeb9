"""Mentions in titles: a hand-made world with known answers, traps included, and all substrings as the oracle."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_features.schemas import LINKS
from kellm_spark.mentions import link_mentions
from kellm_spark.mentions.spelling import spell

from .cluster import Processes, connect_server

PAGE_COLUMNS = (
    "wiki_page_id long, wiki_title string, redirect_to string, is_disambiguation boolean, evidence array<string>, "
    "lead string"
)


def page(page_id: int, title: str, kind: str | None = None, lead: str | None = None, **more: Any) -> tuple[Any, ...]:
    return (
        page_id,
        title,
        more.get("to"),
        more.get("disambiguation", False),
        [kind] if kind else [],
        title + " is told of here." if lead is None else lead,
    )


PAGES = [
    page(1, "Tom Hanks", "person"),
    page(2, "Heat", None, "In physics, heat is energy in transfer."),
    page(3, "Heat (1995 film)", "film", "Heat is a 1995 film."),
    page(4, "Paris", "settlement"),
    page(5, "Paris, Texas", "settlement"),
    page(6, "Paris, Texas (film)", "film"),
    page(7, "New York City", "settlement"),
    page(8, "New York", None, to="New York City"),
    page(9, "The New York Times", "periodical"),
    page(10, "Climate change", None, "Present-day climate change is man-made."),
    page(11, "Dirty Dancing", "film"),
    page(12, "Dirty dancing", None, to="Dirty Dancing"),  # help for typing, no other name
    page(13, "Mercury", disambiguation=True),
    page(14, "Mercury (planet)", None, "x" * 99),
    page(15, "Mercury (element)", None, "x" * 99),
    page(16, "Sabrina", disambiguation=True),
    page(17, "Sabrina (1954 film)", "film", "x" * 99),
    page(18, "Sabrina (1995 film)", "film", "x" * 99),
    *[page(200 + n, f"Sabrina {n} in other words", to="Sabrina (1954 film)") for n in range(6)],
    page(19, "World Health Organization", "organization"),
    page(20, "WHO", None, to="World Health Organization"),
    page(21, "Who", "song"),
    page(22, "1984", "book"),
    page(23, "Barack Obama", "person"),
    page(24, "Obama", None, to="Barack H. Obama"),
    page(25, "Barack H. Obama", None, to="President_Obama#Life"),
    page(26, "President Obama", None, to="Barack Obama"),  # three redirects in a row
    page(27, "Round", None, to="About"),
    page(28, "About", None, to="Round"),
    page(29, "Loop Street", None, to="Loop Street"),
    page(30, "Great Wall of China", "building"),
    page(31, "The Great Wall (film)", "film"),
    page(32, "Léon", "film"),
    page(33, "J. K. Rowling", "person"),
    page(34, "The Beatles", "band", "We love the Beatles."),
    page(35, "Schindler's List", "film"),
    page(36, "IPhone", None, "The iPhone is a phone."),
    page(37, "Batman & Robin", "film"),
    page(38, "Tim Cook", "person"),
    page(39, "Europe", None, "Europe is a continent. Most of Europe is green."),
    page(40, "Inception", "film"),
    page(41, "Java", "settlement", "Java is an island. The people of Java live there."),
    page(42, "Java (disambiguation)", disambiguation=True),
    page(43, "Java (programming language)"),
    page(44, "Washington, D.C.", "settlement"),
    page(45, "Red meat", None, "Eating red meat is common."),
    page(46, "Red Meat", "comic"),
    page(47, "Reuters", "organization"),
    page(48, "Thanksgiving (film)", "film"),
    page(51, "中国"),
    page(52, "发展中国家"),
    page(53, "周杰伦"),
    page(54, "周杰倫", to="周杰伦"),
    page(55, "杰伦传"),
    page(56, "股"),
    page(57, "什么"),
    page(58, "苹果公司"),
    page(59, "苹果", disambiguation=True),
    page(60, "苹果 (水果)"),
    page(66, "红楼梦", disambiguation=True),
    page(67, "红楼梦 (小说)"),
    page(61, "スティーヴン・スピルバーグ"),
    page(62, "スピル"),
    page(63, "Москва", None, "Москва — столица России. Город Москва велик."),
    page(64, "北京大学"),
    page(65, "大学生"),
]

TITLES: list[tuple[str, list[int] | str]] = [
    # title -> pages, the best first, or the reason
    ("Why tom hanks never met Tom Hanks", [1]),
    ("TOM HANKS WINS AGAIN", [1]),
    ("tom hanks wins again", [1]),
    ("The heat is on in the city", "stop words only"),
    ("What Pacino says of making Heat today", [3]),  # energy would be small
    ("How to spend a day in Paris with children", [4]),
    ("Visiting Paris with children in a car", "stop words only"),  # "Oliver Paris" would look the same
    ("Ten Best Restaurants in Paris", [4]),
    ("Why Paris Hilton left town in a hurry", "stop words only"),
    ("Paris Hilton Leaves Town", "stop words only"),
    ("A comparison of parishes", "no mention"),  # inside a word
    ("Snow falls on Paris, Texas, and melts", [5]),
    ("Snow falls on Texas, and on Paris", [4]),
    ("New York City sleeps", [7]),
    ("A walk through New York at night", [7]),
    ("What The New York Times said of the New York mayor", [9, 7]),
    ("New, York says, is not old", "stop words only"),  # the title's comma is not in the name
    ("What climate change does to us", [10]),
    ("Some dirty dancing at a wedding", "stop words only"),
    ("Watching Dirty Dancing at a wedding", [11]),
    ("A look at the planet Mercury from space", "ambiguous mention"),
    ("How Billy Wilder filmed Sabrina in a summer", [17]),
    ("WHO warns of a new virus", [19]),
    ("Who warns of a new virus", "no mention"),
    ("In 1984 we were young", "no mention"),
    ("What Obama told the press", [23]),
    ("Round and About", "no mention"),  # redirects in a ring
    ("On Loop Street they dance", "no mention"),
    ("The Great Wall of China from above", [30]),
    ("Why we still watch Leon today", [32]),
    ("A letter from JK Rowling to her readers", [33]),
    ("A letter from J.K. Rowling to her readers", [33]),
    ("How the Beatles broke up", [34]),
    ("What Schindler’s List taught me", [35]),
    ("Paris's mayor and Tom Hanks’ new house", [1, 4]),
    ("Is the iPhone of any use", [36]),
    ("Why Batman and Robin failed", [37]),
    ("What Apple boss Tim Cook earns", [38]),
    ("Growing Up in Europe", [39]),
    ("The End of Inception", "stop words only"),  # a headline's capital tells nothing of a work in one word
    ("What Nolan meant with Inception in the end", [40]),
    ("Why turkeys are dear at Thanksgiving this year", "ambiguous mention"),  # these pages do not know the feast
    ("How people on Java grow rice", [41]),
    ("A night in Washington DC for little money", [44]),
    ("A night in Washington, D.C. for little money", [44]),
    ("Why red meat is bad for the heart", [45]),
    ("Why Red Meat is the comic of the year", [46]),
    ("Why Red Meat Is Bad", "ambiguous mention"),
    ("", "stop words only"),
    ("!!! 42 ???", "stop words only"),
    ("of the and", "stop words only"),
    ("去中国旅游", [51]),
    ("发展中国家的未来", [52]),
    ("周杰伦新专辑发布", [53]),
    ("周杰倫传记", [53]),
    ("炒股为什么难", "no mention"),
    ("苹果公司发布新iPhone手机", [36, 58]),
    ("苹果怎么吃", "ambiguous mention"),
    ("重读红楼梦", [67]),
    ("スピルバーグの新作", "no mention"),
    ("スティーヴン・スピルバーグ監督の新作", [61]),
    ("Как живет Москва сегодня", [63]),
    ("北京大学生活", [64]),  # two of one length: the leftmost
    *[(f"Number {n} of the day - Reuters", "no mention") for n in range(21)],  # in too many titles to tell anything
]


def world(spark: Any) -> tuple[Any, Any]:
    rows = [(place, title) for place, (title, _) in enumerate(TITLES)]
    return spark.createDataFrame(rows, "item_id long, title string"), spark.createDataFrame(PAGES, PAGE_COLUMNS)


@pytest.fixture(scope="module")
def links(spark) -> dict[int, list[Any]]:
    items, pages = world(spark)
    frame = link_mentions(items.repartition(4), pages.repartition(3))
    assert frame.columns == LINKS.names
    found: dict[int, list[Any]] = {}
    for row in frame.collect():
        found.setdefault(row.item_id, []).append(row)
    assert sorted(found) == list(range(len(TITLES)))
    return {key: sorted(rows, key=lambda row: (-row.link_score, row.wiki_page_id)) for key, rows in found.items()}


@pytest.mark.spark
@pytest.mark.parametrize("place", range(len(TITLES)), ids=[title for title, _ in TITLES])
def test_each_title(links, place: int) -> None:
    wanted, rows = TITLES[place][1], links[place]
    if isinstance(wanted, str):
        assert [(r.wiki_page_id, r.wiki_title, r.method, r.link_score, r.reason) for r in rows] == [
            (None, None, None, 0.0, wanted)
        ]
    else:
        assert [row.wiki_page_id for row in rows] == wanted
        titles = {p[0]: p[1] for p in PAGES}
        for row in rows:
            assert (row.wiki_title, row.reason) == (titles[row.wiki_page_id], None)
            assert 0 < row.link_score <= 1


@pytest.mark.spark
def test_scores_are_the_product_that_the_docstring_tells(links) -> None:
    def row_of(title: str) -> Any:
        return links[[text for text, _ in TITLES].index(title)][0]

    def told(title: str) -> tuple[Any, ...]:
        row = row_of(title)
        return row.link_score, row.method, row.runner_up

    assert told("Why tom hanks never met Tom Hanks") == (1.0, "mention", None)
    assert told("TOM HANKS WINS AGAIN") == (0.9, "mention", None)
    assert told("Ten Best Restaurants in Paris") == (0.7, "mention", None)
    assert told("What Obama told the press") == (pytest.approx(0.95 * 0.9), "mention-redirect", None)
    assert told("What climate change does to us") == (pytest.approx(0.9 * 0.5), "mention", None)
    assert told("How people on Java grow rice") == (
        pytest.approx(0.9 * 0.9), "mention", "Java (programming language)"
    )  # fmt: skip
    # Six redirects and its own title against one of equal length: 7 of 8 parts.
    assert told("How Billy Wilder filmed Sabrina in a summer") == (
        pytest.approx(0.9 * 0.95 * 7 / 8), "mention", "Sabrina (1995 film)"
    )  # fmt: skip
    assert told("重读红楼梦") == (pytest.approx(0.85 * 0.8 * 0.7), "mention", None)
    assert told("Why we still watch Leon today") == (pytest.approx(0.9 * 0.95), "mention", None)
    assert row_of("A look at the planet Mercury from space").runner_up == "Mercury (planet)"


@pytest.mark.spark
def test_the_best_links_are_kept(spark) -> None:
    items, pages = world(spark)
    rows = link_mentions(items, pages, max_links=1).collect()
    assert len(rows) == len(TITLES)
    place = [wanted for _, wanted in TITLES].index([9, 7])
    assert {r.item_id: r.wiki_page_id for r in rows}[place] == 9


@pytest.mark.spark
def test_bad_input_is_refused(spark) -> None:
    items, pages = world(spark)
    with pytest.raises(ConfigError, match="max_links is 0; accepted: 1 or more"):
        link_mentions(items, pages, max_links=0)
    with pytest.raises(SchemaError, match=r"pages: column 'lead' is missing; seen: .*; needed: "):
        link_mentions(items, pages.drop("lead"))
    with pytest.raises(DataError, match="hold 1 different item_id"):
        link_mentions(spark.createDataFrame([(1, "A"), (1, "B")], items.schema), pages)
    with pytest.raises(DataError, match="1 without title"):
        link_mentions(spark.createDataFrame([(1, None)], items.schema), pages)


# The oracle: a world of random names whose spelling and prior leave nothing to decide, so that only the finding is
# tried: every run of units of a title is looked up, the longest wins, then the leftmost.


def random_world(seed: int) -> tuple[list[tuple[str, str]], list[tuple[Any, ...]], dict[str, int]]:
    """Titles of capitalised words (half) or Han characters (half), pages, and each name's page."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("bdfgklmnprstvz", k=3)).capitalize() + "a" for _ in range(60)]
    characters = [chr(0x4E8C + 7 * n) for n in range(1, 25)]
    titles = [(f"w{n}", rng.choices(words, k=rng.randint(2, 8))) for n in range(150)]
    titles += [(f"c{n}", rng.choices(characters, k=rng.randint(3, 14))) for n in range(150)]
    titles += [(f"f{n}", ["Zwazwa", "Zwizwi", *rng.choices(words, k=2)]) for n in range(40)]  # two words too frequent
    names: dict[str, int] = {"Zwazwa Zwizwi": 0}
    for _ in range(700):
        units = list(rng.choice(titles)[1])
        length = rng.randint(2, 4)
        start = rng.randint(0, max(len(units) - length, 0))
        units = units[start : start + length]
        if rng.random() < 0.3:
            units[rng.randrange(len(units))] = rng.choice(words if len(units[0]) > 1 else characters)
        name = joined(units)
        if len(name) > 1 and len(units) > 1 and not names.get(name):
            names[name] = len(names)
    pages, page_of, ends = [], {}, []
    for name, number in names.items():
        target = None
        if ends and rng.random() < 0.4:
            target = rng.choice(ends)[0]
        # A chain of redirects is followed for four steps.
        depth, end = next(((d + 1, e) for n, d, e in ends if n == target), (0, number))
        if depth > 4:
            target, depth, end = None, 0, number
        ends.append((name, depth, end))
        page_of[name] = end
        pages.append(page(number, name, "person" if target is None else None, to=target))
    items = [
        # Small words at the end show that the capitals are those of names.
        (key, joined(units) if key[0] == "c" else " ".join([*units, *["qualm"] * len(units)]))
        for key, units in titles
    ]
    return items, pages, page_of


def joined(units: list[str]) -> str:
    return ("" if len(units[0]) == 1 else " ").join(units)


def every_run(title: str, page_of: dict[str, int]) -> set[int]:
    units = title.split() if " " in title else list(title)
    runs = [(i, j) for i in range(len(units)) for j in range(i + 1, len(units) + 1) if joined(units[i:j]) in page_of]
    free, found = set(range(len(units))), set()
    for i, j in sorted(runs, key=lambda run: (run[0] - run[1], run[0])):
        if free.issuperset(range(i, j)):
            free.difference_update(range(i, j))
            found.add(page_of[joined(units[i:j])])
    return found


@pytest.mark.spark
@pytest.mark.parametrize("seed", [1, 2])
def test_the_automata_find_what_all_substrings_find(spark, seed: int) -> None:
    items, pages, page_of = random_world(seed)
    counts: dict[str, int] = {}
    for _, title in items:
        units = title.split() if " " in title else [title[n : n + 2] for n in range(len(title) - 1)]
        for unit in set(units):
            counts[unit] = counts.get(unit, 0) + 1
    # A name of frequent words alone is none: more than 20 titles, which is above 5% of 340.
    kept = {
        name: number
        for name, number in page_of.items()
        if any(
            counts.get(unit, 0) <= 20
            for unit in (name.split() if " " in name else [name[n : n + 2] for n in range(len(name) - 1)])
        )
    }
    assert len(kept) < len(page_of)
    wanted = {key: every_run(title, kept) for key, title in items}
    assert sum(map(len, wanted.values())) > 300
    frame = link_mentions(
        spark.createDataFrame(items, "item_id string, title string").repartition(seed + 1),
        spark.createDataFrame(pages, PAGE_COLUMNS).repartition(5 - seed),
        max_links=20,
    )
    found: dict[str, set[int]] = {key: set() for key, _ in items}
    for row in frame.collect():
        if row.wiki_page_id is not None:
            assert row.wiki_page_id not in found[row.item_id]  # one row per item and page
            found[row.item_id].add(row.wiki_page_id)
    assert found == wanted


@pytest.mark.spark
def test_the_same_rows_however_they_arrive(spark, monkeypatch: pytest.MonkeyPatch) -> None:
    items, pages = world(spark)
    once = sorted(link_mentions(items.repartition(1), pages.repartition(1)).collect(), key=str)
    monkeypatch.setattr("kellm_spark.mentions.link._MIN_BLOCKS", 3)
    again = link_mentions(items.orderBy("title").repartition(5), pages.orderBy("wiki_title").repartition(4))
    assert sorted(again.collect(), key=str) == once


CLIENT = """
import json, sys
from pyspark.sql import SparkSession
from kellm_spark.mentions import link_mentions

spark = SparkSession.builder.getOrCreate()
rows = link_mentions(spark.read.parquet(sys.argv[1]), spark.read.parquet(sys.argv[2])).collect()
print("FOUND " + json.dumps([type(spark).__module__, sorted(map(list, rows), key=str)]))
spark.stop()
"""


@pytest.mark.spark
@pytest.mark.slow
def test_a_client_of_spark_connect_finds_the_same(spark, tmp_path: Path) -> None:
    items, pages = world(spark)
    items.write.parquet(str(tmp_path / "items"))
    pages.write.parquet(str(tmp_path / "pages"))
    (tmp_path / "server").mkdir()
    with Processes(tmp_path / "server") as processes, connect_server(processes, "local[1]") as remote:
        told = processes.start(
            "client", sys.executable, "-c", CLIENT, tmp_path / "items", tmp_path / "pages", SPARK_REMOTE=remote
        ).finish()
    module, rows = json.loads(re.search("FOUND (.*)", told)[1])
    assert module.startswith("pyspark.sql.connect")
    assert rows == sorted(map(list, link_mentions(items, pages).collect()), key=str)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Spider-Man’s U.S. tour", " spider  man  s  US  tour "),
        ("J. R. R. Tolkien & C. S. Lewis", " JRR  tolkien  and  CS  lewis "),
        ("Amélie (2001)", " amelie  2001 "),
        ("NASA's Wall-E", " NASA  s  wall  e "),
        ("新iPhone手机", "新 iphone 手机"),
        ("バハ・ＡＢＣ", " バハ  ABC "),  # full-width letters are letters, and バ is not ハ
        ("नई दिल्ली", " नई  दिल्ली "),  # vowel signs do not end a word
        ("", ""),
    ],
)
def test_units(text: str, key: str) -> None:
    assert spell(text).key == key


def test_what_capitals_tell() -> None:
    assert spell("How Tom Hanks met a dog", title=True).telling_case
    assert not spell("How Tom Hanks Met a Dog", title=True).telling_case
    assert not spell("how tom hanks met a dog", title=True).telling_case
    assert spell("WHO KILLED KENNEDY", title=True).keys == ("who", "killed", "kennedy")
    assert spell("WHO says no", title=True).keys == ("WHO", "says", "no")


@pytest.mark.parametrize("name", ["The Who", "1984", "9/11", "K", "股", "什么", "2012年", "十二月", "March"])
def test_what_names_nothing(name: str) -> None:
    assert not spell(name).is_name


def test_breaks_are_where_punctuation_parts_words() -> None:
    assert spell("Paris, Texas").breaks == {1}
    assert spell("Mr. Robot - George W. Bush: a life").breaks == {1, 2, 5}
    assert spell("Spider-Man & Dr Strange").breaks == frozenset()
