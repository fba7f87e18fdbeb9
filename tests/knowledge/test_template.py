from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kellm_features.knowledge.domain import load_domain
from kellm_features.knowledge.engines import Prompt, load_engine
from kellm_features.knowledge.engines.template import describe_item, describe_user
from kellm_features.knowledge.facts import Event, Page, UserFacts, find_fact, item_facts, who
from kellm_features.knowledge.text import estimate_tokens
from kellm_features.settings import GenerateSettings

MOVIES, BOOKS = load_domain("movies"), load_domain("books")


def test_item_with_a_page() -> None:
    page = Page(
        "Heat",
        "Heat is a 1995 American crime film written and directed by Michael Mann. It stars Al Pacino, Robert De Niro "
        "and Val Kilmer. A detective hunts a crew of thieves in Los Angeles.",
        (("Cast", "* Al Pacino as Hanna\n* Jon Voight as Nate"),),
    )
    facts = item_facts(MOVIES, "Heat (1995)", 1995, ["Action", "Crime", "Thriller"], [page])
    assert describe_item(facts, 96) == (
        "Heat (1995) is an American crime film (action, thriller) directed by Michael Mann, starring Al Pacino, "
        "Robert De Niro, Val Kilmer and Jon Voight. A detective hunts a crew of thieves in Los Angeles."
    )


def test_item_without_a_page_year_or_genre() -> None:
    assert describe_item(item_facts(MOVIES, "Alien", 1979, ["Horror", "Sci-Fi"]), 96) == (
        "Alien (1979) is a horror and sci-fi film."
    )
    assert describe_item(item_facts(MOVIES, "Untold, The", None, ["unknown"]), 96) == "The Untold is a film."


def test_a_page_that_tells_no_facts_speaks_for_itself() -> None:
    page = Page("Odd", "Odd is a story about a lamp. It glows.")
    facts = item_facts(BOOKS, "Odd", 2001, ["Fable"], [page])
    assert describe_item(facts, 96) == "Odd (2001) is a fable book. Odd is a story about a lamp. It glows."


def test_book_author() -> None:
    page = Page("Emma", "Emma is a novel written by English author Jane Austen. It is set in Surrey.")
    facts = item_facts(BOOKS, "Emma", 1815, ["Romance"], [page])
    assert describe_item(facts, 96) == "Emma (1815) is a romance book by Jane Austen. It is set in Surrey."


@pytest.mark.parametrize(
    ("factor", "lead", "value"),
    [
        ("director", "It was directed and co-produced by W. S. Van Dyke and stars Myrna Loy.", "W. S. Van Dyke"),
        ("director", "Fargo is a film written, produced, and directed by Joel and Ethan Coen.", "Joel and Ethan Coen"),
        ("director", "A film directed by Guillermo del Toro. Set in Spain.", "Guillermo del Toro"),
        ("director", "A film produced by John Hughes.", ""),
        (
            "actors",
            "The film stars Robert Downey Jr., Mel Gibson, and Joan Cusack.",
            "Robert Downey Jr., Mel Gibson and Joan Cusack",
        ),
        ("country", "It is a 1963 British-American spy film.", "British-American"),
        ("country", "It is a 1963 film.", ""),
        ("genre", "It is a 1990 American romantic comedy film directed by A. B.", "romantic comedy"),
    ],
)
def test_facts_read_off_a_lead(factor: str, lead: str, value: str) -> None:
    rule = next(rule for rule in MOVIES.facts if rule.factor == factor)
    assert find_fact(rule, Page("P", lead)) == value


def liked(title: str, year: int, rating: float, *genres: str) -> Event:
    return Event(title, year, genres, rating, rating > 3)


EVENTS = (
    liked("Alien", 1979, 5, "Horror", "Sci-Fi"),
    liked("Heat", 1995, 4, "Crime"),
    liked("Blade Runner", 1982, 5, "Sci-Fi"),
    liked("Ghost", 1990, 2, "Romance"),
    liked("Pretty Woman", 1990, 3, "Romance", "Comedy"),
    liked("Clueless", 1995, 1, "Romance", "Comedy"),
    liked("Fargo", 1996, 4, "Crime", "Drama"),
)


def test_user_profile() -> None:
    # Likes: sci-fi 2 of 2, crime 2 of 2, drama 1 of 1, horror 1 of 1. Decades of likes: 1990s twice, two others once.
    assert describe_user(UserFacts("films", who("viewer", "M", "24", "technician"), EVENTS), 96) == (
        "A male viewer (technician, aged 24) who likes crime, sci-fi and drama films of the 1980s and 1990s. Liked "
        "Blade Runner, Alien, Fargo and Heat. Rarely likes romance films. Disliked Clueless, Ghost and Pretty Woman."
    )


def test_user_without_ratings_likes_or_history() -> None:
    unrated = tuple(Event(f"F{n}", None, (), None, True) for n in range(3))
    assert (
        describe_user(UserFacts("films", "a viewer", unrated), 96) == "A viewer who likes films. Liked F2, F1 and F0."
    )
    assert describe_user(UserFacts("films", "a viewer", EVENTS[3:6]), 96) == (
        "A viewer who has liked none of 3 films so far. Rarely likes romance films. "
        "Disliked Clueless, Ghost and Pretty Woman."
    )
    assert describe_user(UserFacts("books", "a female reader", ()), 96) == "A female reader without a known history."


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (("M", "24", "technician"), "a male viewer (technician, aged 24)"),
        (("f", "25-34", "other"), "a female viewer (aged 25-34)"),
        ((None, None, "academic/educator"), "a viewer (academic/educator)"),
        ((None, None, None), "a viewer"),
    ],
)
def test_demographics_of_what_is_known(known: tuple[str | None, ...], said: str) -> None:
    assert who("viewer", *known) == said


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)
genres = st.lists(words, max_size=3).map(tuple)
events = st.builds(
    Event, words, st.none() | st.integers(1900, 2030), genres, st.none() | st.floats(1, 5), st.booleans()
)


@settings(max_examples=60)
@given(st.lists(events, max_size=25), st.integers(24, 128))
def test_any_profile_keeps_its_budget_and_repeats_itself(history: list[Event], max_tokens: int) -> None:
    facts = UserFacts("films", "a viewer", tuple(history))
    text = describe_user(facts, max_tokens)
    assert text
    assert estimate_tokens(text) <= max_tokens
    engine = load_engine("template", GenerateSettings())
    assert [(place, c.text) for place, c in engine.generate([Prompt("", "", facts)] * 2, max_tokens=max_tokens)] == [
        (0, text),
        (1, text),
    ]
