"""Stage `train`: the adapters and the backbone, jointly; weights, metrics and curves."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kellm_features
from kellm_features.artifacts import digest
from kellm_features.errors import DataError
from kellm_features.schemas import INTERACTIONS, ITEM_ENCODINGS, ITEMS, USER_ENCODINGS, USERS, read_table
from kellm_features.settings import TrainSettings
from kellm_features.stages import StageContext, StageReport
from kellm_features.training.adapter import Adapter
from kellm_features.training.backbones import DeepFM
from kellm_features.training.checkpoint import save_adapters, save_module
from kellm_features.training.data import FIELDS, SPLITS, CtrData, build_ctr_data
from kellm_features.training.encodings import Encodings, read_encodings
from kellm_features.training.knowledge import KnowledgeAugmented
from kellm_features.training.neighbors import neighbor_recall
from kellm_features.training.pairs import PositiveSampler, read_pairs
from kellm_features.training.trainer import Trainer, score

logger = logging.getLogger(__name__)

RECALL_AT = 10


def run(ctx: StageContext) -> StageReport:
    """Train, and write adapter.safetensors, backbone.safetensors, metrics.json and curves.json.

    Raises:
        DataError: ids that the catalogue lacks, missing or unusable encodings, pairs or labels.
        TrainingDivergedError: the loss became NaN or infinite.
    """
    settings, seed = ctx.settings.train, ctx.settings.run.seed
    data, encodings, samplers = read_inputs(ctx)
    encoder_id = encodings["item"].encoder_id
    model = build_model(data, encodings, settings, seed)
    checkpoint = ctx.work / f"{_key(ctx)}.pt"
    ctx.work.mkdir(parents=True, exist_ok=True)
    for other in ctx.work.glob("*.pt"):
        if other != checkpoint:
            other.unlink()
    vectors = {side: encoding.vectors for side, encoding in encodings.items()}
    trainer = Trainer(model, data, vectors, samplers, settings, seed=seed, checkpoint=checkpoint)
    history = trainer.fit()
    metrics: dict[str, Any] = {
        "epoch": history.best_epoch,
        **{part: trainer.evaluate(part) for part in ("valid", "test")},
        "item_mean": {part: _item_mean(data, part) for part in ("valid", "test")},
        "neighbors": _neighbors(model, vectors, samplers),
        "targets": {part: len(data.examples[part]) for part in SPLITS},
    }
    meta = save_adapters(ctx.out / "adapter.safetensors", model.adapters, encoder_id)
    save_module(
        ctx.out / "backbone.safetensors",
        model.backbone.state_dict(),
        {
            "backbone": settings.backbone,
            "fields": FIELDS,
            "vocabularies": data.vocabularies,
            "model_id": meta.model_id,
        },
    )
    _write_json(ctx.out / "metrics.json", metrics)
    _write_json(ctx.out / "curves.json", asdict(history))
    checkpoint.unlink(missing_ok=True)
    logger.info(
        "epoch %d: test AUC %.4f (item mean %.4f)",
        history.best_epoch,
        metrics["test"]["auc"],
        metrics["item_mean"]["test"]["auc"],
    )
    return StageReport(
        rows_in=sum(len(examples) for examples in data.examples.values()),
        rows_out=len(data.item_ids) + len(data.user_ids),
        models={meta.model_id: meta.model_id.rpartition("-")[2]},
        notes=_finite(metrics),
    )


def read_inputs(ctx: StageContext) -> tuple[CtrData, dict[str, Encodings], dict[str, PositiveSampler]]:
    """Examples, encodings and samplers by side, all in catalogue order.

    Raises:
        DataError: see `run`.
    """
    settings = ctx.settings
    data = build_ctr_data(
        read_table(ctx.input("ingest", "interactions.parquet"), INTERACTIONS),
        read_table(ctx.input("ingest", "items.parquet"), ITEMS),
        read_table(ctx.input("ingest", "users.parquet"), USERS),
        split=settings.data.split,
        max_history=settings.history.max_events,
        ties=settings.history.ties,
        seed=settings.run.seed,
    )
    encodings = {
        "user": read_encodings(ctx.input("encode", "user_encodings.parquet"), USER_ENCODINGS, data.user_ids),
        "item": read_encodings(ctx.input("encode", "item_encodings.parquet"), ITEM_ENCODINGS, data.item_ids),
    }
    user, item = encodings["user"], encodings["item"]
    if (user.encoder_id, user.vectors.shape[1]) != (item.encoder_id, item.vectors.shape[1]):
        raise DataError(
            f"users are encoded by {user.encoder_id} ({user.vectors.shape[1]} numbers) and items by {item.encoder_id} "
            f"({item.vectors.shape[1]} numbers): one encoder is accepted; run  kellm run --from encode"
        )
    top_k = settings.train.top_k
    samplers = {
        "user": read_pairs(
            ctx.input("swing", "user_pairs.parquet"), data.user_ids, data.user_in_train, "user_id", top_k
        ),
        "item": read_pairs(
            ctx.input("swing", "item_pairs.parquet"), data.item_ids, data.item_in_train, "item_id", top_k
        ),
    }
    return data, encodings, samplers


def build_model(
    data: CtrData, encodings: dict[str, Encodings], settings: TrainSettings, seed: int
) -> KnowledgeAugmented:
    """The model with seeded initial weights; adapters standardise by the ids that have train rows."""
    in_train = {"user": torch.from_numpy(data.user_in_train), "item": torch.from_numpy(data.item_in_train)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = {}
        for side, encoding in encodings.items():
            adapter = Adapter(encoding.vectors.shape[1], settings.hidden, settings.dim, activation=settings.activation)
            adapter.standardize(encoding.vectors[in_train[side]])
            adapters[side] = adapter
        backbone = DeepFM(
            FIELDS,
            data.table_rows,
            settings.field_dim,
            knowledge_dim=settings.dim * len(adapters),
            dropout=settings.dropout,
        )
    return KnowledgeAugmented(
        backbone,
        adapters,
        weight=settings.weight,
        temperature=settings.temperature,
        reduction=settings.reduction,
    )


def _key(ctx: StageContext) -> str:
    """Names the checkpoint: settings and inputs that shape the weights."""
    parts = {name: artifact.manifest.output_hash for name, artifact in ctx.inputs.items()}
    parts["settings"] = ctx.settings.hash_of(("run", "history", "train"))
    parts["roles"] = ctx.settings.data.split
    parts["version"] = f"{kellm_features.__version__} torch {torch.__version__}"
    return digest(parts)[:32]


def _item_mean(data: CtrData, part: str) -> dict[str, float]:
    return score(data, part, data.item_mean.numpy()[data.examples[part].item.numpy()])


def _neighbors(
    model: KnowledgeAugmented, encodings: dict[str, torch.Tensor], samplers: dict[str, PositiveSampler]
) -> dict[str, dict[str, float]]:
    """In-sample recall of SWING neighbours, before and after adaptation."""
    model = model.cpu().eval()
    found = {}
    with torch.inference_mode():
        for side, adapter in model.adapters.items():
            truth = samplers[side]
            found[side] = {
                "anchors": int((truth.sizes > 0).sum()),
                f"raw_recall_at_{RECALL_AT}": neighbor_recall(encodings[side], truth, RECALL_AT),
                f"adapted_recall_at_{RECALL_AT}": neighbor_recall(adapter(encodings[side]), truth, RECALL_AT),
            }
    return found


def _finite(value: Any) -> Any:
    """NaN is no JSON: a metric without a value is null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(_finite(value), indent=2) + "\n", encoding="utf-8")
