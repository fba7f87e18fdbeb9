"""What both of our Feast online stores do beyond Feast's own: serve one version, tell what is missing or too old.

A request resolves the catalog once, and every view that the active version holds is read from the namespace of that
version, so that a response never mixes two. Views that kellm did not publish are served as stock Feast serves them,
their ttl included, which stock ignores online.
"""

from __future__ import annotations

import asyncio
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
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
Written = list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]]

_request: ContextVar[Version | None] = ContextVar("_request")
"""The version that the request under way is answered from: looked up when it came in, the same for all its views."""


class ServedVersions(OnlineStore):
    """Mixed in before one of Feast's own stores."""

    _backend: OnlineBackend | None = None
    _known: tuple[bytes, Catalog] | None = None

    @abstractmethod
    def _online_config(self, config: RepoConfig) -> OnlineConfig:
        """Where the rows lie, as feature_store.yaml has it."""

    def _opened(self, config: RepoConfig) -> OnlineBackend:
        if self._backend is None:
            self._backend = open_backend(self._online_config(config))
        return self._backend

    def _catalog(self, config: RepoConfig) -> Catalog:
        """The catalog as it is now: its token is asked for each time, the whole of it where that changed."""
        backend = self._opened(config)
        token = backend.token()
        if token is None:
            return Catalog()
        known = self._known
        if known is None or known[0] != token:
            known = self._known = (token, backend.catalog())
        return known[1]

    def _served(self, config: RepoConfig) -> Version | None:
        """The active version, looked up in the store; None where kellm serves nothing."""
        catalog = self._catalog(config)
        return catalog.find(catalog.active) if catalog.active else None

    def get_online_features(self, config: RepoConfig, features: Any, *args: Any, **kwargs: Any) -> Any:
        """As Feast's, all of it from the version that is active as the request comes in.

        Raises:
            StoreError: the feature service needs another version, or asks for precomputed copies; the store does not
                answer.
        """
        with _answered_from(self._served(config), features):
            return super().get_online_features(config, features, *args, **kwargs)

    async def get_online_features_async(self, config: RepoConfig, features: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for an event loop."""
        with _answered_from(await asyncio.to_thread(self._served, config), features):
            return await super().get_online_features_async(config, features, *args, **kwargs)

    def _read_features_per_fv(
        self,
        config: RepoConfig,
        grouped_refs: Any,
        join_key_values: Any,
        entity_name_to_join_key_map: Any,
        online_features_response: Any,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """Read all views of a request in one version. Feast's own way reads many views in one round trip."""
        response, flags = online_features_response, (full_feature_names, include_feature_view_version_metadata)
        rest = (join_key_values, entity_name_to_join_key_map, response, *flags)
        whole, single = _split(config, grouped_refs, _request.get())
        if whole:
            super()._read_features_per_fv(config, whole, *rest)
        if single:
            start = len(response.results)
            OnlineStore._read_features_per_fv(self, config, single, *rest)
            _mark_expired(response.results[start:], single)

    async def _read_features_per_fv_async(
        self,
        config: RepoConfig,
        grouped_refs: Any,
        join_key_values: Any,
        entity_name_to_join_key_map: Any,
        online_features_response: Any,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """The same for an event loop."""
        response, flags = online_features_response, (full_feature_names, include_feature_view_version_metadata)
        rest = (join_key_values, entity_name_to_join_key_map, response, *flags)
        whole, single = _split(config, grouped_refs, _request.get())
        if whole:
            await super()._read_features_per_fv_async(config, whole, *rest)
        if single:
            start = len(response.results)
            await OnlineStore._read_features_per_fv_async(self, config, single, *rest)
            _mark_expired(response.results[start:], single)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """Rows of the active version. A row past the view's ttl keeps its time and loses its features."""
        table = in_version(config, table, None if namespace_of(table) else self._served(config))
        namespace = namespace_of(table)
        if namespace is not None and namespace.layout == "packed":
            values = self._opened(config).fetch(namespace, _ids(entity_keys)).values
            rows = _unpack(namespace, values, requested_features)
        else:
            names = list(requested_features) if requested_features else None  # Feast appends to the list it is given
            rows = super().online_read(config, table, entity_keys, names)  # type: ignore[safe-super]  # Feast's store is next
        return _within_ttl(rows, table)

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """The same for an event loop."""
        served = None if namespace_of(table) else await asyncio.to_thread(self._served, config)
        table = in_version(config, table, served)
        namespace = namespace_of(table)
        if namespace is not None and namespace.layout == "packed":
            answer = await self._opened(config).fetch_async(namespace, _ids(entity_keys))
            rows = _unpack(namespace, answer.values, requested_features)
        else:
            names = list(requested_features) if requested_features else None
            rows = await super().online_read_async(config, table, entity_keys, names)
        return _within_ttl(rows, table)

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: Written, progress: Callable[[int], Any] | None
    ) -> None:
        """Write rows of views that kellm did not publish. A published version never changes.

        Raises:
            StoreError: rows of another version than the active one: written in place they would be mixed with it.
        """
        if not _written_already(self._catalog(config), table, data, progress):
            super().online_write_batch(config, table, data, progress)  # type: ignore[safe-super]  # Feast's store is next

    async def online_write_batch_async(
        self, config: RepoConfig, table: FeatureView, data: Written, progress: Callable[[int], Any] | None
    ) -> None:
        """The same for an event loop."""
        if not _written_already(await asyncio.to_thread(self._catalog, config), table, data, progress):
            await super().online_write_batch_async(config, table, data, progress)

    async def close(self) -> None:
        """Give the connections back as a server of Feast's stops; the store opens them again when it is asked again."""
        await super().close()
        if self._backend is not None:
            await self._backend.aclose()
            self._backend.close()

    def _tear_down_versions(self, config: RepoConfig) -> None:
        """Delete all versions and the catalog, for `feast teardown`."""
        backend = self._opened(config)
        try:
            for version in backend.catalog().versions:
                for view in version.views:
                    backend.drop(online_namespace(config.project, version, view))
            backend.clear()
        finally:
            backend.close()
            self._backend = self._known = None


class _InVersion:
    """A view that stands under the name of a version's namespace, where its rows lie."""

    kellm_namespace: Namespace


def namespace_of(table: Any) -> Namespace | None:
    """The namespace that a view was turned to by `in_version`; None for any other."""
    return table.kellm_namespace if isinstance(table, _InVersion) else None


def in_version(config: RepoConfig, table: FeatureView, served: Version | None) -> FeatureView:
    """The view under the name of its namespace, which is what Feast's stores look rows up by.

    A view that the version does not hold comes back as it is.
    """
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


@contextmanager
def _answered_from(served: Version | None, features: Any) -> Iterator[None]:
    _check_service(features, served)
    before = _request.set(served)
    try:
        yield
    finally:
        _request.reset(before)


def _split(config: RepoConfig, grouped_refs: Any, served: Version | None) -> tuple[list[Any], list[Any]]:
    """Views that Feast's own store reads all at once, and those that need a look at each row."""
    whole: list[Any] = []
    single: list[Any] = []
    for table, features in grouped_refs:
        turned = in_version(config, table, served)
        namespace = namespace_of(turned)
        alone = namespace is not None and (bool(table.ttl) or namespace.layout == "packed")
        (single if alone else whole).append((turned, list(features)))
    return whole, single


def _oldest(table: FeatureView) -> datetime | None:
    """Event time before which a published row is past the view's ttl; None where it never is."""
    return datetime.now(UTC) - table.ttl if table.ttl and namespace_of(table) else None


def _within_ttl(rows: list[Row], table: FeatureView) -> list[Row]:
    oldest = _oldest(table)
    if oldest is None:
        return rows
    return [(when, None) if when is not None and when < oldest else (when, values) for when, values in rows]


def _mark_expired(vectors: Sequence[Any], read: list[tuple[FeatureView, list[str]]]) -> None:
    """Tell what `_within_ttl` took away from what was never there. `vectors` stand in the order of the features."""
    remaining = iter(vectors)
    for table, features in read:
        oldest = _oldest(table)
        for _ in features:
            vector = next(remaining)
            if oldest is None:
                continue
            for place, (status, time) in enumerate(zip(vector.statuses, vector.event_timestamps, strict=True)):
                missing = status == FieldStatus.NOT_FOUND and time.ByteSize()
                if missing and time.ToDatetime(UTC) < oldest:
                    vector.statuses[place] = FieldStatus.OUTSIDE_MAX_AGE


def _written_already(
    catalog: Catalog, table: FeatureView, data: Written, progress: Callable[[int], Any] | None
) -> bool:
    """Whether rows are of the active version, and so there; False where kellm does not publish the view."""
    if not any(table.name in version.views for version in catalog.versions):
        return False
    served = catalog.find(catalog.active) if catalog.active else None
    if served is None or table.name not in served.views:
        raise StoreError(
            f"{table.name} is published by kellm, which serves "
            f"{f'version {served.name} without it' if served else 'no version yet'}, and rows written in place are of "
            f"no version: run  kellm promote"
        )
    event = served.views[table.name].event
    for _, _, timestamp, _ in data:
        when = timestamp.replace(tzinfo=UTC) if timestamp.tzinfo is None else timestamp
        if abs((when - event).total_seconds()) > 1e-3:
            raise StoreError(
                f"{table.name} is served in version {served.name}, whose rows are of {event.isoformat()}, and a "
                f"row of {when.isoformat()} would be mixed with them: run  kellm publish  and  kellm promote"
            )
    if progress:
        progress(len(data))
    return True


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


def _check_service(features: Any, served: Version | None) -> None:
    """Refuse a feature service that needs another version than the active one, or copies of what is switched."""
    if not isinstance(features, FeatureService):
        return
    wanted = features.tags.get(VERSION_TAG)
    if wanted and (served is None or served.name != wanted):
        raise StoreError(
            f"feature service {features.name!r} needs embedding version {wanted!r} and the store serves "
            f"{repr(served.name) if served else 'none'}: run  kellm promote {wanted}, or change the service's version "
            f"and apply it"
        )
    if served and getattr(features, "precompute_online", False):
        held = [view.name for view in features.feature_view_projections if view.name in served.views]
        if held:
            raise StoreError(
                f"feature service {features.name!r} has precompute_online=True, and copies of {', '.join(held)} would "
                f"be served on after a promote: take precompute_online out and apply it"
            )
