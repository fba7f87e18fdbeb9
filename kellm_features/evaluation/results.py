"""The rows that every table and picture of an evaluation is made of, and the file `results.csv` that holds them.

`results.csv` is a contract: a header of `COLUMNS`, one measured figure a line, numbers as Python prints them (they read
back bit for bit), an empty cell where there is no number. Columns may be added at the end, never renamed or moved.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from kellm_features.errors import DataError
from kellm_features.store.layout import write_atomic

Suite = Literal["ctr", "time", "cold", "contrastive", "retrieval", "replication"]
SUITES: tuple[Suite, ...] = get_args(Suite)
"""In the order in which rows are written."""

ALL, WARM, COLD = "all", "warm", "cold"
"""Slices that tables ask for by name; others are shown under the name they have."""

LOWER_IS_BETTER = frozenset({"log_loss", "ece"})
"""Metrics of which less is better; of all others more is."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""A name with a line break would make two lines of one row, for all who read the file by lines."""
_Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class ResultRow(BaseModel):
    """One metric of one arm on one slice, and its difference to another arm where one was tested.

    An arm with differences to several others has one row for each, which repeats `value`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: Annotated[Suite, Field(description="ctr, time, cold, contrastive, retrieval or replication")]
    split: Annotated[str, Field(description="family of folds: B users, C time, A as KAR splits, cold")]
    backbone: Annotated[str, Field(description="deepfm, din, dien; empty where no click model is involved")]
    arm: Annotated[str, Field(min_length=1, description="key of what was compared")]
    label: Annotated[str, Field(min_length=1, description="what people read for it")]
    metric: Annotated[str, Field(min_length=1, description="auc, log_loss, gauc, ece, recall@20, ndcg@20 normalized")]
    slice: Annotated[str, Field(min_length=1, description="all, warm, cold, items 1-9")] = ALL
    value: Annotated[FiniteFloat | None, Field(description="the metric, over all folds and seeds")] = None
    low: Annotated[FiniteFloat | None, Field(description="of its 95 % interval")] = None
    high: Annotated[FiniteFloat | None, Field(description="of its 95 % interval")] = None
    reference: Annotated[str, Field(description="key of the arm that delta is against; empty for none")] = ""
    delta: Annotated[FiniteFloat | None, Field(description="value less the reference's, paired")] = None
    delta_low: Annotated[FiniteFloat | None, Field(description="of delta's 95 % interval")] = None
    delta_high: Annotated[FiniteFloat | None, Field(description="of delta's 95 % interval")] = None
    p: Annotated[_Probability | None, Field(description="two-sided, of delta = 0")] = None
    p_holm: Annotated[_Probability | None, Field(description="p after Holm, over the claims of its family")] = None
    examples: Annotated[int | None, Field(ge=0, description="test examples; items for retrieval")] = None
    clusters: Annotated[int | None, Field(ge=0, description="that the bootstrap draws")] = None
    cluster: Annotated[Literal["user", "item", ""], Field(description="what it draws")] = ""
    folds: Annotated[int | None, Field(ge=0, description="trainings' folds that value is over")] = None
    seeds: Annotated[int | None, Field(ge=0, description="initialisations per fold")] = None
    capped: Annotated[
        int | None, Field(ge=0, description="of its trainings, those whose best epoch was the last of the budget")
    ] = None

    @field_validator("split", "backbone", "arm", "label", "metric", "slice", "reference")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if _CONTROL.search(value):
            raise ValueError("names and labels hold no line breaks or other control characters")
        return value

    @model_validator(mode="after")
    def _intervals(self) -> ResultRow:
        for name, low, high in (("", self.low, self.high), ("delta_", self.delta_low, self.delta_high)):
            if (low is None) != (high is None):
                raise ValueError(f"{name}low and {name}high are given together or not at all")
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name}low {low} is above {name}high {high}")
        if self.delta is not None and not self.reference:
            raise ValueError("delta needs the reference that it is against")
        return self

    @property
    def key(self) -> tuple[str, ...]:
        """What no two rows of a file share."""
        return (self.suite, self.split, self.backbone, self.arm, self.metric, self.slice, self.reference)


COLUMNS: tuple[str, ...] = tuple(ResultRow.model_fields)
"""Columns of `results.csv`, in order; `ResultRow` documents each."""
_NUMBERS = frozenset(name for name, field in ResultRow.model_fields.items() if field.default is None)


def ordered(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Rows by suite, then split, backbone, arm, metric and slice, each in the order in which it first came.

    Arms are a ladder and slices a scale: their order is the caller's, not the alphabet's.

    Raises:
        DataError: two rows have the same key.
    """
    rows = list(rows)
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise DataError(
            f"Results hold {len(twice):,} rows twice, the first {'/'.join(filter(None, twice[0]))}: "
            "a suite, split, backbone, arm, metric, slice and reference are told once"
        )
    ranks = [
        {name: rank for rank, name in enumerate(dict.fromkeys(row.key[place] for row in rows))}
        for place in range(1, len(rows[0].key) if rows else 0)
    ]

    def rank(row: ResultRow) -> tuple[int, ...]:
        return (
            SUITES.index(row.suite),
            *(names[name] for names, name in zip(ranks, row.key[1:], strict=True)),
        )

    return sorted(rows, key=rank)


def write_results(rows: Iterable[ResultRow], path: Path) -> Path:
    """Write `results.csv`, whole or not at all, in the order of `ordered`.

    Raises:
        DataError: two rows have the same key.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in ordered(rows):
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow(["" if value is None else value for value in values])
    write_atomic(path, text.getvalue())
    return path


def read_results(path: Path) -> list[ResultRow]:
    """The rows of a `results.csv`; columns that a later version added are passed over.

    Raises:
        DataError: the file is missing or no CSV, lacks a column, or has a value that its column does not take.
    """
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(
                    f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: write it by write_results"
                )
            return [_row(path, reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not readable as results ({error}): run  kellm evaluate --out FOLDER") from error


def _row(path: Path, line: int, cells: dict[str, str | None]) -> ResultRow:
    values = {name: cells[name] for name in COLUMNS}
    if None in values.values():  # what csv gives where a line ends early
        raise DataError(f"{path}, line {line}: ends before its {len(COLUMNS)} cells: write the file by write_results")
    given = {name: value for name, value in values.items() if value or name not in _NUMBERS}
    try:
        return ResultRow.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column = ".".join(map(str, first["loc"])) or "the row"
        seen = f" (seen: {values[column]!r})" if column in values else ""
        raise DataError(
            f"{path}, line {line}: {column}: {first['msg']}{seen}; write the file by write_results, or mend the line"
        ) from error
