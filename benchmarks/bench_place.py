"""Where a benchmark runs (the machine, the versions, the commit), peers that came as wheels, and the file of rows."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]


def add_wheels(folder: Path) -> None:
    """Put every wheel of `folder` on the path, unpacked: Triton reads the source files of kernels."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels {folder}: no *.whl there")
    target = tempfile.mkdtemp(prefix="bench_wheels_")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.append(target)


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with the number of threads that PyTorch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} thread(s)"


def processor() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def triton_version() -> str:
    """Its version, empty where there is none."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def git_commit() -> str:
    """The checkout's commit, with a + where tracked files differ from it; `unknown` without git."""
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def provenance(*packages: str, commit: str | None = None) -> dict[str, Any]:
    """Columns that tell where and when a row was measured: machine, versions of packages, commit and date.

    Args:
        packages: distributions; their columns are the names with _ for -.
        commit: what is measured, where git cannot tell.
    """
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in packages},
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise SystemExit where a file of rows has other columns than those that are to be written, or another order."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="") as file:
        seen = next(csv.reader(file), [])
    if seen != list(columns):
        missing, other = sorted(set(columns) - set(seen)), sorted(set(seen) - set(columns))
        raise SystemExit(
            f"{path}: its columns are not those of this benchmark (missing: {', '.join(missing) or 'none'}; not known "
            f"here: {', '.join(other) or 'none'}; the order counts too). Write to another file, or give its rows the "
            f"columns {','.join(columns)}"
        )


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV, with a header where it is new; what a row has beside the columns is left out.

    Raises:
        SystemExit: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    require_columns(path, columns)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def one_line(error: Exception) -> str:
    """The error's kind and the beginning of its first line."""
    text = str(error).strip().split("\n")[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
