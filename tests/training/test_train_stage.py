"""The train and export stages on the small world."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from kellm_features.errors import ArtifactError, DataError, SchemaError
from kellm_features.schemas import ITEM_EMBEDDINGS, USER_EMBEDDINGS, read_table
from kellm_features.stages import StageContext
from kellm_features.training import export, stage
from kellm_features.training.checkpoint import load_adapters
from kellm_features.training.trainer import Trainer, TrainingDivergedError

Contexts = Callable[..., StageContext]
OUTPUTS = ("adapter.safetensors", "backbone.safetensors", "metrics.json", "curves.json")


def outputs(ctx: StageContext) -> dict[str, bytes]:
    return {name: (ctx.out / name).read_bytes() for name in OUTPUTS}


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
    assert not list(ctx.work.glob("*.pt"))


def test_same_seed_same_bytes(context: Contexts) -> None:
    first, second, other = (context("train", seed=seed) for seed in (7, 7, 8))
    stage.run(first)
    once = outputs(first)
    stage.run(second)
    assert outputs(second) == once
    stage.run(other)
    assert outputs(other)["adapter.safetensors"] != once["adapter.safetensors"]


@pytest.mark.parametrize("survives", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(
    context: Contexts, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    ctx = context("train", epochs=4, patience=0)
    stage.run(ctx)
    wanted = outputs(ctx)
    for name in OUTPUTS:
        (ctx.out / name).unlink()

    real_step, real_save = Trainer._step, Trainer._save
    state = {"saves": 0, "steps": 0}

    def save(self: Trainer) -> None:
        real_save(self)
        state["saves"] += 1  # the first save follows the warm-up

    def step(self: Trainer, rows: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
        state["steps"] += 1
        if state["saves"] == 1 + survives and state["steps"] % 3 == 0:
            raise KeyboardInterrupt
        return real_step(self, rows, generator)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", save)
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            stage.run(ctx)
    assert len(list(ctx.work.glob("*.pt"))) == 1
    epochs: list[int] = []
    real_epoch = Trainer._epoch
    monkeypatch.setattr(Trainer, "_epoch", lambda self, n, advance: (epochs.append(n), real_epoch(self, n, advance)))
    stage.run(ctx)
    assert epochs == list(range(survives + 1, 5))
    assert outputs(ctx) == wanted


def test_another_config_does_not_take_up_a_checkpoint(context: Contexts) -> None:
    ctx = context("train")
    ctx.work.mkdir(parents=True)
    (ctx.work / "other.pt").write_bytes(b"of another run")
    stage.run(ctx)
    assert not (ctx.work / "other.pt").exists()
    (ctx.work / f"{stage._key(ctx)}.pt").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="not a readable checkpoint"):
        stage.run(ctx)


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


def test_examples_and_features_by_hand(context: Contexts) -> None:
    data, _, _ = stage.read_inputs(context("train"))
    table = pq.read_table(context("train").input("ingest", "interactions.parquet")).to_pandas()
    mine = table[table["user_id"] == 57].sort_values("event_timestamp")  # the first valid user: index 56
    past, future = mine[:12], mine[12:]  # (24 + 1) // 2 events are history
    valid = data.examples["valid"]
    own = valid.user == 56
    assert sorted((valid.item[own] + 1).tolist()) == sorted(future["item_id"])
    likes = dict(zip(future["item_id"], future["liked"], strict=True))
    assert all(likes[i + 1] == bool(y) for i, y in zip(valid.item[own].tolist(), valid.label[own], strict=True))

    features = data.features(torch.tensor([56, 56]), torch.tensor([4, 59]))
    assert features["item"].ids.tolist() == [[5], [0]]  # item 60 has no train rows: unknown
    assert set(features) == set(stage.FIELDS)
    for field, liked in (("history_liked", True), ("history_disliked", False)):
        weights = np.zeros(61)
        np.add.at(weights, features[field].ids[0].numpy(), features[field].weights[0].numpy())
        wanted = past["item_id"][past["liked"] == liked].to_numpy()
        np.testing.assert_allclose(weights[wanted], 1 / len(wanted), rtol=1e-6)
        assert weights.sum() == pytest.approx(1)
    assert features["history_flags"].weights[0, 0].item() == pytest.approx(past["liked"].mean())
    assert features["age"].ids.tolist() == [[0], [0]]  # null everywhere: unknown


def test_exported_embeddings_are_the_trained_modules_outputs(
    context: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context("train")
    kept: list[Trainer] = []
    real_fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (kept.append(self), real_fit(self))[1])
    stage.run(ctx)
    out = context("export")
    report = export.run(out)
    for side, schema in (("item", ITEM_EMBEDDINGS), ("user", USER_EMBEDDINGS)):
        table = read_table(out.out / f"{side}_embeddings.parquet", schema)
        assert table.column(f"{side}_id").to_pylist() == list(range(1, table.num_rows + 1))
        assert table.schema.field("embedding").type == pa.list_(pa.float32())
        vectors = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
        with torch.inference_mode():
            trained = kept[0].model.adapters[side](kept[0].encodings[side]).numpy()
        np.testing.assert_array_equal(vectors, trained)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
        assert table.column("embedding_version").unique().to_pylist() == [report.notes["embedding_version"]]
        assert len(set(table.column("content_hash").to_pylist())) == table.num_rows


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
    data, encodings, samplers = stage.read_inputs(context("train"))
    settings = context("train").settings.train
    model = stage.build_model(data, encodings, settings, 7)
    with torch.no_grad():
        model.adapters["item"].hidden.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    vectors = {side: encoding.vectors for side, encoding in encodings.items()}
    with pytest.raises(TrainingDivergedError, match=r"diverged at epoch 0, step 0: loss=nan.*ii=nan; lower"):
        Trainer(model, data, vectors, samplers, settings, seed=7).fit()
