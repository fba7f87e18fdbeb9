from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kellm_features.data import ingest
from kellm_features.data.movielens import age_group, split_title
from kellm_features.data.split import split_by_time, split_by_user, split_hash
from kellm_features.errors import ConfigError, DataError, KellmError, SchemaError
from kellm_features.schemas import INTERACTIONS, ITEMS, USERS
from kellm_features.settings import load_settings
from kellm_features.stages import StageContext, StageReport


def run(out: Path, *overrides: str) -> StageReport:
    settings = load_settings(None, overrides)
    return ingest.run(StageContext(settings, out, out, out, {}, ingest.input_files(settings), None))


def events(count: int = 40) -> pd.DataFrame:
    """Ten users, two ratings a second, ids from 1."""
    row = np.arange(count)
    return pd.DataFrame(
        {"user_id": row % 10 + 1, "item_id": row % 4 + 1, "rating": row % 5 + 1, "timestamp": 10**9 + row // 2}
    ).drop_duplicates(["user_id", "item_id"])


def catalogue() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "item_id": [1, 2, 3, 4],
            "title": ["Up (2009)", "Matrix, The (1999)", "Heat", "M (1931)"],
            "genres": ["A|B"] * 4,
        }
    )


def write(folder: Path, interactions: pd.DataFrame | None = None, items: pd.DataFrame | None = None) -> list[str]:
    (events() if interactions is None else interactions).to_csv(folder / "events.csv", index=False)
    (catalogue() if items is None else items).to_csv(folder / "items.csv", index=False)
    return [
        "data.format=table",
        f"data.interactions={folder / 'events.csv'}",
        f"data.items={folder / 'items.csv'}",
    ]


def test_movielens_100k_from_its_package(tmp_path: Path) -> None:
    report = run(tmp_path)
    assert (report.rows_in, report.rows_out) == (100_000, 100_000)
    assert (report.notes["items"], report.notes["users"]) == (1682, 943)
    assert report.notes["liked_share"] == pytest.approx(0.55375)  # ratings 4 and 5 of the published counts
    tables = {s.name: pq.read_table(tmp_path / f"{s.name}.parquet") for s in (INTERACTIONS, ITEMS, USERS)}
    for schema in (INTERACTIONS, ITEMS, USERS):
        schema.check(tables[schema.name].schema, schema.name)
    users_per_part = tables["interactions"].to_pandas().groupby("split")["user_id"].nunique()
    assert users_per_part.to_dict() == {"train": 754, "valid": 95, "test": 94}  # 8:1:1 of 943
    items = tables["items"].to_pandas().set_index("item_id")
    assert (items.loc[1, "title"], items.loc[1, "year"]) == ("Toy Story", 1995)
    assert list(items.loc[1, "genres"]) == ["Animation", "Children's", "Comedy"]
    assert pd.isna(items.loc[267, "year"])  # the item named "unknown"


def test_published_layouts_of_movielens(tmp_path: Path) -> None:
    old, latest = tmp_path / "1m", tmp_path / "latest"
    old.mkdir()
    latest.mkdir()
    frame = events()
    rows = frame[["user_id", "item_id", "rating", "timestamp"]].astype(str)
    (old / "ratings.dat").write_text("\n".join(rows.agg("::".join, axis=1)) + "\n")
    films = "1::Léon (1994)::Drama\n2::B (1990)::Action|War\n3::C (1991)::Drama\n4::D (1992)::War\n"
    (old / "movies.dat").write_text(films, encoding="latin-1")
    (old / "users.dat").write_text("\n".join(f"{user}::F::1::10::48067" for user in range(1, 11)) + "\n")
    run(tmp_path, "data.format=movielens-1m", f"data.path={old}")
    items = pq.read_table(tmp_path / "items.parquet").to_pylist()
    assert items[0]["title"] == "Léon"
    assert items[1] == {"item_id": 2, "title": "B", "year": 1990, "genres": ["Action", "War"]}
    user = pq.read_table(tmp_path / "users.parquet").to_pylist()[0]
    assert user == {"user_id": 1, "gender": "F", "age": "under 18", "occupation": "K-12 student"}
    for delimiter in ",;":
        frame.rename(columns={"user_id": "userId", "item_id": "movieId"}).to_csv(
            latest / "ratings.csv", index=False, sep=delimiter
        )
        catalogue().rename(columns={"item_id": "movieId"}).to_csv(latest / "movies.csv", index=False, sep=delimiter)
        report = run(tmp_path, "data.format=movielens-latest", f"data.path={latest}")
        assert report.rows_out == len(frame)
        assert report.notes["users_without_attributes"] == 10


def test_mapped_columns_strings_and_milliseconds(tmp_path: Path) -> None:
    frame = events().rename(columns={"user_id": "viewer", "rating": "stars"})
    frame["viewer"] = "u" + frame["viewer"].astype(str)
    frame["timestamp"] *= 1000
    pd.DataFrame({"user_id": ["u1"], "age": ["25-34"]}).to_csv(tmp_path / "users.csv", index=False)  # our own name
    overrides = [*write(tmp_path, frame), "data.columns.user_id=viewer", "data.columns.rating=stars"]
    overrides.append(f"data.users={tmp_path / 'users.csv'}")
    report = run(tmp_path, *overrides)
    table = pq.read_table(tmp_path / "interactions.parquet").to_pandas()
    assert report.notes["id_type"] == "string"
    assert set(table["user_id"]) == {f"u{number}" for number in range(1, 11)}
    assert table["event_timestamp"].min() == pd.Timestamp(10**9, unit="s", tz="UTC")


def test_liked_wins_over_missing_ratings(tmp_path: Path) -> None:
    frame = events().assign(liked=True)
    frame["rating"] = frame["rating"].where(frame["rating"] > 3)
    run(tmp_path, *write(tmp_path, frame))
    table = pq.read_table(tmp_path / "interactions.parquet")
    assert table.column("liked").to_pylist() == [True] * len(frame)
    assert table.column("rating").null_count == int(frame["rating"].isna().sum())


def test_repeats_keep_the_newest(tmp_path: Path) -> None:
    frame = pd.concat([events(), events().assign(rating=1, timestamp=5 * 10**8)])
    report = run(tmp_path, *write(tmp_path, frame))
    assert report.dropped == {"older event of the same user and item": len(events())}
    assert pq.read_table(tmp_path / "interactions.parquet").to_pandas()["rating"].max() == 5


def _without(column: str) -> dict[str, Any]:
    return {"interactions": events().drop(columns=column)}


def _with(**columns: Any) -> dict[str, Any]:
    return {"interactions": events().assign(**columns)}


BAD_ITEM = pd.concat([catalogue(), catalogue().iloc[:1]])


@pytest.mark.parametrize(
    ("tables", "error", "told"),
    [
        (_without("item_id"), SchemaError, "column 'item_id' is missing; seen: user_id, rating, timestamp"),
        (_without("timestamp"), SchemaError, "column 'timestamp' is missing"),
        (_without("rating"), SchemaError, "neither a column 'rating' nor 'liked'"),
        (_with(rating="good"), SchemaError, "column 'rating' holds 'good'"),
        (_with(rating=np.nan), DataError, "rows have no rating"),
        (_with(timestamp="yesterday"), SchemaError, "timestamp 'yesterday' is not understood"),
        (_with(timestamp=np.nan), DataError, "rows have no timestamp"),
        (_with(user_id=np.nan), DataError, "rows have no user_id"),
        (_with(item_id=9), DataError, "item_id 9 is not in the catalogue (1 such ids"),
        (_with(user_id=1), DataError, "leaves valid and test without a row"),
        ({"interactions": events().iloc[:0]}, DataError, "has no rows"),
        ({"items": catalogue().drop(columns="title")}, SchemaError, "column 'title' is missing"),
        ({"items": BAD_ITEM}, DataError, "item_id 1 stands 2 times in the catalogue"),
        ({"items": catalogue().assign(year="soon")}, SchemaError, "column 'year' holds 'soon'"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, tables: dict[str, Any], error: type[KellmError], told: str) -> None:
    overrides = write(tmp_path, **tables)
    with pytest.raises(error) as caught:
        run(tmp_path, *overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.parquet"))  # nothing written


def test_bad_files_are_named(tmp_path: Path) -> None:
    overrides = write(tmp_path)
    with pytest.raises(DataError, match=r"none.csv does not exist"):
        run(tmp_path, *overrides, f"data.interactions={tmp_path / 'none.csv'}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"broken.parquet is not readable Parquet"):
        run(tmp_path, *overrides, f"data.interactions={tmp_path / 'broken.parquet'}")
    (tmp_path / "void.csv").write_text("")
    with pytest.raises(DataError, match=r"void.csv is empty"):
        run(tmp_path, *overrides, f"data.items={tmp_path / 'void.csv'}")
    with pytest.raises(ConfigError, match=r"neither data\.path nor"):
        run(tmp_path, "data.format=movielens-1m")
    (tmp_path / "ratings.dat").write_text("1::2::3\n")
    with pytest.raises(DataError, match=r"ratings.dat, line 1: 3 fields"):
        run(tmp_path, "data.format=movielens-1m", f"data.path={tmp_path}")


def test_unknown_items_can_be_dropped(tmp_path: Path) -> None:
    frame = events()
    frame.loc[frame.index[:2], "item_id"] = 99
    report = run(tmp_path, *write(tmp_path, frame), "data.unknown_items=drop")
    assert report.dropped["item not in the catalogue"] == 2


def test_titles() -> None:
    assert split_title("Matrix, The (1999)") == ("Matrix, The", 1999)
    assert split_title("Two Friends (1986) ") == ("Two Friends", 1986)
    assert split_title("Land Before Time III: The Time of the Great Giving (1995) (V)")[1] == 1995
    assert split_title("2001: A Space Odyssey (1968)") == ("2001: A Space Odyssey", 1968)
    assert split_title("Babylon 5") == ("Babylon 5", None)
    assert split_title("Seven (a.k.a. Se7en) (1995)") == ("Seven (a.k.a. Se7en)", 1995)


def test_age_groups() -> None:
    assert [age_group(age) for age in (7, 18, 24, 25, 49, 55, 56, 73)] == (
        ["under 18", "18-24", "18-24", "25-34", "45-49", "50-55", "56 or over", "56 or over"]
    )


def test_user_split_keeps_users_whole_and_ignores_row_order() -> None:
    users = pd.Series(np.repeat(np.arange(100), 3))
    parts = pd.Series(split_by_user(users, 0.8, 0.1, seed=1))
    assert parts.groupby(users).nunique().max() == 1
    assert parts.groupby(users).first().value_counts().to_dict() == {"train": 80, "valid": 10, "test": 10}
    shuffled = users.sample(frac=1, random_state=0)
    assert (pd.Series(split_by_user(shuffled, 0.8, 0.1, seed=1), shuffled.index).sort_index() == parts).all()


def test_time_split_keeps_ties_together() -> None:
    times = pd.Series(np.repeat(np.arange(10), 10))
    parts = pd.Series(split_by_time(times, 0.75, 0.1))
    assert parts.groupby(times).nunique().max() == 1
    assert times[parts == "train"].max() < times[parts == "valid"].min() <= times[parts == "valid"].max()
    assert times[parts == "valid"].max() < times[parts == "test"].min()


def test_split_hash_sees_the_split_and_not_the_labels() -> None:
    frame = events().assign(split="train", liked=True)
    frame["event_timestamp"] = pd.to_datetime(frame["timestamp"], unit="s", utc=True)
    base = split_hash(frame)
    assert split_hash(frame.sample(frac=1, random_state=3)) == base
    assert split_hash(frame.assign(liked=False, rating=1)) == base
    moved = frame.copy()
    moved.loc[moved.index[0], "split"] = "test"
    assert split_hash(moved) != base
