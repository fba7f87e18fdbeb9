"""Writing a version into a repository and its online store, beside what is served.

Order, so that a kill at any moment leaves the active version alone and is completed by the next publish: the
definitions are applied; the catalog notes the version as being written, with the names of all its parts; partitions
are written aside and renamed into place; rows are written into namespaces of their own; the catalog notes the
version as published. Promoting it is another step (rollout.py).

Every step looks for what an earlier attempt left and does only the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq

from kellm_features.errors import StoreError
from kellm_features.progress import track
from kellm_features.store.backends import Namespace, OnlineBackend, open_backend, update
from kellm_features.store.catalog import Catalog, Layout, Version, ViewVersion, utc_now
from kellm_features.store.definitions import Applied, apply_definitions
from kellm_features.store.layout import CREATED_TIMESTAMP, DATA, EVENT_TIMESTAMP, SPLIT_HASH, VIEWS, ViewSpec
from kellm_features.store.partitions import (
    Release,
    aside_of,
    build_partition,
    content_hash,
    same_rows,
    served_batches,
    stamp,
    withdrawn_ids,
    write_partition,
)
from kellm_features.store.repo import FEAST_YAML, OnlineConfig, read_online_config
from kellm_features.store.scaffold import write_feature_repo

logger = logging.getLogger(__name__)
LOCK = ".publish.lock"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SPECS = {spec.name: spec for spec in VIEWS}


def publish_release(repo: Path, release: Release) -> Version:
    """Write a release into a repository; what is served stays. Publishing a version again repairs it.

    Raises:
        StoreError: another publish is running, the folder is no Feast repository, its ids are of another type, the
            version was published with other rows, Feast refused the definitions, or the online store failed.
        MissingExtraError: Feast or the store's client is not installed.
    """
    with sole_publisher(repo):
        if not (repo / FEAST_YAML).exists():
            write_feature_repo(repo, id_type=release.id_type)
        config = read_online_config(repo)
        backend = open_backend(config)
        try:
            with backend.lease():
                return _publish(repo, config, backend, release)
        finally:
            backend.close()


@contextlib.contextmanager
def sole_publisher(repo: Path) -> Iterator[None]:
    """Hold the repository's lock; the kernel drops it when this process ends, however it ends.

    Raises:
        StoreError: another process holds it, or the folder is no place for a repository.
    """
    if repo.is_dir() and not (repo / FEAST_YAML).exists() and any(path.name != DATA for path in repo.iterdir()):
        raise StoreError(
            f"{repo} is not empty and holds no {FEAST_YAML}: set store.repo to a Feast repository or to a folder that "
            f"does not exist yet"
        )
    try:
        (repo / DATA).mkdir(parents=True, exist_ok=True)
        handle = (repo / DATA / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"{repo / DATA} cannot be written: {error.strerror}; set store.repo to another folder"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise StoreError(
                f"another publish into {repo} is running ({handle.read().strip() or 'process unknown'}): wait for it "
                f"and try again"
            ) from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
        handle.flush()
        yield


def online_namespace(project: str, version: Version, view: str) -> Namespace:
    """Where a version's rows of a view lie online."""
    held = version.views[view]
    return Namespace(project, SPECS[view], held.number, version.id_type, held.layout, held.dim)


def _publish(repo: Path, config: OnlineConfig, backend: OnlineBackend, release: Release) -> Version:
    catalog = backend.catalog()
    for held in catalog.versions:
        if held.id_type != release.id_type:
            raise StoreError(
                f"{config.where} holds versions with {held.id_type} ids and this run has {release.id_type} ids: set "
                f"store.repo to another folder"
            )
    contents = {name: content_hash(rows) for name, rows in release.tables.items()}
    known = catalog.find(release.version)
    if known is not None and known.state == "pruning":
        raise StoreError(f"version {known.name} is being pruned: run  kellm prune  to its end, then publish again")
    if known is not None and known.state == "published":
        _refuse_other_rows(repo, known, release, contents)
    applied = apply_definitions(repo, list(release.tables), release.id_type)
    if known is None or known.state != "published":
        version = _plan(repo, config, catalog, release, contents, applied)
        _drop_replaced(config, backend, known, version)
        begin_version(backend, version, catalog)
    else:
        version = known
    _write_partitions(repo, release, version, catalog)
    _write_rows(config, backend, release, version)
    if version.state == "published":
        return version
    finished = finish_version(backend, version)
    logger.info("published version %s into %s", version.name, config.where)
    return finished


def begin_version(backend: OnlineBackend, version: Version, planned_on: Catalog) -> None:
    """Note a version as being written.

    Raises:
        StoreError: versions came or went since it was planned, so that its numbers may be another's.
    """

    def transition(current: Catalog) -> Catalog:
        if _parts(current) != _parts(planned_on):
            raise _overtaken(backend, version)
        return current.begin(version)

    update(backend, transition)


def finish_version(backend: OnlineBackend, version: Version) -> Version:
    """Note a version as published.

    Raises:
        StoreError: what the catalog has under that name is no longer what this process began.
    """

    def transition(current: Catalog) -> Catalog:
        if current.find(version.name) != version:
            raise _overtaken(backend, version)
        return current.finish(version.name, utc_now())

    return update(backend, transition).get(version.name)


def _parts(catalog: Catalog) -> object:
    return catalog.next_number, [(version.name, version.state, version.views) for version in catalog.versions]


def _overtaken(backend: OnlineBackend, version: Version) -> StoreError:
    """A process that stood still lost its lease, and did not know: the catalog is what tells."""
    return StoreError(
        f"version {version.name} is not published: another publish or prune changed {backend.where} while this one "
        f"stood still for too long and lost its lease; look at  kellm status  and publish again"
    )


def _plan(
    repo: Path,
    config: OnlineConfig,
    catalog: Catalog,
    release: Release,
    contents: dict[str, str],
    applied: Applied,
) -> Version:
    """The version with the parts that it will have. Views whose rows did not change share those of the latest."""
    begun, latest = catalog.find(release.version), catalog.latest()
    number = catalog.next_number
    views: dict[str, ViewVersion] = {}
    for name, rows in release.tables.items():
        spec = SPECS[name]
        layout: Layout = config.layout if spec.holds_embeddings else "stock"
        taken = None
        for source in (begun, latest):
            held = source.views.get(name) if source else None
            if taken is None and held and (held.content, held.layout) == (contents[name], layout):
                taken = held
        if taken is None or (taken.file != _file_of(spec, release.version) and not (repo / taken.file).exists()):
            event, created = _stamps(repo, spec, release, catalog)
            taken = ViewVersion(
                number=number,
                file=_file_of(spec, release.version),
                rows=len(rows),
                event=event,
                created=created,
                content=contents[name],
                layout=layout,
                dim=release.dim if spec.holds_embeddings else 0,
            )
            number += 1
        views[name] = taken.model_copy(update={"ttl_s": applied.ttl_s.get(name, 0.0)})
    own = [repo / _file_of(SPECS[name], release.version) for name in views]
    return Version(
        name=release.version,
        state="writing",
        id_type=release.id_type,
        started_at=utc_now(),
        views=views,
        split_hash=release.split_hash,
        again=begun.again if begun else any(path.exists() for path in own),
    )


def _stamps(repo: Path, spec: ViewSpec, release: Release, catalog: Catalog) -> tuple[datetime, datetime]:
    """Timestamps of a new partition. One that lies there of a pruned version keeps its own, if it is the same."""
    path = repo / _file_of(spec, release.version)
    if path.exists() and catalog.find(release.version) is None:
        if not same_rows(path, spec, release.tables[spec.name]):
            raise StoreError(
                f"{path} holds other rows of version {release.version!r}, and a version never changes: publish under "
                f"another name"
            )
        first = pq.ParquetFile(path).read_row_group(0, columns=[EVENT_TIMESTAMP, CREATED_TIMESTAMP]).slice(0, 1)
        event, created = (first.column(name)[0].as_py() for name in (EVENT_TIMESTAMP, CREATED_TIMESTAMP))
        return event, created
    held = [v.views[spec.name] for v in catalog.versions if spec.name in v.views and v.name != release.version]
    return stamp(release, [(view.event, view.created) for view in held], utc_now())


def _refuse_other_rows(repo: Path, known: Version, release: Release, contents: dict[str, str]) -> None:
    """A published version never changes."""
    changed = [
        name
        for name, rows in release.tables.items()
        if name not in known.views
        or (
            known.views[name].content != contents[name]
            and not (
                (repo / known.views[name].file).exists() and same_rows(repo / known.views[name].file, SPECS[name], rows)
            )
        )
    ]
    if changed:
        raise StoreError(
            f"version {known.name!r} was published on {known.published_at:%Y-%m-%d %H:%M} UTC with other rows of "
            f"{', '.join(changed)}, and a version never changes: run  kellm run --from export  for a new one, or "
            f"publish with --version"
        )


def _drop_replaced(config: OnlineConfig, backend: OnlineBackend, begun: Version | None, version: Version) -> None:
    """Take back what an unfinished attempt wrote under this name and this one writes otherwise."""
    if begun is None:
        return
    kept = {view.number for view in version.views.values()}
    for name, view in begun.views.items():
        if view.number not in kept and view.file == _file_of(SPECS[name], begun.name):
            backend.drop(online_namespace(config.project, begun, name))


def _write_partitions(repo: Path, release: Release, version: Version, catalog: Catalog) -> None:
    """Write the partitions that are not there. Each withdraws the ids of those before it that it lacks."""
    for name, rows in release.tables.items():
        spec, view = SPECS[name], version.views[name]
        path = repo / view.file
        if path.exists() and same_rows(path, spec, rows):
            continue
        if view.file != _file_of(spec, version.name):
            raise StoreError(f"{path} is gone although it was published: restore it from a backup")
        sources = [catalog.latest(), *(held for held in catalog.versions if held.state == "writing")]
        files = {repo / v.views[name].file for v in sources if v and v.name != version.name and name in v.views}
        withdrawn = withdrawn_ids(sorted(file for file in files if file.exists()), spec, rows)
        table = build_partition(rows, withdrawn, spec, release.id_type, (view.event, view.created))
        if release.split_hash:
            table = table.replace_schema_metadata({SPLIT_HASH: release.split_hash.encode()})
        try:
            write_partition(table, path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror or error}): make room and publish again; what is served "
                f"is unchanged"
            ) from error


def _write_rows(config: OnlineConfig, backend: OnlineBackend, release: Release, version: Version) -> None:
    total = sum(len(rows) for rows in release.tables.values())
    with track("online store", total) as advance:
        for name, rows in release.tables.items():
            namespace, event = online_namespace(config.project, version, name), version.views[name].event
            event_us = (event - EPOCH) // timedelta(microseconds=1)
            for batch in served_batches(rows, namespace.spec, event):
                backend.write(namespace, batch, event_us)
                advance(len(batch), name)


def _file_of(spec: ViewSpec, version: str) -> str:
    return f"{DATA}/{spec.name}/{version}.parquet"


def partition_path(repo: Path, file: str) -> str:
    """A partition's place for any engine: a URI as it is, a path below the repository made absolute."""
    return file if "://" in file else str(repo / file)


def delete_partitions(repo: Path, versions: Sequence[Version]) -> None:
    """Delete the partitions of versions that were never finished, and so never served."""
    for version in versions:
        for name, view in version.views.items():
            path = repo / view.file
            if view.file != _file_of(SPECS[name], version.name):
                continue
            aside_of(path).unlink(missing_ok=True)
            if not version.again:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # Spark writes folders
