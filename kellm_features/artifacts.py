"""Stage artefacts on disk: written aside, switched in whole, manifest last.

A finished stage is a folder `RUN/STAGE/` with its tables and `manifest.json`. It is written under
`RUN/.STAGE.new/` and moved into place by two renames, which `recover` completes or undoes after a kill, so that a
reader sees the old artefact or the new one and nothing between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kellm_features.errors import ArtifactError, DataError

MANIFEST = "manifest.json"
# part-00000-5b2c…-c000.zstd.parquet: the task's number says which rows, the UUID which attempt
_SPARK_PART = re.compile(r"(part-\d+)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class FileStamp(BaseModel):
    """An external input file as it was seen: a changed size or mtime makes it be hashed again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    mtime_ns: int
    sha256: str


class Manifest(BaseModel):
    """What a stage did and from what: the artefact's own account of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    run_id: str
    version: str
    created: datetime
    config_hash: str
    output_hash: str
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    """Upstream stage -> its output hash."""
    files: dict[str, FileStamp] = {}
    """External input -> stamp."""
    split_hash: str | None = None
    outputs: dict[str, str] = {}
    """File below the stage's folder -> sha256."""
    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = {}
    """Reason -> rows."""
    models: dict[str, str] = {}
    """Model id -> revision or file hash."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0
    notes: dict[str, Any] = {}
    """Figures for the report: coverage, metrics, hubness."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and its manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of one output, e.g. `pairs.file("item_pairs.parquet")`.

        Raises:
            ArtifactError: the stage wrote no such file, or it is gone.
        """
        target = self.path / name
        if not target.exists():
            raise ArtifactError(
                f"{target} is missing although the stage '{self.manifest.stage}' finished: "
                f"run  kellm run --from {self.manifest.stage}"
            )
        return target


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        DataError: no such file, or unreadable.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path in the settings") from error


def stamp_file(path: Path, known: FileStamp | None = None) -> FileStamp:
    """Stamp an external input; its hash is taken from `known` while size and mtime are unchanged."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path in the settings") from error
    if known and (known.path, known.size, known.mtime_ns) == (str(path), stat.st_size, stat.st_mtime_ns):
        return known
    return FileStamp(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256_file(path))


def hash_outputs(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a folder, the manifest, Spark's markers and checksums excepted."""
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {MANIFEST, "_SUCCESS"} and not path.name.endswith(".crc")
    }


def digest(outputs: Mapping[str, str]) -> str:
    """One SHA-256 over `hash_outputs`; the random ids in Spark's part names do not count, only the bytes do."""
    named = {_SPARK_PART.sub(r"\1", name): sha256 for name, sha256 in outputs.items()}
    return hashlib.sha256(json.dumps(dict(sorted(named.items()))).encode()).hexdigest()


def load_artifact(run_dir: Path, stage: str) -> Artifact | None:
    """The finished artefact of a stage, or None where there is none.

    Raises:
        ArtifactError: a manifest is there and cannot be read.
    """
    recover(run_dir, stage)
    manifest_path = run_dir / stage / MANIFEST
    if not manifest_path.exists():
        return None
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_text(encoding="utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{manifest_path} is not a manifest of this version of kellm: delete {manifest_path.parent} and run "
            f"the stage again"
        ) from error
    return Artifact(run_dir / stage, manifest)


def require_artifact(run_dir: Path, stage: str, needed_by: str) -> Artifact:
    """The finished artefact of a stage.

    Raises:
        ArtifactError: the stage has not run in this run directory.
    """
    artifact = load_artifact(run_dir, stage)
    if artifact is None:
        raise ArtifactError(
            f"'{needed_by}' needs the output of '{stage}', and {run_dir / stage} holds none: "
            f"run  kellm run --out {run_dir} --until {needed_by}"
        )
    return artifact


@contextmanager
def replace_stage(run_dir: Path, stage: str) -> Iterator[Path]:
    """Yield an empty folder to write into; on success switch it in as the stage's artefact, else remove it."""
    recover(run_dir, stage)
    new = run_dir / f".{stage}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if not (new / MANIFEST).exists():
        shutil.rmtree(new, ignore_errors=True)
        raise ArtifactError(f"stage '{stage}' wrote no manifest: nothing was switched in")
    old = run_dir / f".{stage}.old"
    if (run_dir / stage).exists():
        (run_dir / stage).rename(old)
    new.rename(run_dir / stage)
    shutil.rmtree(old, ignore_errors=True)


def recover(run_dir: Path, stage: str) -> None:
    """Complete or undo a switch that was killed between its two renames; drop what never got that far."""
    final, new, old = (run_dir / name for name in (stage, f".{stage}.new", f".{stage}.old"))
    if not final.exists() and old.exists():
        (new if (new / MANIFEST).exists() else old).rename(final)
    if final.exists() and old.exists():
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` through a temporary name, so that it is whole or absent."""
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(folder / MANIFEST)


def new_run_id() -> str:
    """A sortable id: UTC time to the second and four random bytes."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}"
