"""Titles as keys: names that an item goes by, and spellings that are one name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_spark.naming import compact, item_names, key, parts, serial_key, unowned
from kellm_spark.numbers import digits, plain_amounts


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
        ("Hard 8 (a.k.a. Sydney, a.k.a. Hard Eight)", ["Hard 8", "Sydney", "Hard Eight"]),
        (
            "Strike! (a.k.a. The Hairy Bird, All I Wanna Do)",
            ["Strike!", "The Hairy Bird, All I Wanna Do", "The Hairy Bird", "All I Wanna Do"],
        ),
        ("Hate (Haine, La)", ["Hate", "La Haine"]),
        ("(500) Days of Summer (2009)", ["(500) Days of Summer"]),
        ("Et Dieu&#8230; cr&eacute;a la femme", ["Et Dieu… créa la femme"]),
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
        ("Twelve Monkeys", "12 Monkeys"),
        ("The 6th Man", "Sixth Man, The"),
        ("$1,000,000 Duck", "The Million Dollar Duck"),
        ("9½ Weeks", "Nine 1/2 Weeks"),
        ("Doctor Dolittle", "Dr. Dolittle"),
        ("Romeo + Juliet", "Romeo & Juliet"),
        ("42nd Street", "Forty-Second Street"),
        ("The Jerky Boys: The Movie", "Jerky Boys, The"),
    ],
)
def test_one_key_for_one_name(one: str, other: str) -> None:
    assert {key(name) for name in item_names(one)} & {key(name) for name in item_names(other)}


def test_keys_keep_what_tells_apart() -> None:
    assert key("Rocky II") != key("Rocky III")
    assert key("V for Vendetta") == "v for vendetta"
    assert key("The The") == "the"
    assert key("A") == "a"
    assert key("Dr. No") == "doctor no"
    assert key("Ķīna") == "kina"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("Mission: Impossible", ("Mission", "Impossible")),
        ("Star Wars: Episode V - The Empire Strikes Back", ("Star Wars", "The Empire Strikes Back")),
        ("Spider-Man", None),
        ("Batman: The Movie", None),
        ("2:37", None),
    ],
)
def test_pieces_of_a_name(name: str, pieces: tuple[str, str] | None) -> None:
    assert parts(name) == pieces


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("Robert A. Heinlein's The Puppet Masters", "The Puppet Masters"),
        ("Robert A. Heinlein’s The Puppet Masters", "The Puppet Masters"),
        ("Disney's The Kid", "The Kid"),
        ("Tales from the Crypt Presents: Demon Knight", "Demon Knight"),
        ("Schindler's List", None),
        ("My Best Friend's Wedding", None),
        ("A Pyromaniac's Love Story", None),
        ("What's Eating Gilbert Grape", None),
    ],
)
def test_owners_in_front_of_a_name(name: str, rest: str | None) -> None:
    assert unowned(name) == rest


def test_series_without_their_numbers() -> None:
    assert serial_key("Candyman 2: Farewell to the Flesh") == serial_key("Candyman: Farewell to the Flesh")
    assert serial_key("Friday the 13th Part V: A New Beginning") == serial_key("Friday the 13th: A New Beginning")
    assert serial_key("Heat") is None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("one hundred and one dalmatians", "101 dalmatians"),
        ("two thousand one", "2001"),
        ("nineteen eighty four", "19 84"),
        ("one eight seven", "1 8 7"),
        ("twenty one", "21"),
        ("seven and seven", "7 and 7"),
        ("one million bc", "1000000 bc"),
        ("henry v", "henry 5"),
        ("v for vendetta", "v for vendetta"),
        ("godfather part ii", "godfather 2"),
        ("rocky part i", "rocky 1"),
        ("part of me", "part of me"),
        ("doctor no", "doctor no"),
        ("no 2 road", "no 2 road"),
    ],
)
def test_numbers_as_digits(words: str, wanted: str) -> None:
    assert " ".join(digits(words.split())) == wanted


_SPOKEN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen \
eighteen nineteen".split()
)
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def spoken(number: int) -> list[str]:
    """How a number below a million is read aloud, written independently of the parser."""
    if number < 20:
        return [_SPOKEN[number]]
    if number < 100:
        return [_TENS[number // 10], *([_SPOKEN[number % 10]] if number % 10 else [])]
    if number < 1000:
        return [_SPOKEN[number // 100], "hundred", *(["and", *spoken(number % 100)] if number % 100 else [])]
    return [*spoken(number // 1000), "thousand", *(spoken(number % 1000) if number % 1000 else [])]


@given(st.integers(0, 999_999))
def test_any_number_is_read_back(number: int) -> None:
    assert digits(spoken(number)) == [str(number)]


def test_amounts() -> None:
    assert plain_amounts("$1,000,000 Duck") == "1000000 dollar Duck"
    assert plain_amounts("20,000 Leagues") == "20000 Leagues"
    assert plain_amounts("1,2,3 Go") == "1,2,3 Go"


@given(st.text(max_size=60))
def test_any_title_has_names_and_keys(title: str) -> None:
    for name in item_names(title):
        assert key(key(name)) == key(key(key(name)))  # it settles
        assert " " not in compact(key(name))
