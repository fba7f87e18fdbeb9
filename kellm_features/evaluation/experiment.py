"""One training of an evaluation: an arm on a fold, from a seed; its test predictions are kept on disk."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import kellm_features
from kellm_features.artifacts import digest
from kellm_features.evaluation.arms import Arm
from kellm_features.evaluation.baselines import baseline_scores
from kellm_features.evaluation.world import FoldFiles, World, load_encodings, load_fold, load_samplers
from kellm_features.settings import TrainSettings
from kellm_features.store.layout import write_atomic
from kellm_features.training.adapter import embed
from kellm_features.training.data import CtrData
from kellm_features.training.scores import score
from kellm_features.training.stage import fit

PREDICTIONS = "predictions.parquet"
ITEM_EMBEDDINGS = "item_embeddings.npy"
RESULT = "cell.json"
_NAMES = ("key", "label")

LEARNING_RATES = (1e-3, 5e-4, 2e-3, 2.5e-4)
"""Of the backbone, tried in this order: an arm of n trials has the first n. Adapters learn at `ADAPTER_RATE` of it."""
ADAPTER_RATE = 0.6


@dataclass(frozen=True)
class Cell:
    """What is trained, and everything that shapes the result but the data."""

    fold: str
    backbone: str
    arm: Arm
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Outcome:
    """A finished cell."""

    cell: Cell
    folder: Path
    valid_auc: float
    facts: dict[str, Any]
    """The content of `cell.json`."""

    def predictions(self) -> dict[str, npt.NDArray[Any]]:
        """`user` and `item` (catalogue indices), `label` and `score` of the test targets, aligned."""
        table = pq.read_table(self.folder / PREDICTIONS)
        return {name: table.column(name).to_numpy() for name in table.column_names}

    def item_embeddings(self) -> npt.NDArray[np.float32]:
        """(N, E) of the trained adapter, in the order of the catalogue; of an arm with text."""
        found: npt.NDArray[np.float32] = np.load(self.folder / ITEM_EMBEDDINGS)
        return found


def train_settings(world: World, cell: Cell) -> TrainSettings:
    """[train] of the run, with the evaluation's budget and what makes the arm."""
    evaluate = world.settings.evaluate
    changes: dict[str, Any] = {
        "backbone": cell.backbone,
        "epochs": evaluate.epochs,
        "patience": evaluate.patience or evaluate.epochs,
        "batch_size": evaluate.batch_size,
        "hidden": evaluate.hidden,
        "learning_rate": cell.learning_rate,
        "adapter_learning_rate": ADAPTER_RATE * cell.learning_rate,
        "ranks": 1,
        "workers": 0,
        "tensorboard": None,
        "keep_checkpoints": None,
        "profile": True,  # the backbone gets whatever sides an arm has
        "affinity": "none",
        **dict(cell.arm.train),
    }
    return TrainSettings.model_validate(world.settings.train.model_dump() | changes)


def cell_folder(world: World, cell: Cell) -> Path:
    """Where a cell's result stands: named by a hash of everything that shapes it."""
    files = world.folds[cell.fold]
    # What an arm leaves alone does not name it: a field that is added later changes no name.
    plain = asdict(Arm("", ""))
    arm = {name: value for name, value in asdict(cell.arm).items() if name not in _NAMES and value != plain[name]}
    texts = [world.item_vectors[name] for name in cell.arm.text.split("+")] if cell.arm.text else []
    trained = _told(train_settings(world, cell), cell.arm) if cell.backbone else ""
    parts = {
        "arm": json.dumps(arm, sort_keys=True),
        "train": trained,
        "fold": f"{files.name} {files.split_hash} {files.content_hash} {files.select_on}",
        "history": world.settings.history.model_dump_json(),
        "swing": world.settings.swing.model_dump_json(),
        "texts": " ".join([*texts, files.user_vectors] if cell.arm.profile else texts),
        "seed": f"{cell.seed} {world.settings.run.seed}",
        "version": f"{kellm_features.__version__} torch {torch.__version__}",
    }
    return world.root / "cells" / digest(parts)[:24]


def _told(settings: TrainSettings, arm: Arm) -> str:
    """Settings of a cell that shape its result, as JSON."""
    silent = {"device", "compile", "profile"}  # the arm says the third
    if settings.sides == "none":
        silent |= {"schedule", "warmup_steps", "temperature", "weight", "reduction", "top_k", "positives"}
    if arm.text is None:
        silent |= {"adapter", "shared_experts", "specific_experts", "hidden", "dim", "activation"}
        silent |= {"adapter_learning_rate", "affinity"}
    return settings.model_dump_json(exclude=silent)


def finished(world: World, cell: Cell) -> Outcome | None:
    """The cell's outcome if it was trained before."""
    folder = cell_folder(world, cell)
    if not (folder / RESULT).exists():
        return None
    facts = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return Outcome(cell, folder, facts["valid"]["auc"], facts)


def run_cell(world: World, cell: Cell) -> Outcome:
    """Train, predict the test targets and keep both; a cell that was finished before is read."""
    known = finished(world, cell)
    if known is not None:
        return known
    started, cpu = time.monotonic(), time.process_time()
    files = world.folds[cell.fold]
    data = load_fold(world, files, cell.arm.seen_history)
    folder = cell_folder(world, cell)
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any]
    if cell.arm.baseline is not None:
        scores = {part: baseline_scores(cell.arm.baseline, data, part) for part in ("valid", "test")}
        facts = {"epoch": 0, "history": [], "valid": score(data, "valid", scores["valid"])}
        probabilities = scores["test"]
    else:
        probabilities, facts, embeddings = _train(world, files, cell, data)
        if embeddings is not None:
            temporary = folder / f".{ITEM_EMBEDDINGS}"
            with temporary.open("wb") as handle:
                np.save(handle, embeddings)
            temporary.replace(folder / ITEM_EMBEDDINGS)
    examples = data.examples["test"]
    table = pa.table(
        {
            "user": examples.user.numpy().astype(np.int32),
            "item": examples.item.numpy().astype(np.int32),
            "label": examples.label.numpy() > 0,
            "score": probabilities.astype(np.float64),
        }
    )
    temporary = folder / f".{PREDICTIONS}"
    pq.write_table(table, temporary)
    temporary.replace(folder / PREDICTIONS)
    facts |= {
        "arm": cell.arm.key,
        "backbone": cell.backbone,
        "fold": cell.fold,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "split_hash": files.split_hash,
        "test": score(data, "test", probabilities),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }
    write_atomic(folder / RESULT, json.dumps(facts, indent=1) + "\n")  # last: a cell without it is not finished
    return Outcome(cell, folder, facts["valid"]["auc"], facts)


def _train(
    world: World, files: FoldFiles, cell: Cell, data: CtrData
) -> tuple[npt.NDArray[np.float64], dict[str, Any], npt.NDArray[np.float32] | None]:
    settings = train_settings(world, cell)
    encodings: dict[str, Tensor] = load_encodings(world, files, cell.arm, cell.seed)
    samplers = load_samplers(
        files,
        cell.arm,
        data,
        top_k=settings.top_k,
        normalized=settings.positives == "normalized",
        seed=cell.seed,
    )
    trainer = fit(data, encodings, samplers, settings, seed=cell.seed, checkpoint=None)
    facts = {
        "epoch": trainer.history.best_epoch,
        "history": trainer.history.epochs,
        "valid": trainer.evaluate("valid"),
    }
    probabilities = trainer.predict("test")
    embeddings = None
    if "item" in encodings:
        embeddings = embed(trainer.model.adapters["item"].cpu().eval(), encodings["item"]).numpy()
    return probabilities, facts, embeddings
