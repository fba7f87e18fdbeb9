"""Stage `export`: every encoding through its adapter, as one immutable version."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from kellm_features.artifacts import digest
from kellm_features.errors import ArtifactError
from kellm_features.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_ENCODINGS,
    TIMESTAMP,
    USER_EMBEDDINGS,
    USER_ENCODINGS,
    write_table,
)
from kellm_features.stages import StageContext, StageReport
from kellm_features.training.adapter import embed
from kellm_features.training.checkpoint import AdapterMeta, load_adapters, weights_hash
from kellm_features.training.encodings import Encodings, read_encodings

logger = logging.getLogger(__name__)

_LIST_VALUES = 2**31 - 1  # an Arrow list's offsets are int32
_SCHEMAS = {"item": (ITEM_ENCODINGS, ITEM_EMBEDDINGS), "user": (USER_ENCODINGS, USER_EMBEDDINGS)}


def run(ctx: StageContext) -> StageReport:
    """Write item_embeddings.parquet and user_embeddings.parquet (`ITEM_EMBEDDINGS`, `USER_EMBEDDINGS`).

    Both carry one `embedding_version`: the instant of the export and eight digits of a hash over weights and encodings.

    Raises:
        ArtifactError: the adapters were trained on other encodings.
    """
    adapters, meta = load_adapters(ctx.input("train", "adapter.safetensors"))
    encodings = {}
    for side, (schema, _) in _SCHEMAS.items():
        path = ctx.input("encode", f"{side}_encodings.parquet")
        encodings[side] = read_encodings(path, schema)
        _check_fit(encodings[side], meta, str(path))
    now = datetime.now(UTC).replace(microsecond=0)
    content = digest(
        {"adapter": weights_hash(adapters.state_dict())}
        | {side: _encodings_hash(encoding) for side, encoding in encodings.items()}
    )
    version = f"v{now:%Y%m%dT%H%M%SZ}-{content[:8]}"
    for side, (_, schema) in _SCHEMAS.items():
        table = _table(side, encodings[side], embed(adapters[side], encodings[side].vectors), version, meta, now)
        write_table(table, ctx.out / f"{side}_embeddings.parquet", schema)
    rows = sum(len(encoding.ids) for encoding in encodings.values())
    logger.info("%d embeddings of %d numbers as %s", rows, meta.dim, version)
    return StageReport(
        rows_in=rows,
        rows_out=rows,
        models={meta.model_id: meta.model_id.rpartition("-")[2]},
        notes={
            "embedding_version": version,
            "model_id": meta.model_id,
            "dim": meta.dim,
            "content_hash": content,
        },
    )


def _check_fit(encodings: Encodings, meta: AdapterMeta, where: str) -> None:
    seen = (encodings.encoder_id, encodings.vectors.shape[1])
    if seen != (meta.encoder_id, meta.in_dim):
        raise ArtifactError(
            f"{where} holds {seen[1]} numbers a row by {seen[0]}, and the adapters were trained on {meta.in_dim} by "
            f"{meta.encoder_id}: run  kellm run --from train"
        )


def _encodings_hash(encodings: Encodings) -> str:
    seen = hashlib.sha256("\n".join(map(str, encodings.ids)).encode())
    seen.update(encodings.vectors.numpy().tobytes())
    return seen.hexdigest()


def _table(
    side: str, encodings: Encodings, embeddings: Tensor, version: str, meta: AdapterMeta, now: datetime
) -> pa.Table:
    order = np.argsort(encodings.ids)
    vectors = np.ascontiguousarray(embeddings.numpy()[order])
    rows = len(vectors)
    model = meta.model_id.encode()
    instants = pa.array([now] * rows, TIMESTAMP)
    return pa.table(
        {
            f"{side}_id": pa.array(encodings.ids[order]),
            "embedding": _lists(vectors),
            "embedding_version": pa.array([version] * rows),
            "model_id": pa.array([meta.model_id] * rows),
            "content_hash": pa.array([hashlib.sha256(row.tobytes() + model).hexdigest() for row in vectors]),
            "event_timestamp": instants,
            "created_timestamp": instants,
        }
    )


def _lists(vectors: npt.NDArray[np.float32], limit: int = _LIST_VALUES) -> pa.ChunkedArray:
    """Rows (N, E) as lists, in chunks of at most `limit` values."""
    dim = vectors.shape[1]
    chunks = []
    for start in range(0, len(vectors), limit // dim):
        part = vectors[start : start + limit // dim]
        offsets = pa.array(np.arange(len(part) + 1, dtype=np.int32) * dim)
        chunks.append(pa.ListArray.from_arrays(offsets, pa.array(part.ravel())))
    return pa.chunked_array(chunks, type=pa.list_(pa.float32()))
