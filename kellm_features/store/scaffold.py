"""Writing a fresh Feast repository from the library's template."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from kellm_features.errors import StoreError
from kellm_features.store.layout import IdType

TEMPLATES = {
    "feature_store.yaml": "feature_store.yaml",
    "definitions.py": "definitions.py.txt",
    "README.md": "README.md",
    ".gitignore": "gitignore",
}
"""File of a repository -> its template. A template with another ending is neither imported nor obeyed as it lies."""


def write_feature_repo(folder: Path, *, project: str = "kellm", id_type: IdType = "int64") -> list[Path]:
    """Write feature_store.yaml, definitions.py, README.md and .gitignore.

    Args:
        folder: created where it is missing.
        project: Feast's name for the repository: letters, digits and '_', beginning with a letter.
        id_type: type of item and user ids, "int64" or "string".

    Returns:
        The files written.

    Raises:
        StoreError: the project's name or the id type is not accepted, one of the files exists already, or the folder
            cannot be written. Nothing is written then.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", project):
        raise StoreError(f"project is {project!r}; accepted: letters, digits and '_', beginning with a letter")
    if id_type not in ("int64", "string"):
        raise StoreError(f"id_type is {id_type!r}; accepted: 'int64' or 'string'")
    there = [name for name in TEMPLATES if (folder / name).exists()]
    if there:
        raise StoreError(f"{folder} holds {', '.join(there)} already and is not overwritten: choose another folder")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, template in TEMPLATES.items():
            text = (files("kellm_features.store") / "templates" / template).read_text(encoding="utf-8")
            (folder / name).write_text(Template(text).substitute(project=project, id_type=id_type), encoding="utf-8")
            written.append(folder / name)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}") from error
    return written
