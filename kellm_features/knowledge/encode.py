"""Stage `encode`: descriptions to frozen encodings; rows whose text is unchanged are taken over."""

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
import pyarrow.parquet as pq

from kellm_features.artifacts import Artifact
from kellm_features.errors import DataError
from kellm_features.knowledge.encoder import Encoder, encoder_folder
from kellm_features.knowledge.facts import known_genres
from kellm_features.knowledge.modelfiles import model_files
from kellm_features.knowledge.text import bare_title, titled
from kellm_features.progress import track
from kellm_features.schemas import (
    ITEM_DESCRIPTIONS,
    ITEM_ENCODINGS,
    ITEMS,
    USER_DESCRIPTIONS,
    USER_ENCODINGS,
    TableSchema,
    id_type_of,
    read_table,
    write_table,
)
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport

logger = logging.getLogger(__name__)


def input_files(settings: Settings) -> dict[str, Path]:
    """The encoder's files, so that an encoder edited in place makes the stage stale.

    Raises:
        ConfigError: `encode.model` names no encoder.
    """
    return {f"model/{name}": path for name, path in model_files(encoder_folder(settings.encode.model)).items()}


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

    Raises:
        DataError: an item has no description, or the encoder gave a vector that is not finite.
        ConfigError: `encode.model` names no encoder.
        EngineError: the encoder cannot be loaded.
    """
    items = read_table(ctx.input("ingest", "items.parquet"), ITEMS)
    item_texts = read_table(ctx.input("generate", "item_descriptions.parquet"), ITEM_DESCRIPTIONS)
    user_texts = read_table(ctx.input("generate", "user_descriptions.parquet"), USER_DESCRIPTIONS)
    catalogue = {row["item_id"]: row for row in items.to_pylist()}
    encoder = Encoder(ctx.settings.encode)
    texts = {}
    for row in item_texts.select(["item_id", "description"]).to_pylist():
        if row["item_id"] not in catalogue:
            raise DataError(
                f"item {row['item_id']!r} has a description and is not in the catalogue: run  kellm run --from generate"
            )
        item = catalogue[row["item_id"]]
        texts[row["item_id"]] = encoded_text(item["title"], item["year"], item["genres"], row["description"])
    if missing := catalogue.keys() - texts.keys():
        raise DataError(f"item {min(missing)!r} has no description: run  kellm run --from generate")
    profiles = dict(zip(user_texts["user_id"].to_pylist(), user_texts["description"].to_pylist(), strict=True))

    sides = (
        ("item_encodings.parquet", "item_id", ITEM_ENCODINGS, texts, item_texts),
        ("user_encodings.parquet", "user_id", USER_ENCODINGS, profiles, user_texts),
    )
    reused, encoded, seconds = 0, 0, 0.0
    for name, key, schema, side, table in sides:
        started = time.monotonic()
        known = _known(ctx.previous, name, encoder)
        taken = _encode_side(encoder, side, known, key, schema, id_type_of(table.schema, key), ctx.out / name)
        reused += taken
        encoded += len(side) - taken
        seconds += time.monotonic() - started
    logger.info("encoded %d texts, took over %d unchanged ones", encoded, reused)
    return StageReport(
        rows_in=len(texts) + len(profiles),
        rows_out=len(texts) + len(profiles),
        models={encoder.model_id: encoder.revision},
        notes={
            "encoder_id": encoder.encoder_id,
            "dim": encoder.dim,
            "encoded": encoded,
            "unchanged": reused,
            "seconds": round(seconds, 2),
            "texts_per_s": round(encoded / seconds, 1) if encoded else 0.0,
        },
    )


def _encode_side(
    encoder: Encoder,
    texts: dict[Any, str],
    known: dict[str, npt.NDArray[np.float32]],
    key: str,
    schema: TableSchema,
    id_type: pa.DataType,
    path: Path,
) -> int:
    """Write one side's encodings, sorted by id; returns how many rows were taken over."""
    ids = sorted(texts)
    hashes = [hashlib.sha256(texts[i].encode()).hexdigest() for i in ids]
    new = {h: texts[i] for i, h in zip(ids, hashes, strict=True) if h not in known}
    with track(f"encode {key.removesuffix('_id')}s", len(new), "texts") as advance:
        vectors = encoder.encode(list(new.values()), advance)
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        first = list(new)[int(broken.argmax())]
        raise DataError(
            f"the encoder {encoder.encoder_id} gave a vector that is not finite for {key} "
            f"{ids[hashes.index(first)]!r}: choose another encode.model"
        )
    by_hash = known | dict(zip(new, vectors, strict=True))
    matrix = np.stack([by_hash[h] for h in hashes]) if ids else np.zeros((0, encoder.dim), np.float32)
    flat = pa.array(np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1))
    table = pa.table(
        [
            pa.array(ids, id_type),
            pa.FixedSizeListArray.from_arrays(flat, encoder.dim),
            pa.array(hashes),
            pa.array([encoder.encoder_id] * len(ids), pa.string()),
        ],
        schema=schema.arrow(id_type, encoder.dim),
    )
    write_table(table, path, schema)
    return sum(h in known for h in hashes)


def _known(previous: Artifact | None, name: str, encoder: Encoder) -> dict[str, npt.NDArray[np.float32]]:
    """Encodings of the stage's last run that this encoder made, by text hash."""
    if previous is None or not (previous.path / name).exists():
        return {}
    table = pq.read_table(previous.path / name, columns=["encoding", "text_hash", "encoder_id"])
    rows = zip(*(table[c].to_pylist() for c in ("text_hash", "encoder_id")), strict=True)
    vectors = table["encoding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
    return {text: vectors[k] for k, (text, made_by) in enumerate(rows) if made_by == encoder.encoder_id}
