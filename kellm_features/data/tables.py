"""Tables from Parquet and CSV files, with errors that name the file, the column and the remedy."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kellm_features.errors import DataError, SchemaError, first_line

SNIFFED_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class RawTables:
    """What a reader hands over, before validation: plain frames with the field's column names.

    interactions: user_id, item_id, rating and/or liked, timestamp.
    items: item_id, title, year, genres (list of str).
    users: user_id, gender, age, occupation; None where the source has no users table.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame | None


def read_frame(path: Path) -> pd.DataFrame:
    """Read a Parquet file, a Parquet folder or a CSV whose delimiter is found out (`,` `;` tab or `|`).

    Raises:
        DataError: missing, unreadable, or empty.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path in kellm.toml [data]")
    try:
        if path.is_dir() or ".parquet" in path.name:
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep=delimiter(path), encoding="utf-8")
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty: a header line and at least one row are needed") from error
    except (OSError, ValueError) as error:
        kind = "Parquet" if path.is_dir() or ".parquet" in path.name else "CSV"
        raise DataError(f"{path} is not readable {kind}: {first_line(error)}") from error
    if frame.empty:
        raise DataError(f"{path} has no rows: at least one is needed")
    return frame


def delimiter(path: Path) -> str:
    """What parts the fields of a CSV file, by its header line; a comma where that does not tell."""
    with path.open(encoding="utf-8") as handle:
        header = handle.readline()
    try:
        return csv.Sniffer().sniff(header, delimiters=SNIFFED_DELIMITERS).delimiter
    except csv.Error:
        return ","


def read_separated(path: Path, separator: str, names: list[str], encoding: str = "latin-1") -> pd.DataFrame:
    """Read a headerless file of MovieLens' older releases (`::`, `|` or tab between fields).

    Raises:
        DataError: missing, unreadable, empty, or a line with another number of fields.
    """
    try:
        lines = path.read_text(encoding=encoding).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): set data.path to the unpacked release") from error
    rows = [line.split(separator) for line in lines if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {number}: {len(row)} fields separated by {separator!r}, expected {len(names)} "
                f"({', '.join(names)})"
            )
    if not rows:
        raise DataError(f"{path} has no rows: at least one is needed")
    return pd.DataFrame(rows, columns=names)


def rename_columns(
    frame: pd.DataFrame, mapping: Mapping[str, str], needed: tuple[str, ...], where: Path
) -> pd.DataFrame:
    """Give mapped columns the field's names and keep those that are known or needed.

    Args:
        frame: as read.
        mapping: our name -> the name in the file. A file that has our name instead is taken as it is: one map serves
            interactions, catalogue and users.
        needed: our names that must be there.
        where: the file, for the message.

    Raises:
        SchemaError: a needed column is missing.
    """
    missing = [name for name in needed if not {mapping.get(name, name), name} & set(frame.columns)]
    if missing:
        names = ", ".join(f"'{mapping.get(name, name)}'" for name in missing)
        raise SchemaError(
            f"{where}: column {names} is missing; seen: {', '.join(map(str, frame.columns))}; "
            f'map other names under [data.columns], e.g. {missing[0]} = "…"'
        )
    return frame.rename(columns={theirs: ours for ours, theirs in mapping.items() if theirs in frame.columns})


def first_of(values: pd.Series) -> Any:
    """The first value as a plain Python object, for messages."""
    return values.tolist()[0]
