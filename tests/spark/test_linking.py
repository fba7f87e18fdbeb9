"""Linking on a hand-made catalogue whose right answers are known, traps included."""

from __future__ import annotations

from typing import Any

import pytest

from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_spark.linking import link_items
from kellm_spark.naming import item_names, key, short_key

PAGE_COLUMNS = (
    "wiki_page_id long, wiki_title string, display_title string, redirect_to string, is_disambiguation boolean, "
    "evidence array<string>, year int"
)


def page(page_id: int, title: str, kind: str | None = "film", year: int | None = None, **more: Any) -> tuple[Any, ...]:
    return (
        page_id,
        title,
        more.get("display"),
        more.get("to"),
        more.get("disambiguation", False),
        [kind] if kind else [],
        year,
    )


PAGES = [
    page(1, "The Matrix", year=1999),
    page(2, "The Matrix (franchise)", None),
    page(3, "Casino (1995 film)", year=1995),
    page(4, "Casino", None),
    page(5, "Sabrina (1954 film)", year=1954),
    page(6, "Sabrina (1995 film)", year=1995),
    page(7, "Emma (novel)", "book", 1815),
    page(8, "Emma (disambiguation)", None, disambiguation=True),
    page(9, "Heat", None, disambiguation=True),
    page(10, "Léon: The Professional", year=1994),
    page(11, "Leon", None, to="Léon: The Professional"),
    page(12, "The Professional", None, to="Leon"),  # a redirect to a redirect
    page(13, "La Cité des enfants perdus", year=1995),
    page(14, "Mission: Impossible (film)", year=1996),
    page(15, "U.S. Marshals (film)", year=1998),
    page(16, "Rocky 2", year=1979),
    page(17, "Rocky IV", year=1985),
    page(18, "Twisted (1996 film)", year=1996),
    page(19, "Twister (1996 film)", year=1996),
    page(20, "Ghost (1990 film)", year=1990),
    page(21, "Ghost (1990 Hong Kong film)", year=1990),
    page(22, "Undated Story (film)", year=None),
    page(23, "Boys (1996 film)", year=1996),
    page(24, "Star Wars (film)", year=1977),
    page(25, "Se7en", year=1995, display="Seven"),
    page(26, "Madonna song", "song", 1995),
    page(27, "Evita (song)", None, to="The Matrix"),
    page(28, "Amélie", year=2001),
    page(29, "Mouse Hunt", year=1997),
    page(30, "Merlin", "television", 1998),
    page(31, "Loop", None, to="Loop"),
    page(32, "Thomas & the Magic Railroad", year=2000),
    page(33, "Halloween H20: 20 Years Later", year=1998),
]

CATALOGUE = [
    # item_id, title, year -> page, method or reason
    (1, "Matrix, The", 1999, 1, "exact"),
    (2, "Casino", 1995, 3, "exact"),
    (3, "Sabrina", 1995, 6, "exact"),
    (4, "Sabrina", 1954, 5, "exact"),
    (5, "Sabrina", 1970, None, "year mismatch"),
    (6, "Emma", 1996, None, "wrong kind"),
    (7, "Heat", 1995, None, "disambiguation only"),
    (8, "Leon", 1994, 10, "redirect"),
    (9, "Professional, The", 1994, 10, "redirect"),
    (10, "City of Lost Children, The (Cité des enfants perdus, La)", 1995, 13, "aka"),
    (11, "Mission: Impossible", 1996, 14, "exact"),
    (12, "U.S. Marshalls", 1998, 15, "fuzzy"),
    (13, "Rocky II", 1979, 16, "normalized"),
    (14, "Rocky III", 1985, None, "no candidate"),  # one numeral away from Rocky IV
    (15, "Twister", 1996, 19, "exact"),
    (16, "Ghost", 1990, None, "ambiguous"),
    (17, "Undated Story", 1991, 22, "exact"),
    (18, "Boys, The", 1997, None, "year mismatch"),
    (19, "Star Wars: Episode IV - A New Hope", 1977, 24, "subtitle"),
    (20, "Star Wars: The Clone Wars", 1978, None, "no candidate"),  # a subtitle drops in the same year only
    (21, "Seven (Se7en)", 1995, 25, "exact"),
    (22, "Evita", 1999, None, "no candidate"),  # the redirect names a song
    (23, "Amelie", 2001, 28, "exact"),
    (24, "MouseHunt", 1997, 29, "normalized"),
    (25, "Merlin", 1998, 30, "exact"),
    (26, "Loop", 1990, None, "no candidate"),
    (27, "Thomas and the Magic Railroad", 2000, 32, "normalized"),
    (28, "Halloween: H20", 1998, 33, "subtitle"),
    (29, "Wholly Unknown Picture", 1990, None, "no candidate"),
    (30, "Casino (1995)", None, 3, "exact"),
    (31, "Matrix, The", None, 1, "exact"),
    (32, "Sabrina", None, None, "ambiguous"),
    (33, "Casino", 1996, 3, "exact"),
    (34, "!!!", 1999, None, "no candidate"),
]


@pytest.fixture(scope="module")
def links(spark) -> dict[int, Any]:
    items = spark.createDataFrame([row[:3] for row in CATALOGUE], "item_id long, title string, year int")
    frame = link_items(items.repartition(4), spark.createDataFrame(PAGES, PAGE_COLUMNS).repartition(3))
    rows = frame.collect()
    assert sorted(row.item_id for row in rows) == [row[0] for row in CATALOGUE]  # every item once
    return {row.item_id: row for row in rows}


@pytest.mark.spark
@pytest.mark.parametrize(("item_id", "title", "year", "wanted", "how"), CATALOGUE)
def test_each_item(links, item_id: int, title: str, year: int | None, wanted: int | None, how: str) -> None:
    row = links[item_id]
    assert row.wiki_page_id == wanted
    titles = {p[0]: p[1] for p in PAGES}
    if wanted is None:
        assert (row.wiki_title, row.method, row.link_score, row.reason) == (None, None, 0.0, how)
    else:
        assert (row.wiki_title, row.method, row.reason) == (titles[wanted], how, None)
        assert 0 < row.link_score <= 1


@pytest.mark.spark
def test_scores_tell_how_sure(links) -> None:
    assert links[1].link_score == 1.0
    assert links[33].link_score == pytest.approx(0.92)  # a year off
    assert links[17].link_score == pytest.approx(0.65)  # the page has no year
    assert links[25].link_score == pytest.approx(0.9)  # a television film
    assert links[12].link_score == pytest.approx(0.9 * (1 - 1 / 13))  # "u s marshalls"
    assert links[16].runner_up == "Ghost (1990 film)"
    assert links[5].runner_up == "Sabrina (1954 film)"


@pytest.mark.spark
def test_tolerance_and_similarity_are_limits(spark) -> None:
    items = spark.createDataFrame(
        [("a", "Casino", 1993), ("b", "U.S. Marshalls", 1998)], "item_id string, title string, year int"
    )
    pages = spark.createDataFrame(PAGES, PAGE_COLUMNS)
    wide = {r.item_id: r for r in link_items(items, pages, year_tolerance=2, min_similarity=0.95).collect()}
    assert wide["a"].wiki_page_id == 3
    assert wide["a"].link_score == pytest.approx(0.84)
    assert wide["b"].reason == "no candidate"


@pytest.mark.spark
def test_books_link_to_books(spark) -> None:
    items = spark.createDataFrame([(1, "Emma", 1815), (2, "The Matrix", 1999)], "item_id long, title string, year int")
    rows = {
        r.item_id: r for r in link_items(items, spark.createDataFrame(PAGES, PAGE_COLUMNS), domain="books").collect()
    }
    assert rows[1].wiki_page_id == 7
    assert rows[2].reason == "wrong kind"


@pytest.mark.spark
def test_bad_input_is_refused(spark) -> None:
    pages = spark.createDataFrame(PAGES, PAGE_COLUMNS)
    items = spark.createDataFrame([(1, "Casino", 1995), (1, "Emma", 1996)], "item_id long, title string, year int")
    with pytest.raises(DataError, match="2 rows hold 1 different item_id"):
        link_items(items, pages)
    with pytest.raises(SchemaError, match="'year' is missing"):
        link_items(items.drop("year"), pages)
    with pytest.raises(DataError, match="1 without title"):
        link_items(spark.createDataFrame([(1, None, 1995)], items.schema), pages)
    with pytest.raises(ConfigError, match="known: movies"):
        link_items(items, pages, domain="recipes")
    with pytest.raises(ConfigError, match="min_similarity is 0"):
        link_items(items, pages, min_similarity=0)


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Matrix, The (1999)", ["The Matrix"]),
        ("Good, The Bad and The Ugly, The", ["The Good, The Bad and The Ugly"]),
        ("Avventura, L'", ["L'Avventura"]),
        ("Seven (a.k.a. Se7en)", ["Seven", "Se7en"]),
        (
            "Like Water for Chocolate (Como agua para chocolate)",
            ["Like Water for Chocolate", "Como agua para chocolate"],
        ),
        ("Postino, Il (The Postman)", ["Il Postino", "The Postman"]),
        ("Merlin (TV)", ["Merlin"]),
    ],
)
def test_names_of_a_title(title: str, names: list[str]) -> None:
    assert item_names(title) == names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Godfather Part II", "Godfather, Part 2"),
        ("Amélie", "AMELIE"),
        ("Thomas & the Magic Railroad", "Thomas and the Magic Railroad"),
        ("Schindler's List", "Schindlers List"),
        ("Star Wars: Episode V", "Star Wars 5"),
    ],
)
def test_one_key_for_one_name(one: str, other: str) -> None:
    assert key(one) == key(other)


def test_keys_keep_what_tells_apart() -> None:
    assert key("Rocky II") != key("Rocky III")
    assert key("V for Vendetta") == "v for vendetta"
    assert key("The The") == "the"
    assert key("A") == "a"
    assert short_key("Mission: Impossible") == "mission"
    assert short_key("Spider-Man") is None
    assert key("Ķīna") == "kina"
