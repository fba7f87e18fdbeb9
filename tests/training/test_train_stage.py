"""The train and export stages on the small world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from kellm_features.errors import ArtifactError, ConfigError, DataError, SchemaError
from kellm_features.schemas import ITEM_EMBEDDINGS, USER_EMBEDDINGS, read_table
from kellm_features.settings import load_settings
from kellm_features.stages import StageContext
from kellm_features.training import export, stage
from kellm_features.training.adapter import Adapter
from kellm_features.training.checkpoint import load_adapters
from kellm_features.training.launch import Job
from kellm_features.training.loader import ExampleFiles
from kellm_features.training.trainer import Trainer, TrainingDivergedError

Contexts = Callable[..., StageContext]
OUTPUTS = ("adapter.safetensors", "backbone.safetensors", "metrics.json", "curves.json")


def outputs(ctx: StageContext) -> dict[str, bytes]:
    return {name: (ctx.out / name).read_bytes() for name in OUTPUTS}


def inputs(ctx: StageContext) -> Any:
    """Examples, encodings and samplers."""
    return stage.load_inputs(ctx.settings, ctx.input)


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def replace(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


def test_it_learns(context: Contexts) -> None:
    ctx = context("train", epochs=40, patience=40, warmup_steps=150, learning_rate=5e-3, dropout=0.0)
    stage.run(ctx)
    metrics = json.loads((ctx.out / "metrics.json").read_text())
    assert metrics["test"]["auc"] > metrics["item_mean"]["test"]["auc"] + 0.1
    for side in ("item", "user"):
        found = metrics["neighbors"][side]
        assert found["adapted_recall_at_10"] > found["raw_recall_at_10"] + 0.1
    curves = json.loads((ctx.out / "curves.json").read_text())
    assert curves["best_epoch"] == metrics["epoch"]
    best = max(curves["epochs"], key=lambda row: row["valid_auc"])
    assert (best["epoch"], best["valid_auc"]) == (metrics["epoch"], metrics["valid"]["auc"])
    assert {"step", "epoch", "loss", "ctr", "uu", "ii"} == set(curves["steps"][-1])
    assert set(metrics["test"]) == {"auc", "log_loss", "gauc", "ece"}


def test_same_seed_same_bytes(context: Contexts) -> None:
    first, second, other = (context("train", seed=seed) for seed in (7, 7, 8))
    stage.run(first)
    once = outputs(first)
    stage.run(second)
    assert outputs(second) == once
    stage.run(other)
    assert outputs(other)["adapter.safetensors"] != once["adapter.safetensors"]


def kept(ctx: StageContext) -> dict[str, int]:
    """Checkpoint -> when it was written."""
    return {file.name: file.stat().st_mtime_ns for file in ctx.work.glob("checkpoints-*/*")}


@pytest.mark.parametrize("survives", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(
    context: Contexts, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    ctx = context("train", epochs=4, patience=0)
    stage.run(ctx)
    wanted = outputs(ctx)
    shutil.rmtree(ctx.work)
    for name in OUTPUTS:
        (ctx.out / name).unlink()

    real_step, steps = Trainer._clicks, 0

    def step(self: Trainer, *args: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 6 * survives + 3:  # 6 batches an epoch
            raise KeyboardInterrupt
        return real_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_clicks", step)
        with pytest.raises(KeyboardInterrupt):
            stage.run(ctx)
    before = kept(ctx)
    assert sorted(before) == [f"epoch-000{epoch}.pt" for epoch in range(survives + 1)]
    stage.run(ctx)
    assert outputs(ctx) == wanted
    assert before.items() < kept(ctx).items()  # those were not trained again


def test_checkpoints_stay_until_other_settings_are_trained_on(
    context: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context("train", epochs=2)
    stage.run(ctx)
    before, wanted = kept(ctx), outputs(ctx)
    assert set(before) == {"epoch-0000.pt", "epoch-0001.pt", "epoch-0002.pt"}
    with stage.resuming_from(1):
        stage.run(ctx)
    assert outputs(ctx) == wanted
    after = kept(ctx)
    assert [name for name in before if after[name] != before[name]] == ["epoch-0002.pt"]
    with stage.resuming_from(9), pytest.raises(ArtifactError, match="epoch 9 has no checkpoint"):
        stage.run(ctx)
    other = context("train", epochs=2, dim=4)

    def diverge(*_: object) -> None:
        raise TrainingDivergedError("the loss is no number")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", diverge)
        with pytest.raises(TrainingDivergedError):
            stage.run(other)
    with pytest.raises(ConfigError):
        stage.run(context("train", epochs=2, temperature=0.1, device="gpu"))
    folder = ctx.work / stage._key(ctx)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == after  # those that failed cost none
    stage.run(other)
    folders = list(other.work.glob("checkpoints-*"))
    assert [folder.name for folder in folders] == [stage._key(other)]
    assert not set(kept(other).values()) & set(after.values())


@pytest.mark.parametrize("resume_from", [None, 2, 1])
def test_a_training_can_be_extended(context: Contexts, resume_from: int | None) -> None:
    four = context("train", epochs=4, patience=0)
    stage.run(four)
    wanted = outputs(four)
    shutil.rmtree(four.work)
    two = context("train", epochs=2, patience=0)
    stage.run(two)
    before = kept(two)
    with stage.resuming_from(resume_from):
        stage.run(four)
    assert outputs(four) == wanted
    trained_again = {name for name, time in before.items() if kept(four)[name] != time}
    assert trained_again == ({"epoch-0002.pt"} if resume_from == 1 else set())


def test_the_stage_trains_on_the_file_that_it_writes(context: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[object] = []
    real = stage.fit
    monkeypatch.setattr(stage, "fit", lambda *args, **more: (sources.append(more["source"]), real(*args, **more))[1])
    ctx = context("train")
    stage.run(ctx)
    assert isinstance(sources[0], ExampleFiles)
    file = pq.read_table(ctx.work / "examples.parquet")
    train = inputs(ctx)[0].examples["train"]
    assert file["item"].to_pylist() == train.item.tolist()
    assert file["liked"].to_pylist() == (train.label > 0).tolist()


def test_positives_are_normalized_unless_told_and_prefer_what_few_like(context: Contexts) -> None:
    interactions = pq.read_table(context("train").input("ingest", "interactions.parquet"))
    table = interactions.to_pandas()
    train = table[(table["split"] == "train") & table["liked"]]
    data, _, raw = inputs(context("train", top_k=1, positives="raw"))
    counts = data.train_likes["item"]
    assert counts.tolist() == [int((train["item_id"] == item).sum()) for item in data.item_ids]
    _, _, tamed = inputs(context("train", top_k=1))
    likes = {name: counts[one["item"].candidates[:59, 0]].mean() for name, one in (("raw", raw), ("tamed", tamed))}
    assert likes["tamed"] < likes["raw"]


def test_valid_and_test_labels_never_reach_the_weights(world: Path, context: Contexts) -> None:
    ctx = context("train", patience=0)
    stage.run(ctx)
    before = {name: load_file(ctx.out / name) for name in OUTPUTS[:2]}
    metrics = (ctx.out / "metrics.json").read_text()

    def flip(table: pa.Table) -> pa.Table:
        liked, train = table.column("liked"), pc.equal(table.column("split"), "train")
        return replace("liked", pc.if_else(train, liked, pc.invert(liked)))(table)

    edit(world / "ingest/interactions.parquet", flip)
    again = context("train", patience=0)
    stage.run(again)
    assert (again.out / "metrics.json").read_text() != metrics
    for name, tensors in before.items():
        now = load_file(again.out / name)
        assert all(torch.equal(now[key], tensor) for key, tensor in tensors.items())


def test_exported_embeddings_are_the_trained_modules_outputs(
    context: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context("train")
    trainers: list[Trainer] = []
    real_fit = stage.fit
    monkeypatch.setattr(stage, "fit", lambda *args, **more: (trainers.append(real_fit(*args, **more)), trainers[0])[1])
    stage.run(ctx)
    out = context("export")
    report = export.run(out)
    for side, schema in (("item", ITEM_EMBEDDINGS), ("user", USER_EMBEDDINGS)):
        table = read_table(out.out / f"{side}_embeddings.parquet", schema)
        assert table.column(f"{side}_id").to_pylist() == list(range(1, table.num_rows + 1))
        assert table.schema.field("embedding").type == pa.list_(pa.float32())
        vectors = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
        with torch.inference_mode():
            trained = trainers[0].model.adapters[side](trainers[0].encodings[side]).numpy()
        np.testing.assert_array_equal(vectors, trained)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
        assert table.column("embedding_version").unique().to_pylist() == [report.notes["embedding_version"]]
        assert len(set(table.column("content_hash").to_pylist())) == table.num_rows


def test_a_catalogue_is_adapted_in_blocks(context: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, exported = context("train", epochs=1), context("export")
    stage.run(trained)
    whole = outputs(trained)["metrics.json"]
    shutil.rmtree(trained.work)
    sizes: list[int] = []

    def forward(self: Adapter, encodings: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            sizes.append(len(encodings))
        return real(self, encodings)

    real = Adapter.forward
    monkeypatch.setattr("kellm_features.training.adapter._BLOCK", 32)
    monkeypatch.setattr(Adapter, "forward", forward)
    stage.run(trained)
    assert json.loads(outputs(trained)["metrics.json"])["test"] == pytest.approx(json.loads(whole)["test"], abs=1e-5)
    items, users = [32, 28], [32, 32, 16]
    # Validation, valid and test take the items alone, without profiles; neighbours and the export both sides.
    assert sizes == [*items * 3, *users, *items]
    sizes.clear()
    export.run(exported)
    assert sizes == [*items, *users]


def test_lists_longer_than_their_offsets_reach_are_written_in_chunks() -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(8, 3)
    lists = export._lists(vectors, limit=10)
    assert [len(chunk) for chunk in lists.chunks] == [3, 3, 2]
    assert lists.to_pylist() == vectors.tolist()
    assert export._lists(vectors[:0]).to_pylist() == []


def test_more_positives_than_swing_keeps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set: train.top_k = 30 draws .* swing.top_k = 25 keeps: raise "):
        load_settings(overrides=["train.top_k=30", "swing.top_k=25"])
    assert load_settings(overrides=["swing.top_k=5"]).train.top_k == 20  # nobody asked for more than there are
    more = load_settings(overrides=["swing.top_k=200", "train.top_k=150"])
    job = Job.of(more, inputs={}, out=tmp_path, checkpoints=tmp_path)
    assert Job.model_validate_json(job.model_dump_json()).settings.train.top_k == 150


def test_adapter_file_tells_what_it_is(context: Contexts) -> None:
    ctx = context("train")
    stage.run(ctx)
    _, meta = load_adapters(ctx.out / "adapter.safetensors")
    assert (meta.in_dim, meta.hidden, meta.dim, meta.encoder_id) == (12, 16, 8, "test-encoder")
    assert meta.model_id.startswith("test-encoder+adapter-")
    (ctx.out / "adapter.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="not an adapter"):
        load_adapters(ctx.out / "adapter.safetensors")


def test_export_refuses_encodings_of_another_encoder(world: Path, context: Contexts) -> None:
    stage.run(context("train"))
    edit(world / "encode/item_encodings.parquet", replace("encoder_id", pa.array(["other"] * 60)))
    with pytest.raises(ArtifactError, match="by other, and the adapters were trained on 12 by test-encoder"):
        export.run(context("export"))


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("encode/item_encodings.parquet", lambda t: t.slice(1), DataError, "item_id 1 has no encoding"),
        ("encode/item_encodings.parquet", lambda t: t.slice(0, 0), DataError, "holds no rows"),
        ("encode/user_encodings.parquet", lambda t: pa.concat_tables([t, t]), DataError, "more than once"),
        (
            "encode/user_encodings.parquet",
            lambda t: replace("user_id", pa.array(np.arange(80) + 2))(t),
            DataError,
            "user_id 81 is not in the catalogue",
        ),
        (
            "encode/item_encodings.parquet",
            lambda t: replace("encoding", pa.array(np.full((60, 12), np.nan, "float32").tolist(), t.schema.types[1]))(
                t
            ),
            DataError,
            "holds NaN",
        ),
        ("encode/item_encodings.parquet", lambda t: t.drop_columns("encoding"), SchemaError, "'encoding' is missing"),
        ("swing/item_pairs.parquet", lambda t: t.slice(0, 0), DataError, "holds no pairs"),
        (
            "swing/item_pairs.parquet",
            lambda t: replace("neighbor_id", pa.array([99] * t.num_rows))(t),
            DataError,
            "item_id 99 is not in the catalogue",
        ),
        (
            "swing/item_pairs.parquet",
            lambda t: replace("score", pa.array([float("nan")] * t.num_rows))(t),
            DataError,
            "score nan is seen",
        ),
        (
            "swing/user_pairs.parquet",
            lambda t: replace("neighbor_id", pa.array([70 + i % 7 for i in range(t.num_rows)]))(t),
            DataError,
            "made from another split",
        ),
        (
            "ingest/interactions.parquet",
            lambda t: t.filter(pc.not_equal(t.column("split"), "valid")),
            DataError,
            "'valid' of the split has no targets",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    world: Path,
    context: Contexts,
    file: str,
    change: Callable[[pa.Table], pa.Table],
    error: type[Exception],
    words: str,
) -> None:
    edit(world / file, change)
    ctx = context("train")
    with pytest.raises(error, match=words) as caught:
        stage.run(ctx)
    assert "\n" not in str(caught.value)
    assert not list(ctx.out.iterdir())


def test_a_loss_that_is_no_number_is_named(context: Contexts) -> None:
    data, encodings, samplers = inputs(context("train"))
    settings = context("train").settings.train
    vectors = {side: encoding.vectors for side, encoding in encodings.items()}
    model = stage.build_model(data, vectors, settings, 7)
    with torch.no_grad():
        model.adapters["item"].hidden.bias.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"diverged at epoch 0, step 0 or shortly before: loss=nan.*ii=nan"):
        Trainer(model, data, vectors, samplers, settings, seed=7).fit()
