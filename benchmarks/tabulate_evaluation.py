"""Write the tables of docs/evaluation.md anew from the rows under benchmarks/data.

python benchmarks/tabulate_evaluation.py

Where a table stands: page_tables.py. NAME is one of `TABLES`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a test that runs the script by its path

import page_tables
from page_tables import table

from kellm_features.evaluation.grid import NOTHING, number
from kellm_features.evaluation.results import ALL, COLD, WARM, ResultRow, read_results

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evaluation.md"
BLOCK = page_tables.BLOCK
ID = "id-30"
SLICES = ("items 1-9", "items 10-99", "items 100-999", "items 1000+")
RECALLS = ("recall@20", "recall@20 normalized")


class Rows:
    """Results by what they are of."""

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        self.rows = list(rows)

    def arms(self, suite: str, backbone: str) -> dict[str, str]:
        """Key -> label of the arms, in order."""
        return {row.arm: row.label for row in self.rows if (row.suite, row.backbone) == (suite, backbone)}

    def find(
        self, suite: str, backbone: str, arm: str, metric: str = "auc", slice_: str = ALL, reference: str | None = None
    ) -> ResultRow | None:
        """One row; None where nothing was measured. Without a reference, the first of the arm."""
        key = (suite, backbone, arm, metric, slice_)
        return next(
            (
                row
                for row in self.rows
                if (row.suite, row.backbone, row.arm, row.metric, row.slice) == key
                and (reference is None or row.reference == reference)
            ),
            None,
        )


def value(row: ResultRow | None) -> str:
    """`0.7412`."""
    return NOTHING if row is None or row.value is None else number(row.value, "metric")


def spanned(row: ResultRow | None) -> str:
    """`0.445 [0.429, 0.460]`."""
    if row is None or row.value is None:
        return NOTHING
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def difference(row: ResultRow | None) -> str:
    """`+0.0076 [+0.0050, +0.0101] *`, starred where Holm's p is below 0.05."""
    if row is None or row.delta is None or row.delta_low is None or row.delta_high is None:
        return NOTHING
    delta, low, high = (number(figure, "delta") for figure in (row.delta, row.delta_low, row.delta_high))
    return f"{delta} [{low}, {high}]{' *' if row.p_holm is not None and row.p_holm < 0.05 else ''}"


def ladder(rows: Rows, suite: str, backbone: str) -> str:
    """Arms of one suite and backbone: metrics, and what AUC they gain over ID, over all and within users."""
    lines = []
    for arm, label in rows.arms(suite, backbone).items():
        metrics = [value(rows.find(suite, backbone, arm, metric)) for metric in ("auc", "log_loss", "gauc", "ece")]
        gains = [difference(rows.find(suite, backbone, arm, metric, reference=ID)) for metric in ("auc", "gauc")]
        lines.append([label, *metrics, *gains])
    return table(["arm", "AUC", "LogLoss", "GAUC", "ECE", "ΔAUC", "ΔGAUC"], lines)


def cold(rows: Rows, suite: str, backbone: str) -> str:
    """Arms on all, within users, on warm and on cold items."""
    lines = []
    for arm, label in rows.arms(suite, backbone).items():
        deltas = [
            difference(rows.find(suite, backbone, arm, metric, part, ID))
            for metric, part in (("auc", ALL), ("gauc", ALL), ("auc", WARM), ("auc", COLD))
        ]
        values = [value(rows.find(suite, backbone, arm, "auc", part)) for part in (ALL, COLD)]
        lines.append([label, values[0], *deltas[:3], values[1], deltas[3]])
    return table(["arm", "AUC", "Δ all", "ΔGAUC", "Δ warm", "cold AUC", "Δ cold"], lines)


def slices(rows: Rows, suite: str, backbone: str, *arms: str) -> str:
    """What arms gain over ID by how often an item stands in train rows."""
    labels = rows.arms(suite, backbone)
    known = [part for part in (COLD, *SLICES) if rows.find(suite, backbone, ID, "auc", part)]
    lines = [
        [labels[arm], *(difference(rows.find(suite, backbone, arm, "auc", part, ID)) for part in known)] for arm in arms
    ]
    return table(["arm", *known], lines)


def forms(rows: Rows, backbone: str) -> str:
    """Forms of the contrastive term, each against the same model without it."""
    lines = []
    for arm, label in rows.arms("contrastive", backbone).items():
        found = rows.find("contrastive", backbone, arm)
        reference = found.reference if found else ""
        parts = [
            difference(rows.find("contrastive", backbone, arm, metric, part, reference))
            for metric, part in (("auc", ALL), ("gauc", ALL), ("auc", COLD), ("auc", SLICES[-1]))
        ]
        recalls = [
            f"{value(row)} {difference(row)}".removesuffix(f" {NOTHING}")
            for row in (rows.find("contrastive", backbone, arm, metric, COLD, reference) for metric in RECALLS)
        ]
        against = {"none": "none", "none-profile": "profile, none"}.get(reference, NOTHING)
        lines.append([label, against, *parts, *recalls])
    head = ["form", "against", "ΔAUC", "ΔGAUC", "Δ cold", f"Δ {SLICES[-1]}", "recall@20", "normalised"]
    return table(head, lines, texts=2)


def retrieval(rows: Rows, *texts: str) -> str:
    """Scorers of neighbours: popularity, controls, the best of each text, and all scorers of some texts."""
    lines = []
    for arm, label in rows.arms("retrieval", "").items():
        text, _, scorer = arm.partition(" ")
        if scorer and text not in texts and label.partition(":")[0] != "control":
            continue
        raw, tamed = (rows.find("retrieval", "", arm, metric, COLD) for metric in RECALLS)
        gains = [value(rows.find("retrieval", "", arm, metric, COLD)) for metric in ("ndcg@20", "ndcg@20 normalized")]
        lines.append([label, spanned(raw), gains[0], spanned(tamed), gains[1]])
    return table(["scorer", "recall@20", "NDCG@20", "normalised recall@20", "NDCG@20"], lines)


TABLES: dict[str, Callable[..., str]] = {
    "ladder": ladder,
    "cold": cold,
    "slices": slices,
    "forms": forms,
    "retrieval": retrieval,
}


def written(page: str) -> str:
    """The page with its tables made from the rows."""
    return page_tables.rewritten(page, TABLES, lambda path: Rows(read_results(path)))


def main() -> None:
    """Rewrite the page in place."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
