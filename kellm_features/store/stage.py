"""The stage "publish": a run's embeddings become a version, which is promoted where the gates let it pass."""

from __future__ import annotations

from kellm_features.artifacts import Artifact
from kellm_features.errors import KellmError
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport
from kellm_features.store import rollout
from kellm_features.store.backends import open_backend
from kellm_features.store.catalog import Catalog
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.repo import read_online_config


def run(ctx: StageContext) -> StageReport:
    """Publish the run's embeddings, descriptions, links and neighbours into `settings.store.repo`.

    Returns:
        rows_in and rows_out count items and users with an embedding; the notes hold version, repository, rows and
        partitions per view, whether the version was promoted, and what the gates found.

    Raises:
        StoreError: see `rollout.publish` and, where `store.promote` is on, `rollout.promote`.
        MissingExtraError: Feast or the store's client is not installed.
    """
    settings = ctx.settings.store
    repo = settings.repo.resolve()
    inputs = {view: ctx.input(*source) for view, source in rollout.INPUTS.items()}
    version = rollout.publish(repo, inputs, version=settings.version, split_hash=ctx.split_hash)
    if settings.promote:
        version = rollout.promote(repo, version.name, settings=settings.verify)
    embeddings = sum(version.views[spec.name].rows for spec in (ITEM_EMBEDDING, USER_EMBEDDING))
    return StageReport(
        rows_in=embeddings,
        rows_out=embeddings,
        notes={
            "version": version.name,
            "repo": str(repo),
            "promoted": settings.promote,
            "gates": version.verification,
            "rows": {name: view.rows for name, view in version.views.items()},
            "partitions": {name: view.file for name, view in version.views.items()},
        },
    )


def why_stale(settings: Settings, artifact: Artifact) -> str | None:
    """Why the store no longer holds what this artefact published, or None where it does.

    A version that was rolled back from is not promoted again by the next run: that was somebody's decision.
    """
    notes = artifact.manifest.notes
    repo = settings.store.repo.resolve()
    name = notes.get("version")
    if settings.store.version not in (None, name):
        return f"published as {name}, wanted as {settings.store.version}"
    try:
        catalog = _catalog(settings)
    except KellmError as error:
        return str(error)
    version = catalog.find(str(name))
    if version is None or version.state != "published":
        return f"the online store of {repo} no longer holds version {name}"
    if {view: held.file for view, held in version.views.items()} != notes.get("partitions"):
        return f"version {name} was published into {repo} since, from another run"
    gone = [held.file for held in version.views.values() if not (repo / held.file).exists()]
    if gone:
        return f"{repo / gone[0]} is gone"
    if settings.store.promote and not notes.get("promoted"):
        return f"version {name} is published and was not promoted"
    return None


def _catalog(settings: Settings) -> Catalog:
    backend = open_backend(read_online_config(settings.store.repo))
    try:
        return backend.catalog()
    finally:
        backend.close()
