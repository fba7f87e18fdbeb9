"""Kinds and years from titles, infoboxes and categories, against what a person reads on such pages."""

from __future__ import annotations

import pytest

from kellm_spark.evidence import defined_as, defined_year, kinds_of, split_title, title_kind, year_of
from kellm_spark.wikitext import Article, parse_article


def page(box: str = "", *categories: str) -> Article:
    """A page with an infobox ("film | released = 1995") and categories."""
    source = f"{{{{Infobox {box}}}}}\n" if box else ""
    return parse_article(source + "Text.\n" + "".join(f"[[Category:{name}]]\n" for name in categories))


@pytest.mark.parametrize(
    ("box", "kinds"),
    [
        ("film", ["film"]),
        ("Film awards", ["award"]),
        ("film festival", ["event"]),
        ("Television", ["television"]),
        ("television channel", ["organization"]),
        ("TV channel", ["organization"]),
        ("animanga/Header", ["television"]),
        ("book", ["book"]),
        ("comic book title", ["book"]),
        ("comics character", ["character"]),
        ("comics creator", ["person"]),
        ("video game character", ["character"]),
        ("video game", ["game"]),
        ("games", ["event"]),
        ("magazine", ["periodical"]),
        ("song", ["song"]),
        ("song contest", ["event"]),
        ("album", ["album"]),
        ("musical artist", ["band"]),
        ("musical composition", ["song"]),
        ("officeholder", ["person"]),
        ("football biography", ["person"]),
        ("football club", ["organization"]),
        ("football match", ["event"]),
        ("military conflict", ["event"]),
        ("military person", ["person"]),
        ("province or territory of Canada", ["settlement"]),
        ("U.S. state", ["settlement"]),
        ("language family", ["language"]),
        ("award", ["award"]),
        ("company", ["organization"]),
        ("martial art", []),
        ("unit", []),
    ],
)
def test_kind_of_an_infobox(box: str, kinds: list[str]) -> None:
    assert kinds_of(page(box), "X") == kinds


@pytest.mark.parametrize(
    ("category", "kinds"),
    [
        ("1995 films", ["film"]),
        ("Films directed by Michael Mann", ["film"]),
        ("Films based on American novels", ["film"]),
        ("Films about writers", ["film"]),
        ("American novels adapted into films", ["book"]),
        ("Films adapted into plays", ["film"]),
        ("Short stories adapted into films", ["book"]),
        ("Television shows adapted into films", ["television"]),
        ("Works adapted into films", []),
        ("Inspirations for films", []),
        ("Lists of films", []),
        ("American film awards", []),
        ("Books about film", ["book"]),
        ("Symphonic poems", []),
        ("Poems by Robert Frost", ["book"]),
        ("1928 compositions", ["song"]),
        ("Songs from musicals", ["song"]),
        ("2003 singles", ["song"]),
        ("Wimbledon champions – Men's singles", []),
        ("Albums produced by Brian Eno", ["album"]),
        ("Musical groups established in 1970", ["band"]),
        ("1905 births", ["person"]),
        ("384 BC births", ["person"]),
        ("Living people", ["person"]),
        ("Turkic people", []),
        ("Characters in the Iliad", ["character"]),
        ("Populated places in Latvia", ["settlement"]),
        ("1999 American television series debuts", ["television"]),
        ("Video games set in Japan", ["game"]),
    ],
)
def test_kind_of_a_category(category: str, kinds: list[str]) -> None:
    assert kinds_of(page("", category), "X") == kinds


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Casino (1995 film)", "film"),
        ("Rocky (film series)", "film series"),
        ("Emma (novel)", "book"),
        ("Psycho (comics)", "book"),
        ("Emma (TV series)", "television"),
        ("Alien (soundtrack)", "album"),
        ("Heart (band)", "band"),
        ("Francis Ford (actor)", "person"),
        ("Algorithms (journal)", "periodical"),
        ("(500) Days of Summer", None),
        ("Mercury (planet)", None),
    ],
)
def test_kind_of_a_title(title: str, kind: str | None) -> None:
    assert title_kind(title) == kind


def test_the_strongest_evidence_comes_first() -> None:
    assert kinds_of(page("film", "1996 films", "Films based on novels"), "Emma (novel)") == ["book", "film"]
    assert kinds_of(page("musical artist", "1947 births", "1970s bands"), "David Bowie") == ["band", "person"]
    # A list holds what its categories name and is none of it; a page with an infobox of its own is no list.
    assert kinds_of(page("", "1990s films", "Fictional detectives"), "List of films of 1995") == ["list"]
    assert kinds_of(page("film"), "List of Lovers") == ["film"]


def test_other_names_of_infoboxes() -> None:
    for source, kind in (
        ("{{Taxobox|name=Aardwolf}}", "species"),
        ("{{Automatic taxobox}}", "species"),
        ("{{Speciesbox|genus=Felis}}", "species"),
        ("{{Infoskreine taksonomeja|a=b}}", "species"),
        ("{{Infoboks film|a=b}}", "film"),
        ("{{Ficha de película|a=b}}", "film"),
        ("{{Info/Filme|a=b}}", "film"),
        ("{{Film infobox|a=b}}", "film"),
    ):
        assert kinds_of(parse_article(source), "X") == [kind], source


@pytest.mark.parametrize(
    ("title", "box", "categories", "year"),
    [
        ("Casino (1995 film)", "film | released = 1994", [], 1995),
        ("Heat", "film | released = {{Film date|1995|12|15|1996|2|1}}", [], 1995),
        ("Heat", "film | released = {{start date|df=y|1995|12|6}}", [], 1995),
        ("Heat", "film | released = <!-- 1990 --> [[December 15]], [[1995 in film|1995]]<ref>1993</ref>", [], 1995),
        ("Lost", "television | first_aired = {{Start date|2004|9|22}} | last_aired = 2010", [], 2004),
        ("The Sopranos", "television | released = 1999–2007", [], 1999),
        ("The Wire (2002–2008 TV series)", "television", [], 2002),
        ("Robinson Crusoe", "book | release_date = 25 April 1719", [], 1719),
        ("Animal Farm", "book | pub_date = 17 August 1945 | english_pub_date = 1946", [], 1945),
        ("America the Beautiful", "song | released = | written = 1895", [], 1895),
        ("Emma", "", ["1815 novels", "1815 British novels", "Novels adapted into films"], 1815),
        ("Emma", "film | runtime = 121", ["1996 films", "1990s comedy films"], 1996),
        ("An American in Paris", "", ["Compositions by George Gershwin", "1928 compositions"], 1928),
        ("Lost", "", ["2004 American television series debuts", "2010 American television series endings"], 2004),
        ("The Oscars", "award", ["Awards established in 1929", "1929 establishments in California"], None),
        ("Blade Runner 2049", "film | budget = $150 million", [], None),
        ("Ayn Rand", "writer | birth_date = {{birth date|1905|2|2}}", ["1905 births"], None),
    ],
)
def test_year_of_a_work(title: str, box: str, categories: list[str], year: int | None) -> None:
    assert year_of(page(box, *categories), title) == year


def test_only_parentheses_at_the_end_tell_pages_apart() -> None:
    assert split_title("Casino (1995 film)") == ("Casino", "1995 film")
    assert split_title("(500) Days of Summer") == ("(500) Days of Summer", "")
    assert split_title("Birdman or (The Virtue)") == ("Birdman or", "The Virtue")


@pytest.mark.parametrize(
    ("lead", "kind"),
    [
        ("Heat is a 1995 American crime drama film written and directed by Michael Mann.", "film"),
        ("I'm Not Rappaport is a play by Herb Gardner, made into a film in 1996.", "book"),
        ("Emma is a novel by Jane Austen, set in the film-like village of Highbury.", "book"),
        ("Final Destination is an American horror franchise that includes five films.", "film series"),
        ('"Let It Go" is a song from the film Frozen.', "song"),
        ("Trio is the soundtrack album of the film.", "album"),
        ("The Office is an American mockumentary sitcom television series.", "television"),
        ("Life Is a Long Quiet River is a 1988 French film.", "film"),
        ("A tall tale is a story with unbelievable elements.", None),
        ("Das ist ein Roman.", None),
        ("", None),
    ],
)
def test_what_a_lead_calls_its_subject(lead: str, kind: str | None) -> None:
    assert defined_as(lead) == kind


def test_the_year_in_a_definition() -> None:
    assert defined_year("The Seventh Seal is a 1957 Swedish historical fantasy film.") == 1957
    assert defined_year("Heat is a film of 1995.") is None
