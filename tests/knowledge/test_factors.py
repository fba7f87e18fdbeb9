from __future__ import annotations

import json

import pytest

from kellm_features.knowledge.factors import MOST_CHARACTERS, factor_schema, factors_as_prose, parse_factors

FACTORS = ["genre", "director", "plot/theme"]
WHOLE = {"genre": "crime", "director": "Michael Mann", "plot/theme": "A detective hunts thieves."}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (json.dumps(WHOLE), WHOLE),
        (f"Sure! Here it is:\n```json\n{json.dumps(WHOLE, indent=2)}\n```\nAnything else?", WHOLE),
        # The token limit fell within the last text, within a key, and before a value.
        ('{"genre": "crime", "plot/theme": "A detective hun', {"genre": "crime"}),
        ('{"genre": "crime", "direc', {"genre": "crime"}),
        ('{"genre": "crime", "director":', {"genre": "crime"}),
        # Not under the schema: case, lists, nothing known, keys of no domain, values of no text.
        (
            '{"Genre": ["crime", "drama"], "DIRECTOR": "unknown", "plot/theme": null, "x": "y"}',
            {"genre": "crime, drama"},
        ),
        ('{"genre": {"a": 1}, "director": 7, "plot/theme": "n/a"}', {}),
        ('{"director": "Not mentioned in the text."}', {}),
        # No JSON at all.
        (
            "Genre: crime\n- **Director**: Michael Mann\n3. Plot/theme: A hunt: long",
            {"genre": "crime", "director": "Michael Mann", "plot/theme": "A hunt: long"},
        ),
        ("Heat is a crime film by Michael Mann.", {}),
        ("", {}),
        ("{" * 2000, {}),
        ("- * " * 3000, {}),
        ("-" * 9000 + ": x", {}),
    ],
)
def test_factors_that_an_answer_tells(answer: str, told: dict[str, str]) -> None:
    assert parse_factors(answer, FACTORS) == told


def test_a_line_that_was_cut_off_is_left_out() -> None:
    answer = "Genre: crime\nDirector: Michael Ma"
    assert parse_factors(answer, FACTORS, cut_off=True) == {"genre": "crime"}
    assert parse_factors(answer, FACTORS)["director"] == "Michael Ma"


def test_the_order_is_the_domains_and_the_length_is_limited() -> None:
    told = parse_factors(json.dumps({"plot/theme": "x" * 2 * MOST_CHARACTERS, "genre": " a  b\n"}), FACTORS)
    assert list(told) == ["genre", "plot/theme"]
    assert told["genre"] == "a b"
    assert len(told["plot/theme"]) == MOST_CHARACTERS


def test_the_schema_asks_for_each_factor_and_nothing_else() -> None:
    schema = factor_schema(FACTORS)
    assert list(schema["properties"]) == schema["required"] == FACTORS
    assert schema["additionalProperties"] is False


def test_prose() -> None:
    assert factors_as_prose("Heat (1995)", {"genre": "crime", "plot/theme": "A hunt."}) == (
        "Heat (1995). Genre: crime. Plot/theme: A hunt."
    )
    assert factors_as_prose("", {"genre": "crime"}) == "Genre: crime."
