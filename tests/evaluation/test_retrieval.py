"""Retrieval for cold items from files to rows: who trains, who is judged, and what a row is set against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kellm_features.evaluation.arms import Arm
from kellm_features.evaluation.experiment import ITEM_EMBEDDINGS, Cell, Outcome
from kellm_features.evaluation.protocol import Fold, cold_fold
from kellm_features.evaluation.retrieval import METRIC_NAMES, score_forms, score_retrieval, task_of
from kellm_features.evaluation.tables import contrastive_forms
from kellm_features.evaluation.world import World
from kellm_features.schemas import INTERACTIONS, write_table
from kellm_features.settings import Settings

from .world import interactions, prepared

ITEMS_N, USERS_N = 60, 45
FORMS = ("none", "mean", "none-profile", "both")
REFERENCES = {"mean": ("none",), "none-profile": ("none",), "both": ("none-profile",)}


def likes(table: pa.Table) -> pd.DataFrame:
    data = table.to_pandas()
    return data[data["liked"]]


def split(table: pa.Table) -> Fold:
    return cold_fold(table, share=0.3, fold=1, folds=5)


def table_of(lonely: int = 3) -> pa.Table:
    """Users of three tastes; of the cold test items, `lonely` are met and never liked, so they have no neighbours."""
    rng = np.random.default_rng(0)
    rows = [
        (user + 1, int(item) + 1, int(rng.random() < (0.8 if item % 3 == user % 3 else 0.2)), "train")
        for user in range(USERS_N)
        for item in rng.choice(ITEMS_N, 24, replace=False)
    ]
    nobody_likes = sorted(split(interactions(rows)).cold_test)[:lonely]  # labels decide no split
    return interactions([(user, item, liked * (item not in nobody_likes), part) for user, item, liked, part in rows])


def world_of(root: Path, table: pa.Table) -> World:
    settings = Settings.model_validate({"evaluate": {"samples": 100}})
    world = prepared(root, settings, [split(table)], items=ITEMS_N, users=USERS_N)
    write_table(table, root / "run" / "ingest" / "interactions.parquet", INTERACTIONS)
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(tmp_path_factory.mktemp("retrieval"), table_of())


def test_train_users_alone_tell_what_trains(world: World, tmp_path: Path) -> None:
    """Turned likes of valid and test users reach the truth, and neither SWING nor degrees."""
    files = world.folds["cold1"]
    data = table_of().to_pandas()
    parts = split(table_of()).interactions.to_pandas()
    trains = data["user_id"].isin(parts.loc[parts["split"] == "train", "user_id"])
    assert 0 < trains.sum() < len(data)
    turned = data.assign(liked=np.where(trains, data["liked"], ~data["liked"]))
    other = world_of(tmp_path, pa.Table.from_pandas(turned, schema=table_of().schema, preserve_index=False))
    here, there = task_of(world, files), task_of(other, other.folds["cold1"])
    for name in ("swing", "degree", "in_degree"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    assert (here.truth["raw"].neighbors != there.truth["raw"].neighbors).any()
    # Degrees are those of the likes in the fold's own train rows.
    own = likes(split(table_of()).interactions.filter(pa.array(parts["split"] == "train")))
    assert here.degree.tolist() == np.bincount(own["item_id"] - 1, minlength=ITEMS_N).tolist()
    assert here.swing.any()


@pytest.fixture(scope="module")
def forms(world: World) -> dict[str, tuple[str, list[Outcome]]]:
    """Four forms with embeddings of chance."""
    found = {}
    for place, key in enumerate(FORMS):
        folder = world.root / key
        folder.mkdir()
        vectors = np.random.default_rng(place).normal(size=(ITEMS_N, 4)).astype(np.float32)
        np.save(folder / ITEM_EMBEDDINGS, vectors)
        found[key] = (f"form {key}", [Outcome(Cell("cold1", "din", Arm(key, key), 0, 1e-3), folder, 0.5, {})])
    return found


def test_forms_are_set_against_what_their_clicks_are(world: World, forms: dict[str, tuple[str, list[Outcome]]]) -> None:
    rows = score_forms(world, "din", forms, REFERENCES)
    assert {(row.arm, row.reference) for row in rows} == {
        ("none", ""), ("mean", "none"), ("none-profile", "none"), ("both", "none-profile"),
    }  # fmt: skip
    values = {(row.arm, row.metric): row.value for row in rows}
    assert {metric for _, metric in values} == set(METRIC_NAMES.values())
    for row in rows:
        if row.reference:
            assert row.delta == pytest.approx(values[row.arm, row.metric] - values[row.reference, row.metric])
    clicks = [row.model_copy(update={"metric": "auc"}) for row in rows if row.metric == "recall@20"]
    grid = contrastive_forms([*clicks, *rows])
    assert grid.column("label") == ["form mean", "form none-profile", "form both"]  # a line each
    assert grid.column("backbone") == ["din"] * 3
    assert None not in grid.column("delta_recall_normalized")


def test_items_without_a_true_neighbour_are_not_counted(
    world: World, forms: dict[str, tuple[str, list[Outcome]]]
) -> None:
    """A neighbour shares two users who like both, so it is told by products of the likes."""
    liked = np.zeros((USERS_N, ITEMS_N))
    told = likes(table_of())
    liked[told["user_id"] - 1, told["item_id"] - 1] = 1
    common = liked.T @ liked
    np.fill_diagonal(common, 0)
    test = np.array(sorted(split(table_of()).cold_test)) - 1
    judged = int((common[test] >= 2).any(axis=1).sum())
    assert judged <= len(test) - 3
    for row in score_forms(world, "din", forms, REFERENCES):
        assert (row.examples, row.clusters, row.cluster) == (judged, judged, "item")


def test_scorers_of_texts_are_set_against_popularity(world: World) -> None:
    rows = score_retrieval(world)
    assert {row.reference for row in rows if row.arm != "popularity"} == {"popularity"}
    assert {row.reference for row in rows if row.arm == "popularity"} == {""}
    assert {"title", "knowledge", "random pairs", "in-degree"} <= {row.arm for row in rows}
    assert {row.backbone for row in rows} == {""}
