"""Six items and four users: what a model sees of them can be worked out by hand."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import torch

from kellm_features.schemas import INTERACTIONS, ITEMS, USERS
from kellm_features.training.data import CtrData, build_ctr_data
from kellm_features.training.features import Features

ITEM_IDS = [10, 20, 30, 40, 50, 60]
GENRES = [["A", "B"], ["A"], ["B"], [], ["C"], ["A", "D"]]
ROWS = [1, 2, 3, 4, 0, 5]  # of the table `item`: item 50 has no train rows
YEARS = [1990, 1980, None, 1990, 1970, 1980]
GENRE_ROWS = {"A": 1, "B": 2, "D": 3}  # C stands at item 50 alone
# The first half of a user's events is history, at most three of them.
EVENTS = {
    1: ("train", [(10, 1), (20, 0), (30, 1), (40, 1), (60, 0)]),
    2: ("valid", [(50, 1), (20, 1), (10, 0), (30, 1), (40, 0)]),
    3: ("test", [(40, 1), (50, 0)]),
}


def small_data(seen_history: int | None = None) -> CtrData:
    rows = [
        (user, item, 5.0 if liked else 1.0, bool(liked), second, part)
        for user, (part, events) in EVENTS.items()
        for second, (item, liked) in enumerate(events)
    ]
    frame = pd.DataFrame(rows, columns=INTERACTIONS.names).astype({"rating": "float32"})
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], unit="s", utc=True).astype(
        "datetime64[us, UTC]"
    )
    items = pd.DataFrame({"item_id": ITEM_IDS, "title": "x", "year": YEARS, "genres": GENRES})
    users = pd.DataFrame(
        {"user_id": [1, 2, 3, 4], "gender": ["F", "M", "F", None], "age": "25", "occupation": ["a", None, "b", "a"]}
    )
    tables = (
        pa.Table.from_pandas(table[schema.names], schema=schema.arrow(), preserve_index=False)
        for table, schema in ((frame, INTERACTIONS), (items.astype({"year": "Int32"}), ITEMS), (users, USERS))
    )
    return build_ctr_data(*tables, split="user", max_history=3, ties="strict", seed=7, seen_history=seen_history)


def flat(features: Features) -> dict[str, torch.Tensor]:
    """Every tensor, with rows of distinct items looked up, so that batches of other items can be compared."""
    out = {f"{name} {part}": getattr(bag, part) for name, bag in features.fields.items() for part in ("ids", "weights")}
    for name, bag in features.items.items():
        for part in ("ids", "weights"):
            values = getattr(bag, part)
            out[f"target {name} {part}"] = values[features.target]
            seen = values[features.history]
            out[f"events {name} {part}"] = seen * (features.flags > 0)[..., None].expand_as(seen)
    return out | {"flags": features.flags, "places": features.places}
