"""The rows that SWING counts: checked, cut in time, filtered, and every dropped row accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kellm_features.errors import ConfigError, DataError, SchemaError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

TIME_COLUMNS = ("event_timestamp", "timestamp")
LATEST_SECONDS = 1e11
"""The year 5138: integers above are no epoch seconds."""


@dataclass(frozen=True)
class Checked:
    """Rows before the cut with ids as int64 or string, and what a first look at them told."""

    pairs: DataFrame
    """Columns user_id, item_id; duplicates and all."""
    rows: int
    """Rows given."""
    later: int
    """Rows at or after the cut."""
    id_bytes: int
    """Size of both ids of the rows before the cut, as Arrow holds them."""

    @property
    def used(self) -> int:
        return self.rows - self.later


def check_interactions(
    interactions: DataFrame, before: datetime | str | int | float | None = None, time_column: str | None = None
) -> Checked:
    """Check the columns and look once at all rows.

    Args:
        interactions: columns user_id and item_id; with `before` a timestamp as well.
        before: rows at or after this moment are left out (UTC unless it says otherwise; a number: epoch seconds).
        time_column: the column that `before` is about; None: event_timestamp, else timestamp.

    Raises:
        SchemaError: a column is missing or has another type.
        DataError: an id or a needed timestamp is null, or no row is before the cut.
        ConfigError: `before` is no moment in time.
    """
    from pyspark.sql import functions as sf

    types = {field.name: field.dataType.simpleString() for field in interactions.schema.fields}
    ids: list[Column] = []
    for name in ("user_id", "item_id"):
        _require(types, name, ("tinyint", "smallint", "int", "bigint", "string"), "integers or strings")
        ids.append(sf.col(name) if types[name] == "string" else sf.col(name).cast("bigint").alias(name))
    kept, seconds, wrong = sf.lit(True), sf.lit(None), sf.lit(False)
    cut = time = None
    if before is not None:
        time = time_column or next((name for name in TIME_COLUMNS if name in types), TIME_COLUMNS[0])
        cut = _moment(before)
        kind = _require(
            types, time, ("timestamp", "timestamp_ntz", "date", "int", "bigint"), "timestamps or epoch seconds"
        )
        if kind in ("int", "bigint"):
            seconds = sf.col(time)
            kept = seconds < cut.timestamp()
        elif kind == "timestamp":
            kept = sf.col(time) < sf.expr(f"timestamp'{cut:%Y-%m-%d %H:%M:%S.%f}Z'")
        else:  # without a zone: taken as UTC
            kept = sf.col(time).cast("timestamp_ntz") < sf.expr(f"timestamp_ntz'{cut:%Y-%m-%d %H:%M:%S.%f}'")
        wrong = sf.col(time).isNull()
    told = (
        interactions.select(*ids, kept.alias("kept"), seconds.alias("seconds"), wrong.alias("wrong"))
        .agg(
            sf.count("*").alias("rows"),
            sf.count_if(sf.col("kept") & sf.col("user_id").isNull()).alias("user_id"),
            sf.count_if(sf.col("kept") & sf.col("item_id").isNull()).alias("item_id"),
            sf.count_if("wrong").alias("wrong"),
            sf.count_if(~sf.col("kept")).alias("later"),
            sf.max("seconds").alias("seconds"),
            *(
                sf.sum(sf.when(sf.col("kept"), sf.octet_length(name) + 4 if types[name] == "string" else sf.lit(8)))
                .cast("bigint")
                .alias(f"{name}_bytes")
                for name in ("user_id", "item_id")
            ),
        )
        .first()
    )
    assert told is not None
    for name in ("user_id", "item_id"):
        if told[name]:
            raise DataError(
                f"interactions: column '{name}' is null in {told[name]:,} of {told['rows']:,} rows; "
                "drop or fill these rows first"
            )
    if told["wrong"]:
        raise DataError(
            f"interactions: column '{time}' is null in {told['wrong']:,} of {told['rows']:,} rows, which may lie on "
            "either side of the cut; drop or fill these rows first"
        )
    if told["seconds"] is not None and told["seconds"] > LATEST_SECONDS:
        raise DataError(
            f"interactions: column '{time}' holds {told['seconds']:,}, which is no epoch second; "
            "divide milliseconds by 1,000, or give a timestamp column"
        )
    if cut is not None and told["later"] == told["rows"]:
        raise DataError(
            f"interactions: all {told['rows']:,} rows are at or after {cut.isoformat()} ({time}); give a later cut"
        )
    pairs = interactions.where(kept).select(*ids) if before is not None else interactions.select(*ids)
    size = (told["user_id_bytes"] or 0) + (told["item_id_bytes"] or 0)
    return Checked(pairs, told["rows"], told["later"], size)


def _require(types: dict[str, str], name: str, accepted: tuple[str, ...], told: str) -> str:
    if name not in types:
        raise SchemaError(
            f"interactions: column '{name}' is missing; seen: {', '.join(types) or 'no columns'}; needed: user_id, "
            "item_id" + ("" if name in ("user_id", "item_id") else f", and {name} for a cut in time")
        )
    if types[name] not in accepted:
        raise SchemaError(f"interactions: column '{name}' has type {types[name]}; accepted: {told}")
    return types[name]


def _moment(before: datetime | str | int | float) -> datetime:
    moment: datetime | str | float = before
    try:
        if isinstance(moment, str):
            try:
                moment = float(moment)
            except ValueError:
                moment = datetime.fromisoformat(str(moment))
        if not isinstance(moment, datetime):
            moment = datetime.fromtimestamp(moment, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"swing before is {before!r}; accepted: an ISO 8601 date or time (UTC unless it names a zone), "
            "or epoch seconds"
        ) from error
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
