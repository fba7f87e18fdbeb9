"""Stage `train`: the adapters and the backbone, jointly; weights, metrics and curves."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kellm_features
from kellm_features.artifacts import digest
from kellm_features.errors import DataError
from kellm_features.schemas import INTERACTIONS, ITEM_ENCODINGS, ITEMS, USER_ENCODINGS, USERS, read_table
from kellm_features.settings import Settings, TrainSettings
from kellm_features.stages import StageContext, StageReport
from kellm_features.training.adapter import Standardized, embed
from kellm_features.training.backbones import build_backbone
from kellm_features.training.checkpoint import save_adapters, save_module
from kellm_features.training.data import FIELDS, SPLITS, CtrData, build_ctr_data
from kellm_features.training.device import training_device
from kellm_features.training.encodings import Encodings, read_encodings
from kellm_features.training.experts import build_adapters
from kellm_features.training.knowledge import KnowledgeAugmented, knowledge_width
from kellm_features.training.launch import Job, run_ranks
from kellm_features.training.loader import ExampleFiles, ExampleSource, write_examples
from kellm_features.training.neighbors import neighbor_recall
from kellm_features.training.pairs import PositiveSampler, read_pairs
from kellm_features.training.ranks import Ranks
from kellm_features.training.schedule import chosen_sides, shown_sides
from kellm_features.training.scores import score
from kellm_features.training.trainer import Trainer

logger = logging.getLogger(__name__)

RECALL_AT = 10
Find = Callable[[str, str], Path]
"""(stage, file) -> where an input is."""

_resume_from: ContextVar[int | None] = ContextVar("resume_from", default=None)


@contextmanager
def resuming_from(epoch: int | None) -> Iterator[None]:
    """Let the stage, if it runs inside, go on from this epoch's checkpoint instead of the newest."""
    token = _resume_from.set(epoch)
    try:
        yield
    finally:
        _resume_from.reset(token)


def run(ctx: StageContext) -> StageReport:
    """Train, here or on ranks; writes adapter.safetensors, backbone.safetensors, metrics.json and curves.json.

    Checkpoints stay below `ctx.work` until a training with other settings or inputs has finished; one with more epochs
    goes on from them.

    Raises:
        ConfigError: a device that is not there, more ranks than GPUs, a TensorBoard folder that cannot be written to.
        DataError: ids that the catalogue lacks, missing or unusable encodings, pairs or labels.
        ArtifactError: the epoch of `resuming_from` is not kept, damaged, or above `train.epochs`.
        TrainingDivergedError: the loss became NaN or infinite.
        RankFailedError: a rank failed, for one of these reasons or another, or was killed.
    """
    checkpoints = ctx.work / _key(ctx)
    here = ctx.settings.train.ranks == 1 and ctx.settings.train.launcher == "torchrun"
    report = _train_here(ctx, checkpoints) if here else _train_on_ranks(ctx, checkpoints)
    _drop_others(checkpoints)  # not before: a slip in the settings should cost no checkpoint
    return report


def _train_here(ctx: StageContext, checkpoints: Path) -> StageReport:
    training_device(ctx.settings.train)  # inputs take long to read: refuse before
    return train(ctx.settings, ctx.input, ctx.out, checkpoints, resume_from=_resume_from.get())


def _train_on_ranks(ctx: StageContext, checkpoints: Path) -> StageReport:
    settings = ctx.settings
    job = Job.of(
        settings,
        inputs={name: artifact.path for name, artifact in ctx.inputs.items()},
        out=ctx.out,
        checkpoints=checkpoints,
        resume_from=_resume_from.get(),
    )
    return run_ranks(job, ctx.work / "ranks", settings)


def train(
    settings: Settings,
    find: Find,
    out: Path,
    checkpoints: Path,
    *,
    ranks: Ranks | None = None,
    resume_from: int | None = None,
) -> StageReport:
    """What `run` does, in this process or as one rank of several, of which the first writes.

    Examples are streamed from a file beside the checkpoints.

    Args:
        settings: sections run, data, history and train.
        find: inputs of the stages ingest, swing and encode.
        out: folder for the outputs.
        checkpoints: folder of the finished epochs.
        ranks: this process among those that share the training.
        resume_from: see `Trainer.fit`.
    """
    seed, ranks = settings.run.seed, ranks or Ranks()
    data, encodings, samplers = load_inputs(settings, find)
    examples = checkpoints.parent / "examples.parquet"
    if ranks.first:
        write_examples(data.examples["train"], examples)
    ranks.after_first()
    vectors = {side: encoding.vectors for side, encoding in encodings.items()}
    trainer = fit(
        data,
        vectors,
        samplers,
        settings.train,
        seed=seed,
        checkpoint=checkpoints,
        ranks=ranks,
        resume_from=resume_from,
        source=ExampleFiles(examples, len(data.user_ids), len(data.item_ids)),
    )
    report = StageReport(
        rows_in=sum(len(examples) for examples in data.examples.values()),
        rows_out=len(data.item_ids) + len(data.user_ids),
    )
    if not trainer.ranks.first:
        return report
    metrics = _metrics(trainer, samplers)
    meta = save_adapters(out / "adapter.safetensors", trainer.model.adapters, encodings["item"].encoder_id)
    save_module(
        out / "backbone.safetensors",
        trainer.model.backbone.state_dict(),
        {
            "backbone": settings.train.backbone,
            "field_dim": settings.train.field_dim,
            "shown": list(trainer.model.shown),
            "affinity": trainer.model.affinity,
            "dim": settings.train.dim,
            "fields": list(FIELDS.items()),  # the order counts, and JSON's objects are written in another
            "vocabularies": data.vocabularies,
            "model_id": meta.model_id,
        },
    )
    _write_json(out / "metrics.json", metrics)
    _write_json(out / "curves.json", asdict(trainer.history))
    logger.info(
        "epoch %d: test AUC %.4f (item mean %.4f)",
        metrics["epoch"],
        metrics["test"]["auc"],
        metrics["item_mean"]["test"]["auc"],
    )
    return StageReport(
        rows_in=report.rows_in,
        rows_out=report.rows_out,
        models={meta.model_id: meta.model_id.rpartition("-")[2]},
        notes=_finite(metrics),
    )


def fit(
    data: CtrData,
    encodings: Mapping[str, Tensor],
    samplers: Mapping[str, PositiveSampler],
    settings: TrainSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
    ranks: Ranks | None = None,
    resume_from: int | None = None,
    source: ExampleSource | None = None,
) -> Trainer:
    """Build the model that the settings describe and train it; the trainer then holds the chosen epoch's weights.

    Args:
        data: examples and features.
        encodings: side -> (N, D) in catalogue order; none for a model without text, or one side's alone.
        samplers: side -> positives, for the contrasted ones among these sides.
        settings: of the model and the training.
        seed: of everything random.
        checkpoint: folder of the finished epochs; None keeps none.
        ranks: this process among those that share the training.
        resume_from: see `Trainer.fit`.
        source: examples to train on; None: those of `data`, in memory.
    """
    ranks = ranks or Ranks()
    model = build_model(data, encodings, settings, seed, gather=ranks.world > 1)
    trainer = Trainer(
        model, data, encodings, samplers, settings, seed=seed, checkpoint=checkpoint, ranks=ranks, source=source
    )
    trainer.fit(resume_from)
    return trainer


def load_inputs(settings: Settings, find: Find) -> tuple[CtrData, dict[str, Encodings], dict[str, PositiveSampler]]:
    """Examples, encodings and samplers by side, all in catalogue order.

    Args:
        settings: sections run, data, history and train.
        find: inputs of the stages ingest, swing and encode.

    Raises:
        DataError: see `run`.
    """
    data = build_ctr_data(
        read_table(find("ingest", "interactions.parquet"), INTERACTIONS),
        read_table(find("ingest", "items.parquet"), ITEMS),
        read_table(find("ingest", "users.parquet"), USERS),
        split=settings.data.split,
        max_history=settings.history.max_events,
        ties=settings.history.ties,
        seed=settings.run.seed,
    )
    user = read_encodings(find("encode", "user_encodings.parquet"), USER_ENCODINGS, data.user_ids)
    item = read_encodings(find("encode", "item_encodings.parquet"), ITEM_ENCODINGS, data.item_ids)
    if (user.encoder_id, user.vectors.shape[1]) != (item.encoder_id, item.vectors.shape[1]):
        raise DataError(
            f"users are encoded by {user.encoder_id} ({user.vectors.shape[1]} numbers) and items by {item.encoder_id} "
            f"({item.vectors.shape[1]} numbers): one encoder is accepted; run  kellm run --from encode"
        )
    known = {"user": (data.user_ids, data.user_in_train), "item": (data.item_ids, data.item_in_train)}
    samplers = {
        side: read_pairs(
            find("swing", f"{side}_pairs.parquet"),
            ids,
            in_train,
            f"{side}_id",
            settings.train.top_k,
            data.train_likes[side] if settings.train.positives == "normalized" else None,
        )
        for side, (ids, in_train) in known.items()
    }
    return data, {"user": user, "item": item}, samplers


def build_model(
    data: CtrData, encodings: Mapping[str, Tensor], settings: TrainSettings, seed: int, *, gather: bool = False
) -> KnowledgeAugmented:
    """The model with seeded initial weights; adapters standardise by the ids that have train rows.

    Args:
        data: its tables and train rows.
        encodings: side -> (N, D) in catalogue order, the sides that get an adapter.
        settings: of the model.
        seed: of the initial weights.
        gather: for a training on ranks.
    """
    in_train = {"user": torch.from_numpy(data.user_in_train), "item": torch.from_numpy(data.item_in_train)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = build_adapters(
            settings.adapter,
            {side: vectors.shape[1] for side, vectors in encodings.items()},
            hidden=settings.hidden,
            dim=settings.dim,
            activation=settings.activation,
            shared_experts=settings.shared_experts,
            specific_experts=settings.specific_experts,
        )
        for side, adapter in adapters.items():
            if isinstance(adapter, Standardized):
                adapter.standardize(encodings[side][in_train[side]])
        shown = [side for side in shown_sides(settings) if side in adapters]
        backbone = build_backbone(
            settings.backbone,
            FIELDS,
            data.table_rows,
            settings.field_dim,
            knowledge_dim=knowledge_width({side: adapters[side] for side in shown}, affinity=settings.affinity),
            dropout=settings.dropout,
        )
    return KnowledgeAugmented(
        backbone,
        adapters,
        weight=settings.weight,
        temperature=settings.temperature,
        reduction=settings.reduction,
        sides=[side for side in chosen_sides(settings) if side in adapters],
        shown=shown,
        affinity=settings.affinity,
        gather=gather,
    )


def _key(ctx: StageContext) -> str:
    """Names the checkpoints: settings and inputs that shape an epoch's weights, which how many follow does not."""
    parts = {name: artifact.manifest.output_hash for name, artifact in ctx.inputs.items()}
    settings = ctx.settings.model_copy(update={"train": ctx.settings.train.model_copy(update={"epochs": 1})})
    parts["settings"] = settings.hash_of(("run", "history", "train"))
    parts["roles"] = ctx.settings.data.split
    parts["version"] = f"{kellm_features.__version__} torch {torch.__version__}"
    return f"checkpoints-{digest(parts)[:32]}"


def _drop_others(checkpoints: Path) -> None:
    """Delete the checkpoints of other settings and inputs."""
    for other in checkpoints.parent.glob("checkpoints-*"):
        if other != checkpoints:
            shutil.rmtree(other, ignore_errors=True)


def _metrics(trainer: Trainer, samplers: Mapping[str, PositiveSampler]) -> dict[str, Any]:
    data = trainer.data
    return {
        "epoch": trainer.history.best_epoch,
        **{part: trainer.evaluate(part) for part in ("valid", "test")},
        "item_mean": {part: _item_mean(data, part) for part in ("valid", "test")},
        "neighbors": _neighbors(trainer, samplers),
        "targets": {part: len(data.examples[part]) for part in SPLITS},
        "training": {
            "device": trainer.device.type,
            "ranks": trainer.ranks.world,
            "precision": trainer.settings.precision,
            "compile": trainer.settings.compile,
        },
    }


def _item_mean(data: CtrData, part: str) -> dict[str, float]:
    return score(data, part, data.item_mean.numpy()[data.examples[part].item.numpy()])


def _neighbors(trainer: Trainer, samplers: Mapping[str, PositiveSampler]) -> dict[str, dict[str, float]]:
    """In-sample recall of SWING neighbours, before and after adaptation."""
    found = {}
    for side, adapter in trainer.model.adapters.items():
        truth, raw = samplers[side], trainer.encodings[side]
        adapted = embed(adapter.eval(), raw)
        found[side] = {
            "anchors": int((truth.sizes > 0).sum()),
            f"raw_recall_at_{RECALL_AT}": neighbor_recall(raw.cpu(), truth, RECALL_AT),
            f"adapted_recall_at_{RECALL_AT}": neighbor_recall(adapted.cpu(), truth, RECALL_AT),
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
