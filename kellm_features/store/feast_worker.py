"""`feast apply` in a process of its own, and what the registry then says of our views.

`feast apply` changes the working directory and imports every module of the repository under its bare name, which no
other code may share. The publishing process also stays free of Feast and pandas this way.

Run as `python -m kellm_features.store.feast_worker REPO`: the answer is one JSON object on stdout, and all that Feast
prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from kellm_features.store.layout import VIEWS


def main() -> None:
    """Answer the fields of `definitions.Applied`, or `{"error": ...}`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    repo = Path(sys.argv[1])
    try:
        _apply(repo)
        answer = _look_up(repo)
    except (Exception, SystemExit) as error:  # Feast exits on an invalid project; the parent tells all of them
        answers.write(json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())}))
        answers.flush()
        raise
    answers.write(json.dumps(answer))
    answers.flush()


def _apply(repo: Path) -> None:
    """What `feast apply` does, in the order in which it does it."""
    from feast.repo_config import load_repo_config
    from feast.repo_operations import apply_total, cli_check_repo
    from feast.utils import get_default_yaml_file_path

    yaml = get_default_yaml_file_path(repo)
    cli_check_repo(repo, yaml)
    apply_total(load_repo_config(repo, yaml), repo, skip_source_validation=True)


def _look_up(repo: Path) -> dict[str, Any]:
    """Id types and ttls of those of our views that the definitions hold."""
    from feast import FeatureStore
    from feast.errors import FeastObjectNotFoundException

    store = FeatureStore(repo_path=str(repo))
    id_types, ttl_s = {}, {}
    for spec in VIEWS:
        try:
            view = store.get_feature_view(spec.name)
        except FeastObjectNotFoundException:
            continue
        id_types[spec.name] = store.get_entity(spec.entity).value_type.name.lower()
        ttl_s[spec.name] = view.ttl.total_seconds() if view.ttl else 0.0
    path = store.config.registry.path
    return {"id_types": id_types, "ttl_s": ttl_s, "registry": path if (repo / path).is_file() else None}


if __name__ == "__main__":
    main()
