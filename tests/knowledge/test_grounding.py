"""What counts as a claim, when it stands in a source, and what the score makes of it: worked by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.knowledge.claims import find_claims
from kellm_features.knowledge.facts import Page
from kellm_features.knowledge.grounding import Source, grounding, grounding_score, source_text, unsupported

PAGE = (
    "Toy Story is a 1995 American computer-animated comedy film directed by John Lasseter. It stars Tom Hanks, Tim "
    "Allen and Samuel L. Jackson. It earned $373.6 million, the 12th most of the 1990s, and was shown from 1995–98."
)


def found(text: str) -> list[tuple[str, str]]:
    return [(claim.kind, text[claim.start : claim.end]) for claim in find_claims(text)]


def missing(text: str, source: str) -> list[str]:
    return [text[claim.start : claim.end] for claim in unsupported(text, source)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Released in May, it stars Whoopi Goldberg.", ["Whoopi Goldberg"]),
        ("With Robin Williams and J. Lee Thompson, Jr.", ["Robin Williams", "J. Lee Thompson"]),
        ("Director Joe Johnston, and Robert Downey Jr. The rest is silence.", ["Joe Johnston", "Robert Downey Jr."]),
        ("by Guillermo del Toro, Lars von Trier and Héctor Elizondo",
         ["Guillermo del Toro", "Lars von Trier", "Héctor Elizondo"]),
        ("the book by Jean-Pierre Andrevon and Conan O'Brien", ["Jean-Pierre Andrevon", "Conan O'Brien"]),
        ("an Oscar-winning English-language film", ["Oscar"]),
        ("a French Action Comedy in Spanish, an American Film Noir", []),
        ("Dark, Gripping. Rarely so good. I liked it.", ["Gripping"]),
        ("Mann's direction. McKean shines. Others do not.", ["Mann's", "McKean"]),
        ("Jumanji is a fantasy film. Loneliness is a theme.", ["Jumanji"]),
        ("See Apollo 13 and Father of the Bride Part II.", ["Apollo 13", "Father of the Bride Part II"]),
        ('like "the usual suspects" and "What\'s Love Got to Do with It?" (1993)', ["What's Love Got to Do with It"]),
        ("“Honey, I Shrunk the Kids,” and *A Bug's Life*, **not** this", ["Honey, I Shrunk the Kids", "A Bug's Life"]),
        ("roles in Dances with Wolves (1990) and Blast from the Past (1999)",
         ["Dances with Wolves", "Blast from the Past"]),
        ("of Star Trek V: The Final Frontier (1989)", ["Star Trek V: The Final Frontier"]),
        ("Al Pacino in Heat (1995)", ["Al Pacino", "Heat"]),
        ('"Splendor (1999)." and "Heat (1995)"', ["Splendor", "Heat"]),
        ("E.T. came home. J.R.R. Tolkien wrote it.", ["E.T.", "J.R.R. Tolkien"]),
    ],
)  # fmt: skip
def test_names(text: str, names: list[str]) -> None:
    assert [name for kind, name in found(text) if kind == "name"] == names


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("from the 1990s and the '60s", {"1990s", "1960s"}),
        ("in 1939–45, 1914-1918 and 1998-12", {"1939", "1945", "1914", "1918", "1998"}),
        ("in 2001, 90210 of 1,995 men", {"2001", "90210", "1995"}),
        ("in her 30s and the 80s", {"30s", "80s"}),
        ("two of twelve friends, twenty-five years, the 6th and the sixth", {"2", "12", "20 5", "6th"}),
        ("$373.6 million and 92%", {"373.6", "92"}),
        ("one man, a first and second look", set()),
        ("Apollo 13, the 7up bottle", set()),
    ],
)
def test_years_and_numbers(text: str, figures: set[str]) -> None:
    assert {claim.key for claim in find_claims(text) if claim.kind != "name"} == figures


def test_a_year_is_no_number() -> None:
    kinds = [claim.kind for claim in find_claims("in 1995, 1,995 men of the 1990s saw 20 films")]
    assert kinds == ["year", "number", "year", "number"]
    assert missing("1,995 men in 1995", "Of 1995 men") == []
    assert missing("1,995 men in 1995", "Of 1,995 men") == ["1995"]


@pytest.mark.parametrize(
    "text",
    [
        "by JOHN LASSETER, with Hanks and Samuel Jackson",
        "by John Lásseter, the Lasseter of “Toy Story”",
        "with Dr. Tim Allen Sr.",
        "Lasseter's Toy Story",
        "of 1995, the 1990s, the '90s",
        "$373 million, or $374 million; the twelfth; 1998",
    ],
)
def test_what_stands_in_the_page(text: str) -> None:
    assert missing(text, PAGE) == []
    assert find_claims(text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("by John Hanks", ["John Hanks"]),  # both names stand there, the person does not
        ("with Tom Hanks and Tim Curry", ["Tim Curry"]),
        ("with W. Allen", ["W. Allen"]),
        ("a film by Comedy Central", ["Comedy Central"]),
        ("see Film, Earned, Shown", ["Earned", "Shown"]),  # there, but not as names
        ("in 1996, the 1980s", ["1996", "1980s"]),
        ("$372 million, the 13th, twelve men", ["372", "13th", "twelve"]),
        ("Toy Story 2 (1999)", ["Toy Story 2", "1999"]),
        ("It has Tom Hanks and Annie Potts. Potts is funny.", ["Annie Potts", "Potts"]),
    ],
)
def test_what_does_not_is_marked(text: str, wrong: list[str]) -> None:
    assert missing(text, PAGE) == wrong


def test_numerals_spelling_and_small_words_do_not_matter() -> None:
    source = "The Godfather: Part II, Twelve Monkeys, Thelma and Louise, Björk, Lech Wałęsa, Rocky III, Spider-Man"
    text = 'See "Godfather: Part 2", "12 Monkeys", Thelma & Louise, Bjork, Lech Walesa, "Rocky 3" and Spider Man.'
    assert missing(text, source) == []


def test_a_whole_number_stands_for_a_decimal_from_ten() -> None:
    source = f"It took 2.6, 92.5 and {'9' * 400}.5 million."
    assert missing("took 92, 3 and 400 million", source) == ["3", "400"]


def test_score_is_the_share_of_claims_and_each_counts_once() -> None:
    text = 'Toy Story (1995), by John Lasseter. "Toy Story" has Billy Crystal; Crystal, Lasseter, and Lasseter again.'
    result = grounding(text, PAGE)
    assert (result.score, result.claims) == (3 / 4, 4)
    assert [text[c.start : c.end] for c in result.unsupported] == ["Billy Crystal", "Crystal"]
    assert grounding_score(text, Source(PAGE)) == grounding_score(text, PAGE) == 3 / 4


def test_a_surname_is_another_claim_where_nobody_of_that_name_went_before() -> None:
    assert grounding("a film with Hanks and Billy Crystal", PAGE).claims == 2
    assert grounding("a film with Crystal and Billy Crystal", PAGE).claims == 2
    assert grounding("a film with Billy Crystal and Crystal", PAGE).claims == 1


def test_scream_is_not_scream_2() -> None:
    assert missing("in Scream 2 and Scream", "Scream is a film.") == ["Scream 2"]


@pytest.mark.parametrize("text", ["", "  \n", "A delightful film for all ages, not to be missed."])
def test_nothing_to_check_is_not_checked(text: str) -> None:
    assert grounding(text, PAGE) == grounding(text, "")
    assert (grounding(text, PAGE).score, grounding(text, PAGE).claims) == (0, 0)


def test_nothing_stands_in_an_empty_source() -> None:
    assert grounding_score("Toy Story (1995)", "") == 0
    assert missing("Toy Story (1995)", "") == ["Toy Story", "1995"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("John Lasseter", "Michael Mann"),
        ("Tom Hanks", "Tom Cruise"),
        ("1995", "1994"),
        ("Toy Story", "Heat"),
        ("Tim Allen", "John Allen"),
    ],
)
def test_one_swap_lowers_the_score(old: str, new: str) -> None:
    text = "Toy Story (1995) by John Lasseter has Tom Hanks and Tim Allen, as well as Billy Crystal."
    assert grounding_score(text.replace(old, new), PAGE) < grounding_score(text, PAGE)


def test_offsets_are_of_the_text_as_it_was_given() -> None:
    decomposed = "directed by He\u0301ctor Babenco æt home — “Łódź” (1990) in Kraków"
    assert found(decomposed) == [
        ("name", "He\u0301ctor Babenco"),
        ("name", "Łódź"),
        ("year", "1990"),
        ("name", "Kraków"),
    ]
    assert missing(decomposed, "Hector Babenco, Lodz, Krakow, 1990") == []


def test_source_is_all_that_is_known_and_no_references() -> None:
    page = Page("Toy Story", "A film.", (("Cast", "Tom Hanks as Woody"), ("References", "Roger Ebert"), ("Plot", " ")))
    source = source_text("Toy Story, The (1995)", ["Comedy", "(no genres listed)"], [page, Page("Pixar", "A studio.")])
    assert source.splitlines() == [
        "The Toy Story", "Toy Story, The (1995)", "Comedy", "Toy Story", "A film.", "Tom Hanks as Woody", "Pixar",
        "A studio.",
    ]  # fmt: skip
    assert grounding_score("The Toy Story (1995) has Woody and Pixar.", source) == 1
    assert missing("praised by Roger Ebert", source) == ["Roger Ebert"]
    assert source_text("Heat", [], []) == "Heat"


def test_the_documented_example() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "grounding.md"
    code = document.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    page = Page("Heat", "Heat is a 1995 film directed by Michael Mann, starring Al Pacino.")
    scope: dict[str, Any] = {"pages": [page]}
    exec(code, scope)
    assert (scope["result"].score, scope["result"].claims) == (0.8, 5)
    assert [claim.key for claim in scope["result"].unsupported] == ["tom cruise"]


PIECES = (
    "Robin Mann's the of The E.T. J. Dr. II 1995 1990s '60s 12 1,995 2.5 two Sixth O'Brien Jean-Claude Élan “Heat” \" “"
    " ” * ( ) . , is a Łódź 1939–45 (1990) English film With & I $ % é 映画 😀 ß İ ǅ"
).split()
TEXTS = st.builds(str.join, st.sampled_from([" ", ", ", "\n", " — "]), st.lists(st.sampled_from(PIECES), max_size=30))


@given(TEXTS)
def test_a_text_stands_in_itself(text: str) -> None:
    result = grounding(text, f"Before. {text} After.")
    assert result.unsupported == ()
    assert result.score == (1 if find_claims(text) else 0)


@given(TEXTS | st.text(max_size=200), TEXTS)
def test_score_is_a_share_and_marks_are_in_the_text(text: str, source: str) -> None:
    claims, result = find_claims(text), grounding(text, source)
    assert result.claims == len({(claim.kind, claim.key) for claim in claims})
    lost = len({(claim.kind, claim.key) for claim in result.unsupported})
    assert result.score * result.claims == pytest.approx(result.claims - lost)
    assert all(0 <= a.start < a.end <= b.start < b.end <= len(text) for a, b in itertools.pairwise(claims))
