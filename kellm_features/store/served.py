"""What both of our Feast online stores do beyond Feast's own: serve one version, tell what is missing or too old.

A request resolves the catalog once, and every view that the active version holds is read from the namespace of that
version, so that a response never mixes two. Views that kellm did not publish are served as stock Feast serves them.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from feast import FeatureService, FeatureView, RepoConfig
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from kellm_features.errors import StoreError
from kellm_features.store import packed
from kellm_features.store.backends import Id, Namespace, OnlineBackend, open_backend
from kellm_features.store.catalog import Catalog, Version
from kellm_features.store.publish import online_namespace
from kellm_features.store.repo import OnlineConfig
from kellm_features.store.views import VERSION_TAG

Row = tuple[datetime | None, dict[str, Value] | None]


class ServedVersions(OnlineStore):
    """Mixed in before one of Feast's own stores."""

    _backend: OnlineBackend | None = None
    _known: tuple[bytes, Catalog] | None = None

    def _online_config(self, config: RepoConfig) -> OnlineConfig:
        raise NotImplementedError

    def _served(self, config: RepoConfig) -> Version | None:
        """The active version, looked up in the store; None where kellm serves nothing."""
        if self._backend is None:
            self._backend = open_backend(self._online_config(config))
        token = self._backend.token()
        if token is None:
            return None
        known = self._known
        if known is None or known[0] != token:
            known = self._known = (token, self._backend.catalog())
        catalog = known[1]
        return catalog.find(catalog.active) if catalog.active else None

    def get_online_features(self, config: RepoConfig, features: Any, *args: Any, **kwargs: Any) -> Any:
        """As Feast's, after a look at the version that the feature service needs."""
        _check_service(features, self._served(config) if _wanted(features) else None)
        return super().get_online_features(config, features, *args, **kwargs)

    async def get_online_features_async(self, config: RepoConfig, features: Any, *args: Any, **kwargs: Any) -> Any:
        """As Feast's, after a look at the version that the feature service needs."""
        _check_service(features, await asyncio.to_thread(self._served, config) if _wanted(features) else None)
        return await super().get_online_features_async(config, features, *args, **kwargs)

    def _read_features_per_fv(self, config: RepoConfig, grouped_refs: Any, *args: Any, **kwargs: Any) -> None:
        """Read all views of a request in one version. Feast's own way reads many views in one round trip."""
        whole, single = _split(config, grouped_refs, self._served(config))
        if whole:
            super()._read_features_per_fv(config, whole, *args, **kwargs)
        if single:
            OnlineStore._read_features_per_fv(self, config, single, *args, **kwargs)
            _mark_expired(args, kwargs)

    async def _read_features_per_fv_async(
        self, config: RepoConfig, grouped_refs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The same for an event loop."""
        whole, single = _split(config, grouped_refs, await asyncio.to_thread(self._served, config))
        if whole:
            await super()._read_features_per_fv_async(config, whole, *args, **kwargs)
        if single:
            await OnlineStore._read_features_per_fv_async(self, config, single, *args, **kwargs)
            _mark_expired(args, kwargs)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """Rows of the active version. A row past the view's ttl keeps its time and loses its features."""
        table = _in_version(config, table, None if isinstance(table, _InVersion) else self._served(config))
        namespace = getattr(table, "kellm_namespace", None)
        if namespace is not None and namespace.layout == "packed":
            assert self._backend is not None
            rows = _unpack(namespace, self._backend.fetch(namespace, _ids(entity_keys)).values, requested_features)
        else:
            names = list(requested_features) if requested_features else None  # Feast appends to the list it is given
            rows = super().online_read(config, table, entity_keys, names)  # type: ignore[safe-super]  # of the mixed-in store
        return _within_ttl(rows, table.ttl)

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """The same for an event loop."""
        served = None if isinstance(table, _InVersion) else await asyncio.to_thread(self._served, config)
        table = _in_version(config, table, served)
        namespace = getattr(table, "kellm_namespace", None)
        if namespace is not None and namespace.layout == "packed":
            assert self._backend is not None
            answer = await self._backend.fetch_async(namespace, _ids(entity_keys))
            rows = _unpack(namespace, answer.values, requested_features)
        else:
            names = list(requested_features) if requested_features else None
            rows = await super().online_read_async(config, table, entity_keys, names)
        return _within_ttl(rows, table.ttl)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows of views that kellm did not publish. A published version never changes.

        Raises:
            StoreError: rows of another version than the active one: written in place they would be mixed with it.
        """
        served = self._served(config)
        if served is None or table.name not in served.views:
            super().online_write_batch(config, table, data, progress)  # type: ignore[safe-super]  # the mixed-in store's
            return
        event = served.views[table.name].event
        for _, _, timestamp, _ in data:
            when = timestamp.replace(tzinfo=UTC) if timestamp.tzinfo is None else timestamp
            if abs((when - event).total_seconds()) > 1e-3:
                raise StoreError(
                    f"{table.name} is served in version {served.name}, whose rows are of {event.isoformat()}, and a "
                    f"row of {when.isoformat()} would be mixed with them: run  kellm publish  and  kellm promote"
                )
        if progress:  # rows of the active version are there already
            progress(len(data))

    def _tear_down_versions(self, config: RepoConfig) -> None:
        """Delete all versions and the catalog, for `feast teardown`."""
        backend = open_backend(self._online_config(config))
        try:
            for version in backend.catalog().versions:
                for view in version.views:
                    backend.drop(online_namespace(config.project, version, view))
            backend.clear()
        finally:
            backend.close()


class _InVersion:
    """Marks a view that was turned to a version's namespace already."""


def _in_version(config: RepoConfig, table: FeatureView, served: Version | None) -> FeatureView:
    """The view under the name of its namespace, which is what Feast's stores look rows up by."""
    if served is None or table.name not in served.views:
        return table
    namespace = online_namespace(config.project, served, table.name)
    turned: Any = copy.copy(table)
    turned.__class__ = _turned_class(type(table))
    turned.name = namespace.name
    turned.kellm_namespace = namespace
    # Feast would append its own version of the definition to the name; ours stands in it already.
    turned.current_version_number = None
    turned.projection = copy.copy(table.projection)
    turned.projection.version_tag = None
    return cast(FeatureView, turned)


_TURNED: dict[type, type] = {}


def _turned_class(kind: type) -> type:
    if kind not in _TURNED:
        _TURNED[kind] = type(f"{kind.__name__}InVersion", (kind, _InVersion), {})
    return _TURNED[kind]


def _split(config: RepoConfig, grouped_refs: Any, served: Version | None) -> tuple[list[Any], list[Any]]:
    """Views that Feast's own store reads all at once, and those that need a look at each row."""
    whole: list[Any] = []
    single: list[Any] = []
    for table, features in grouped_refs:
        turned = _in_version(config, table, served)
        namespace = getattr(turned, "kellm_namespace", None)
        alone = bool(table.ttl) or (namespace is not None and namespace.layout == "packed")
        (single if alone else whole).append((turned, list(features)))
    return whole, single


def _within_ttl(rows: list[Row], ttl: timedelta | None) -> list[Row]:
    if not ttl:
        return rows
    oldest = datetime.now(UTC) - ttl
    return [(when, None) if when is not None and when < oldest else (when, values) for when, values in rows]


def _mark_expired(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Rows that are not found and have a time were found, and are past their ttl."""
    response = kwargs.get("online_features_response", args[2] if len(args) > 2 else None)
    for vector in response.results if response is not None else ():
        for place, status in enumerate(vector.statuses):
            if status == FieldStatus.NOT_FOUND and vector.event_timestamps[place].seconds:
                vector.statuses[place] = FieldStatus.OUTSIDE_MAX_AGE


def _ids(entity_keys: Sequence[EntityKey]) -> list[Id]:
    return [getattr(value, value.WhichOneof("val")) for key in entity_keys for value in key.entity_values[:1]]


def _unpack(namespace: Namespace, values: Sequence[bytes | None], requested: list[str] | None) -> list[Row]:
    names = [name for name, _ in namespace.spec.features]
    rows: list[Row] = []
    for value, seconds in zip(values, packed.event_times(values), strict=True):
        if value is None or seconds is None:
            rows.append((None, None))
            continue
        vector, tail = packed.as_feast_values(value, namespace.dim)
        stored = dict(zip(names, [vector, *tail], strict=True))
        features = {name: Value.FromString(stored[name]) for name in requested or names}
        rows.append((datetime.fromtimestamp(seconds, UTC), features))
    return rows


def _wanted(features: Any) -> str | None:
    return features.tags.get(VERSION_TAG) if isinstance(features, FeatureService) else None


def _check_service(features: Any, served: Version | None) -> None:
    """Refuse a feature service that needs another version than the active one."""
    wanted = _wanted(features)
    if wanted and (served is None or served.name != wanted):
        raise StoreError(
            f"feature service {features.name!r} needs embedding version {wanted!r} and the store serves "
            f"{repr(served.name) if served else 'none'}: run  kellm promote {wanted}, or change the service's version "
            f"and apply it"
        )
