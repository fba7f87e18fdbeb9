"""A small world with a known structure: items and users of four tastes, likes mostly within a taste."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kellm_features.artifacts import Artifact, Manifest, digest, hash_outputs
from kellm_features.schemas import (
    INTERACTIONS,
    ITEM_ENCODINGS,
    ITEMS,
    PAIRS,
    USER_ENCODINGS,
    USERS,
    TableSchema,
    write_table,
)
from kellm_features.settings import Settings
from kellm_features.stages import StageContext

ITEMS_N, USERS_N, TASTES, DIM = 60, 80, 4, 12


def _manifest(stage: str, folder: Path) -> Manifest:
    outputs = hash_outputs(folder)
    return Manifest(
        stage=stage,
        run_id="test",
        version="0",
        created=datetime(2024, 1, 1, tzinfo=UTC),
        config_hash="",
        split_hash="split",
        outputs=outputs,
        output_hash=digest(outputs),
    )


def _write(frame: pd.DataFrame, path: Path, schema: TableSchema, dim: int | None = None) -> None:
    arrow = schema.arrow(dim=dim)
    write_table(pa.Table.from_pandas(frame[schema.names], schema=arrow, preserve_index=False), path, schema)


def make_world(folder: Path) -> None:
    """Write the artefacts of ingest, swing and encode. Item 60 has no interactions: it is cold."""
    rng = np.random.default_rng(5)
    item_taste, user_taste = rng.integers(0, TASTES, ITEMS_N), rng.integers(0, TASTES, USERS_N)
    split = np.where(np.arange(USERS_N) < 56, "train", np.where(np.arange(USERS_N) < 68, "valid", "test"))
    rows = []
    for user in range(USERS_N):
        for second, item in enumerate(rng.choice(ITEMS_N - 1, 24, replace=False)):
            liked = rng.random() < (0.95 if item_taste[item] == user_taste[user] else 0.1)
            rows.append((user + 1, item + 1, 5.0 if liked else 1.0, bool(liked), second, split[user]))
    frame = pd.DataFrame(rows, columns=INTERACTIONS.names).astype({"rating": "float32"})
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], unit="s", utc=True).astype(
        "datetime64[us, UTC]"
    )
    _write(frame, folder / "ingest/interactions.parquet", INTERACTIONS)
    ids = np.arange(1, ITEMS_N + 1)
    genres = [[f"genre {taste}", "film"] if taste else [] for taste in item_taste]
    items = pd.DataFrame({"item_id": ids, "title": [f"Film {i}" for i in ids], "year": 1990, "genres": genres})
    _write(items.astype({"year": "int32"}), folder / "ingest/items.parquet", ITEMS)
    users = pd.DataFrame({"user_id": np.arange(1, USERS_N + 1), "gender": "F", "age": None, "occupation": "artist"})
    users.loc[::3, "gender"] = None
    _write(users, folder / "ingest/users.parquet", USERS)
    _write(_pairs(item_taste, np.arange(ITEMS_N) < ITEMS_N - 1), folder / "swing/item_pairs.parquet", PAIRS)
    _write(_pairs(user_taste, split == "train"), folder / "swing/user_pairs.parquet", PAIRS)
    for key, taste, schema in (("item_id", item_taste, ITEM_ENCODINGS), ("user_id", user_taste, USER_ENCODINGS)):
        # The taste is there, and drowned by noise: raw cosine neighbours are nearly random.
        signal, noise = 0.4 * np.eye(TASTES, DIM)[taste], rng.normal(size=(len(taste), DIM))
        encodings = pd.DataFrame(
            {
                key: np.arange(1, len(taste) + 1),
                "encoding": list((signal + 0.3 * noise).astype(np.float32)),
                "text_hash": "0",
                "encoder_id": "test-encoder",
            }
        )
        _write(encodings, folder / f"encode/{key[:4]}_encodings.parquet", schema, DIM)


def _pairs(taste: np.ndarray, allowed: np.ndarray) -> pd.DataFrame:
    rng = np.random.default_rng(9)
    rows = []
    for anchor in np.flatnonzero(allowed):
        alike = np.flatnonzero((taste == taste[anchor]) & allowed & (np.arange(len(taste)) != anchor))
        chosen = rng.permutation(alike)[:6]
        scores = np.sort(rng.random(len(chosen)) + 0.1)[::-1]
        rows += [(anchor + 1, n + 1, s, 3, r + 1) for r, (n, s) in enumerate(zip(chosen, scores, strict=True))]
    return pd.DataFrame(rows, columns=PAIRS.names).astype({"common": "int32", "rank": "int32"})


def docs_block(word: str, language: str = "python") -> str:
    """The one code block of docs/training.md that has the word."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return str(found)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with the artefacts that training reads, to be changed at will."""
    make_world(tmp_path)
    return tmp_path


@pytest.fixture
def context(world: Path) -> Callable[..., StageContext]:
    """A `StageContext` over the world: `context("train", epochs=2)`."""

    def build(stage: str, seed: int = 7, **train: object) -> StageContext:
        small = {"hidden": 16, "dim": 8, "batch_size": 128, "field_dim": 4, "warmup_steps": 20, "epochs": 3, "top_k": 5}
        settings = Settings.model_validate({"run": {"seed": seed}, "train": small | {"device": "cpu"} | train})
        inputs = {
            name: Artifact(world / name, _manifest(name, world / name))
            for name in ("ingest", "swing", "encode", "train")
            if name != stage and (world / name).is_dir()
        }
        out = world / stage
        out.mkdir(exist_ok=True)
        return StageContext(settings, world, out, world / "work" / stage, inputs, {}, "split")

    return build
