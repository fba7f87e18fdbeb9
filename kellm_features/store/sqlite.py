"""`KellmSqliteOnlineStore`: Feast's SQLite store with versions that are switched whole.

In feature_store.yaml, `type: kellm_features.store.sqlite.KellmSqliteOnlineStore`; all options of Feast's
`type: sqlite` hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig

from kellm_features.store.repo import SQLITE_TYPE, OnlineConfig
from kellm_features.store.served import ServedVersions


class KellmSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Feast's options."""

    type: Literal["kellm_features.store.sqlite.KellmSqliteOnlineStore"] = SQLITE_TYPE  # type: ignore[assignment]  # Feast\'s own is the name of its own


class KellmSqliteOnlineStore(ServedVersions, SqliteOnlineStore):
    """Feast's SQLite store: one version per response, the view's ttl honoured."""

    def _online_config(self, config: RepoConfig) -> OnlineConfig:
        return OnlineConfig(
            repo=Path(config.repo_path or "."),
            project=config.project,
            kind="sqlite",
            path=Path(self._get_db_path(config)),
        )

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> Any:
        """Delete the database, with the files that its write-ahead log leaves."""
        self._tear_down_versions(config)
        super().teardown(config, tables, entities)
        for suffix in ("-wal", "-shm"):
            Path(f"{self._get_db_path(config)}{suffix}").unlink(missing_ok=True)
