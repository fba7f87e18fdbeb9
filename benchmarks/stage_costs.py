"""Append the cost of each stage of a finished run to benchmarks/data/stage_costs.csv.

python benchmarks/stage_costs.py RUN --name ml-100k
"""

import argparse
import csv
import platform
import subprocess
from pathlib import Path

import psutil

from kellm_features.artifacts import load_artifact
from kellm_features.stages import STAGE_NAMES

OUT = Path(__file__).parent / "data" / "stage_costs.csv"
FIELDS = "date dataset stage rows_in rows_out seconds cpu_seconds peak_mib cores memory_gib python commit".split()


def main() -> None:
    """Read the manifests, print and append one row a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="what was run, e.g. ml-100k")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    new = not OUT.exists()
    with OUT.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS)
        if new:
            writer.writeheader()
        for stage in STAGE_NAMES:
            artifact = load_artifact(options.run, stage)
            if artifact is None:
                continue
            m = artifact.manifest
            row = {
                "date": f"{m.created:%Y-%m-%d}",
                "dataset": options.name,
                "stage": stage,
                "rows_in": m.rows_in,
                "rows_out": m.rows_out,
                "seconds": m.seconds,
                "cpu_seconds": m.cpu_seconds,
                "peak_mib": m.peak_mib,
                "cores": psutil.cpu_count(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30),
                "python": platform.python_version(),
                "commit": commit.strip(),
            }
            writer.writerow(row)
            print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
