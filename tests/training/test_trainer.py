"""The trainer: schedules, checkpoints, precision, and what it says on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from kellm_features.errors import ArtifactError, ConfigError
from kellm_features.stages import StageContext
from kellm_features.training import stage
from kellm_features.training.data import CtrData
from kellm_features.training.knowledge import KnowledgeAugmented
from kellm_features.training.loader import ExampleFiles, ExampleSource, write_examples
from kellm_features.training.state import CheckpointFolder
from kellm_features.training.trainer import Trainer, TrainingDivergedError

Contexts = Callable[..., StageContext]


@pytest.fixture
def fit(context: Contexts) -> Callable[..., Trainer]:
    """`fit(encoded=("item",), checkpoint=None, resume_from=None, source=None, epochs=2, …)`, on the small world."""

    def run(
        encoded: tuple[str, ...] = ("user", "item"),
        checkpoint: Path | None = None,
        resume_from: int | None = None,
        source: Callable[[CtrData], ExampleSource] | None = None,
        **settings: object,
    ) -> Trainer:
        ctx = context("train", **{"schedule": "joint", "patience": 0, "epochs": 2} | settings)
        data, encodings, samplers = stage.load_inputs(ctx.settings, ctx.input)
        vectors = {side: encodings[side].vectors for side in encoded}
        return stage.fit(
            data,
            vectors,
            samplers,
            ctx.settings.train,
            seed=7,
            checkpoint=checkpoint,
            resume_from=resume_from,
            source=source(data) if source else None,
        )

    return run


Fit = Callable[..., Trainer]


def assert_same_bits(one: Trainer, other: Trainer) -> None:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.history == other.history


@pytest.mark.parametrize("schedule", ["joint", "pretrain", "alternating"])
def test_without_a_side_or_a_weight_nothing_contrastive_is_done(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a contrastive term was computed")

    monkeypatch.setattr("kellm_features.training.losses.AdapterInfoNCE.forward", refuse)
    monkeypatch.setattr("kellm_features.training.pairs.PositiveSampler.sample", refuse)
    none, weightless = (fit(schedule=schedule, profile=True, **off) for off in ({"sides": "none"}, {"weight": 0.0}))
    assert_same_bits(none, weightless)
    assert set(none.history.steps[-1]) == {"step", "epoch", "loss", "ctr"}
    assert none.history.epochs[-1]["loss"] == none.history.epochs[-1]["ctr"]


@pytest.mark.parametrize(("sides", "terms"), [("both", {"uu", "ii"}), ("item", {"ii"}), ("user", {"uu"})])
def test_only_the_terms_of_the_chosen_sides_are_in_the_loss(fit: Fit, sides: str, terms: set[str]) -> None:
    row = fit(sides=sides, weight=0.25, profile=True).history.epochs[-1]
    assert {"uu", "ii"} & set(row) == terms
    assert row["loss"] == pytest.approx(row["ctr"] + 0.25 * sum(row[term] for term in terms), rel=1e-6)


@pytest.mark.parametrize("encoded", [(), ("item",), ("user", "item")])
@pytest.mark.parametrize("backbone", ["deepfm", "din", "dien"])
def test_any_sides_may_have_text(fit: Fit, encoded: tuple[str, ...], backbone: str) -> None:
    trainer = fit(encoded, backbone=backbone, affinity="history")
    losses = [row["loss"] for row in trainer.history.epochs]
    assert losses[1] < losses[0]
    scores = trainer.predict("test")
    assert scores.shape == (len(trainer.data.examples["test"]),)
    assert 0 < scores.min() < scores.max() < 1


def steps_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modes of all steps to come."""
    from kellm_features.training.knowledge import JointStep

    modes: list[str] = []
    real = JointStep.forward

    def forward(self: JointStep, features: Any, sides: Any, labels: Any, mode: Any = "joint") -> Any:
        modes.append(mode)
        return real(self, features, sides, labels, mode)

    monkeypatch.setattr(JointStep, "forward", forward)
    return modes


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("joint", ["joint"] * 12),
        ("pretrain", ["contrastive"] * 3 + ["joint"] * 12),
        ("alternating", ["ctr", "contrastive"] * 12),
    ],
)
def test_schedules_take_the_steps_they_are_named_for(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, schedule: str, wanted: list[str]
) -> None:
    modes = steps_seen(monkeypatch)
    trainer = fit(schedule=schedule, warmup_steps=3, batch_size=128)
    assert modes == wanted  # 672 examples: 6 batches an epoch
    assert [row["step"] for row in trainer.history.steps if row["epoch"] == 2] == list(range(6, 12))
    warmup = [-3, -2, -1] if schedule == "pretrain" else []
    assert [row["step"] for row in trainer.history.steps if row["epoch"] == 0] == warmup


def test_alternating_steps_go_over_all_anchors_and_leave_the_backbone_alone(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    real = KnowledgeAugmented.contrastive_loss

    def contrastive_loss(self: KnowledgeAugmented, sides: Any) -> Any:
        seen.append(set(sides["item"].anchor_ids.tolist()))
        loss = real(self, sides)
        grads = torch.autograd.grad(loss.total, list(self.backbone.parameters()), allow_unused=True, retain_graph=True)
        assert all(grad is None for grad in grads)
        return loss

    monkeypatch.setattr(KnowledgeAugmented, "contrastive_loss", contrastive_loss)
    fit(schedule="alternating", batch_size=48, epochs=1)  # 59 items have a positive: passes of 48 and 11
    assert [len(ids) for ids in seen[:4]] == [48, 11, 48, 11]
    assert seen[0] | seen[1] == set(range(59))
    assert seen[0] != seen[2]


@pytest.mark.parametrize("schedule", ["pretrain", "alternating"])
def test_from_any_kept_epoch_a_training_ends_with_the_same_bits(fit: Fit, tmp_path: Path, schedule: str) -> None:
    whole = fit(checkpoint=tmp_path / "kept", epochs=4, schedule=schedule)
    folder = CheckpointFolder(tmp_path / "kept")
    assert folder.epochs() == [*([0] if schedule == "pretrain" else []), 1, 2, 3, 4]
    before = {epoch: folder.load(epoch) for epoch in folder.epochs()}
    for epoch in (3, 1, min(before)):
        assert_same_bits(fit(checkpoint=tmp_path / "kept", epochs=4, schedule=schedule, resume_from=epoch), whole)
        assert folder.epochs() == list(before)
        for kept, state in before.items():
            again = folder.load(kept)
            assert again.history == state.history
            assert again.best_auc == state.best_auc
            torch.testing.assert_close(
                [again.model, again.best, again.optimizer], [state.model, state.best, state.optimizer], rtol=0, atol=0
            )
    assert_same_bits(fit(checkpoint=tmp_path / "kept", epochs=4, schedule=schedule), whole)  # nothing is left to do


def test_later_epochs_are_dropped_before_training_goes_on(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(checkpoint=tmp_path, epochs=4)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(checkpoint=tmp_path, epochs=4, resume_from=2)
    assert CheckpointFolder(tmp_path).epochs() == [1, 2]


def test_a_damaged_newest_checkpoint_is_passed_over(fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = fit(checkpoint=tmp_path, epochs=3)
    newest = tmp_path / "epoch-0003.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor's bytes, where torch.load sees nothing wrong
    torch.load(_written(tmp_path / "flipped", content), weights_only=True)
    newest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert_same_bits(fit(checkpoint=tmp_path, epochs=3), whole)
    assert "epoch-0003.pt is not a readable checkpoint" in caplog.text
    assert "going on from the checkpoint before it" in caplog.text
    assert "delete" not in caplog.text  # nothing is left to do for whoever reads it
    newest.write_bytes(content[:1000])
    with pytest.raises(
        ArtifactError, match=r"epoch-0003.pt is not a readable checkpoint \(1,000 bytes.*delete it, or name"
    ):
        fit(checkpoint=tmp_path, epochs=3, resume_from=3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory\nand more"), TypeError("no argument 'warmth'")]
)
def test_a_whole_checkpoint_that_cannot_be_loaded_is_left_alone(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fit(checkpoint=tmp_path, epochs=3)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("epoch-*.pt")}

    def load(*_: object, map_location: str, **__: object) -> None:
        assert map_location == "cpu"  # a GPU may be too small for the weights, the moments and the best weights twice
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(
        ArtifactError, match=rf"epoch-0003.pt is whole, but could not be loaded \({type(error).__name__}: "
    ) as told:
        fit(checkpoint=tmp_path, epochs=3)
    assert "\n" not in str(told.value)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("epoch-*.pt")} == before


def test_a_checkpoint_that_cannot_be_read_is_left_alone(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(checkpoint=tmp_path, epochs=2)
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "epoch-0002.pt":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(ArtifactError, match=r"epoch-0002.pt could not be read \(Permission denied\): make it readable"):
        fit(checkpoint=tmp_path, epochs=2)
    assert CheckpointFolder(tmp_path).epochs() == [1, 2]


def test_past_a_damaged_checkpoint_new_ones_are_kept(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one to keep, a damaged later file is not the one: a second kill would then cost all epochs."""
    areas = iter([0.5, 0.6, 0.4, 0.4, 0.4, 0.4])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, part: {"auc": next(areas), "log_loss": 0.5})
    fit(checkpoint=tmp_path, epochs=4, patience=9, keep_checkpoints=1)
    folder = CheckpointFolder(tmp_path)
    assert folder.epochs() == [2, 4]
    folder.file(4).write_bytes(b"damaged")
    folder.file(9).write_bytes(b"of a longer training")
    saved: list[list[int]] = []
    real = CheckpointFolder.save
    monkeypatch.setattr(
        CheckpointFolder, "save", lambda self, state: (real(self, state), saved.append(self.epochs()))[0]
    )
    fit(checkpoint=tmp_path, epochs=4, patience=9, keep_checkpoints=1)
    assert saved == [[2, 3, 9], [2, 4, 9]]


@pytest.mark.parametrize("schedule", ["joint", "pretrain"])
def test_from_epoch_0_a_training_begins_anew(fit: Fit, tmp_path: Path, schedule: str) -> None:
    whole = fit(checkpoint=tmp_path, schedule=schedule)
    folder = CheckpointFolder(tmp_path)
    before = {epoch: folder.file(epoch).stat().st_mtime_ns for epoch in folder.epochs()}
    assert (0 in before) == (schedule == "pretrain")
    assert_same_bits(fit(checkpoint=tmp_path, schedule=schedule, resume_from=0), whole)
    again = {epoch for epoch, time in before.items() if folder.file(epoch).stat().st_mtime_ns != time}
    assert again == {1, 2}  # the warm-up, where there is one, is not done again


def test_fewer_epochs_than_are_kept_leave_the_later_ones(fit: Fit, tmp_path: Path) -> None:
    short = fit(epochs=2)
    fit(checkpoint=tmp_path, epochs=4)
    assert_same_bits(fit(checkpoint=tmp_path, epochs=2), short)
    assert CheckpointFolder(tmp_path).epochs() == [1, 2, 3, 4]
    with pytest.raises(ArtifactError, match=r"epoch 3 cannot be resumed from: train.epochs = 2 ends before it"):
        fit(checkpoint=tmp_path, epochs=2, resume_from=3)


def test_examples_from_a_file_train_to_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    read: list[int] = []

    class Counted(ExampleFiles):
        def read(self, group: int) -> Any:
            read.append(group)
            return super().read(group)

    def source(data: CtrData) -> ExampleSource:
        write_examples(data.examples["train"], tmp_path / "examples.parquet", group_rows=100)
        return Counted(tmp_path / "examples.parquet", len(data.user_ids), len(data.item_ids))

    assert_same_bits(fit(source=source), fit())
    assert read == [0, 1, 2, 3, 4, 5, 6] * 2  # 672 rows, in both epochs


def _written(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def test_an_epoch_that_is_not_kept_is_told(fit: Fit, tmp_path: Path) -> None:
    fit(checkpoint=tmp_path)
    with pytest.raises(ArtifactError, match=r"epoch 7 has no checkpoint in .*kept: 1, 2"):
        fit(checkpoint=tmp_path, resume_from=7)
    with pytest.raises(ArtifactError, match="keeps no checkpoints"):
        fit(resume_from=1)
    with pytest.raises(ArtifactError, match=r"epoch-0002.pt is of another model.*delete"):
        fit(checkpoint=tmp_path, dim=4)


def test_the_newest_and_the_best_are_kept(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    areas = iter([0.5, 0.7, 0.6, 0.65, 0.6])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, part: {"auc": next(areas), "log_loss": 0.5})
    trainer = fit(checkpoint=tmp_path, epochs=5, patience=5, keep_checkpoints=2)
    assert trainer.history.best_epoch == 2
    assert CheckpointFolder(tmp_path).epochs() == [2, 4, 5]
    best = CheckpointFolder(tmp_path).load(2)
    assert all(torch.equal(best.model[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_patience_ends_a_training_also_after_resuming(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    areas = iter([0.5, 0.7, 0.6, 0.65, 0.6, 0.9])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, part: {"auc": next(areas), "log_loss": 0.5})
    assert len(fit(checkpoint=tmp_path, epochs=9, patience=2).history.epochs) == 4
    again = fit(checkpoint=tmp_path, epochs=9, patience=2)
    assert (len(again.history.epochs), again.history.best_epoch) == (4, 2)


@pytest.mark.parametrize("step", [0, 31])
def test_a_loss_that_is_no_number_is_found_though_steps_are_not_waited_for(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    taken = 0
    real = KnowledgeAugmented.loss

    def loss(self: KnowledgeAugmented, *args: Any, **more: Any) -> Any:
        nonlocal taken
        out = real(self, *args, **more)
        taken += 1
        return out._replace(total=out.total * float("inf")) if taken == step + 1 else out

    monkeypatch.setattr(KnowledgeAugmented, "loss", loss)
    # 168 batches, of which each third is looked at: a bad one in between is seen at the next look.
    with pytest.raises(TrainingDivergedError, match=rf"epoch 1, step {-(-step // 3) * 3} or shortly before: loss="):
        fit(batch_size=4, checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_is_said_of_a_divergence_names_what_is_in_use(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**options: Any) -> str:
        with pytest.raises(TrainingDivergedError) as caught:
            fit(**options)
        return str(caught.value).split("; lower ")[1]

    rate, weight = "train.adapter_learning_rate (now 0.001)", "train.weight (now 0.01)"
    temperature = "raise train.temperature (now 0.03)"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda self, part: {"auc": 0.5, "log_loss": float("nan")})
        rates = f"train.learning_rate (now 0.0005) or {rate}"
        assert told() == f"{rates} or {weight}, or {temperature}"
        assert told(weight=0.0, profile=True) == rates
        assert told(encoded=()) == "train.learning_rate (now 0.0005)"
    monkeypatch.setattr(Trainer, "_contrast", lambda self, *_: {"loss": torch.tensor(float("nan"))})
    assert told(schedule="pretrain") == f"{rate}, or {temperature}"


def test_what_an_adapter_draws_in_the_warm_up_is_seeded(fit: Fit, context: Contexts) -> None:
    def warmed(draws: int) -> dict[str, torch.Tensor]:
        ctx = context("train", schedule="pretrain", warmup_steps=2, epochs=1)
        data, encodings, samplers = stage.load_inputs(ctx.settings, ctx.input)
        vectors = {side: encoding.vectors for side, encoding in encodings.items()}
        model = stage.build_model(data, vectors, ctx.settings.train, 7)
        torch.manual_seed(1)
        model.adapters["item"] = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Dropout(0.5))
        torch.manual_seed(draws)
        Trainer(model, data, vectors, samplers, ctx.settings.train, seed=7).fit()
        assert torch.initial_seed() == draws  # the process's own draws are left alone
        return model.state_dict()

    one, other = warmed(2), warmed(3)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_trains_float32_weights_to_about_the_same(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: (out := real(x, *rest), seen.append(out.dtype))[0]
    )
    plain, half = fit(dropout=0.0), fit(dropout=0.0, precision="bfloat16")
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.history.epochs[-1]["ctr"] == pytest.approx(plain.history.epochs[-1]["ctr"], rel=5e-3)
    np.testing.assert_allclose(half.predict("test"), plain.predict("test"), atol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # PyTorch's own, in its compiler
@pytest.mark.parametrize("backbone", ["deepfm", "din"])
def test_compiled_steps_lose_as_much(fit: Fit, backbone: str) -> None:
    torch.compiler.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, Inductor of PyTorch 2.13 fails at the scatter-add of DeepFM's ids on a CPU
    try:
        plain = fit(dropout=0.0, backbone=backbone)
        assert not counters["stats"]["unique_graphs"]
        compiled = fit(dropout=0.0, backbone=backbone, compile=True)
        assert counters["stats"]["unique_graphs"]
    finally:
        torch.set_num_threads(threads)
    for row, wanted in zip(compiled.history.steps, plain.history.steps, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)


def test_tensorboard_reads_what_was_written(fit: Fit, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "board"
    more: dict[str, Any] = {"schedule": "pretrain", "warmup_steps": 4, "tensorboard": str(folder)}
    history = fit(checkpoint=tmp_path / "kept", **more).history
    fit(checkpoint=tmp_path / "kept", resume_from=1, **more)
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("loss", "ctr", "uu", "ii"):
        rows = [row for row in history.steps if row["epoch"] > 0]
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/{name}")]
        assert found == [(row["step"] + 4, pytest.approx(row[name])) for row in rows]
    assert [scalar.step for scalar in events.Scalars("warmup/ii")] == [0, 1, 2, 3]
    for name in ("auc", "log_loss"):
        wanted = [pytest.approx(row[f"valid_{name}"]) for row in history.epochs]
        assert [scalar.value for scalar in events.Scalars(f"valid/{name}")] == wanted
    assert events.Scalars("rate/learning_rate")[0].value == pytest.approx(5e-4)
    assert all(scalar.value > 0 for scalar in events.Scalars("rate/examples_per_s"))


def test_a_tensorboard_that_is_no_folder_costs_no_checkpoint(fit: Fit, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    fit(checkpoint=kept)
    (tmp_path / "board").write_text("a file")
    with pytest.raises(ConfigError, match=r"train.tensorboard = '\S*board' cannot be written to \(File exists\)"):
        fit(checkpoint=kept, resume_from=1, tensorboard=str(tmp_path / "board"))
    assert CheckpointFolder(kept).epochs() == [1, 2]
