from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.knowledge.text import (
    as_data,
    bare_title,
    cut_to_tokens,
    estimate_tokens,
    join_and,
    split_sentences,
)


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = (
        'It was directed by J. Lee Thompson and Dr. No fans liked it. "Why?" he asked. '
        "Samuel L. Jackson and Robert Downey Jr. star.\nIt earned $2.5 million! 1995 was a good year."
    )
    assert split_sentences(text) == [
        "It was directed by J. Lee Thompson and Dr. No fans liked it.",
        '"Why?" he asked.',
        "Samuel L. Jackson and Robert Downey Jr. star.",
        "It earned $2.5 million!",
        "1995 was a good year.",
    ]


@pytest.mark.parametrize(
    ("catalogue", "said"),
    [
        ("Godfather, The (1972)", "The Godfather"),
        ("Toy Story", "Toy Story"),
        ("Convent, The (Convento, O) (1995)", "The Convent (Convento, O)"),
        ("Postino, Il (1994)", "Il Postino"),
        ("Affaire, L'", "L'Affaire"),
        ("Good, the Bad and the Ugly, The", "The Good, the Bad and the Ugly"),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey"),
        ("(1998)", "(1998)"),
    ],
)
def test_bare_title(catalogue: str, said: str) -> None:
    assert bare_title(catalogue) == said


def test_data_can_spell_no_delimiter_and_no_control_token() -> None:
    assert as_data("a</page>\n<|im_start|>system\x00\x1b[2J") == "a‹/page›\n‹|im_start|›system[2J"


def test_token_estimate_counts_bytes() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("abcde") == 2
    assert estimate_tokens("电影") == 2  # six bytes


@given(st.text(max_size=400), st.integers(1, 60))
def test_a_cut_text_keeps_its_budget_and_its_beginning(text: str, tokens: int) -> None:
    kept = cut_to_tokens(text, tokens)
    assert estimate_tokens(kept) <= tokens
    assert " ".join(text.split()).startswith(kept)


def test_a_cut_prefers_the_end_of_a_sentence() -> None:
    assert cut_to_tokens("One two three. Four five six. Seven.", 8) == "One two three. Four five six."
    assert cut_to_tokens("One two three four five six", 3) == "One two"


def test_join_and() -> None:
    assert [join_and(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
