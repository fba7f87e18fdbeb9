from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from kellm_features.errors import ConfigError
from kellm_features.knowledge.domain import SHIPPED, load_domain

MOVIES = (resources.files("kellm_features.knowledge") / "domains" / "movies.toml").read_text(encoding="utf-8")


def test_every_shipped_file_is_a_domain() -> None:
    folder = Path(str(resources.files("kellm_features.knowledge"))) / "domains"
    assert tuple(sorted(path.stem for path in folder.glob("*.toml"))) == SHIPPED
    for name in SHIPPED:
        domain = load_domain(name)
        assert domain.name == name
        assert len(domain.item.factors) >= 5


def test_movie_factors_are_those_of_the_papers() -> None:
    domain = load_domain("movies")
    assert domain.item.factors == (
        "genre", "director", "actors", "time period", "country", "character", "plot/theme", "mood/tone",
        "critical acclaim/award",
    )  # fmt: skip
    assert {"production quality", "soundtrack"} < set(domain.user.factors)


def test_own_domain_by_path(tmp_path: Path) -> None:
    path = tmp_path / "songs.toml"
    path.write_text(MOVIES.replace('name = "movies"', 'name = "songs"'), encoding="utf-8")
    assert load_domain(str(path)).name == "songs"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{page}", "{pages}", r"item.grounded has the unknown field \{pages\}; accepted are .*\{page\}"),
        ("{page}", "the page", r"item.grounded lacks the field \{page\}"),
        ("Introduce the film {title}", "Introduce the film", r"item.closed_book lacks the field \{title\}"),
        ("{history}", "{title}", r"user.prompt has the unknown field \{title\}"),
        ("\n{history}\n", "\n", r"user.prompt lacks the field \{history\}"),
        ("is known of: {factors}.", "is known of {title}: {factors}.", r"item.system has the unknown field \{title\}"),
        ("{genres}", "{genres!r:>9}", r"unknown field \{genres\}"),
        ("{genres}", "{genres", "unpaired brace"),
        ("{names}", "names", r"holds none of \{name\}, \{names\}"),
        ("{names}", "({names}", "is no regular expression"),
        ("version = 1", "version = 1\nlanguage = 'en'", "'language': extra inputs are not permitted"),
        ("noun = ", "none = ", "'noun': field required"),
        ("[user]\n", "[user]\nagain = 'Only {title}.'\n", r"user.again has the unknown field \{title\}"),
        ("[item]\n", "[item]\nby_factor = 'JSON.'\n", r"item.by_factor lacks the field \{factors\}"),
        ('"genre", "director", "actors"', '"genre", "Genre", "actors"', "item.factors names one factor twice"),
        ("page_tokens = 320", "page_tokens = 3", "budget.page_tokens.*greater than or equal to 16"),
        ("digest_tokens", "summary_tokens", "budget.summary_tokens.*extra inputs"),
    ],
)
def test_faulty_domain_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in MOVIES
    path = tmp_path / "own.toml"
    path.write_text(MOVIES.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=told) as caught:
        load_domain(path)
    assert "\n" not in str(caught.value)


def test_a_setting_wins_over_the_domains_budget() -> None:
    domain = load_domain("movies")
    assert domain.budgeted(page_tokens=None, profile_tokens=None) == domain
    other = domain.budgeted(page_tokens=99, profile_tokens=None).budget
    assert (other.page_tokens, other.profile_tokens) == (99, domain.budget.profile_tokens)


def test_unknown_name_missing_file_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'films': accepted are articles, books, movies, products or the path"):
        load_domain("films")
    with pytest.raises(ConfigError, match="does not exist"):
        load_domain(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="not readable TOML"):
        load_domain(tmp_path / "bad.toml")
