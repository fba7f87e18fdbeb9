"""What is exported is what was evaluated: a server that looks vectors up gives the figures of the training."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kellm_features.artifacts import Artifact
from kellm_features.stages import StageContext
from kellm_features.training import export, stage
from kellm_features.training.backbones import build_backbone
from kellm_features.training.knowledge import PAST, Affinity, KnowledgeAugmented
from kellm_features.training.scores import score

from .conftest import _manifest, docs_block

Contexts = Callable[..., StageContext]


def mean_of(vectors: torch.Tensor, wanted: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, E): the mean over each row's wanted places, in a loop."""
    rows = []
    for row, chosen in zip(places, wanted, strict=True):
        ids = row[chosen] - 1
        rows.append(vectors[ids].mean(0) if len(ids) else torch.zeros(vectors.shape[1]))
    return torch.stack(rows)


@pytest.mark.parametrize("adapter", ["mlp", "experts"])
@pytest.mark.parametrize(
    ("affinity", "profile"),
    [("none", True), ("none", False), ("profile", False), ("history", True), ("history", False)],
)
def test_exported_embeddings_score_as_the_metrics_say(
    context: Contexts, affinity: Affinity, profile: bool, adapter: str
) -> None:
    options = {"backbone": "din", "affinity": affinity, "profile": profile, "adapter": adapter, "epochs": 2}
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

    # No adapter is at hand where vectors are served: stand-ins name the sides that the backbone was shown.
    shown = ("user", "item") if profile or affinity == "profile" else ("item",)
    products = {"none": 0, "profile": 1, "history": 2}[affinity]
    path = trained.out / "backbone.safetensors"
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["kellm"])
    assert (meta["shown"], meta["affinity"]) == (list(shown), affinity)
    rows = {table: len(values) + 1 for table, values in meta["vocabularies"].items()}
    width = (len(meta["shown"]) + products) * meta["dim"]
    backbone = build_backbone(
        meta["backbone"], dict(meta["fields"]), rows, meta["field_dim"], knowledge_dim=width, dropout=0.0
    )
    backbone.load_state_dict(load_file(path))
    sides = {side: torch.nn.Identity() for side in meta["shown"]}
    model = KnowledgeAugmented(backbone, sides, affinity=meta["affinity"]).eval()

    told = json.loads((trained.out / "metrics.json").read_text())["test"]
    examples = data.examples["test"]
    features = data.features(examples.user, examples.item)
    given = {"user": vectors["user"][examples.user], "item": vectors["item"][examples.item]}
    for name, flag in zip(PAST, (1, 2), strict=True):
        given[name] = mean_of(vectors["item"], features.flags == flag, features.places)
    with torch.inference_mode():
        probabilities = model.logits(features, given).double().sigmoid().numpy()
    if (affinity, profile) == ("history", False):  # the default, of which the docs show the stand-ins
        names = {"torch": torch, "KnowledgeAugmented": KnowledgeAugmented, "backbone": backbone, "features": features}
        names |= {"item": given["item"], "liked_mean": given["liked"], "disliked_mean": given["disliked"]}
        exec(docs_block("Identity"), names)
        np.testing.assert_array_equal(names["logits"].detach().double().sigmoid().numpy(), probabilities)
    found = score(data, "test", probabilities)
    assert found.keys() == told.keys()
    for metric, value in told.items():
        assert found[metric] == pytest.approx(value, abs=1e-5), metric
