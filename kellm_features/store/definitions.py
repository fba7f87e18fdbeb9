"""A repository's definitions applied to its registry, when they changed, in a process of its own.

Applying costs seconds of CPU and imports Feast; `data/.applied.json` remembers what was applied last.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kellm_features.errors import MissingExtraError, StoreError
from kellm_features.settings import expand_environment
from kellm_features.store.layout import DATA, IdType, write_atomic
from kellm_features.store.repo import FEAST_YAML

logger = logging.getLogger(__name__)
APPLIED = ".applied.json"


class Applied(BaseModel):
    """What `feast apply` was last run on, and what the registry says of our views."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    definitions: str
    """Hash over feature_store.yaml, all modules, and the versions of Feast and of this library."""
    id_types: dict[str, str]
    """View -> type of its entity's ids."""
    ttl_s: dict[str, float]
    """View -> its ttl in seconds, 0 for none."""
    registry: str | None = None
    """The registry's file, relative to the repository; None where it is no local file."""


def apply_definitions(repo: Path, views: list[str], id_type: IdType) -> Applied:
    """Run `feast apply` where the definitions changed since the last time.

    Args:
        repo: the Feast repository.
        views: names of the views that are about to be published; the definitions must hold them.
        id_type: type of the ids that are about to be published.

    Raises:
        StoreError: Feast refused the definitions, a view is missing, or its ids are of another type.
        MissingExtraError: Feast is not installed.
    """
    if importlib.util.find_spec("feast") is None:
        raise MissingExtraError("feast", "feast", "publishing embeddings")
    now = _hash_definitions(repo)
    applied = _read(repo)
    if applied is None or applied.definitions != now or (applied.registry and not (repo / applied.registry).exists()):
        applied = Applied.model_validate({"definitions": now, **_run_worker(repo)})
        write_atomic(repo / DATA / APPLIED, applied.model_dump_json(indent=2) + "\n")
    for view in views:
        seen = applied.id_types.get(view)
        if seen is None:
            known = ", ".join(applied.id_types) or "none"
            raise StoreError(
                f"the repository {repo} defines no feature view {view} (it defines {known}): add "
                f"knowledge_objects(...) to its definitions"
            )
        if seen != id_type:
            raise StoreError(
                f"the repository defines {view} with ids of type {seen} and this run has {id_type} ids: set id_type "
                f"in definitions.py, or set store.repo to another folder"
            )
    return applied


def _read(repo: Path) -> Applied | None:
    try:
        return Applied.model_validate_json((repo / DATA / APPLIED).read_text(encoding="utf-8"))
    except (OSError, ValidationError):  # a hint only: without it the definitions are applied once more
        return None


def _hash_definitions(repo: Path) -> str:
    sha = hashlib.sha256(f"{version('feast')} {version('kellm-features')}".encode())
    sha.update(expand_environment((repo / FEAST_YAML).read_text(encoding="utf-8")).encode())
    for path in sorted(repo.rglob("*.py")):
        if path.relative_to(repo).parts[0] != DATA:
            sha.update(f"{path.relative_to(repo)}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def _run_worker(repo: Path) -> dict[str, object]:
    command = [sys.executable, "-P", "-m", "kellm_features.store.feast_worker", str(repo)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
        log.seek(0)
        said = log.read().strip()
    logger.debug("feast apply in %s:\n%s", repo, said)
    answer: dict[str, object] = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode or "error" in answer:
        cause = answer.get("error") or (said.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise StoreError(f"feast apply failed in {repo} ({cause}): nothing was published; run it there to see all")
    return answer
