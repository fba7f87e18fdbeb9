"""Tables of a small world for the evaluation's tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from kellm_features.evaluation.protocol import Fold
from kellm_features.evaluation.world import FoldFiles, World, content_hash, prepare_fold, save_vectors
from kellm_features.schemas import INTERACTIONS, ITEMS, USERS, read_table, write_table
from kellm_features.settings import Settings


def interactions(rows: list[tuple[int, int, int, str]]) -> pa.Table:
    """`INTERACTIONS` of (user, item, liked, split), a second apart in this order."""
    frame = pd.DataFrame(
        [
            (user, item, 5.0 if liked else 1.0, bool(liked), second, part)
            for second, (user, item, liked, part) in enumerate(rows)
        ],
        columns=INTERACTIONS.names,
    ).astype({"rating": "float32"})
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], unit="s", utc=True).astype(
        "datetime64[us, UTC]"
    )
    return pa.Table.from_pandas(frame, schema=INTERACTIONS.arrow(), preserve_index=False)


def catalogue(count: int) -> pa.Table:
    """`ITEMS` 1 … count."""
    frame = pd.DataFrame({"item_id": range(1, count + 1), "title": "x", "year": 1990, "genres": [["A"]] * count})
    return pa.Table.from_pandas(frame.astype({"year": "int32"}), schema=ITEMS.arrow(), preserve_index=False)


def people(count: int) -> pa.Table:
    """`USERS` 1 … count."""
    frame = pd.DataFrame({"user_id": range(1, count + 1), "gender": "F", "age": "25", "occupation": "artist"})
    return pa.Table.from_pandas(frame, schema=USERS.arrow(), preserve_index=False)


def prepared(root: Path, settings: Settings, folds: Iterable[Fold], *, items: int, users: int) -> World:
    """A world of `items` and `users`, on disk: its catalogue, its folds, and random vectors for titles and users."""
    ingest = root / "run" / "ingest"
    ingest.mkdir(parents=True)
    write_table(catalogue(items), ingest / "items.parquet", ITEMS)
    write_table(people(users), ingest / "users.parquet", USERS)
    vectors = np.random.default_rng(1).normal(3, 2, size=(items, 5)).astype(np.float32)
    texts = {"title": save_vectors(root / "vectors", vectors)}
    files = {fold.name: fold_files(root, fold, settings) for fold in folds}
    return World(root, root / "run", settings, texts, files, {})


def fold_files(root: Path, fold: Fold, settings: Settings) -> FoldFiles:
    """A fold of the world in `root`, prepared."""
    paths = [root / "run" / "ingest" / f"{what}.parquet" for what in ("items", "users")]
    items, users = (
        read_table(path, schema)[name].to_pylist()
        for path, schema, name in zip(paths, (ITEMS, USERS), ("item_id", "user_id"), strict=True)
    )
    content = content_hash(fold, paths)
    folder = prepare_fold(root, fold, settings, items, users, content)
    vectors = np.random.default_rng(0).normal(size=(len(users), 4)).astype(np.float32)
    user_vectors = save_vectors(root / "vectors", vectors)
    return FoldFiles(folder, fold.name, fold.split, fold.select_on, fold.split_hash, content, user_vectors)
