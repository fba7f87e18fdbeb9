"""What is exported is what was evaluated: a server that looks vectors up gives the figures of the training."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from kellm_features.artifacts import Artifact
from kellm_features.stages import StageContext
from kellm_features.training import export, stage
from kellm_features.training.backbones import build_backbone
from kellm_features.training.data import FIELDS
from kellm_features.training.knowledge import PAST, KnowledgeAugmented
from kellm_features.training.trainer import score

from .conftest import _manifest

Contexts = Callable[..., StageContext]


def mean_of(vectors: torch.Tensor, wanted: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, E): the mean over each row's wanted places, in a loop."""
    rows = []
    for row, chosen in zip(places, wanted, strict=True):
        ids = row[chosen] - 1
        rows.append(vectors[ids].mean(0) if len(ids) else torch.zeros(vectors.shape[1]))
    return torch.stack(rows)


@pytest.mark.parametrize("adapter", ["mlp", "experts"])
@pytest.mark.parametrize("affinity", ["none", "profile", "history"])
def test_exported_embeddings_score_as_the_metrics_say(context: Contexts, affinity: str, adapter: str) -> None:
    options = {"backbone": "din", "affinity": affinity, "adapter": adapter, "epochs": 2}
    trained = context("train", **options)
    stage.run(trained)
    ctx = context("export", **options)
    ctx.inputs["train"] = Artifact(trained.out, _manifest("train", trained.out))
    export.run(ctx)
    data, _, _ = stage.load_inputs(trained.settings, trained.input)
    vectors = {}
    for side, ids in (("item", data.item_ids), ("user", data.user_ids)):
        table = pq.read_table(ctx.out / f"{side}_embeddings.parquet").sort_by(f"{side}_id")
        assert table[f"{side}_id"].to_pylist() == list(ids)
        vectors[side] = torch.from_numpy(np.array(table["embedding"].to_pylist(), dtype=np.float32))

    products = {"none": 0, "profile": 1, "history": 2}[affinity]
    width = (2 + products) * vectors["item"].shape[1]
    settings = trained.settings.train
    backbone = build_backbone("din", FIELDS, data.table_rows, settings.field_dim, knowledge_dim=width, dropout=0.0)
    backbone.load_state_dict(load_file(trained.out / "backbone.safetensors"))
    # No adapter is at hand where vectors are served: stand-ins name the sides.
    sides = {"user": torch.nn.Identity(), "item": torch.nn.Identity()}
    model = KnowledgeAugmented(backbone, sides, affinity=affinity).eval()

    told = json.loads((trained.out / "metrics.json").read_text())["test"]
    examples = data.examples["test"]
    features = data.features(examples.user, examples.item)
    given = {"user": vectors["user"][examples.user], "item": vectors["item"][examples.item]}
    for name, flag in zip(PAST, (1, 2), strict=True):
        given[name] = mean_of(vectors["item"], features.flags == flag, features.places)
    with torch.inference_mode():
        probabilities = model.logits(features, given).double().sigmoid().numpy()
    found = score(data, "test", probabilities)
    assert found.keys() == told.keys()
    for metric, value in told.items():
        assert found[metric] == pytest.approx(value, abs=1e-5), metric
