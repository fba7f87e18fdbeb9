"""Tables of a small world for the evaluation's tests."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from kellm_features.schemas import INTERACTIONS, ITEMS, USERS


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
