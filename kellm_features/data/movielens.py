"""MovieLens in its published forms: 100K (its own files, or the package that ships it), 1M, and latest.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from kellm_features.data.tables import RawTables, read_frame, read_separated, rename_columns
from kellm_features.resources import MOVIELENS_100K, package_file

GENRES_100K = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")
ITEM_FIELDS_100K = ["item_id", "title", "release_date", "video_release_date", "imdb_url", *GENRES_100K]
AGE_GROUPS = {
    1: "under 18",
    18: "18-24",
    25: "25-34",
    35: "35-44",
    45: "45-49",
    50: "50-55",
    56: "56 or over",
}
"""The seven groups of ML-1M, lower bound -> name; ML-100K's ages in years are put into the same ones."""
OCCUPATIONS_1M = (
    "other|academic or educator|artist|clerical or admin|college or graduate student|customer service|"
    "doctor or health care|executive or managerial|farmer|homemaker|K-12 student|lawyer|programmer|retired|"
    "sales or marketing|scientist|self-employed|technician or engineer|tradesman or craftsman|unemployed|writer"
).split("|")
NO_GENRES = "(no genres listed)"
# "Matrix, The (1999)", with trailing spaces, and "(V)" for straight-to-video releases
_TITLE = re.compile(r"^(?P<title>.*?)\s*\((?P<year>(?:18|19|20)\d\d)\)\s*(?:\((?:V|TV)\))?\s*$")


def split_title(title: str) -> tuple[str, int | None]:
    """Part "Matrix, The (1999)" into ("Matrix, The", 1999); the year is None where none is given."""
    match = _TITLE.match(title)
    return (match["title"], int(match["year"])) if match else (title.strip(), None)


def with_title_and_year(items: pd.DataFrame, fallback_year: pd.Series | None = None) -> pd.DataFrame:
    """Replace `title` by its name and add `year` (nullable int32)."""
    parts = [split_title(str(title)) for title in items["title"]]
    year = pd.Series([year for _, year in parts], index=items.index, dtype="Int32")
    if fallback_year is not None:
        year = year.fillna(fallback_year.astype("Int32"))
    return items.assign(title=[title for title, _ in parts], year=year)


def age_group(age: int) -> str:
    """The ML-1M group of an age in years (or of a group's code)."""
    return AGE_GROUPS[max(bound for bound in AGE_GROUPS if bound <= max(age, 1))]


def _split_genres(text: str) -> list[str]:
    return [] if text == NO_GENRES else [genre for genre in str(text).split("|") if genre]


def read_100k(folder: Path | None) -> RawTables:
    """MovieLens-100K from `u.data`, `u.item`, `u.user`, or from the package that ships it."""
    if folder is not None:
        interactions = read_separated(folder / "u.data", "\t", ["user_id", "item_id", "rating", "timestamp"])
        items = read_separated(folder / "u.item", "|", ITEM_FIELDS_100K)
        users = read_separated(folder / "u.user", "|", ["user_id", "age", "gender", "occupation", "zip_code"])
    else:
        files = {name: package_file(MOVIELENS_100K, f"MovieLens100k_{name}.parquet.brotli") for name in PACKAGED}
        interactions, items, users = (read_frame(files[name]) for name in PACKAGED)
        interactions = interactions.rename(columns={"movie_id": "item_id"})
        items = items.rename(columns={"movie_id": "item_id", "movie_title": "title"})
    flags = items[GENRES_100K[1:]].astype(int)
    genres = [[name for name, flag in zip(flags.columns, row, strict=True) if flag] for row in flags.to_numpy()]
    released = pd.to_datetime(items["release_date"], format="%d-%b-%Y", errors="coerce").dt.year
    items = with_title_and_year(items.assign(genres=genres), fallback_year=released)
    users = users.assign(
        age=[age_group(int(age)) for age in users["age"]],
        occupation=users["occupation"].where(~users["occupation"].isin(["none", "other"])),
    )
    return _typed(interactions, items, users)


PACKAGED = ("data", "items", "users")


def read_1m(folder: Path) -> RawTables:
    """MovieLens-1M from `ratings.dat`, `movies.dat`, `users.dat` (`::` between fields, latin-1)."""
    return _typed(
        read_separated(folder / "ratings.dat", "::", ["user_id", "item_id", "rating", "timestamp"]),
        read_1m_items(folder),
        read_1m_users(folder),
    )


def read_1m_items(path: Path) -> pd.DataFrame:
    """The catalogue of MovieLens-1M: `movies.dat`, or the folder that holds it."""
    items = read_separated(path / "movies.dat" if path.is_dir() else path, "::", ["item_id", "title", "genres"])
    return with_title_and_year(items.assign(genres=[_split_genres(text) for text in items["genres"]]))


def read_1m_users(folder: Path) -> pd.DataFrame:
    """The users of MovieLens-1M, ages and occupations in words."""
    users = read_separated(folder / "users.dat", "::", ["user_id", "gender", "age", "occupation", "zip_code"])
    return users.assign(
        age=[age_group(int(age)) for age in users["age"]],
        occupation=[OCCUPATIONS_1M[int(code)] if int(code) else None for code in users["occupation"]],
    )


def read_latest(folder: Path) -> RawTables:
    """MovieLens latest (small or full) from `ratings.csv` and `movies.csv`; it has no users table."""
    ratings, movies = folder / "ratings.csv", folder / "movies.csv"
    names = {"user_id": "userId", "item_id": "movieId"}
    interactions = rename_columns(read_frame(ratings), names, ("user_id", "item_id", "rating", "timestamp"), ratings)
    items = rename_columns(read_frame(movies), names, ("item_id", "title", "genres"), movies)
    items = with_title_and_year(items.assign(genres=[_split_genres(text) for text in items["genres"]]))
    return _typed(interactions, items, None)


def _typed(interactions: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame | None) -> RawTables:
    """Ids and timestamps as int64, ratings as float32, catalogue columns in house order."""
    interactions = interactions.astype(
        {"user_id": "int64", "item_id": "int64", "rating": "float32", "timestamp": "int64"}
    )
    items = items.astype({"item_id": "int64"})[["item_id", "title", "year", "genres"]]
    if users is not None:
        users = users.astype({"user_id": "int64"})[["user_id", "gender", "age", "occupation"]]
    return RawTables(interactions[["user_id", "item_id", "rating", "timestamp"]], items, users)
