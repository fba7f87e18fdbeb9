"""Splits and the hash that ties every later artefact to the split it came from."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pandas as pd

from kellm_features.errors import DataError


def split_by_user(user_ids: pd.Series, train: float, valid: float, seed: int) -> npt.NDArray[np.object_]:
    """Give each user, with all of his rows, to train, valid or test (KELLMRec: 8:1:1).

    Returns:
        A string array aligned with `user_ids`.
    """
    users = np.sort(user_ids.unique())
    shuffled = np.random.default_rng(seed).permutation(len(users))
    train_end, valid_end = (round(len(users) * part) for part in (train, train + valid))
    parts: npt.NDArray[np.object_] = np.empty(len(users), dtype=object)
    parts[shuffled[:train_end]] = "train"
    parts[shuffled[train_end:valid_end]] = "valid"
    parts[shuffled[valid_end:]] = "test"
    by_row: npt.NDArray[np.object_] = parts[np.searchsorted(users, user_ids.to_numpy())]
    return by_row


def split_by_time(timestamps: pd.Series, train: float, valid: float) -> npt.NDArray[np.object_]:
    """Cut globally in time: train < T1 <= valid < T2 <= test, equal timestamps on one side."""
    first, second = timestamps.quantile([train, train + valid], interpolation="lower")
    parts = np.full(len(timestamps), "test", dtype=object)
    parts[(timestamps < second).to_numpy()] = "valid"
    parts[(timestamps < first).to_numpy()] = "train"
    return parts


def check_parts(parts: npt.NDArray[np.object_], rule: str) -> dict[str, int]:
    """Rows per part.

    Raises:
        DataError: a part is empty.
    """
    counts = {name: int((parts == name).sum()) for name in ("train", "valid", "test")}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise DataError(
            f"the split by {rule} leaves {' and '.join(empty)} without a row (rows: {counts}): "
            "give more data, or change data.split, data.train_fraction or data.valid_fraction"
        )
    return counts


def split_hash(interactions: pd.DataFrame) -> str:
    """SHA-256 of who met what, when, in which part. Labels do not enter: they never decide a split."""
    rows = interactions.sort_values(["user_id", "item_id"], kind="stable")
    sha = hashlib.sha256()
    for name in ("user_id", "item_id", "split"):
        sha.update("\n".join(rows[name].astype(str)).encode())
        sha.update(b"\0")
    sha.update(rows["event_timestamp"].astype("int64").to_numpy().tobytes())
    return sha.hexdigest()
