"""Stage `export`: every encoding through its adapter, as one immutable version."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

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
from kellm_features.training.checkpoint import AdapterMeta, load_adapters, weights_hash
from kellm_features.training.encodings import Encodings, read_encodings

logger = logging.getLogger(__name__)

_BLOCK = 8192
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


def embed(adapter: nn.Module, encodings: Tensor) -> Tensor:
    """Encodings (N, D) -> embeddings (N, E) float32 on the CPU, in blocks."""
    with torch.inference_mode():
        return torch.cat([adapter(block) for block in torch.split(encodings, _BLOCK)]).float()


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
    rows, dim = vectors.shape
    model = meta.model_id.encode()
    instants = pa.array([now] * rows, TIMESTAMP)
    offsets = pa.array(np.arange(0, rows * dim + 1, dim, dtype=np.int32))
    return pa.table(
        {
            f"{side}_id": pa.array(encodings.ids[order]),
            "embedding": pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel())),
            "embedding_version": pa.array([version] * rows),
            "model_id": pa.array([meta.model_id] * rows),
            "content_hash": pa.array([hashlib.sha256(row.tobytes() + model).hexdigest() for row in vectors]),
            "event_timestamp": instants,
            "created_timestamp": instants,
        }
    )
