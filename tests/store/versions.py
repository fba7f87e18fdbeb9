"""Versions of a view with known vectors, and what their gates say."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kellm_features.settings import VerifySettings
from kellm_features.store.layout import ITEM_EMBEDDING, ViewSpec
from kellm_features.store.verify import Verification, ViewCheck, verify_version

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DIM = 16
Rows = dict[Any, Any]


def vectors(count: int = 200, seed: int = 0) -> Rows:
    """Float32 vectors around a mean that is not zero, by id."""
    rng = np.random.default_rng(seed)
    return dict(enumerate((rng.standard_normal((count, DIM)) + 0.5).astype(np.float32), 1))


def write(path: Path, rows: Rows | list, withdrawn: tuple = (), spec: ViewSpec = ITEM_EMBEDDING) -> Path:
    """A partition as `publish` writes it; `rows` may repeat an id, and hold vectors that no publish lets through."""
    pairs = [*(rows.items() if isinstance(rows, dict) else rows), *((key, None) for key in withdrawn)]
    schema = spec.arrow("string" if any(isinstance(key, str) for key, _ in pairs) else "int64")
    table = {name: pa.nulls(len(pairs), schema.field(name).type) for name in schema.names}
    table[spec.join_key] = pa.array([key for key, _ in pairs], schema.field(0).type)
    lists = [None if vector is None else list(vector) for _, vector in pairs]
    table["embedding"] = pa.array(lists, pa.list_(pa.float32()))
    for name in ("event_timestamp", "created_timestamp"):
        table[name] = pa.array([NOW] * len(pairs), pa.timestamp("us", tz="UTC"))
    table["is_deleted"] = pa.array([at >= len(pairs) - len(withdrawn) for at in range(len(pairs))])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table, schema=schema), path)
    return path


def online(rows: Rows, dtype: type = np.float32):
    """What an online store with these rows answers; it keeps `dtype`."""

    def fetch(view: str, ids: list) -> tuple[np.ndarray, np.ndarray]:
        assert view.endswith("_knowledge_embedding")
        dim = len(next(iter(rows.values()))) if rows else 0
        values = np.full((len(ids), dim), np.nan, dtype=np.float32)
        for at, key in enumerate(ids):
            assert isinstance(key, int | str)
            if key in rows:
                values[at] = np.asarray(rows[key], dtype=dtype)
        return values, np.array([key in rows for key in ids])

    return fetch


def check(tmp_path, now: Rows | list, before: Rows | None = None, **change: Any) -> Verification:
    """Verify `now` against `before`, whose further ids `now` withdraws, and which is online as it should be."""
    served = dict(now)
    withdrawn = tuple(key for key in before or {} if key not in served)
    mine = write(tmp_path / "now.parquet", now, withdrawn)
    theirs = None if before is None else write(tmp_path / "before.parquet", before)
    fetch = change.pop("fetch", None) or online({key: row for key, row in served.items() if row is not None})
    view = ViewCheck(ITEM_EMBEDDING, mine, theirs, change.pop("dtype", "float32"))
    seed, limits = change.pop("seed", 0), VerifySettings(**change)
    return verify_version("v2", [view], fetch, limits, against=None if before is None else "v1", seed=seed)


def failed(verification: Verification) -> dict[str, tuple[str, ...]]:
    return {gate.name: gate.ids for gate in verification.gates if not gate.passed}


def measured(verification: Verification) -> dict[str, float]:
    return {gate.name: gate.measured for gate in verification.gates if gate.measured is not None}


def nudged(rows: Rows, by: float = 0.1) -> Rows:
    """The rows of a version after a little more training."""
    rng = np.random.default_rng(9)
    return {key: (row + by * rng.standard_normal(len(row))).astype(np.float32) for key, row in rows.items()}


def rotated(rows: Rows) -> Rows:
    turn, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, DIM)))
    return {key: (row @ turn).astype(np.float32) for key, row in rows.items()}
