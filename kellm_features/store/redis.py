"""`KellmRedisOnlineStore`: Feast's Redis store with versions that are switched whole.

In feature_store.yaml, `type: kellm_features.store.redis.KellmRedisOnlineStore`; all options of Feast's `type: redis`
hold, and `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.protos.feast.types.Value_pb2 import Value

from kellm_features.store.repo import REDIS_TYPE, OnlineConfig
from kellm_features.store.served import ServedVersions


class KellmRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """Feast's options, and how embedding views are laid out."""

    type: Literal["kellm_features.store.redis.KellmRedisOnlineStore"] = REDIS_TYPE  # type: ignore[assignment]  # Feast\'s own is the name of its own
    layout: Literal["stock", "packed"] = "stock"
    """stock: hashes as Feast writes them; packed: one string per id with a float16 vector, a third of the bytes."""


class KellmRedisOnlineStore(ServedVersions, RedisOnlineStore):
    """Feast's Redis store: one version per response, NOT_FOUND for what is missing, the view's ttl honoured."""

    def _online_config(self, config: RepoConfig) -> OnlineConfig:
        online = config.online_store
        return OnlineConfig(
            repo=Path(config.repo_path or "."),
            project=config.project,
            kind="redis",
            connection_string=online.connection_string,
            redis_type=online.redis_type.value,
            sentinel_master=online.sentinel_master,
            layout=online.layout,
        )

    def _get_features_for_entity(
        self, values: Sequence[Any], feature_view: str, requested_features: list[str]
    ) -> tuple[datetime | None, dict[str, Value] | None]:
        """A row without its time, which is asked for last, is not there. Feast's own says PRESENT, of 1970."""
        if values[-1] is None:
            return None, None
        row: tuple[datetime | None, dict[str, Value] | None] = super()._get_features_for_entity(
            values, feature_view, requested_features
        )
        return row

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> Any:
        """Delete all rows, versions and the catalog."""
        self._tear_down_versions(config)
        super().teardown(config, tables, entities)
