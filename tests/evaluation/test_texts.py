"""Texts of items: what is read, what stands before what, and what is encoded once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kellm_features.errors import ConfigError, DataError
from kellm_features.evaluation.prepare import coverage_of, prepare, with_data
from kellm_features.evaluation.texts import TextEncoder, read_descriptions
from kellm_features.evaluation.world import save_vectors
from kellm_features.settings import Settings


def test_descriptions_of_json_and_parquet(tmp_path: Path) -> None:
    texts = {"1": "One.", "2": " ", "9": "Another catalogue's."}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    table = pd.DataFrame({"item_id": [1, 2, 9], "description": ["One.", None, "Another catalogue's."]})
    table.to_parquet(tmp_path / "texts.parquet")
    for name in ("texts.json", "texts.parquet"):
        assert read_descriptions(tmp_path / name, [1, 2, 3]) == {1: "One."}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not readable JSON"),
        ("[1]", "a list is seen"),
        ('{"1": 2}', "is of type int, not text"),
        ('{"77": "x"}', "none of"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        read_descriptions(path, [1, 2])


def test_descriptions_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file"):
        read_descriptions(tmp_path / "no.json", [1])


def test_a_text_is_encoded_once(tmp_path: Path) -> None:
    encoder = TextEncoder(Settings().encode, tmp_path)
    first = encoder.encode({"a": ["a film about a dog", "a film about a war"], "b": ["a film about a dog"]})
    assert np.array_equal(first["a"][0], first["b"][0])
    parts = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = encoder.encode({"c": ["a film about a war"]})
    assert np.array_equal(again["c"][0], first["a"][1])
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == parts


def test_vectors_are_named_by_their_content(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert save_vectors(tmp_path, x) == save_vectors(tmp_path, x.copy()) != save_vectors(tmp_path, x + 1)
    assert np.array_equal(np.load(tmp_path / save_vectors(tmp_path, x)), x)


def test_coverage_counts_what_is_more_than_the_title() -> None:
    """Of four items two have a page; the digest of the others is a sentence that says nothing of them."""
    texts = {
        "title": ["A", "B", "C", "D"],
        "digest": ["A. By Lee.", "B. By Kim.", "C. A film.", "D. A film."],
        "page": ["A is a film by Lee.", "B", "C", "D"],  # the page of B has no lead
        "closed-book": ["A says the model", "B says the model", "C says the model", "D"],
    }
    assert coverage_of(texts, [True, True, False, False]) == {"digest": 0.5, "page": 0.5, "closed-book": 0.75}


@pytest.mark.parametrize(
    ("files", "expected"),
    [(["movies.dat"], "movielens-1m"), (["movies.csv"], "movielens-latest"), (["u.item"], "movielens-100k")],
)
def test_a_release_is_told_by_its_files(tmp_path: Path, files: list[str], expected: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    settings = with_data(Settings(), tmp_path, None)
    assert (settings.data.format, settings.data.path, settings.history.ties) == (expected, tmp_path, "strict")


@pytest.mark.parametrize("coarse", [True, False])
def test_a_coarse_clock_shuffles_ties(tmp_path: Path, coarse: bool) -> None:
    (tmp_path / "movies.dat").touch()
    columns = {"user_id": [1], "item_id": [1], "liked": [True], "timestamp": [0]} | (
        {"timestamp_coarse": [True]} if coarse else {}
    )
    pd.DataFrame(columns).to_parquet(tmp_path / "interactions.parquet")
    settings = with_data(Settings(), tmp_path, None)
    assert settings.data.interactions == tmp_path / "interactions.parquet"
    assert settings.history.ties == ("shuffle" if coarse else "strict")


def test_constants_of_swing_that_would_be_passed_over(tmp_path: Path) -> None:
    settings = Settings.model_validate({"swing": {"alpha": 2.0, "preset": "yang"}})
    with pytest.raises(ConfigError, match=r"swing\.alpha = 2\.0 has no effect"):
        prepare(settings, "ctr", tmp_path / "out", descriptions=None, listener=lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds none of movies\.dat"):
        with_data(Settings(), tmp_path, None)
    with pytest.raises(DataError, match="is not a folder"):
        with_data(Settings(), tmp_path / "no", None)
