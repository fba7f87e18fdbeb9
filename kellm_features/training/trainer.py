"""The training loop: seeded by epoch, stopped by validation AUC, resumable at finished epochs, on one rank or more."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kellm_features.errors import ArtifactError, DataError, first_line
from kellm_features.progress import Advance, track
from kellm_features.settings import TrainSettings
from kellm_features.training.adapter import embed
from kellm_features.training.data import CtrData
from kellm_features.training.device import training_device
from kellm_features.training.draws import Draws
from kellm_features.training.knowledge import JointLoss, JointStep, KnowledgeAugmented, Mode, pooled
from kellm_features.training.loader import Batch, BatchLoader, ExampleSource, ExampleTable
from kellm_features.training.meter import Meter, TrainingDivergedError, remedy
from kellm_features.training.monitor import Monitor, Silent, TensorBoard
from kellm_features.training.optimizer import adapter_optimizer, joint_optimizer
from kellm_features.training.pairs import PositiveSampler
from kellm_features.training.ranks import Ranks
from kellm_features.training.schedule import contrasted_sides, has_partial_steps, modes, warmup_steps
from kellm_features.training.scores import score
from kellm_features.training.sides import SideBuilder, past_bags
from kellm_features.training.state import CheckpointFolder, History, TrainingState

__all__ = ["History", "Trainer", "TrainingDivergedError"]

logger = logging.getLogger(__name__)

_CURVE_POINTS = 50  # sampled steps per epoch in the curve
_SCORE_BATCH = 8192


class Trainer:
    """Trains a `KnowledgeAugmented` model on `CtrData`.

    Every random choice of an epoch comes from (seed, epoch), so a training that was killed and resumed gives the
    weights of one that was not; on the CPU, the same bits. Choices that concern a batch are made for the whole of it,
    so W ranks take the steps that one process takes, to within rounding, unless the model draws (dropout) or computes
    over the batch (batch normalisation): that each rank does for its own part.

    Args:
        model: moved to `device`; for W > 1 ranks built with `gather=True`.
        data: examples and features.
        encodings: side -> (N, D) float32 in catalogue order, for each of the model's adapters.
        samplers: side -> positives, for each contrasted side.
        settings: batch size, learning rates, schedule, epochs, patience, precision, device.
        seed: of everything random here; initial weights are the caller's.
        checkpoint: folder of the finished epochs (`CheckpointFolder`), which all ranks can read; None keeps none.
        ranks: this process among those that share the training.
        source: examples to train on, the same on all ranks; None: those of `data`, in memory.

    Raises:
        ConfigError: `settings.device` is none that this machine has.
        DataError: a side that is not shown to the backbone has no positives either.
        ValueError: a contrasted side without a sampler; ranks, and a model that contrasts on each alone.
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
        ranks: Ranks | None = None,
        source: ExampleSource | None = None,
    ) -> None:
        self.device = training_device(settings)
        self.model = model.to(self.device)
        self.data = data
        self.source = source or ExampleTable(data.examples["train"])
        self.encodings = {side: encodings[side].to(self.device) for side in model.adapters}
        self.settings = settings
        self.seed = seed
        self.checkpoints = None if checkpoint is None else CheckpointFolder(checkpoint, settings.keep_checkpoints)
        self.ranks = ranks or Ranks()
        self.draws = Draws(seed, self.ranks.rank, self.device)
        self.history = History()
        if self.ranks.world > 1 and not model.contrast.gather:
            raise ValueError("the model contrasts on each rank alone: build it with gather=True")
        self.sides = SideBuilder(self.encodings, samplers, contrasted_sides(model), self.ranks)
        if idle := sorted(set(model.adapters) - set(model.shown) - set(self.sides.contrasted)):
            raise DataError(
                f"the adapters of {idle} have nothing to learn from: the backbone is not shown their embeddings, and "
                f"SWING has no pairs of theirs, or their term no weight ({model.weight:g}); show them, for users by "
                "train.profile = true"
            )
        self.modes = modes(settings.schedule, self.sides.contrasted)
        self.optimizer = joint_optimizer(model, settings)
        self._step = self._wrapped()
        self._monitor: Monitor = Silent()
        self._best_auc = -math.inf
        self._best: dict[str, Tensor] = {}

    def fit(self, resume_from: int | None = None) -> History:
        """Train to the end, or on from a checkpoint; the model then holds the chosen epoch's weights.

        A damaged newest checkpoint is passed over with a warning for the one before it: the epoch is done again, to
        the same end.

        Args:
            resume_from: the epoch to go on from; later ones are dropped. 0: the state after the warm-up where that is
                kept, else the start. None: the newest that is kept, up to `settings.epochs`.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite.
            ArtifactError: the epoch is not kept, above `settings.epochs`, damaged, not to be read or loaded, or of
                another model; no checkpoint is deleted then.
            ConfigError: `settings.tensorboard` is no folder that can be written to.
            MissingExtraError: `settings.tensorboard` without tensorboard.
        """
        found = self._restore(resume_from)
        per_epoch = sum(self.source.group_rows)
        with self._watched():  # before anything is dropped, as it may fail
            if self.checkpoints is not None and self.ranks.first:
                # Unless it was told to, it drops damaged epochs alone, and leaves those of a longer training.
                self.checkpoints.drop_after(found, up_to=self.settings.epochs if resume_from is None else None)
            self._warm_up()
            with self._progress("train", self._epochs_left() * per_epoch, "examples") as advance:
                while self._epochs_left():
                    self._epoch(len(self.history.epochs) + 1, advance)
                    self._save()
        self.model.load_state_dict(self._best)
        return self.history

    def predict(self, part: str) -> npt.NDArray[np.float64]:
        """Probabilities of a like for the targets of one part of the split, (n,); in float32 whatever the training."""
        examples = self.data.examples[part]
        was_training = self.model.training
        self.model.eval()
        scores = []
        with torch.inference_mode():
            embeddings = {side: embed(self.model.adapters[side], self.encodings[side]) for side in self.model.shown}
            for start in range(0, len(examples), _SCORE_BATCH):
                user, item = (ids[start : start + _SCORE_BATCH] for ids in (examples.user, examples.item))
                rows = {"user": user.to(self.device), "item": item.to(self.device)}
                features = self.data.features(user, item)
                vectors = {side: z[rows[side]] for side, z in embeddings.items()}
                if self.model.affinity == "history":
                    past = past_bags((features.places - 1).clamp_min(0), features, self.device)
                    vectors |= pooled(past, embeddings["item"])
                logits = self.model.logits(features.to(self.device), vectors)
                scores.append(logits.double().sigmoid().cpu())
        self.model.train(was_training)
        probabilities: npt.NDArray[np.float64] = torch.cat(scores).numpy()
        return probabilities

    def evaluate(self, part: str) -> dict[str, float]:
        """AUC, LogLoss, GAUC (by user) and calibration error of one part."""
        return score(self.data, part, self.predict(part))

    def _warm_up(self) -> None:
        """Contrastive steps alone, each side's anchors in seeded passes: neighbours settle before clicks are fitted."""
        steps = warmup_steps(self.settings, self.sides.contrasted)
        if self.history.warm or not steps:
            return
        generator = self.draws.positives(0)
        anchors = self.sides.passes(self.settings.batch_size, generator)
        optimizer = adapter_optimizer(self.model, self.settings)
        meter = self._meter(0)
        every = max(1, steps // _CURVE_POINTS)
        note = ""
        self.model.train()
        with self.draws.of_model(0), self._progress("warm up", steps, "steps") as advance:
            for step in range(steps):
                meter.add(self._contrast(next(anchors), generator, optimizer), 1)
                if step % every == 0 or step == steps - 1:
                    values = meter.read(step)
                    self._curve({"step": step - steps, "epoch": 0, **values})
                    note = f"contrastive loss {values['loss']:.4f}"
                advance(1, note)
        self.history.warm = True
        self._save()

    def _epoch(self, epoch: int, advance: Advance) -> None:
        loader = self._loader(epoch)
        every = max(1, len(loader) // _CURVE_POINTS)
        meter = self._meter(epoch)
        positives = self.draws.positives(epoch)
        anchors = self.sides.passes(self.settings.batch_size, positives)
        started, note = time.monotonic(), ""
        self.model.train()
        with self.draws.of_model(epoch):
            for step, batch in enumerate(loader):
                losses = self._clicks(batch, positives)
                if "contrastive" in self.modes:
                    contrast = self._contrast(next(anchors), positives, self.optimizer)
                    losses = {**contrast, **losses, "loss": losses["loss"] + contrast["loss"]}
                meter.add(losses, len(batch.whole_user))
                if step % every == 0:
                    values = meter.read(step)
                    self._curve({"step": (epoch - 1) * len(loader) + step, "epoch": epoch, **values})
                    note = f"epoch {epoch}, loss {values['loss']:.4f}"
                advance(len(batch.whole_user), note)
        means = meter.means(len(loader) - 1)
        seconds = time.monotonic() - started
        self._validate(epoch, means)
        rates = {"learning_rate": self.settings.learning_rate, "examples_per_s": loader.rows / max(seconds, 1e-9)}
        self._monitor.epoch(self.history.epochs[-1], epoch * len(loader) - 1, rates)

    def _validate(self, epoch: int, means: dict[str, float]) -> None:
        """Score the epoch, once for all ranks, and keep its weights if they are the best so far."""
        valid = [math.nan, math.nan]
        if self.ranks.first:
            found = self.evaluate("valid")
            valid = [found["auc"], found["log_loss"]]
        area, loss = self.ranks.told(valid)
        if not math.isfinite(loss):
            told = f"training diverged at the end of epoch {epoch}: validation LogLoss is {loss}"
            raise TrainingDivergedError(f"{told}; {self._remedy(epoch)}")
        self.history.epochs.append({"epoch": epoch, **means, "valid_auc": area, "valid_log_loss": loss})
        logger.info("epoch %d: loss %.4f, valid AUC %.4f", epoch, means["loss"], area)
        if area > self._best_auc or self.settings.patience == 0:
            self._best_auc = area
            self.history.best_epoch = epoch
            self._best = copy.deepcopy(self.model.state_dict())

    def _loader(self, epoch: int) -> BatchLoader:
        return BatchLoader(
            self.source,
            self.data,
            self.settings.batch_size,
            seed=self.seed,
            epoch=epoch,
            training=True,
            workers=self.settings.workers,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )

    def _clicks(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """A step that learns from clicks, jointly or alone."""
        mode: Mode = self.modes[0]
        # Averaged over ranks, the means of parts become the mean of the batch at these weights, whatever their lengths.
        share = self.ranks.world * len(batch.user) / len(batch.whole_user)
        if not share:  # a last batch with fewer examples than ranks: this one takes part in the step, at weight 0
            batch = self._stand_in(batch)
        own = {"user": batch.user, "item": batch.item}
        sides = self.sides.of_batch(
            {side: own[side] for side in self.model.shown},
            {"user": batch.whole_user, "item": batch.whole_item},
            generator,
            contrast=mode == "joint",
            seen=batch.features if self.model.affinity == "history" else None,
        )
        features, labels = batch.features.to(self.device), batch.label.to(self.device)
        with self._precision():
            out: JointLoss = self._step(features, sides, labels, mode)
        total = out.total
        if share != 1:  # the contrastive terms are of the whole batch already
            whole = self.model.weight * sum(out.contrastive.values(), torch.zeros_like(out.ctr))
            total = share * (out.total - whole) + whole
        return self._descend(self.optimizer, total, out, share)

    def _stand_in(self, batch: Batch) -> Batch:
        user, item = batch.whole_user[:1], batch.whole_item[:1]
        features = self.data.features(user, item)
        return batch._replace(user=user, item=item, label=torch.zeros(1), features=features)

    def _contrast(
        self, anchors: dict[str, Tensor], generator: torch.Generator, optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """A step of the contrastive terms alone."""
        sides = self.sides.of_anchors(anchors, generator)
        with self._precision():
            out: JointLoss = self._step(None, sides, None, "contrastive")
        return self._descend(optimizer, out.total, out, 1.0)

    def _descend(
        self, optimizer: torch.optim.Optimizer, total: Tensor, out: JointLoss, share: float
    ) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        optimizer.step()
        short = {"user": "uu", "item": "ii"}
        terms = {short.get(side, side): term.detach() for side, term in out.contrastive.items()}
        return {"loss": total.detach(), "ctr": share * out.ctr.detach(), **terms}

    def _wrapped(self) -> nn.Module:
        """The model's step, compiled and averaged over ranks as the settings want it."""
        step: nn.Module = JointStep(self.model)
        if self.settings.compile:
            step.compile(dynamic=True)  # the number of distinct items is another in each batch
        if self.ranks.world == 1:
            return step
        return nn.parallel.DistributedDataParallel(
            step,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=has_partial_steps(self.settings, self.sides.contrasted, self.model.shown),
        )

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _meter(self, epoch: int) -> Meter:
        return Meter(epoch, self.device, self.ranks, self._remedy(epoch))

    def _remedy(self, epoch: int) -> str:
        has = {"adapted": bool(self.model.adapters), "contrasted": bool(self.sides.contrasted)}
        return remedy(self.settings, warm_up=epoch == 0, **has)

    def _epochs_left(self) -> int:
        """Epochs to go at most: 0 when all are done or patience has run out."""
        done = len(self.history.epochs)
        if 0 < self.settings.patience <= done - self.history.best_epoch:
            return 0
        return max(0, self.settings.epochs - done)

    @contextmanager
    def _progress(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        if not self.ranks.first:
            yield lambda amount=1, note="": None
            return
        with track(label, total, unit) as advance:
            yield advance

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Let TensorBoard follow, where the settings name a folder."""
        with ExitStack() as stack:
            if self.settings.tensorboard is not None and self.ranks.first:
                done = len(self.history.epochs)
                batches = -(-sum(self.source.group_rows) // self.settings.batch_size)
                self._monitor = stack.enter_context(
                    TensorBoard(
                        self.settings.tensorboard,
                        resumed_at=done * batches if done or self.history.warm else None,
                        warmup_steps=warmup_steps(self.settings, self.sides.contrasted),
                    )
                )
            yield
        self._monitor = Silent()

    def _curve(self, row: dict[str, float]) -> None:
        self.history.steps.append(row)
        self._monitor.step(row)

    def _save(self) -> None:
        if self.checkpoints is None or not self.ranks.first:
            return
        own = self.history.best_epoch == len(self.history.epochs)
        best = {} if own else self._best
        self.checkpoints.save(
            TrainingState(self.model.state_dict(), self.optimizer.state_dict(), best, self._best_auc, self.history)
        )

    def _restore(self, epoch: int | None) -> int:
        """Take the state of an epoch, or of the newest; which one that was, -1 for the start."""
        if self.checkpoints is None:
            if epoch is not None:
                raise ArtifactError(f"epoch {epoch} cannot be resumed from: this training keeps no checkpoints")
            return -1
        state, found = None, -1
        if self.ranks.first:
            if epoch is None:
                state = self.checkpoints.newest(self.settings.epochs)
                found = -1 if state is None else len(state.history.epochs)
            elif epoch > 0 or 0 in self.checkpoints.epochs():
                found = epoch
        if (found := int(self.ranks.told([float(found)])[0])) < 0:
            return found
        state = state or self.checkpoints.load(found)
        if found > self.settings.epochs:
            raise ArtifactError(
                f"epoch {found} cannot be resumed from: train.epochs = {self.settings.epochs} ends before it; raise "
                "train.epochs, or name an earlier epoch"
            )
        try:
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
        except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the checkpoint
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"{self.checkpoints.file(len(state.history.epochs))} is of another model or other settings "
                f"({first_line(error)}): delete {self.checkpoints.path}, or choose another folder"
            ) from error
        self.history, self._best_auc = state.history, state.best_auc
        if self.history.best_epoch:
            self._best = state.best or copy.deepcopy(self.model.state_dict())
        logger.info("resuming after epoch %d of %d", len(self.history.epochs), self.settings.epochs)
        return found
