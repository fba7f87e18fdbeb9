"""Rolling out embedding versions: publish, verify, promote, roll back, prune, and what the state is.

    publish(repo, run_inputs("runs/nightly"))   # beside what is served
    verify(repo)                                 # the gates, against what is served
    promote(repo)                                # served from the next request on, everywhere
    rollback(repo)                               # and back

All state lies in the online store's catalog (catalog.py), so that these work from any machine that has the
repository. Neither Feast nor pandas is imported here; `publish` runs `feast apply` in a process of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kellm_features.errors import StoreError
from kellm_features.settings import StoreSettings, VerifySettings
from kellm_features.store import packed, wire
from kellm_features.store.backends import Id, OnlineBackend, open_backend, update
from kellm_features.store.catalog import Catalog, Version, utc_now
from kellm_features.store.layout import (
    ITEM_DESCRIPTION,
    ITEM_EMBEDDING,
    ITEM_NEIGHBORS,
    ITEM_WIKI_LINK,
    USER_EMBEDDING,
    USER_NEIGHBORS,
)
from kellm_features.store.partitions import read_release
from kellm_features.store.publish import (
    SPECS,
    delete_partitions,
    online_namespace,
    partition_path,
    publish_release,
    sole_publisher,
)
from kellm_features.store.repo import OnlineConfig, read_online_config
from kellm_features.store.verify import Verification, ViewCheck, verify_version

logger = logging.getLogger(__name__)

INPUTS = {
    ITEM_EMBEDDING.name: ("export", "item_embeddings.parquet"),
    USER_EMBEDDING.name: ("export", "user_embeddings.parquet"),
    ITEM_DESCRIPTION.name: ("generate", "item_descriptions.parquet"),
    ITEM_WIKI_LINK.name: ("link", "links.parquet"),
    ITEM_NEIGHBORS.name: ("swing", "item_pairs.parquet"),
    USER_NEIGHBORS.name: ("swing", "user_pairs.parquet"),
}
"""View -> (stage, file) that it is made from."""


def run_inputs(run_dir: Path | str) -> dict[str, Path]:
    """View -> artefact, of a run's directory."""
    return {view: Path(run_dir) / stage / file for view, (stage, file) in INPUTS.items()}


def publish(
    repo: Path | str, inputs: Mapping[str, Path], *, version: str | None = None, split_hash: str | None = None
) -> Version:
    """Write a version beside what is served. Publishing a version again completes or repairs it.

    Args:
        repo: the Feast repository; made from the template where the folder does not exist.
        inputs: view -> Parquet artefact, one of the two embedding views at least; `run_inputs` gives those of a run.
        version: its name; None takes the `embedding_version` of the rows.
        split_hash: of the split that the embeddings were trained on (`training_join` refuses another one).

    Raises:
        DataError: an artefact is missing, unreadable or of another schema.
        StoreError: see `partitions.read_release` and `publish.publish_release`. What is served is unchanged.
        MissingExtraError: Feast or the Redis client is not installed.
    """
    return publish_release(Path(repo).resolve(), read_release(inputs, version, split_hash=split_hash))


def verify(repo: Path | str, version: str | None = None, *, settings: VerifySettings | None = None) -> Verification:
    """Hold a published version against the gates, and note the findings in the catalog.

    Args:
        repo: the Feast repository; the partitions of both versions must be within reach.
        version: None takes the one published last.
        settings: limits; None takes the defaults.

    Raises:
        StoreError: no such version, it is not published to its end, or something could not be read.
    """
    with _opened(repo) as (config, backend):
        found = _verify(config, backend, backend.catalog(), version, settings or VerifySettings())
        update(backend, lambda catalog: catalog.verified(found.version, found.model_dump(mode="json")))
    return found


def promote(
    repo: Path | str,
    version: str | None = None,
    *,
    settings: VerifySettings | None = None,
    force: bool = False,
) -> Version:
    """Serve a version, from the next request of every reader on, if it passes the gates.

    Findings of an earlier `verify` against the version that is still active are taken over.

    Args:
        repo: the Feast repository.
        version: None takes the one published last.
        settings: limits of the gates; None takes the defaults.
        force: serve it whatever the gates say, as when they are what is wrong.

    Raises:
        StoreError: no such version, it is not published to its end, a gate failed, or the active version was changed
            by somebody else meanwhile.
    """
    with _opened(repo) as (config, backend):
        catalog = backend.catalog()
        target = _pick(catalog, version)
        if target.name == catalog.active:
            return target
        if not force:
            limits = settings or VerifySettings()
            found = _standing_verification(catalog, target, limits)
            if found is None:
                found = _verify(config, backend, catalog, target.name, limits)
                update(backend, lambda current: current.verified(target.name, found.model_dump(mode="json")))
            if not found.passed:
                failures = found.failures()
                raise StoreError(
                    f"version {target.name} is not promoted, it fails {len(failures)} of {len(found.gates)} gates: "
                    f"{'; '.join(failures)}. Mend it and publish anew, change [store.verify], or use --force"
                )
        return update(backend, lambda current: _promoted(current, target.name, catalog.active)).get(target.name)


def rollback(repo: Path | str) -> Version:
    """Serve the version again that was served before this one.

    Raises:
        StoreError: nothing is served, or nothing was before that is still held.
    """
    with _opened(repo) as (_, backend):
        return update(backend, lambda catalog: catalog.rollback(utc_now())).active_version()


def prune(repo: Path | str, keep: int, *, grace_s: float | None = None) -> list[str]:
    """Delete old versions from the online store; their partitions stay, as history for training.

    Kept are the active version, the `keep` published last, and what was active within the grace period, as requests
    may still be reading it. Unfinished versions go, with their partitions: nobody else publishes meanwhile.

    Args:
        repo: the Feast repository.
        keep: published versions to keep, 1 at least.
        grace_s: None takes the default of `store.grace_s`.

    Returns:
        The names of those that went.

    Raises:
        StoreError: `keep` is below 1, a publish is running, or the store failed; running it again goes on.
    """
    if keep < 1:
        raise StoreError(f"prune was to keep {keep} versions: 1 at least, so that there is one to serve")
    grace = timedelta(seconds=StoreSettings().grace_s if grace_s is None else grace_s)
    root = Path(repo).resolve()
    with _opened(root) as (config, backend), sole_publisher(root), backend.lease():
        catalog = update(backend, lambda current: _condemned(current, keep, utc_now() - grace))
        going = [version for version in catalog.versions if version.state == "pruning"]
        kept = {(name, view.number) for v in catalog.versions if v not in going for name, view in v.views.items()}
        for version in going:
            for name, view in version.views.items():
                if (name, view.number) not in kept:
                    backend.drop(online_namespace(config.project, version, name))
        delete_partitions(root, [version for version in going if version.published_at is None])
        names = [version.name for version in going]
        update(backend, lambda current: current.forget(set(names)))
    logger.info("pruned %s", ", ".join(names) or "nothing")
    return names


@dataclass(frozen=True)
class VersionStatus:
    """One line of `status`."""

    name: str
    state: str
    """serving, published, unfinished or pruning."""
    rows: dict[str, int]
    """View -> ids."""
    dim: int
    published_at: datetime | None
    verified: bool | None
    """Whether the gates passed; None: not checked."""
    layout: str


@dataclass(frozen=True)
class Status:
    """What a store holds, newest version first."""

    where: str
    active: str | None
    since: datetime | None
    """When the active version was promoted."""
    previous: str | None
    """What a rollback would serve."""
    versions: tuple[VersionStatus, ...]


def status(repo: Path | str) -> Status:
    """What the online store holds and serves.

    Raises:
        StoreError: no repository there, or the store does not answer.
    """
    with _opened(repo) as (config, backend):
        catalog = backend.catalog()
    lines = []
    for version in reversed(catalog.versions):
        state = {"writing": "unfinished", "pruning": "pruning", "published": "published"}[version.state]
        vectors = [view for name, view in version.views.items() if SPECS[name].holds_embeddings]
        lines.append(
            VersionStatus(
                name=version.name,
                state="serving" if version.name == catalog.active else state,
                rows={name: view.rows for name, view in version.views.items()},
                dim=vectors[0].dim,
                published_at=version.published_at,
                verified=Verification.model_validate(version.verification).passed if version.verification else None,
                layout=vectors[0].layout,
            )
        )
    held = [entry for entry in catalog.history if entry.version != catalog.active]
    current = next((entry for entry in catalog.history if entry.version == catalog.active), None)
    return Status(
        where=config.where,
        active=catalog.active,
        since=current.since if current else None,
        previous=held[-1].version if held else None,
        versions=tuple(lines),
    )


@contextmanager
def _opened(repo: Path | str) -> Iterator[tuple[OnlineConfig, OnlineBackend]]:
    config = read_online_config(repo)
    backend = open_backend(config)
    try:
        yield config, backend
    finally:
        backend.close()


def _pick(catalog: Catalog, name: str | None) -> Version:
    if name is not None:
        return catalog.get(name)
    latest = catalog.latest()
    if latest is None:
        raise StoreError("no version is published to its end: run  kellm publish")
    return latest


def _verify(
    config: OnlineConfig, backend: OnlineBackend, catalog: Catalog, name: str | None, settings: VerifySettings
) -> Verification:
    version = _pick(catalog, name)
    if version.state != "published":
        raise StoreError(f"version {version.name} is {version.state}, not published to its end: run  kellm publish")
    active = catalog.find(catalog.active) if catalog.active and catalog.active != version.name else None
    checks = []
    for view, held in version.views.items():
        if SPECS[view].holds_embeddings:
            before = active.views.get(view) if active else None
            checks.append(
                ViewCheck(
                    SPECS[view],
                    candidate=partition_path(config.repo, held.file),
                    active=partition_path(config.repo, before.file) if before else None,
                    dtype="float16" if held.layout == "packed" else "float32",
                )
            )

    def fetch(view: str, ids: Sequence[Id]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        namespace = online_namespace(config.project, version, view)
        decode = packed.decode_rows if namespace.layout == "packed" else wire.decode_vectors
        return decode(backend.fetch(namespace, ids).values, namespace.dim)

    return verify_version(version.name, checks, fetch, settings, against=active.name if active else None)


def _standing_verification(catalog: Catalog, version: Version, limits: VerifySettings) -> Verification | None:
    """Findings on a version that still hold: good ones, under these limits, against what is active now."""
    if version.verification is None:
        return None
    found = Verification.model_validate(version.verification)
    return found if found.passed and (found.against, found.settings) == (catalog.active, limits) else None


def _promoted(catalog: Catalog, name: str, expected: str | None) -> Catalog:
    if catalog.active not in (expected, name):
        raise StoreError(
            f"version {catalog.active} was promoted by somebody else while {name} was held against {expected}: look at "
            f"kellm status  and promote again"
        )
    return catalog.promote(name, utc_now())


def _condemned(catalog: Catalog, keep: int, before: datetime) -> Catalog:
    published = sorted(
        (version for version in catalog.versions if version.state == "published"),
        key=lambda version: version.published_at or version.started_at,
    )
    spared = {version.name for version in published[-keep:]} | {catalog.active}
    spared |= {name for name, when in catalog.retired.items() if when > before}
    names = {v.name for v in catalog.versions if v.state != "pruning" and v.name not in spared}
    return catalog.condemn(names) if names else catalog
