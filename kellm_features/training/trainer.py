"""The training loop: seeded by epoch, stopped by validation AUC, resumable at its last finished epoch."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kellm_features.errors import ArtifactError, KellmError
from kellm_features.progress import track
from kellm_features.settings import TrainSettings
from kellm_features.training.backbones import Bag
from kellm_features.training.data import CtrData
from kellm_features.training.knowledge import KnowledgeAugmented, Side
from kellm_features.training.metrics import auc, gauc, log_loss
from kellm_features.training.pairs import PositiveSampler

logger = logging.getLogger(__name__)

FIRST_ORDER_RATE = 10.0
"""Factor on the learning rate for weights of single ids: an id is seen in few steps, and its log-odds span units, which
a rate that suits shared layers does not reach before they overfit (MovieLens-100K: validation AUC 0.742 → 0.744, one
seed)."""
_CURVE_POINTS = 50  # sampled steps per epoch in the curve
_SCORE_BATCH = 8192


class TrainingDivergedError(KellmError):
    """The loss is no number any more."""


@dataclass
class History:
    """What a training went through."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    """One row an epoch: epoch, loss, ctr, uu, ii, valid_auc, valid_log_loss."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """Sampled steps: step, epoch, loss, ctr, uu, ii."""
    warm: bool = False
    """The warm-up is done."""
    best_epoch: int = 0
    """The epoch whose weights were kept, from 1."""


class Trainer:
    """Trains a `KnowledgeAugmented` model on `CtrData`.

    Every random choice of an epoch comes from (seed, epoch), so a training that was killed and resumed gives the
    weights of one that was not; on the CPU, the same bits.

    Args:
        model: moved to `device`.
        data: examples and features.
        encodings: side -> (N, D) float32 in catalogue order, for each of the model's adapters.
        samplers: side -> positives.
        settings: batch size, learning rate, epochs, patience, device.
        seed: of everything random here; initial weights are the caller's.
        checkpoint: file that holds the last finished epoch; None keeps none.
    """

    def __init__(
        self,
        model: KnowledgeAugmented,
        data: CtrData,
        encodings: Mapping[str, Tensor],
        samplers: Mapping[str, PositiveSampler],
        settings: TrainSettings,
        *,
        seed: int,
        checkpoint: Path | None = None,
    ) -> None:
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device)
        self.data = data
        self.encodings = {side: encodings[side].to(self.device) for side in model.adapters}
        self.samplers = samplers
        self.settings = settings
        self.seed = seed
        self.checkpoint = checkpoint
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, settings))
        self.history = History()
        self._best_auc = -math.inf
        self._best: dict[str, Tensor] = {}

    def fit(self) -> History:
        """Train to the end, or from where the checkpoint left off; the model then holds the chosen epoch's weights.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite.
            ArtifactError: the checkpoint is unreadable.
        """
        self._restore()
        examples = len(self.data.examples["train"])
        left = self.settings.epochs - len(self.history.epochs)
        self._warm_up()
        with track("train", left * examples, "examples") as advance:
            while len(self.history.epochs) < self.settings.epochs and not self._out_of_patience():
                self._epoch(len(self.history.epochs) + 1, advance)
                self._save()
        self.model.load_state_dict(self._best)
        return self.history

    def predict(self, part: str) -> npt.NDArray[np.float64]:
        """Probabilities of a like for the targets of one part of the split, (n,)."""
        examples = self.data.examples[part]
        was_training = self.model.training
        self.model.eval()
        scores = []
        with torch.inference_mode():
            embeddings = {
                side: adapter(self.encodings[side]).to(self.device) for side, adapter in self.model.adapters.items()
            }
            for start in range(0, len(examples), _SCORE_BATCH):
                user, item = (ids[start : start + _SCORE_BATCH] for ids in (examples.user, examples.item))
                rows = {"user": user.to(self.device), "item": item.to(self.device)}
                features = self._to_device(self.data.features(user, item))
                logits = self.model.logits(features, {side: z[rows[side]] for side, z in embeddings.items()})
                scores.append(logits.double().sigmoid().cpu())
        self.model.train(was_training)
        probabilities: npt.NDArray[np.float64] = torch.cat(scores).numpy()
        return probabilities

    def evaluate(self, part: str) -> dict[str, float]:
        """AUC, LogLoss and GAUC (by user) of one part."""
        return score(self.data, part, self.predict(part))

    def _warm_up(self) -> None:
        """Contrastive steps alone, each side's anchors in seeded passes: neighbours settle before clicks are fitted."""
        steps = self.settings.warmup_steps
        if self.history.warm or not steps or not self.model.adapters or not self.model.weight:
            return
        generator = self._generator(0)
        streams = {
            side: _passes(torch.nonzero(self.samplers[side].sizes > 0).squeeze(1), self.settings.batch_size, generator)
            for side in self.model.adapters
        }
        optimizer = torch.optim.AdamW(
            self.model.adapters.parameters(),
            lr=self.settings.adapter_learning_rate,
            weight_decay=self.settings.weight_decay,
        )
        every = max(1, steps // _CURVE_POINTS)
        with track("warm up", steps, "steps") as advance:
            for step in range(steps):
                terms = {
                    side: self.model.contrastive(side, self._side(side, next(stream), generator))[0]
                    for side, stream in streams.items()
                }
                total = torch.stack(list(terms.values())).sum()
                values = _named({"loss": self.model.weight * total, **terms})
                self._require_finite(0, step, values)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(total)
                optimizer.step()
                if step % every == 0:
                    self.history.steps.append({"step": step - steps, "epoch": 0, **values})
                advance(1, f"contrastive loss {values['loss']:.4f}")
        self.history.warm = True
        self._save()

    def _epoch(self, epoch: int, advance: Any) -> None:
        generator = self._generator(epoch)
        examples = self.data.examples["train"]
        order = torch.randperm(len(examples), generator=generator)
        batches = torch.split(order, self.settings.batch_size)
        every = max(1, len(batches) // _CURVE_POINTS)
        sums: dict[str, float] = {}
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout
            for step, rows in enumerate(batches):
                values = self._step(rows, generator)
                self._require_finite(epoch, step, values)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value * len(rows)
                if step % every == 0:
                    at = (epoch - 1) * len(batches) + step
                    self.history.steps.append({"step": at, "epoch": epoch, **values})
                advance(len(rows), f"epoch {epoch}, loss {values['loss']:.4f}")
        valid = self.evaluate("valid")
        means = {name: total / len(examples) for name, total in sums.items()}
        self.history.epochs.append(
            {"epoch": epoch, **means, "valid_auc": valid["auc"], "valid_log_loss": valid["log_loss"]}
        )
        logger.info("epoch %d: loss %.4f, valid AUC %.4f", epoch, means["loss"], valid["auc"])
        if valid["auc"] > self._best_auc or self.settings.patience == 0:
            self._best_auc = valid["auc"]
            self.history.best_epoch = epoch
            self._best = copy.deepcopy(self.model.state_dict())

    def _step(self, rows: Tensor, generator: torch.Generator) -> dict[str, float]:
        examples = self.data.examples["train"]
        user, item, label = examples.user[rows], examples.item[rows], examples.label[rows]
        features = self._to_device(self.data.features(user, item, generator))
        ids = {"user": user, "item": item}
        sides = {side: self._side(side, ids[side], generator) for side in self.model.adapters}
        loss = self.model.loss(features, sides, label.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.total)
        self.optimizer.step()
        return _named({"loss": loss.total, "ctr": loss.ctr, **loss.contrastive})

    def _side(self, side: str, ids: Tensor, generator: torch.Generator) -> Side:
        """Distinct ids of the batch, those with a positive first, and one drawn positive for each of them."""
        distinct, rows = torch.unique(ids, return_inverse=True)
        sampler = self.samplers[side]
        lone = sampler.sizes[distinct] == 0
        order = torch.argsort(lone.long(), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        anchors = distinct[order][: int((~lone).sum())]
        positives = sampler.sample(anchors, generator)
        x = self.encodings[side]
        return Side(
            encodings=x[distinct[order].to(self.device)],
            rows=place[rows].to(self.device),
            positives=x[positives.to(self.device)],
            anchor_ids=anchors.to(self.device),
            positive_ids=positives.to(self.device),
        )

    def _to_device(self, features: dict[str, Bag]) -> dict[str, Bag]:
        if self.device.type == "cpu":
            return features
        return {n: Bag(bag.ids.to(self.device), bag.weights.to(self.device)) for n, bag in features.items()}

    def _out_of_patience(self) -> bool:
        waited = len(self.history.epochs) - self.history.best_epoch
        return 0 < self.settings.patience <= waited

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))

    def _require_finite(self, epoch: int, step: int, values: dict[str, float]) -> None:
        if math.isfinite(values["loss"]):
            return
        parts = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        raise TrainingDivergedError(
            f"training diverged at epoch {epoch}, step {step}: {parts}; lower train.learning_rate "
            f"(now {self.settings.learning_rate:g}) or raise train.temperature (now {self.settings.temperature:g})"
        )

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self._best,
            "best_auc": self._best_auc,
            "history": asdict(self.history),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(self.checkpoint)

    def _restore(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise ArtifactError(f"{self.checkpoint} is not a readable checkpoint ({error}): delete it") from error
        self._best, self._best_auc = state["best"], state["best_auc"]
        self.history = History(**state["history"])
        logger.info("resuming after epoch %d of %d", len(self.history.epochs), self.settings.epochs)


def _parameter_groups(model: KnowledgeAugmented, settings: TrainSettings) -> list[dict[str, Any]]:
    """Three rates: adapters, the backbone's first-order weights where it names them, and all else."""
    adapters = list(model.adapters.parameters())
    named = getattr(model.backbone, "first_order_parameters", None)
    first_order = list(named()) if named else []
    apart = {id(parameter) for parameter in (*adapters, *first_order)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    rate = settings.learning_rate
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for parameters, lr, decay in (
            (adapters, settings.adapter_learning_rate, settings.weight_decay),
            (first_order, FIRST_ORDER_RATE * rate, 0.0),
            (rest, rate, settings.weight_decay),
        )
        if parameters
    ]


def score(data: CtrData, part: str, probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
    """AUC, LogLoss and GAUC of given predictions for the targets of one part."""
    examples = data.examples[part]
    labels = examples.label.numpy() > 0
    return {
        "auc": auc(labels, probabilities),
        "log_loss": log_loss(labels, probabilities),
        "gauc": gauc(labels, probabilities, examples.user.numpy()),
    }


def _named(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers under the names of the curve."""
    short = {"user": "uu", "item": "ii"}
    return {short.get(name, name): float(value.detach()) for name, value in values.items()}


def _passes(ids: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `ids` without end, shuffled anew in each pass."""
    while len(ids):
        yield from torch.split(ids[torch.randperm(len(ids), generator=generator)], size)
