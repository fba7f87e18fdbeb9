"""Linking on a hand-made catalogue whose right answers are known, traps included."""

from __future__ import annotations

from typing import Any

import pytest

from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_spark.linking import LinkOptions, link_items, linkable_titles

PAGE_COLUMNS = (
    "wiki_page_id long, wiki_title string, display_title string, redirect_to string, is_disambiguation boolean, "
    "evidence array<string>, year int, lead string"
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
        more.get("lead", f"{title.partition(' (')[0]} is a thing."),
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
    page(40, "12 Monkeys", year=1995),
    page(41, "National Lampoon's Vacation", year=1983, lead="National Lampoon's Vacation, or simply Vacation, is"),
    page(42, "Vacation (2015 film)", year=2015),
    page(43, "Miss Evers' Boys", year=1997),
    page(44, "The Puppet Masters (film)", year=1994, lead="The Puppet Masters is a film after Robert Heinlein."),
    page(45, "The Empire Strikes Back", year=1980, lead="The Empire Strikes Back is the second Star Wars film."),
    page(46, "Candyman 2: Farewell to the Flesh", year=1995),
    page(47, "Children of the Corn III: Urban Harvest", year=1995),
    page(48, "Everything You Always Wanted to Know About Sex* But Were Afraid to Ask", year=1972),
    page(49, "Attack of the Killer Tomatoes", year=1978),
    page(50, "Air Bud", year=1997),
    page(51, "One Hundred and One Dalmatians", year=1961),
    page(52, "101 Dalmatians (1996 film)", year=1996),
    page(53, "Alice, Sweet Alice", year=1976),
    page(54, "Prince of Central Park", year=2000),
    page(55, "Killer!", year=1990),
    page(56, "The Loner: Ringmaster", year=1998),
    page(57, "Saw IV", year=2007),
    page(58, "Dracula: Dead Again", year=1979),
    page(59, "Dracula: Back Again", year=1979),
    page(60, "Friday the 13th Part 2", year=1981),
    page(61, "Little Women (1994 film)", year=1994),
    page(62, "Little Women (1995 film)", year=1995),
    page(63, "Little Women", "book", 1868),
    page(64, "The Jerky Boys: The Movie", year=1995),
    page(65, "Aladdin: The Return of Jafar", year=1993, lead="The Return of Jafar is a film."),
    page(66, "The Wrath of God", year=1972),
    page(67, "Steve Jobs (film)", year=2015),
    page(68, "2010 (film)", year=1984, lead="2010: The Year We Make Contact is a film."),
    page(69, "Che (2008 film)", year=2008),
    page(71, "The Class (2008 film)", year=2008),
    page(72, "Anguish (1987 film)", year=1987, lead="Anguish (Spanish: Angustia) is a film."),
    page(77, "Demon Knight", year=1995, lead="Tales from the Crypt Presents: Demon Knight is a film."),
    page(74, "The Seventh Seal", None, lead="The Seventh Seal is a 1957 Swedish film by Ingmar Bergman."),
    page(75, "Singin' in the Rain", None, lead="Singin' in the Rain is a 1952 American musical film."),
    page(76, "Singin' in the Rain (film)", year=1952),
    page(73, "I'm Not Rappaport", year=1996, lead="I'm Not Rappaport is a play by Herb Gardner."),
    page(70, "Death at a Funeral Parlour (2010 film)", year=2010),
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
    (40, "Twelve Monkeys", 1995, 40, "normalized"),
    (41, "Vacation", 1983, 41, "possessive"),  # the other "Vacation" is of another year
    (42, "Boys, Les", 1997, None, "year mismatch"),  # and not the boys of Miss Evers
    (43, "Robert A. Heinlein's The Puppet Masters", 1994, 44, "possessive"),
    (44, "Star Wars: Episode V - The Empire Strikes Back", 1980, 45, "subtitle"),
    (45, "Candyman: Farewell to the Flesh", 1995, 46, "subtitle"),
    (46, "Candyman 3: Farewell to the Flesh", 1995, None, "no candidate"),  # one number may be missing, not differ
    (47, "Children of the Corn III", 1994, 47, "subtitle"),  # with its number, a year off is the same film
    (48, "Everything You Always Wanted to Know About Sex", 1972, 48, "prefix"),
    (49, "Attack of the Killer Tomatoes!", 1980, 49, "year"),
    (50, "Attack of the Killer Tomatoes!", 1984, None, "year mismatch"),
    (51, "Air Bud: Golden Receiver", 1998, None, "no candidate"),  # the sequel of a year later
    (52, "101 Dalmatians", 1961, 51, "normalized"),
    (53, "101 Dalmatians", 1996, 52, "exact"),
    (54, "Communion (a.k.a. Alice, Sweet Alice/Holy Terror)", 1977, 53, "aka"),
    (55, "Prince of Central Park, The", 1999, 54, "normalized"),  # four words a year apart are the same
    (56, "Killer, The", 1989, None, "year mismatch"),  # one word is not, and no misspelling either
    (57, "Ringmaster", 1998, None, "no candidate"),  # one word behind a colon is too little
    (58, "Saw V", 2007, None, "no candidate"),
    (59, "Dracula", 1979, None, "ambiguous"),  # two films begin with the name
    (60, "Friday the 13th", 1981, None, "no candidate"),  # cut short, but for the number
    (61, "Little Women", 1994, 61, "exact"),  # a remake within a year: the nearer one
    (62, "Little Women", 1995, 62, "exact"),
    (63, "Jerky Boys, The", 1994, 64, "normalized"),
    (64, "Return of Jafar, The", 1993, 65, "subtitle"),
    (66, "Aguirre: The Wrath of God", 1972, None, "unconfirmed"),  # its tail is the name of a Western of that year
    (67, "Steve Jobs: The Man in the Machine", 2015, None, "unconfirmed"),  # a documentary of the film's year
    (68, "2010: The Year We Make Contact", 1984, 68, "subtitle"),
    (69, "Che: Part Two", 2008, 69, "subtitle"),
    (70, "Death at a Funeral Parlour", 2007, None, "year mismatch"),  # the remake; its page says that there are two
    (71, "Class, The (Klass)", 2007, None, "year mismatch"),  # a French film of the year after
    (72, "Anguish (Angustia)", 1986, 72, "exact"),
    (77, "Tales from the Crypt Presents: Demon Knight", 1995, 77, "subtitle"),  # and possessive, at the same score
    (74, "Seventh Seal, The (Sjunde inseglet, Det)", 1957, 74, "exact"),  # no infobox, no category
    (75, "Singin' in the Rain", 1952, 76, "exact"),  # those weigh more than a lead
    (76, "Seventh Seal, The", 1977, None, "year mismatch"),
    (73, "I'm Not Rappaport", 1996, 73, "exact"),
    (65, "Vacation", 1984, None, "year mismatch"),
]


@pytest.fixture(scope="module")
def links(spark) -> dict[int, Any]:
    items = spark.createDataFrame([row[:3] for row in CATALOGUE], "item_id long, title string, year int")
    frame = link_items(items.repartition(4), spark.createDataFrame(PAGES, PAGE_COLUMNS).repartition(3))
    rows = frame.collect()
    assert sorted(row.item_id for row in rows) == sorted(row[0] for row in CATALOGUE)  # every item once
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
    assert links[73].link_score == pytest.approx(0.6)  # the page is of the play, and tells of the film
    assert links[16].runner_up == "Ghost (1990 film)"
    assert links[5].runner_up == "Sabrina (1954 film)"


@pytest.mark.spark
def test_tolerance_and_similarity_are_limits(spark) -> None:
    items = spark.createDataFrame(
        [("a", "Casino", 1993), ("b", "U.S. Marshalls", 1998)], "item_id string, title string, year int"
    )
    pages = spark.createDataFrame(PAGES, PAGE_COLUMNS)
    wide = {
        r.item_id: r for r in link_items(items, pages, LinkOptions(year_tolerance=2, min_similarity=0.95)).collect()
    }
    assert wide["a"].wiki_page_id == 3
    assert wide["a"].link_score == pytest.approx(0.84)
    assert wide["b"].reason == "no candidate"


@pytest.mark.spark
def test_books_link_to_books(spark) -> None:
    items = spark.createDataFrame([(1, "Emma", 1815), (2, "The Matrix", 1999)], "item_id long, title string, year int")
    pages = spark.createDataFrame(PAGES, PAGE_COLUMNS)
    rows = {r.item_id: r for r in link_items(items, pages, LinkOptions(domain="books")).collect()}
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
    with pytest.raises(SchemaError, match="'evidence' is missing"):
        link_items(items, pages.drop("evidence"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"domain": "recipes"}, "known: movies"),
        ({"method": "nearest"}, "known: names, edit-similarity"),
        ({"domain": "articles", "method": "edit-similarity"}, "articles mention many"),
        ({"year_tolerance": -1}, "year_tolerance is -1"),
        ({"min_similarity": 0}, "min_similarity is 0"),
        ({"max_links": 0}, "max_links is 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LinkOptions(**options)


@pytest.mark.spark
def test_linkable_titles_hold_every_page_that_may_be_linked(spark) -> None:
    items = spark.createDataFrame([row[:3] for row in CATALOGUE], "item_id long, title string, year int")
    titles = spark.createDataFrame([(p[1],) for p in PAGES], "wiki_title string")
    kept = {row.wiki_title for row in linkable_titles(items, titles).collect()}
    of_title = {p[0]: p[1] for p in PAGES}
    # A misspelt name and what a page calls itself show only inside the page.
    needed = {of_title[page_id] for *_, page_id, how in CATALOGUE if page_id and how != "fuzzy" and page_id != 25}
    assert needed <= kept
    assert {"Leon", "The Professional"} <= kept  # redirects, whose targets are read in a second round
    assert "Madonna song" not in kept
    assert "Amélie" in kept


@pytest.mark.spark
def test_every_order_of_the_rows_links_alike(spark) -> None:
    items = [row[:3] for row in CATALOGUE]
    answers = []
    for parts, flip in ((1, False), (5, True)):
        frame = spark.createDataFrame(items[::-1] if flip else items, "item_id long, title string, year int")
        pages = spark.createDataFrame(PAGES[::-1] if flip else PAGES, PAGE_COLUMNS)
        answers.append(sorted(link_items(frame.repartition(parts), pages.repartition(parts)).collect()))
    assert answers[0] == answers[1]
