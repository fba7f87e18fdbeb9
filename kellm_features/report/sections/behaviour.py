"""What behaviour taught: SWING pairs and their hubs, and the training's curves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kellm_features.errors import ArtifactError
from kellm_features.report.charts import Bar, LineChart, bars, line_chart
from kellm_features.report.view import RunView

HUBS = 8
PARTS = {"valid": "validation", "test": "test"}


@dataclass(frozen=True)
class SwingSide:
    """SWING pairs of items or of users, and how unevenly the neighbours are spread."""

    name: str
    pairs: int
    anchors: int
    """Ids that have at least one neighbour."""
    population: int
    """Ids in all."""
    most: int
    """Largest number of lists of the first k that one id stands in."""
    top_percent: float
    """Share of all places in these lists that the most frequent 1 % of ids take."""
    never: int
    """Ids that stand in no list."""
    skewness: float
    """Of the number of lists an id stands in: Radovanović et al.'s hubness."""


@dataclass(frozen=True)
class Swing:
    """Both sides and the items that stand in most lists."""

    k: int
    sides: tuple[SwingSide, ...]
    hubs: tuple[Bar, ...]


@dataclass(frozen=True)
class Training:
    """Curves by step and by epoch, and the kept model's figures."""

    charts: tuple[LineChart, ...]
    epochs: int
    best_epoch: int
    parts: tuple[tuple[str, dict[str, float]], ...]
    """(part of the split, metric -> value)."""


def swing(view: RunView) -> Swing:
    """Counts of pairs, and hubness of the neighbour lists that training draws from."""
    k = view.settings.train.top_k
    users = pq.read_metadata(view.file("ingest", "users.parquet")).num_rows
    sides, hubs = [], []
    for side, population in (("item", len(view.items)), ("user", users)):
        table = view.table("swing", f"{side}_pairs.parquet", ["anchor_id", "neighbor_id", "rank"])
        listed = table.filter(pc.field("rank") <= k)["neighbor_id"].value_counts()
        counts = pc.struct_field(listed, "counts").to_numpy(zero_copy_only=False)
        sides.append(
            SwingSide(
                f"{side}s",
                len(table),
                pc.count_distinct(table["anchor_id"]).as_py(),
                population,
                *hubness(counts, population),
            )
        )
        if side == "item":
            rows = zip(pc.struct_field(listed, "values").to_pylist(), counts.tolist(), strict=True)
            best = sorted(rows, key=lambda row: (-row[1], str(row[0])))[:HUBS]
            hubs = [(view.label(key), count, "") for key, count in best]
    return Swing(k, tuple(sides), tuple(bars(hubs, len(view.items))))


def hubness(counts: np.ndarray, population: int) -> tuple[int, float, int, float]:
    """How unevenly places in neighbour lists are spread.

    Args:
        counts: (M,) lists that each listed id stands in, M <= population.
        population: ids in all; the others stand in none.

    Returns:
        The largest count, the share of all places that the most frequent 1 % of ids (at least one) take, the number
        of ids in no list, and the skewness E[(N - μ)³]/σ³ of the counts (0 where they are all equal).
    """
    if not len(counts):
        return 0, 0.0, population, 0.0
    padded = np.zeros(max(population, len(counts)))
    padded[: len(counts)] = np.sort(counts)[::-1]
    top = padded[: max(1, round(len(padded) / 100))].sum() / padded.sum()
    deviation = padded - padded.mean()
    spread = float(padded.std())
    skewness = float((deviation**3).mean() / spread**3) if spread else 0.0
    return int(padded[0]), float(top), int((padded == 0).sum()), skewness


def training(view: RunView) -> Training:
    """Losses by step, validation AUC by epoch, and the metrics of the kept model."""
    curves = _json(view.file("train", "curves.json"))
    metrics = _json(view.file("train", "metrics.json"))
    steps, epochs = curves["steps"], curves["epochs"]
    best = int(curves["best_epoch"])

    def series(rows: list[dict[str, float]], x: str, names: dict[str, str]) -> dict[str, Any]:
        return {
            shown: ([row[x] for row in rows], [row[key] for row in rows])
            for key, shown in names.items()
            if rows and key in rows[0]
        }

    charts = [
        line_chart("Click loss (nats)", series(steps, "step", {"ctr": "training"}), x_label="step"),
        line_chart("Contrastive losses", series(steps, "step", {"ii": "items", "uu": "users"}), x_label="step"),
        line_chart(
            "Validation AUC",
            series(epochs, "epoch", {"valid_auc": "validation"}),
            x_label="epoch",
            points=True,
            mark=(best, "kept") if best else None,
        ),
    ]
    parts = tuple((PARTS[name], metrics[name]) for name in PARTS if name in metrics)
    return Training(tuple(chart for chart in charts if chart), len(epochs), best, parts)


def test_metrics(view: RunView) -> dict[str, float]:
    """AUC, LogLoss and GAUC on the test part."""
    metrics: dict[str, float] = _json(view.file("train", "metrics.json"))["test"]
    return metrics


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable JSON: run  kellm run --from train") from error
