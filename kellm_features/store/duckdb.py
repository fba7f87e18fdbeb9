"""`feature_store.yaml`: `offline_store: {type: kellm_features.store.duckdb.KellmDuckDBOfflineStore}`.

Feast's duckdb offline store, mended in one place: `feast monitor`. Feast 0.67 takes an array feature for a number and
casts it to one, so that a view with an embedding gets no metrics at all, neither for its other features; the command
says "completed" all the same.

A repository whose offline store is Spark runs `feast monitor` with this store as well, under a second configuration
file: Feast's Spark store cannot keep its metrics from one run to the next.
"""

from __future__ import annotations

import re
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig
from feast.infra.offline_stores.file_source import FileSource
from feast.repo_config import RepoConfig

from kellm_features.store.layout import IS_DELETED


class KellmDuckDBOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """The options of Feast's duckdb store under this one's type."""

    type: str = "kellm_features.store.duckdb.KellmDuckDBOfflineStore"


class KellmDuckDBOfflineStore(DuckDBOfflineStore):
    """Feast's duckdb offline store with metrics for views that hold arrays, of Parquet that Spark reads as well."""

    @staticmethod
    def get_monitoring_max_timestamp(
        config: RepoConfig, data_source: DataSource, timestamp_field: str
    ) -> datetime | None:
        """The latest event time in the source, None where it holds no row."""
        return DuckDBOfflineStore.get_monitoring_max_timestamp(config, _parquet(data_source), timestamp_field)

    @staticmethod
    def compute_monitoring_metrics(
        config: RepoConfig,
        data_source: DataSource,
        feature_columns: list[tuple[str, str]],
        timestamp_field: str,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        histogram_bins: int = 20,
        top_n: int = 10,
    ) -> list[dict[str, Any]]:
        """Feast's metrics, for an array feature those of one number per row.

        That number is the Euclidean norm of an array of floats (an embedding that collapses or blows up shows in it)
        and the length of any other array. Rows that withdraw an id are not counted: their nulls are no gaps in data.
        Sources other than Parquet go to Feast as they are.

        Args:
            config: of the repository.
            data_source: what the view reads.
            feature_columns: (feature, "numeric" or "categorical") as Feast classified them.
            timestamp_field: the column that dates are of.
            start_date: first instant counted.
            end_date: last instant counted.
            histogram_bins: of a numeric feature.
            top_n: values told of a categorical feature.
        """
        data_source = _parquet(data_source)
        further = (timestamp_field, start_date, end_date, histogram_bins, top_n)
        plain = DuckDBOfflineStore.compute_monitoring_metrics
        if not isinstance(data_source, FileSource) or not isinstance(data_source.file_format, ParquetFormat):
            return list(plain(config, data_source, feature_columns, *further))
        path = FileSource.get_uri_for_file_path(config.repo_path, data_source.path)
        source = "read_parquet('{}')".format(path.replace("'", "''"))
        with duckdb.connect() as connection:
            types = {name: kind for name, kind, *_ in connection.execute(f"DESCRIBE FROM {source}").fetchall()}
            arrays = [name for name, _ in feature_columns if types.get(name, "").endswith("]")]
            numbers = {name: _number(name, types[name]) for name in arrays}
            if not numbers and IS_DELETED not in types:
                return list(plain(config, data_source, feature_columns, *further))
            columns = [f"{numbers.get(name, _quoted(name))} AS {_quoted(name)}" for name, _ in feature_columns]
            kept = f" WHERE {IS_DELETED} IS NOT TRUE" if IS_DELETED in types else ""
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.parquet"
                connection.execute(
                    f"COPY (SELECT {_quoted(timestamp_field)}, {', '.join(columns)} FROM {source}{kept}) "
                    f"TO '{rows}' (FORMAT parquet)"
                )
                summary = FileSource(path=str(rows), file_format=ParquetFormat(), timestamp_field=timestamp_field)
                kinds = [(name, "numeric" if name in numbers else kind) for name, kind in feature_columns]
                return list(plain(config, summary, kinds, *further))


def _parquet(source: DataSource) -> DataSource:
    """What Spark reads as plain Parquet files, as the same files; any other source as it is."""
    if not isinstance(source, SparkSource) or source.query or source.table_format or source.file_format != "parquet":
        return source
    return FileSource(path=source.path, file_format=ParquetFormat(), timestamp_field=source.timestamp_field)


def _number(name: str, kind: str) -> str:
    """SQL for one number of an array column of duckdb's type `kind`; null where the array is."""
    column = _quoted(name)
    if not re.fullmatch(r"(FLOAT|DOUBLE)\[\d*\]", kind):
        return f"len({column})"
    squares = f"list_sum(list_transform({column}, lambda x: x::DOUBLE * x::DOUBLE))"
    return f"CASE WHEN {column} IS NOT NULL THEN sqrt(coalesce({squares}, 0)) END"  # the sum of no squares is null


def _quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))
