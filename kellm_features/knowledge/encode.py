"""Stage `encode`: descriptions to frozen encodings; what was encoded before, in a run that ended or not, is kept."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kellm_features.errors import DataError
from kellm_features.knowledge.encoder import Encoder, encoder_folder
from kellm_features.knowledge.facts import known_genres
from kellm_features.knowledge.modelfiles import model_files
from kellm_features.knowledge.text import bare_title, titled
from kellm_features.knowledge.vectors import VectorStore, to_arrow
from kellm_features.progress import track
from kellm_features.schemas import (
    ITEM_DESCRIPTIONS,
    ITEM_ENCODINGS,
    ITEMS,
    USER_DESCRIPTIONS,
    USER_ENCODINGS,
    id_type_of,
    read_table,
    write_table,
)
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport

logger = logging.getLogger(__name__)

KEEP_EVERY_S = 10.0
"""Finished vectors go to disk this often: rarely enough for a GPU's thousands of texts per second."""


def input_files(settings: Settings) -> dict[str, Path]:
    """The encoder's files, so that an encoder edited in place makes the stage stale.

    Raises:
        ConfigError: `encode.model` names no encoder.
        EngineError: it names a hub model that is not on this machine and cannot be fetched.
    """
    return {f"model/{name}": path for name, path in model_files(encoder_folder(settings.encode)).items()}


def encoded_text(title: str, year: int | None, genres: Sequence[str], description: str) -> str:
    """The text of an item that is encoded: title, year and genres first, then the description.

    A description dilutes what identifies an item, and an encoder's window may cut it: on MovieLens-1M title and
    genres alone found better neighbours than free prose did. A description that opens with title and year, as the
    template engine's do, and names the genres is encoded as it is.
    """
    name = titled(bare_title(title), year)
    known = known_genres(genres)
    if description.startswith(f"{name} is ") and all(g.casefold() in description.casefold() for g in known):
        return description
    head = f"{name}. {', '.join(known)}".rstrip(" .")
    return f"{head}. {description}"


def run(ctx: StageContext) -> StageReport:
    """Encode item and user descriptions.

    A text that this encoder has encoded before keeps its vector: those of the stage's last run, and those that a run
    had finished when it was killed.

    Raises:
        DataError: an item has no description, or the encoder gave a vector that is not finite.
        ConfigError: `encode.model` names no encoder.
        EngineError: the encoder cannot be loaded, or a process of `encode.devices` failed.
    """
    items = read_table(ctx.input("ingest", "items.parquet"), ITEMS)
    item_texts = read_table(ctx.input("generate", "item_descriptions.parquet"), ITEM_DESCRIPTIONS)
    user_texts = read_table(ctx.input("generate", "user_descriptions.parquet"), USER_DESCRIPTIONS)
    profiles = dict(zip(user_texts["user_id"].to_pylist(), user_texts["description"].to_pylist(), strict=True))
    sides = (
        ("item", _item_texts(items, item_texts), ITEM_ENCODINGS, id_type_of(item_texts.schema, "item_id")),
        ("user", profiles, USER_ENCODINGS, id_type_of(user_texts.schema, "user_id")),
    )
    rows, encoded, started = 0, 0, time.monotonic()
    with Encoder(ctx.settings.encode) as encoder:
        earlier = [] if ctx.previous is None else sorted(ctx.previous.path.glob("*_encodings.parquet"))
        store = VectorStore(ctx.work, encoder.encoder_id, encoder.dim, earlier)
        for side, texts, schema, id_type in sides:
            ids = sorted(texts)
            hashes = [hashlib.sha256(texts[i].encode()).hexdigest() for i in ids]
            missing = [k for k, text_hash in enumerate(hashes) if text_hash not in store]
            _encode(encoder, store, side, {hashes[k]: (ids[k], texts[ids[k]]) for k in missing})
            table = pa.table(
                [
                    pa.array(ids, id_type),
                    to_arrow(store.gather(hashes), encoder.dim),
                    pa.array(hashes, pa.string()),
                    pa.array([encoder.encoder_id] * len(ids), pa.string()),
                ],
                schema=schema.arrow(id_type, encoder.dim),
            )
            write_table(table, ctx.out / f"{side}_encodings.parquet", schema)
            rows += len(ids)
            encoded += len(missing)
    seconds = time.monotonic() - started
    logger.info("encoded %d texts, took over %d that were encoded before", encoded, rows - encoded)
    return StageReport(
        rows_in=rows,
        rows_out=rows,
        models={encoder.model_id: encoder.revision},
        notes={
            "encoder_id": encoder.encoder_id,
            "dim": encoder.dim,
            "dtype": ctx.settings.encode.dtype,
            "encoded": encoded,
            "unchanged": rows - encoded,
            "seconds": round(seconds, 2),
            "texts_per_s": round(encoded / seconds, 1) if encoded else 0.0,
        },
    )


def _item_texts(items: pa.Table, descriptions: pa.Table) -> dict[Any, str]:
    """What is encoded, by item id."""
    catalogue = {row["item_id"]: row for row in items.to_pylist()}
    texts = {}
    for row in descriptions.select(["item_id", "description"]).to_pylist():
        if row["item_id"] not in catalogue:
            raise DataError(
                f"item {row['item_id']!r} has a description and is not in the catalogue: run  kellm run --from generate"
            )
        item = catalogue[row["item_id"]]
        texts[row["item_id"]] = encoded_text(item["title"], item["year"], item["genres"], row["description"])
    if missing := catalogue.keys() - texts.keys():
        raise DataError(f"item {min(missing)!r} has no description: run  kellm run --from generate")
    return texts


def _encode(encoder: Encoder, store: VectorStore, side: str, new: dict[str, tuple[Any, str]]) -> None:
    """Encode texts, hash → (id, text), into the store: a kill loses the last seconds of work and no more."""
    hashes = list(new)
    kept, last = 0, time.monotonic()
    finished: list[npt.NDArray[np.float32]] = []
    with track(f"encode {side}s", len(new), "texts") as advance:
        for start in range(0, len(hashes), encoder.slice_size):
            end = min(start + encoder.slice_size, len(hashes))
            vectors = encoder.encode([new[text_hash][1] for text_hash in hashes[start:end]], advance)
            broken = ~np.isfinite(vectors).all(axis=1)
            if broken.any():
                first, _ = new[hashes[start + int(broken.argmax())]]
                raise DataError(
                    f"the encoder {encoder.encoder_id} gave a vector that is not finite for {side} {first!r}: choose "
                    "another encode.model, or bfloat16 or float32 where encode.dtype is float16"
                )
            finished.append(vectors)
            if end == len(hashes) or time.monotonic() - last >= KEEP_EVERY_S:
                store.append(hashes[kept:end], np.concatenate(finished))
                kept, last = end, time.monotonic()
                finished.clear()
