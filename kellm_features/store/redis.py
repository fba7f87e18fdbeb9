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
from pydantic import field_validator

from kellm_features.errors import StoreError
from kellm_features.store.repo import REDIS_TYPE, OnlineConfig
from kellm_features.store.served import ServedVersions, in_version, namespace_of


class KellmRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """Feast's options, and how embedding views are laid out."""

    type: Literal["kellm_features.store.redis.KellmRedisOnlineStore"] = REDIS_TYPE  # type: ignore[assignment]  # Feast's own is the name of its own
    layout: Literal["stock", "packed"] = "stock"
    """stock: hashes as Feast writes them; packed: one string per id with a float16 vector, a third of the bytes."""

    @field_validator("key_ttl_seconds")
    @classmethod
    def _rows_stay(cls, seconds: int | None) -> int | None:
        if seconds:
            raise ValueError(
                f"key_ttl_seconds is {seconds}, and a row of any view of an entity written with it would let Redis "
                f"delete the published rows of that entity: leave it out, and set a ttl on the feature view"
            )
        return seconds


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

    def retrieve_online_documents_v2(self, config: RepoConfig, table: FeatureView, *args: Any, **kwargs: Any) -> Any:
        """Not there: Redis without its search module has no vector search, in Feast as here.

        Raises:
            StoreError: always, for a view that kellm serves.
        """
        _refuse_search(in_version(config, table, self._served(config)), table.name)
        return super().retrieve_online_documents_v2(config, table, *args, **kwargs)

    def retrieve_online_documents(self, config: RepoConfig, table: FeatureView, *args: Any, **kwargs: Any) -> Any:
        """Not there either."""
        _refuse_search(in_version(config, table, self._served(config)), table.name)
        return super().retrieve_online_documents(config, table, *args, **kwargs)

    async def close(self) -> None:
        """Give the connections back, Feast's as well: its own store leaves them to the garbage collector."""
        await super().close()
        clients, self._client, self._client_async = (self._client, self._client_async), None, None
        if clients[0] is not None:
            clients[0].close()
        if clients[1] is not None:
            await clients[1].aclose()

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> Any:
        """Delete all rows, versions and the catalog."""
        self._tear_down_versions(config)
        super().teardown(config, tables, entities)


def _refuse_search(turned: FeatureView, name: str) -> None:
    if namespace_of(turned) is not None:
        raise StoreError(
            f"{name} lies in Redis, which has no vector search: search it in a repository with KellmSqliteOnlineStore, "
            f"or build an index over the version's partition (store.search.VectorIndex is exact)"
        )
