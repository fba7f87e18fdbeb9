"""`KellmSqliteOnlineStore`: Feast's SQLite store with versions that are switched whole.

In feature_store.yaml, `type: kellm_features.store.sqlite.KellmSqliteOnlineStore`; all options of Feast's
`type: sqlite` hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from feast import Entity, FeatureView, RepoConfig
from feast.infra.key_encoding_utils import deserialize_entity_key
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from kellm_features.errors import StoreError
from kellm_features.store import wire
from kellm_features.store.backends import Namespace
from kellm_features.store.backends.sqlite import SqliteBackend, file_inode
from kellm_features.store.repo import SQLITE_TYPE, OnlineConfig
from kellm_features.store.search import VectorIndex
from kellm_features.store.served import ServedVersions, in_version, namespace_of

Document = tuple[datetime, EntityKey, dict[str, Value], float]


class KellmSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Feast's options."""

    type: Literal["kellm_features.store.sqlite.KellmSqliteOnlineStore"] = SQLITE_TYPE  # type: ignore[assignment]  # Feast's own is the name of its own


class KellmSqliteOnlineStore(ServedVersions, SqliteOnlineStore):
    """Feast's SQLite store: one version per response, the view's ttl honoured, exact vector search."""

    _inode = 0
    _index: tuple[Namespace, VectorIndex] | None = None

    def _online_config(self, config: RepoConfig) -> OnlineConfig:
        return OnlineConfig(
            repo=Path(config.repo_path or "."),
            project=config.project,
            kind="sqlite",
            path=Path(self._get_db_path(config)),
        )

    def _get_conn(self, config: RepoConfig) -> Any:
        """Feast's connection, opened anew where the file was replaced: its namespaces have the same names."""
        inode = file_inode(Path(self._get_db_path(config)))
        if inode != self._inode:
            self._conn = None  # not closed: another thread may be reading from it
        conn = super()._get_conn(config)
        self._inode = inode or file_inode(Path(self._get_db_path(config)))
        return conn

    def retrieve_online_documents_v2(
        self,
        config: RepoConfig,
        table: FeatureView,
        requested_features: list[str],
        embedding: list[float] | None,
        top_k: int,
        distance_metric: str | None = None,
        query_string: str | None = None,
        filters: Any = None,
        include_feature_view_version_metadata: bool = False,
    ) -> list[tuple[datetime | None, EntityKey | None, dict[str, Value] | None]]:
        """The rows of the active version that are nearest to an embedding, each with its `distance`.

        The search is exact; the version's vectors stay in memory for the next one. Views that kellm did not publish
        are searched as stock Feast does it, with its options.

        Returns:
            At most `top_k` rows **in the order of their ids**: Feast's client pairs rows and ids in that order, and
            rows in the order of their distances would come out under each other's ids. Sort by `distance`.

        Raises:
            StoreError: the view holds no embeddings, a text query or filters were given, or see
                `search.VectorIndex.nearest`.
        """
        found = self._nearest(config, table, requested_features, embedding, top_k, distance_metric)
        if found is None:
            documents: list[tuple[datetime | None, EntityKey | None, dict[str, Value] | None]]
            documents = super().retrieve_online_documents_v2(
                config,
                table,
                requested_features,
                embedding,
                top_k,
                distance_metric,
                query_string,
                filters,
                include_feature_view_version_metadata,
            )
            return documents
        if query_string is not None or filters is not None:
            raise StoreError(f"{table.name} is searched by vectors alone: leave query_string and filters out")
        found.sort(key=lambda document: [getattr(v, v.WhichOneof("val")) for v in document[1].entity_values])
        return [(time, key, {**row, "distance": Value(float_val=distance)}) for time, key, row, distance in found]

    def retrieve_online_documents(
        self,
        config: RepoConfig,
        table: FeatureView,
        requested_features: list[str],
        embedding: list[float],
        top_k: int,
        distance_metric: str | None = None,
    ) -> list[tuple[datetime | None, EntityKey | None, Value | None, Value | None, Value | None]]:
        """The same, nearest first, as Feast's older call has it: time, key, feature, vector and distance.

        The feature is the vector, whatever was requested.
        """
        found = self._nearest(config, table, None, embedding, top_k, distance_metric)
        if found is None:
            documents: list[tuple[datetime | None, EntityKey | None, Value | None, Value | None, Value | None]]
            documents = super().retrieve_online_documents(
                config, table, requested_features, embedding, top_k, distance_metric
            )
            return documents
        return [
            (time, key, vector, vector, Value(float_val=distance))
            for time, key, row, distance in found
            for vector in row.values()
        ]

    def _nearest(
        self,
        config: RepoConfig,
        table: FeatureView,
        requested: list[str] | None,
        embedding: list[float] | None,
        top_k: int,
        metric: str | None,
    ) -> list[Document] | None:
        """Nearest rows first; None where kellm does not serve the view."""
        turned = in_version(config, table, self._served(config))
        namespace = namespace_of(turned)
        if namespace is None:
            return None
        if not namespace.spec.holds_embeddings or embedding is None:
            raise StoreError(
                f"{table.name} was searched {'without a vector' if embedding is None else 'and holds no vectors'}: "
                f"pass `query` for a view that holds embeddings"
            )
        index = self._index_of(config, namespace)
        places, distances = index.nearest(embedding, top_k, metric or "L2")
        keys = [deserialize_entity_key(index.keys[place]) for place in places]
        names = requested or [namespace.spec.features[0][0]]
        rows = self.online_read(config, turned, keys, names)
        return [
            (time, key, {name: row[name] for name in names if name in row}, distance)
            for (time, row), key, distance in zip(rows, keys, distances.tolist(), strict=True)
            if time is not None and row is not None  # a row past the view's ttl is no neighbour
        ]

    def _index_of(self, config: RepoConfig, namespace: Namespace) -> VectorIndex:
        """The namespace's vectors; those searched last stay in memory."""
        held = self._index
        if held is None or held[0] != namespace:
            backend = self._opened(config)
            assert isinstance(backend, SqliteBackend)
            keys, values = backend.vectors(namespace)
            vectors, _ = wire.decode_vectors(values, namespace.dim)
            held = self._index = (namespace, VectorIndex(keys, vectors))
        return held[1]

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> Any:
        """Delete the database, with the files that its write-ahead log leaves."""
        self._tear_down_versions(config)
        self._index = None
        super().teardown(config, tables, entities)
        for suffix in ("-wal", "-shm"):
            Path(f"{self._get_db_path(config)}{suffix}").unlink(missing_ok=True)
