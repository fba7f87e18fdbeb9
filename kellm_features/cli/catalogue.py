"""A catalogue as a Spark table, in the forms that catalogues come in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kellm_features.errors import DataError, SchemaError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

MOVIELENS = {"movieId": "item_id", "movie_id": "item_id"}
"""Columns of MovieLens' own files."""


def read_catalogue(session: SparkSession, path: str) -> DataFrame:
    """The items of a catalogue.

    Args:
        session: reads it.
        path: MovieLens' `movies.dat` (1M, 10M) or `movies.csv` (latest), or Parquet or CSV with item_id and title.
            A CSV file on this machine may have `,` `;` tab or `|` between its fields.

    Returns:
        item_id (bigint or string), title, year (int; null where the catalogue has none, a year at the end of a title is
        found when linking). Other columns are left out.

    Raises:
        DataError: the file is missing or unreadable.
        SchemaError: it has no item_id or no title.
    """
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as sf

    from kellm_features.data.movielens import read_1m_items
    from kellm_features.data.tables import delimiter
    from kellm_spark.session import spark_reason
    from kellm_spark.storage import read_table

    local = Path(path)
    if local.suffix == ".dat":
        frame = read_1m_items(local)[["item_id", "title", "year"]].astype({"item_id": "int64"})
        return session.createDataFrame(
            [(row.item_id, row.title, None if row.year != row.year else int(row.year)) for row in frame.itertuples()],
            "item_id bigint, title string, year int",
        )
    separator = delimiter(local) if local.suffix == ".csv" and local.is_file() else ","
    try:
        items = read_table(session, path, ids=("item_id", *MOVIELENS), separator=separator)
    except AnalysisException as error:
        raise DataError(f"catalogue {path} cannot be read: {spark_reason(error)}") from error
    names = {name: ours for name, ours in MOVIELENS.items() if name in items.columns and "item_id" not in items.columns}
    items = items.withColumnsRenamed(names)
    missing = [name for name in ("item_id", "title") if name not in items.columns]
    if missing:
        raise SchemaError(
            f"catalogue {path}: column {', '.join(map(repr, missing))} is missing; seen: {', '.join(items.columns)}"
        )
    kind = dict(items.dtypes)["item_id"]
    item_id = sf.col("item_id").cast("bigint" if kind in ("tinyint", "smallint", "int", "bigint") else "string")
    year = sf.col("year").cast("int") if "year" in items.columns else sf.lit(None).cast("int")
    return items.select(item_id.alias("item_id"), sf.col("title").cast("string").alias("title"), year.alias("year"))
