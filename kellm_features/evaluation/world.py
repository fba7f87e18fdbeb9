"""What an evaluation works on: the inputs of all arms and folds, prepared on disk, and how a fold is loaded."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kellm_features.errors import ArtifactError
from kellm_features.evaluation.arms import Arm
from kellm_features.evaluation.protocol import Fold
from kellm_features.evaluation.swing import swing_lists
from kellm_features.schemas import INTERACTIONS, ITEMS, USERS, read_table, write_table
from kellm_features.settings import Settings
from kellm_features.store.layout import write_atomic
from kellm_features.training.data import CtrData, build_ctr_data
from kellm_features.training.pairs import PositiveSampler

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FoldFiles:
    """A prepared fold: its interactions, the SWING pairs of its train rows, and its users' vectors."""

    folder: Path
    name: str
    split: Literal["user", "time"]
    select_on: Literal["valid", "test"]
    split_hash: str
    content_hash: str
    """Of what decides no split and shapes everything: labels, catalogue and user table."""
    user_vectors: str
    """File of (U, D) encodings of the profiles, in the order of the user table."""

    @property
    def family(self) -> str:
        """`B` of B0, `cold` of cold1."""
        return self.name.rstrip("0123456789")


@dataclass(frozen=True)
class World:
    """Everything that a training needs, by path: small enough to be sent to another process."""

    root: Path
    run_dir: Path
    """The run whose stages ingest, wiki and link the evaluation rests on."""
    settings: Settings
    item_vectors: Mapping[str, str]
    """Text variant -> file of (N, D) encodings, in the order of the catalogue."""
    folds: Mapping[str, FoldFiles]
    coverage: Mapping[str, float]
    """Text variant -> share of the items that have more of it than title and genres."""

    def items(self) -> Path:
        """`ITEMS` of the run."""
        return self.run_dir / "ingest" / "items.parquet"

    def users(self) -> Path:
        """`USERS` of the run."""
        return self.run_dir / "ingest" / "users.parquet"


def content_hash(fold: Fold, tables: Iterable[Path]) -> str:
    """Of a fold's labels and of tables: a split's hash knows neither."""
    seen = hashlib.sha256(np.packbits(fold.interactions.column("liked").to_numpy()).tobytes())
    for path in tables:
        seen.update(path.read_bytes())
    return seen.hexdigest()


def prepare_fold(
    root: Path, fold: Fold, settings: Settings, items: Sequence[object], users: Sequence[object], content: str
) -> Path:
    """Write a fold's interactions and SWING pairs, once; a folder of the same split is left as it is.

    Pairs of both sides come from likes in train rows alone, by the preset of [swing] and by KELLMRec's.

    Returns:
        The fold's folder; `fold.json` is written last.
    """
    folder = root / "folds" / fold.name
    told = folder / "fold.json"
    facts = {
        "split_hash": fold.split_hash,
        "content_hash": content,
        "swing": settings.hash_of(("swing",)),
        "pairs": ["swing", "kellmrec"],
    }
    if told.exists() and json.loads(told.read_text(encoding="utf-8")).items() >= facts.items():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    told.unlink(missing_ok=True)
    write_table(fold.interactions, folder / "interactions.parquet", INTERACTIONS)
    table = fold.interactions.select(["user_id", "item_id", "liked", "split"]).to_pandas()
    likes = table[table["split"].eq("train") & table["liked"]]
    user = np.searchsorted(np.asarray(users), likes["user_id"].to_numpy())
    item = np.searchsorted(np.asarray(items), likes["item_id"].to_numpy())
    sides = {"item": (user, item, len(items)), "user": (item, user, len(users))}
    for (kind, preset), (side, (witnesses, anchors, count)) in itertools.product(
        {"swing": settings.swing.preset, "kellmrec": "kellmrec"}.items(), sides.items()
    ):
        anchor, neighbor, score = swing_lists(witnesses, anchors, count, preset=preset, top_k=settings.swing.top_k)
        path = pairs_file(folder, side, kind)
        temporary = path.with_name(f".{path.name}")
        np.savez(temporary, split_hash=np.array(fold.split_hash), anchor=anchor, neighbor=neighbor, score=score)
        temporary.replace(path)
    cold = {"cold_valid": sorted(fold.cold_valid), "cold_test": sorted(fold.cold_test)}
    write_atomic(told, json.dumps(facts | cold) + "\n")
    return folder


def pairs_file(folder: Path, side: str, kind: Literal["swing", "kellmrec"]) -> Path:
    """Where a fold keeps the pairs of a side by one of two presets, that of [swing] or KELLMRec's."""
    return folder / f"{side}_pairs_{kind}.npz"


def save_vectors(folder: Path, vectors: FloatArray) -> str:
    """Write a matrix under a name that its content gives it."""
    name = f"{hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest()[:24]}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        temporary = folder / f".{name}"
        with temporary.open("wb") as handle:
            np.save(handle, vectors)
        temporary.replace(folder / name)
    return name


def load_fold(world: World, files: FoldFiles, seen: int | None) -> CtrData:
    """A fold's examples, kept for the next arm of the same fold.

    Args:
        world: the evaluation.
        files: the fold.
        seen: history events that the model sees, the newest; None: all of them.
    """
    history, seed = world.settings.history, world.settings.run.seed
    # A clock of whole days ties nearly everything: the strict rule would drop all targets of a history's last day.
    ties = "shuffle" if files.family == "A" else history.ties
    seen = None if seen is None else min(seen, history.max_events)
    return _load(files, world.items(), world.users(), (history.max_events, ties, seed), seen)


@lru_cache(maxsize=2)
def _load(
    files: FoldFiles,
    items: Path,
    users: Path,
    history: tuple[int, Literal["strict", "shuffle"], int],
    seen: int | None,
) -> CtrData:
    max_events, ties, seed = history
    return build_ctr_data(
        read_table(files.folder / "interactions.parquet", INTERACTIONS),
        read_table(items, ITEMS),
        read_table(users, USERS),
        split=files.split,
        max_history=max_events,
        ties=ties,
        seed=seed,
        seen_history=seen,
        valid_part=files.select_on,
    )


def load_encodings(world: World, files: FoldFiles, arm: Arm, seed: int) -> dict[str, Tensor]:
    """Side -> (N, D) encodings of an arm, in catalogue order; empty for a model without text."""
    if arm.text is None:
        return {}
    item = np.concatenate([_vectors(world, world.item_vectors[name]) for name in arm.text.split("+")], axis=1)
    found = {"item": item}
    if arm.profile:
        found = {"user": _vectors(world, files.user_vectors), "item": item}
    rng = np.random.default_rng([seed, 1])
    if arm.rows == "shuffled":
        found = {side: rng.permutation(vectors, axis=0) for side, vectors in found.items()}
    elif arm.rows == "noise":
        found = {
            side: rng.normal(vectors.mean(0), vectors.std(0), vectors.shape).astype(np.float32)
            for side, vectors in found.items()
        }
    return {side: torch.from_numpy(np.ascontiguousarray(vectors)) for side, vectors in found.items()}


def load_samplers(
    files: FoldFiles, arm: Arm, data: CtrData, *, top_k: int, normalized: bool, seed: int
) -> dict[str, PositiveSampler]:
    """Side -> positives of an arm.

    Raises:
        ArtifactError: the pairs are of another split than the fold.
    """
    samplers = {}
    for side, count in (("item", len(data.item_ids)), ("user", len(data.user_ids))):
        path = pairs_file(files.folder, side, "kellmrec" if arm.pairs == "kellmrec" else "swing")
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        if str(found["split_hash"]) != files.split_hash:
            raise ArtifactError(
                f"{path} was made from split {str(found['split_hash'])[:12]}, and the fold is {files.split_hash[:12]}: "
                "delete the folder; the evaluation makes it anew"
            )
        anchors, neighbors, scores = found["anchor"], found["neighbor"], found["score"]
        if arm.pairs == "random":
            known = np.unique(anchors)
            rng = np.random.default_rng([seed, 2])
            # A shift within the known ids is never the anchor itself, and no neighbour comes twice.
            shifts = 1 + np.argsort(rng.random((len(known), len(known) - 1)), axis=1)[:, :top_k]
            neighbors = known[(np.arange(len(known))[:, None] + shifts).ravel() % len(known)]
            anchors = np.repeat(known, shifts.shape[1])
            scores = np.ones(len(anchors))
        degrees = data.train_likes[side] if normalized else None
        samplers[side] = PositiveSampler(anchors, neighbors, scores, count, top_k, degrees)
    return samplers


@lru_cache(maxsize=16)
def _array(path: Path) -> FloatArray:
    vectors: FloatArray = np.load(path)
    return vectors


def _vectors(world: World, name: str) -> FloatArray:
    return _array(world.root / "vectors" / name)
