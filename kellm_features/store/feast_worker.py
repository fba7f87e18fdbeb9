"""Feast's side of a publish, in a process of its own: apply the definitions, check them, materialize.

`feast apply` changes the working directory and imports every module of the repository under its bare name, which no
other code may share. The pipeline's process also stays free of Feast and duckdb this way.

Run as `python -m kellm_features.store.feast_worker`: the request is one JSON object on stdin, the answers are JSON
lines on stdout, and all that Feast prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from kellm_features.store.layout import VIEWS


class Request(TypedDict):
    """What to do: apply `repo`, whose ids must be `id_type`, then serve each view's rows of one instant."""

    repo: str
    id_type: str
    views: dict[str, str]
    """View name -> event_timestamp of its partition, ISO 8601."""


def main() -> None:
    """Answer `{"phase": ...}`, `{"view": ...}` as each is done, then `{"stores": [...]}` or `{"error": ...}`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    request: Request = json.load(sys.stdin)
    repo = Path(request["repo"])
    try:
        say(phase="apply")
        _apply(repo)
        _check(repo, request["id_type"])
        say(phase="materialize")
        from feast import FeatureStore

        store = FeatureStore(repo_path=str(repo))
        for view, event in request["views"].items():
            instant = datetime.fromisoformat(event)
            store.materialize(instant, instant, feature_views=[view])
            say(view=view)
        paths = (store.config.registry.path, getattr(store.config.online_store, "path", None))
        say(stores=[str(path) for path in paths if path and (repo / path).is_file()])
    except (Exception, SystemExit) as error:  # Feast exits on an invalid project; the parent tells all of them
        say(error=" ".join(f"{type(error).__name__}: {error}".split()))
        raise


def _apply(repo: Path) -> None:
    """What `feast apply` does, in the order in which it does it."""
    from feast.repo_config import load_repo_config
    from feast.repo_operations import apply_total, cli_check_repo
    from feast.utils import get_default_yaml_file_path

    yaml = get_default_yaml_file_path(repo)
    cli_check_repo(repo, yaml)
    apply_total(load_repo_config(repo, yaml), repo, skip_source_validation=False)


def _check(repo: Path, id_type: str) -> None:
    """Raise where the definitions lack what is published, or key it by ids of another type."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(repo))
    for spec in VIEWS:
        store.get_feature_view(spec.name)
        seen = store.get_entity(spec.entity).value_type.name.lower()
        if seen != id_type:
            raise TypeError(
                f"the repository defines {spec.entity} ids of type {seen} and this run has {id_type} ids: set id_type "
                f"in definitions.py, or set store.repo to another folder"
            )


if __name__ == "__main__":
    main()
