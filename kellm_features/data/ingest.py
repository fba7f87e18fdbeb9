"""Stage `ingest`: interactions, catalogue and users in the house's form, with labels and a split."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from kellm_features.data import movielens
from kellm_features.data.split import check_parts, split_by_time, split_by_user, split_hash
from kellm_features.data.tables import RawTables, first_of, read_frame, rename_columns
from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_features.resources import MOVIELENS_100K, package_file
from kellm_features.schemas import INTERACTIONS, ITEMS, USERS, write_table
from kellm_features.settings import DataSettings, Settings
from kellm_features.stages import StageContext, StageReport

logger = logging.getLogger(__name__)

_FILES = {
    "movielens-100k": ("u.data", "u.item", "u.user"),
    "movielens-1m": ("ratings.dat", "movies.dat", "users.dat"),
    "movielens-latest": ("ratings.csv", "movies.csv", None),
    "table": (None, None, None),
}


def input_files(settings: Settings) -> dict[str, Path]:
    """The files that this stage reads, by role; a folder of Parquet parts counts file by file."""
    data = settings.data
    if data.format == "movielens-100k" and data.path is None:
        own: tuple[Path | None, ...] = tuple(
            package_file(MOVIELENS_100K, f"MovieLens100k_{name}.parquet.brotli") for name in movielens.PACKAGED
        )
    else:
        own = tuple(data.path / name if data.path and name else None for name in _FILES[data.format])
    roles = ("interactions", "items", "users")
    picked = {role: getattr(data, role) or file for role, file in zip(roles, own, strict=True)}
    files: dict[str, Path] = {}
    for role, path in picked.items():
        if path is None:
            continue
        if path.is_dir():
            files |= {f"{role}/{part.name}": part for part in sorted(path.rglob("*.parquet"))}
        else:
            files[role] = path
    return files


def run(ctx: StageContext) -> StageReport:
    """Read, check, label and split.

    Raises:
        DataError: missing or unreadable file, empty table, duplicate item ids, ids that the catalogue lacks, NaN
            ratings, a part of the split without rows.
        SchemaError: a missing column or a wrong type.
    """
    data = ctx.settings.data
    raw = _read(data)
    where = str(data.interactions or data.path or data.format)
    dropped: dict[str, int] = {}
    items = _check_items(raw.items, str(data.items or data.path or data.format))
    interactions = _label(raw.interactions, data.like_above, where)
    rows_in = len(interactions)
    interactions, items, users = _same_id_type(interactions, items, raw.users)
    interactions = _known_items(interactions, items, data.unknown_items, where, dropped)
    interactions = _without_repeats(interactions, dropped)
    users, added = _all_users(users, interactions)
    interactions["split"] = (
        split_by_user(interactions["user_id"], data.train_fraction, data.valid_fraction, ctx.settings.run.seed)
        if data.split == "user"
        else split_by_time(interactions["event_timestamp"], data.train_fraction, data.valid_fraction)
    )
    counts = check_parts(interactions["split"].to_numpy(), data.split)
    interactions = interactions.sort_values(["user_id", "event_timestamp", "item_id"], kind="stable")
    key = pa.int64() if interactions["item_id"].dtype == np.int64 else pa.string()
    for table, schema, name in (
        (interactions, INTERACTIONS, "interactions"),
        (items.sort_values("item_id"), ITEMS, "items"),
        (users.sort_values("user_id"), USERS, "users"),
    ):
        arrow = pa.Table.from_pandas(table[schema.names], schema=schema.arrow(key), preserve_index=False)
        write_table(arrow, ctx.out / f"{name}.parquet", schema)
    liked = float(interactions["liked"].mean())
    logger.info(
        "%d interactions, %d users, %d items, %.1f%% liked",
        len(interactions),
        len(users),
        len(items),
        100 * liked,
    )
    return StageReport(
        rows_in=rows_in,
        rows_out=len(interactions),
        dropped=dropped,
        split_hash=split_hash(interactions),
        notes={
            "format": data.format,
            "items": len(items),
            "users": len(users),
            "users_without_attributes": added,
            "liked_share": liked,
            "split": data.split,
            "rows_per_part": counts,
            "id_type": str(key),
        },
    )


def _read(data: DataSettings) -> RawTables:
    if data.format != "movielens-100k" and data.path is None and not (data.interactions and data.items):
        raise ConfigError(
            f"data.format is '{data.format}', and neither data.path nor both data.interactions and data.items are "
            "set: name the folder or the files in kellm.toml [data]"
        )
    names = data.columns.model_dump()
    interactions, items, users = (_override(data, role, names) for role in ("interactions", "items", "users"))
    if interactions is not None and items is not None and (users is not None or data.path is None):
        return RawTables(interactions, items, users)
    if data.format == "table":
        missing = "interactions" if interactions is None else "items"
        raise ConfigError(f"data.format is 'table', and data.{missing} is not set: name a Parquet or CSV file")
    if data.format == "movielens-1m" and interactions is not None:
        assert data.path is not None
        own_items = items if items is not None else movielens.read_1m_items(data.path)
        own_users = users if users is not None else movielens.read_1m_users(data.path)
        return RawTables(interactions, own_items.astype({"item_id": "int64"}), own_users.astype({"user_id": "int64"}))
    readers = {"movielens-1m": movielens.read_1m, "movielens-latest": movielens.read_latest}
    if data.format == "movielens-100k":
        own = movielens.read_100k(data.path)
    else:
        assert data.path is not None
        own = readers[data.format](data.path)
    return RawTables(
        own.interactions if interactions is None else interactions,
        own.items if items is None else items,
        own.users if users is None else users,
    )


def _override(data: DataSettings, role: str, names: dict[str, str]) -> pd.DataFrame | None:
    path: Path | None = getattr(data, role)
    if path is None:
        return None
    needed = {
        "interactions": ("user_id", "item_id", "timestamp"),
        "items": ("item_id", "title"),
        "users": ("user_id",),
    }[role]
    frame = rename_columns(read_frame(path), names, needed, path)
    if role == "interactions" and not {"rating", "liked"} & set(frame.columns):
        raise SchemaError(
            f"{path}: neither a column '{names['rating']}' nor '{names['liked']}' is there; one of them makes the label"
        )
    if role == "items":
        frame = _house_items(frame, path)
    if role == "users":
        wanted = [name for name in USERS.names if name in frame.columns]
        frame = frame[wanted].reindex(columns=USERS.names)
        frame[USERS.names[1:]] = frame[USERS.names[1:]].astype("string")
    return frame


def _house_items(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Titles without their "(year)", genres as lists."""
    if "year" not in frame.columns:
        frame = movielens.with_title_and_year(frame)
    else:
        year = pd.to_numeric(frame["year"], errors="coerce")
        bad = frame["year"][year.isna() & frame["year"].notna()]
        if len(bad):
            raise SchemaError(f"{path}: column 'year' holds {first_of(bad)!r}: a year in digits or nothing is accepted")
        frame = frame.assign(year=year.astype("Int32"))
    if "genres" not in frame.columns:
        return frame.assign(genres=[[] for _ in range(len(frame))])
    genres = [
        [str(part) for part in value]
        if isinstance(value, list | tuple | np.ndarray)
        else [part.strip() for part in str(value).split("|") if part.strip()]
        if isinstance(value, str)
        else []
        for value in frame["genres"]
    ]
    return frame.assign(genres=genres)


def _check_items(items: pd.DataFrame, where: str) -> pd.DataFrame:
    if items["item_id"].isna().any():
        raise DataError(f"{where}: {int(items['item_id'].isna().sum())} items have no item_id: give each one")
    repeated = items["item_id"][items["item_id"].duplicated()]
    if len(repeated):
        raise DataError(
            f"{where}: item_id {first_of(repeated)!r} stands {(items['item_id'] == repeated.iloc[0]).sum()} times in "
            f"the catalogue ({repeated.nunique()} ids are repeated): ids must be unique"
        )
    if items["title"].isna().any():
        first = first_of(items["item_id"][items["title"].isna()])
        raise DataError(
            f"{where}: item {first!r} has no title ({int(items['title'].isna().sum())} such): give each one"
        )
    return items.assign(title=items["title"].astype(str))


def _label(interactions: pd.DataFrame, like_above: float, where: str) -> pd.DataFrame:
    frame = pd.DataFrame({name: interactions[name] for name in ("user_id", "item_id")})
    for name in ("user_id", "item_id"):
        if frame[name].isna().any():
            raise DataError(f"{where}: {int(frame[name].isna().sum())} rows have no {name}: drop them or fill them in")
    rating = interactions.get("rating")
    if rating is not None:
        numeric = pd.to_numeric(rating, errors="coerce")
        bad = rating[numeric.isna() & rating.notna()]
        if len(bad):
            raise SchemaError(f"{where}: column 'rating' holds {first_of(bad)!r}: numbers are accepted")
        frame["rating"] = numeric.astype("float32")
    else:
        frame["rating"] = np.float32("nan")
    liked = interactions.get("liked")
    if liked is not None:
        if liked.isna().any() or not liked.isin([0, 1, True, False]).all():
            raise DataError(f"{where}: column 'liked' must hold true or false in every row; seen: {liked.unique()[:4]}")
        frame["liked"] = liked.astype(bool)
    else:
        if frame["rating"].isna().any():
            raise DataError(
                f"{where}: {frame['rating'].isna().sum()} rows have no rating (null or NaN) and there is no "
                "column 'liked': drop these rows, or give the label"
            )
        frame["liked"] = frame["rating"] > like_above
    frame["event_timestamp"] = _instants(interactions["timestamp"], where)
    return frame


def _instants(values: pd.Series, where: str) -> pd.Series:
    """Seconds, milliseconds or microseconds since 1970, ISO text or datetimes -> UTC microseconds."""
    if values.isna().any():
        raise DataError(f"{where}: {int(values.isna().sum())} rows have no timestamp: drop them or fill them in")
    if pd.api.types.is_numeric_dtype(values):
        largest = float(values.abs().max())
        unit = "s" if largest < 1e11 else "ms" if largest < 1e14 else "us"
        instants = pd.to_datetime(values.astype("int64"), unit=unit, utc=True)
    else:
        instants = pd.to_datetime(
            values, utc=True, errors="coerce", format=None if values.dtype != object else "ISO8601"
        )
        if instants.isna().any():
            bad = first_of(values[instants.isna()])
            raise SchemaError(f"{where}: timestamp {bad!r} is not understood: epoch numbers or ISO 8601 are accepted")
    return instants.astype("datetime64[us, UTC]")


def _same_id_type(
    interactions: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
    """int64 ids where all tables have integers, strings everywhere else."""
    tables = [interactions, items] + ([users] if users is not None else [])
    keys = [(table, name) for table in tables for name in ("user_id", "item_id") if name in table.columns]
    target = "int64" if all(pd.api.types.is_integer_dtype(table[name]) for table, name in keys) else "str"
    cast = [table.astype({n: target for n in ("user_id", "item_id") if n in table.columns}) for table in tables]
    return cast[0], cast[1], cast[2] if users is not None else None


def _known_items(
    interactions: pd.DataFrame, items: pd.DataFrame, unknown: str, where: str, dropped: dict[str, int]
) -> pd.DataFrame:
    known = interactions["item_id"].isin(items["item_id"])
    if known.all():
        return interactions
    missing = interactions["item_id"][~known]
    if unknown == "refuse":
        raise DataError(
            f"{where}: item_id {first_of(missing)!r} is not in the catalogue ({missing.nunique()} such ids in "
            f'{len(missing)} rows): add them to the catalogue, or set data.unknown_items = "drop"'
        )
    dropped["item not in the catalogue"] = len(missing)
    if not known.any():
        raise DataError(f"{where}: no interaction is with an item of the catalogue: are these the same ids?")
    return interactions[known]


def _without_repeats(interactions: pd.DataFrame, dropped: dict[str, int]) -> pd.DataFrame:
    """The newest event of each (user, item)."""
    ordered = interactions.sort_values("event_timestamp", kind="stable")
    kept = ordered.drop_duplicates(["user_id", "item_id"], keep="last")
    if len(kept) < len(ordered):
        dropped["older event of the same user and item"] = len(ordered) - len(kept)
    return kept.copy()


def _all_users(users: pd.DataFrame | None, interactions: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The users table, with an empty row for each user that it lacks; and how many were added."""
    seen = np.sort(interactions["user_id"].unique())
    if users is None:
        users = pd.DataFrame({"user_id": seen[:0]})
    repeated = users["user_id"][users["user_id"].duplicated()]
    if len(repeated):
        raise DataError(f"user_id {first_of(repeated)!r} stands more than once in the users table: ids must be unique")
    users = users.reindex(columns=USERS.names)
    missing = seen[~np.isin(seen, users["user_id"].to_numpy())]
    added = pd.DataFrame({"user_id": missing}).reindex(columns=USERS.names)
    parts = [part.astype(dict.fromkeys(USERS.names[1:], "object")) for part in (users, added) if len(part)]
    table = pd.concat(parts, ignore_index=True).astype({"user_id": interactions["user_id"].dtype})
    table[USERS.names[1:]] = table[USERS.names[1:]].astype(object).where(table[USERS.names[1:]].notna(), None)
    return table, len(missing)
