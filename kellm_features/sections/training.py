"""Sections of training and of its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kellm_features.sections.base import PositiveInt, Section


class TrainSettings(Section):
    """Adapter and backbone, trained jointly: loss = ctr + weight * (uu + ii) (KELLMRec §3.4)."""

    backbone: Literal["deepfm", "din", "dien"] = "deepfm"
    adapter: Annotated[
        Literal["mlp", "experts"], Field(description="mlp: KELLMRec's two layers; experts: KAR's hybrid experts")
    ] = "mlp"
    shared_experts: Annotated[int, Field(ge=1, le=64, description="of adapter = experts, for both sides")] = 2
    specific_experts: Annotated[int, Field(ge=1, le=64, description="of adapter = experts, for each side")] = 5
    hidden: PositiveInt = 256
    dim: Annotated[int, Field(gt=0, le=4096, description="length of the served embedding")] = 64
    activation: Literal["gelu", "relu"] = "gelu"
    epochs: PositiveInt = 8
    batch_size: Annotated[
        int,
        Field(
            gt=0,
            description="examples of a step, over all ranks; where a step is of the contrastive terms alone (pretrain, "
            "alternating), anchors of each side",
        ),
    ] = 512
    learning_rate: Annotated[float, Field(gt=0, lt=1, description="of the backbone")] = 5e-4
    adapter_learning_rate: Annotated[float, Field(gt=0, lt=1, description="of the adapters")] = 1e-3
    schedule: Annotated[
        Literal["joint", "pretrain", "alternating"],
        Field(
            description="joint: KELLMRec's one loss; pretrain: warmup_steps of contrastive steps alone, then joint; "
            "alternating: a step of clicks, a step of the contrastive terms"
        ),
    ] = "pretrain"
    warmup_steps: Annotated[
        int, Field(ge=0, description="of schedule = pretrain: contrastive steps of the adapters before the joint ones")
    ] = 600
    sides: Annotated[
        Literal["both", "item", "user", "none"], Field(description="whose contrastive terms are in the loss")
    ] = "both"
    profile: Annotated[
        bool,
        Field(description="whether the backbone gets the users' embeddings; without, these learn from SWING alone"),
    ] = False
    affinity: Annotated[
        Literal["none", "profile", "history"],
        Field(
            description="products that the backbone gets beside the vectors: item times profile, which it then gets "
            "too, or item times the means of the items liked and disliked before; none: KELLMRec"
        ),
    ] = "history"
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.03
    weight: Annotated[float, Field(ge=0, description="w of the contrastive terms")] = 0.01
    reduction: Annotated[
        Literal["sum", "mean"], Field(description="of the contrastive terms; sum is the printed form, at w = 0.004")
    ] = "mean"
    top_k: Annotated[
        int, Field(gt=0, description="positives are drawn from this many SWING neighbours, swing.top_k at most")
    ] = 20
    positives: Annotated[
        Literal["raw", "normalized"],
        Field(
            description="normalized: scores over (10 + times that the neighbour was liked), which tames hubs; ranks "
            "anew what SWING's own cut kept"
        ),
    ] = "normalized"
    field_dim: Annotated[int, Field(gt=0, description="width of the backbone's id and genre embeddings")] = 16
    weight_decay: Annotated[
        float, Field(ge=0, description="of AdamW; weights of single ids (the first order) have none")
    ] = 0.0
    dropout: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="after the hidden layers of the backbone's DNN, and on the knowledge vectors that enter it",
        ),
    ] = 0.5
    patience: Annotated[
        int, Field(ge=0, description="epochs without a better validation AUC before stopping; 0: never, keep the last")
    ] = 3
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="bfloat16: autocast over float32 weights")
    ] = "float32"
    compile: Annotated[bool, Field(description="torch.compile the model", json_schema_extra={"tuning": True})] = False
    device: Annotated[
        str | None, Field(description="None: cuda where there is one", json_schema_extra={"tuning": True})
    ] = None
    ranks: Annotated[
        int,
        Field(
            ge=1,
            description="processes that share a batch (DDP); dropout and the batch statistics of DIN and DIEN are each "
            "rank's own, so weights differ from one process's as by another seed",
            json_schema_extra={"tuning": True},
        ),
    ] = 1
    launcher: Annotated[
        Literal["torchrun", "spark"],
        Field(
            description="who starts the ranks: torchrun here (one rank: this process itself), or Spark's "
            "TorchDistributor on its executors",
            json_schema_extra={"tuning": True},
        ),
    ] = "torchrun"
    workers: Annotated[
        int,
        Field(
            ge=0, description="processes that prepare batches; 0: the trainer's own", json_schema_extra={"tuning": True}
        ),
    ] = 0
    keep_checkpoints: Annotated[
        int | None,
        Field(ge=1, description="newest epochs to keep for resuming; None: all", json_schema_extra={"tuning": True}),
    ] = None
    tensorboard: Annotated[
        Path | None, Field(description="folder for TensorBoard's event files", json_schema_extra={"tuning": True})
    ] = None

    @model_validator(mode="after")
    def _users_learn(self) -> TrainSettings:
        if not (self.profile or self.affinity == "profile" or (self.sides in ("both", "user") and self.weight > 0)):
            raise ValueError(
                f'sides = "{self.sides}" at weight = {self.weight:g} with profile = false leaves the users\' '
                'embeddings nothing to learn from: set profile = true, or sides = "both" or "user" at a weight above 0'
            )
        return self


class EvaluateSettings(Section):
    """How arms are compared: folds, seeds, and a budget of training that is the same for all."""

    backbones: Annotated[
        list[Literal["deepfm", "din", "dien"]], Field(min_length=1, description="of the ladder and the replication")
    ] = Field(default=["deepfm", "din", "dien"])
    cold_backbones: Annotated[
        list[Literal["deepfm", "din", "dien"]], Field(min_length=1, description="on cold items and on the time split")
    ] = Field(default=["deepfm"])
    folds: Annotated[int, Field(ge=1, le=10, description="of ten blocks of users, how many are tested in turn")] = 3
    cold_folds: Annotated[int, Field(ge=1, le=10, description="draws of cold items, each with a block of users")] = 2
    cold_share: Annotated[float, Field(gt=0, lt=1, description="of the items, left without any train interaction")] = (
        0.2
    )
    seeds: Annotated[int, Field(ge=1, le=20, description="initial weights per fold")] = 1
    trials: Annotated[
        int, Field(ge=1, le=4, description="learning rates that each arm may try on the last fold's validation part")
    ] = 2
    epochs: Annotated[int, Field(gt=0, description="of each training; the best by validation AUC is taken")] = 12
    patience: Annotated[
        int | None,
        Field(
            ge=1,
            description="epochs without a better validation AUC before stopping; None: none stops early, and no dip "
            "of a curve decides between arms",
        ),
    ] = None
    batch_size: PositiveInt = 4096
    hidden: Annotated[int, Field(gt=0, description="width of the adapters, for vectors side by side")] = 64
    samples: Annotated[
        int, Field(ge=100, le=100_000, description="of the bootstrap; no p is below 2 / samples, times Holm's claims")
    ] = 2000
    jobs: Annotated[
        int, Field(ge=1, description="trainings at a time, one core each", json_schema_extra={"tuning": True})
    ] = 2
