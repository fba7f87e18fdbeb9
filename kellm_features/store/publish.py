"""The stage "publish": a version becomes immutable partitions and is served.

Order, so that a kill at any moment is completed by the next run: journal the new partitions, rename them into place,
apply the repository's definitions, materialize, replace `data/published.json`, drop the journal.

Stock Feast materializes in place, row by row: while it runs, a request may see two versions. Ids that the new
version lacks are withdrawn by null rows (`partitions.build_partition`), so that none of an older version stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kellm_features.artifacts import Artifact
from kellm_features.errors import MissingExtraError, StoreError
from kellm_features.progress import track
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport
from kellm_features.store.layout import (
    DATA,
    ITEM_DESCRIPTION,
    ITEM_EMBEDDING,
    ITEM_NEIGHBORS,
    ITEM_WIKI_LINK,
    PUBLISHED,
    USER_EMBEDDING,
    USER_NEIGHBORS,
    VIEWS,
    Partition,
    Publication,
    Published,
    ViewSpec,
    read_published,
    write_atomic,
)
from kellm_features.store.partitions import Release, build_partition, live_rows, read_release, stamp
from kellm_features.store.scaffold import write_feature_repo

logger = logging.getLogger(__name__)

LOCK = ".publish.lock"
JOURNAL = ".publishing.json"
STAGING = ".staging"
FEAST_YAML = "feature_store.yaml"


class _NotAppliedError(StoreError):
    """Feast refused the definitions: nothing of the new version can have been served."""


INPUTS = {
    ITEM_EMBEDDING.name: ("export", "item_embeddings.parquet"),
    USER_EMBEDDING.name: ("export", "user_embeddings.parquet"),
    ITEM_DESCRIPTION.name: ("generate", "item_descriptions.parquet"),
    ITEM_WIKI_LINK.name: ("link", "links.parquet"),
    ITEM_NEIGHBORS.name: ("swing", "item_pairs.parquet"),
    USER_NEIGHBORS.name: ("swing", "user_pairs.parquet"),
}


def run(ctx: StageContext) -> StageReport:
    """Publish the run's embeddings, descriptions, links and neighbours into `settings.store.repo`.

    Returns:
        rows_in and rows_out count items and users with an embedding; the notes hold version, partitions, rows and
        withdrawn ids per view, and the repository's path. `published.json` in the stage's folder is a copy.

    Raises:
        StoreError: another publish is running, the folder is no Feast repository, its ids are of another type, the
            version was published with other embeddings, or Feast refused.
        MissingExtraError: Feast is not installed.
    """
    if importlib.util.find_spec("feast") is None:
        raise MissingExtraError("feast", "feast", "publishing embeddings")
    repo = ctx.settings.store.repo.resolve()
    release = read_release({view: ctx.input(*source) for view, source in INPUTS.items()})
    published = publish(repo, release)
    write_atomic(ctx.out / PUBLISHED, published.model_dump_json(indent=2) + "\n")
    current = published.current
    embeddings = sum(current.views[spec.name].rows for spec in (ITEM_EMBEDDING, USER_EMBEDDING))
    return StageReport(
        rows_in=embeddings,
        rows_out=embeddings,
        notes={
            "version": current.version,
            "repo": str(repo),
            "rows": {name: partition.rows for name, partition in current.views.items()},
            "withdrawn": {name: partition.withdrawn for name, partition in current.views.items()},
            "partitions": current.files,
        },
    )


def why_stale(settings: Settings, artifact: Artifact) -> str | None:
    """Why the repository no longer serves what this artefact published, or None where it does.

    Reads `published.json` and looks for files; imports no Feast.
    """
    repo = settings.store.repo.resolve()
    version, partitions = artifact.manifest.notes.get("version"), artifact.manifest.notes.get("partitions")
    try:
        published = read_published(repo)
    except StoreError as error:
        return str(error)
    if published is None:
        return f"nothing is published in {repo}"
    if published.current.version != version:
        return f"{repo} serves version {published.current.version} now, this run made {version}"
    if published.current.files != partitions:
        return f"{repo} was published to since, from another run"
    for name in (FEAST_YAML, *published.stores, *published.current.files.values()):
        if not (repo / name).exists():
            return f"{repo / name} is gone"
    return None


def publish(repo: Path, release: Release) -> Published:
    """Write a release into a repository and serve it. Publishing what is served already repairs the online store.

    Raises:
        StoreError: see `run`.
    """
    with _sole_publisher(repo) as lock:
        if not (repo / FEAST_YAML).exists():
            write_feature_repo(repo, id_type=release.id_type)
        before = read_published(repo)
        unfinished = _read_journal(repo)
        _check(repo, release, before)
        views = _write_partitions(repo, release, before.current if before else None, unfinished)
        try:
            stores = _serve(repo, release, views, lock)
        except _NotAppliedError:
            _undo(repo, views, before.current if before else None, unfinished)
            raise
        current = Publication(version=release.version, published_at=datetime.now(UTC), dim=release.dim, views=views)
        previous = [before.current, *before.previous] if before else []
        if unfinished and unfinished.views != views:
            previous.insert(0, unfinished)
        elif before and (before.current.version, before.current.views) == (current.version, current.views):
            current, previous = before.current, before.previous
        after = Published(id_type=release.id_type, stores=stores, current=current, previous=previous)
        write_atomic(repo / DATA / PUBLISHED, after.model_dump_json(indent=2) + "\n")
        (repo / DATA / JOURNAL).unlink(missing_ok=True)
    logger.info("published version %s into %s", release.version, repo)
    return after


@contextlib.contextmanager
def _sole_publisher(repo: Path) -> Iterator[IO[str]]:
    """Hold the repository's lock; the kernel drops it when this process ends, however it ends."""
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
        yield handle


def _read_journal(repo: Path) -> Publication | None:
    """What a killed publish had written: the views whose partitions came into place."""
    journal = repo / DATA / JOURNAL
    if not journal.exists():
        return None
    try:
        unfinished = Publication.model_validate_json(journal.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{journal} is not readable ({error}): delete it and publish again") from error
    logger.warning("version %s was not published to its end", unfinished.version)
    there = {name: partition for name, partition in unfinished.views.items() if (repo / partition.file).exists()}
    return unfinished.model_copy(update={"views": there})


def _check(repo: Path, release: Release, before: Published | None) -> None:
    """Refuse another id type, and other embeddings under a version's name: a version never changes."""
    if before is None:
        return
    if before.id_type != release.id_type:
        raise StoreError(
            f"{repo} holds versions with {before.id_type} ids and this run has {release.id_type} ids: set store.repo "
            f"to another folder"
        )
    for publication in (before.current, *before.previous):
        for name in publication.files.values():
            if not (repo / name).exists():
                raise StoreError(
                    f"{repo / name} is gone although it was published: restore it, or delete {repo / DATA}"
                )
    known = next((p for p in (before.current, *before.previous) if p.finished and p.version == release.version), None)
    for spec in (ITEM_EMBEDDING, USER_EMBEDDING) if known else ():
        assert known is not None
        if not _same_rows(repo / known.files[spec.name], spec, release):
            raise StoreError(
                f"version {release.version!r} was published into {repo} on {known.published_at:%Y-%m-%d %H:%M} with "
                f"other {spec.name} rows, and a version never changes: run  kellm run --from export  for a new one"
            )


def _same_rows(path: Path, spec: ViewSpec, release: Release) -> bool:
    rows = release.tables[spec.name]
    return bool(live_rows(path, spec).cast(rows.schema).equals(rows))


def _write_partitions(
    repo: Path, release: Release, current: Publication | None, unfinished: Publication | None
) -> dict[str, Partition]:
    """Write the views whose rows changed, all aside first; those that did not change keep their partition.

    Rows of an unfinished publish may be in the online store: the new ones are later than they are, and withdraw their
    ids as well. Where they are the same rows, they are taken over, and the publish is completed.
    """
    now = datetime.now(UTC)
    staging = repo / DATA / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    views: dict[str, Partition] = {}
    moves: dict[Path, Path] = {}
    for spec in VIEWS:
        (repo / DATA / spec.name).mkdir(exist_ok=True)
        known = [
            publication.views[spec.name]
            for publication in (unfinished, current)
            if publication and spec.name in publication.views
        ]
        if known and _same_rows(repo / known[0].file, spec, release):
            views[spec.name] = known[0]
            continue
        rows = release.tables[spec.name]
        withdrawn = _withdrawn([repo / partition.file for partition in known], spec, rows)
        stamps = stamp(release, known[0] if known else None, now)
        aside, target = staging / spec.name, _free_path(repo, spec, release.version)
        pq.write_table(build_partition(rows, withdrawn, spec, release.id_type, stamps), aside, compression="zstd")
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        moves[aside] = target
        views[spec.name] = Partition(
            file=str(target.relative_to(repo)),
            rows=len(rows),
            withdrawn=len(withdrawn),
            event=stamps[0],
            created=stamps[1],
        )
    journal = Publication(version=release.version, published_at=now, dim=release.dim, views=views, finished=False)
    write_atomic(repo / DATA / JOURNAL, journal.model_dump_json(indent=2) + "\n")
    for aside, target in moves.items():
        aside.rename(target)
    staging.rmdir()
    return views


def _undo(repo: Path, views: dict[str, Partition], current: Publication | None, unfinished: Publication | None) -> None:
    """Take back partitions that were never served."""
    kept = {file for publication in (current, unfinished) if publication for file in publication.files.values()}
    for partition in views.values():
        if partition.file not in kept:
            (repo / partition.file).unlink(missing_ok=True)
    if unfinished:
        write_atomic(repo / DATA / JOURNAL, unfinished.model_dump_json(indent=2) + "\n")
    else:
        (repo / DATA / JOURNAL).unlink(missing_ok=True)


def _withdrawn(partitions: list[Path], spec: ViewSpec, rows: pa.Table) -> pa.Array:
    """Ids in any of the partitions that the rows lack."""
    type_ = rows.schema.field(spec.join_key).type
    keys = [pq.read_table(path, columns=[spec.join_key]).column(0).cast(type_) for path in partitions]
    known = pc.unique(pa.chunked_array([chunk for key in keys for chunk in key.chunks], type_))
    return known.filter(pc.invert(pc.is_in(known, value_set=rows.column(spec.join_key))))


def _free_path(repo: Path, spec: ViewSpec, version: str) -> Path:
    """`data/VIEW/VERSION.parquet`; `VERSION.r2` and so on where the version was published before."""
    folder = repo / DATA / spec.name
    path, count = folder / f"{version}.parquet", 1
    while path.exists():
        count += 1
        path = folder / f"{version}.r{count}.parquet"
    return path


def _serve(repo: Path, release: Release, views: dict[str, Partition], lock: IO[str]) -> list[str]:
    """Apply and materialize in a worker process; the local files of registry and online store.

    The worker inherits the lock, so that it stays held should this process be killed.
    """
    request = {
        "repo": str(repo),
        "id_type": release.id_type,
        "views": {name: partition.event.isoformat() for name, partition in views.items()},
    }
    command = [sys.executable, "-P", "-m", "kellm_features.store.feast_worker"]
    answer: dict[str, Any] = {}
    phase = "start"
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        track("materialize", sum(partition.rows for partition in views.values())) as advance,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=[lock.fileno()]
        ) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(request))
        worker.stdin.close()
        for line in worker.stdout:
            answer = json.loads(line)
            phase = answer.get("phase", phase)
            if "view" in answer:
                advance(views[answer["view"]].rows, answer["view"])
        code = worker.wait()
        log.seek(0)
        said = log.read().strip()
    logger.debug("feast in %s:\n%s", repo, said)
    if code == 0 and "stores" in answer:
        return list(answer["stores"])
    cause = answer.get("error") or (said.splitlines() or [f"exit code {code}"])[-1]
    if phase == "materialize":
        raise StoreError(
            f"materializing into {repo} failed ({cause}): the version is written and not served; mend the cause and "
            f"publish again"
        )
    raise _NotAppliedError(f"feast apply failed in {repo} ({cause}): nothing was published; run it there to see all")
