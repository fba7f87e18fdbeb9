"""From predictions on disk to rows, and what a training's folder is named by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from kellm_features.errors import ArtifactError
from kellm_features.evaluation.arms import ID_5, ID_30, ITEM_MEAN, Arm, ladder
from kellm_features.evaluation.bootstrap import ClusterBootstrap
from kellm_features.evaluation.experiment import PREDICTIONS, Cell, Outcome, cell_folder, train_settings
from kellm_features.evaluation.protocol import Fold
from kellm_features.evaluation.results import ResultRow
from kellm_features.evaluation.score import score_study, with_holm
from kellm_features.evaluation.world import World, content_hash, load_encodings, load_fold, load_samplers
from kellm_features.settings import Settings

from .world import fold_files, interactions, prepared

ITEMS_N, USERS_N = 30, 90
ARMS = {ID_30: 2.0, ID_5: 1.0}


def rows(fold: int) -> list[tuple[int, int, int, str]]:
    """Every user meets 16 items, half of which are history; the parts are thirds of the users, turned by the fold."""
    rng = np.random.default_rng(fold)
    parts = np.roll(np.repeat(["train", "valid", "test"], USERS_N // 3), fold * USERS_N // 3)
    return [
        (user + 1, int(item) + 1, int(rng.random() < 0.5), str(parts[user]))
        for user in range(USERS_N)
        for item in rng.choice(ITEMS_N, 16, replace=False)
    ]


def user_fold(name: str, given: list[tuple[int, int, int, str]]) -> Fold:
    return Fold(name, interactions(given), "user", "valid", frozenset(), frozenset())


@pytest.fixture
def world(tmp_path: Path) -> World:
    settings = Settings.model_validate({"history": {"max_events": 8}, "evaluate": {"samples": 200, "epochs": 3}})
    folds = [user_fold(f"B{k}", rows(k)) for k in range(2)]
    return prepared(tmp_path, settings, folds, items=ITEMS_N, users=USERS_N)


def outcome(world: World, fold: str, arm: Arm, seed: int, *, noise: float) -> Outcome:
    """A training whose scores are the labels and noise; the first seed's is at its best in the last of 3 epochs."""
    examples = load_fold(world, world.folds[fold], None).examples["test"]
    rng = np.random.default_rng([seed, int(fold[-1]), int(100 * noise)])
    label = examples.label.numpy() > 0
    score = 1 / (1 + np.exp(-(label + rng.normal(0, noise, len(label)))))
    folder = world.root / f"{fold} {arm.key} {seed} {noise}"
    folder.mkdir()
    columns = {"user": examples.user.numpy(), "item": examples.item.numpy(), "label": label, "score": score}
    pq.write_table(pa.table(columns), folder / PREDICTIONS)
    return Outcome(Cell(fold, "din", arm, seed, 1e-3), folder, 0.5, {"epoch": 2 if seed else 3})


def test_folds_seeds_and_a_closed_form_first(world: World) -> None:
    """Closed forms have one seed, whatever the others have: folds, seeds and examples are those of the study."""
    turns = [(fold, seed) for fold in ("B0", "B1") for seed in range(3)]
    closed = {fold: outcome(world, fold, ITEM_MEAN, 0, noise=3.0) for fold in ("B0", "B1")}
    trained = {
        ITEM_MEAN: [closed[fold] for fold, _ in turns],
        ID_30: [outcome(world, fold, ID_30, seed, noise=2.0) for fold, seed in turns],
        ID_5: [outcome(world, fold, ID_5, seed, noise=1.0) for fold, seed in turns],
    }
    references = {ITEM_MEAN.key: ("id-30",), ID_5.key: ("id-30", "item-mean")}
    found = score_study(world, "ctr", "B", "din", trained, references)
    told = {(r.arm, r.reference): r for r in found if (r.metric, r.slice) == ("auc", "all")}
    assert told.keys() == {("item-mean", "id-30"), ("id-30", ""), ("id-5", "id-30"), ("id-5", "item-mean")}
    per_fold = [len(closed[fold].predictions()["label"]) for fold in ("B0", "B1")]
    for (arm, _), row in told.items():
        assert (row.folds, row.seeds, row.examples, row.backbone) == (2, 3, sum(per_fold), "din")
        assert row.capped == (None if arm == "item-mean" else 2)
        of_arm = next(known for key, known in trained.items() if key.key == arm)
        areas = [roc_auc_score(o.predictions()["label"], o.predictions()["score"]) for o in of_arm]
        assert row.value == pytest.approx(np.average(areas, weights=np.repeat(per_fold, 3)))
        assert row.low < row.value < row.high
    better = told["id-5", "id-30"]
    assert better.delta == pytest.approx(better.value - told["id-30", ""].value)
    assert better.delta_low > 0
    assert {r.cluster for r in found if r.slice == "items 10-99" and r.metric == "auc"} == {"user"}


def test_what_is_told_of_cold_items_varies_by_item(world: World) -> None:
    """Train users meet items 1 to 14 alone, so 16 are cold: their interval is that of draws of 16 items."""
    folds = [
        user_fold(name, [row for row in rows(place) if row[1] <= 14 or row[3] != "train"])
        for place, name in enumerate(("cold0", "cold1"))
    ]
    files = {fold.name: fold_files(world.root, fold, world.settings) for fold in folds}
    world = replace(world, folds=files)
    trained = {arm: [outcome(world, name, arm, 0, noise=noise) for name in files] for arm, noise in ARMS.items()}
    found = score_study(world, "cold", "cold", "din", trained, {ID_5.key: ("id-30",)})
    told = {(r.arm, r.slice): r for r in found if r.metric == "auc"}
    assert {row.slice for row in told.values()} >= {"all", "warm", "cold", "items 0"}
    for (_, slice_), row in told.items():
        assert row.cluster == ("item" if slice_ in ("cold", "items 0", "items 1-9") else "user")
    assert {row.metric for row in found if row.slice == "cold"} == {"auc", "log_loss", "ece"}
    parts = [one.predictions() for one in trained[ID_5]]
    user, item, label, score = (np.concatenate([p[n] for p in parts]) for n in ("user", "item", "label", "score"))
    fold = np.repeat([0, 1], [len(part["label"]) for part in parts])
    cold = item >= 14  # places in the catalogue
    by_item, by_user = (
        ClusterBootstrap(by, 200, world.settings.run.seed, fold).auc(label, score, cold) for by in (item, user)
    )
    row = told[ID_5.key, "cold"]
    assert (row.value, row.low, row.high) == pytest.approx((by_item.value, *by_item.interval()))
    assert by_item.interval() != pytest.approx(by_user.interval())
    assert (row.clusters, row.examples) == (16, cold.sum())


def test_other_targets_are_refused(world: World) -> None:
    one, other = outcome(world, "B0", ID_30, 0, noise=1.0), outcome(world, "B0", ID_5, 0, noise=1.0)
    table = pq.read_table(other.folder / PREDICTIONS)
    pq.write_table(table.take(list(reversed(range(table.num_rows)))), other.folder / PREDICTIONS)
    with pytest.raises(ArtifactError, match="other targets"):
        score_study(world, "ctr", "B", "din", {ID_30: [one], ID_5: [other]}, {})


def test_holm_runs_over_the_claims_of_a_backbone(world: World) -> None:
    arms = {
        arm: [outcome(world, "B0", arm, 0, noise=1.0 + place)] for place, arm in enumerate((ID_30, ID_5, ITEM_MEAN))
    }
    references = {ID_5.key: ("id-30",), ITEM_MEAN.key: ("id-30",)}
    both = [row for name in ("din", "deepfm") for row in score_study(world, "ctr", "B", name, arms, references)]
    for row in with_holm(both):
        if row.p is None:
            assert row.p_holm is None
            continue
        peers = sorted(
            r.p
            for r in both
            if r.p is not None and (r.backbone, r.metric, r.slice) == (row.backbone, row.metric, row.slice)
        )
        assert len(peers) == 2
        assert row.p_holm == pytest.approx(min(1, max(2 * peers[0], row.p if row.p > peers[0] else 0)))


def test_steps_are_one_family_and_each_ground_another() -> None:
    """By hand: of two claims on the ground, 0.01·2 and 0.03; of three steps 0.01·3, 0.02·2 and 0.04; one form alone."""

    def claim(arm: str, reference: str, p: float, **changes: str) -> ResultRow:
        place = {"suite": "ctr", "split": "B", "backbone": "din", "metric": "auc", "label": arm} | changes
        return ResultRow.model_validate(place | {"arm": arm, "reference": reference, "delta": 0.1, "p": p})

    claims = [
        claim("a", "id-30", 0.01), claim("b", "id-30", 0.03),
        claim("a", "id-5", 0.01), claim("b", "a", 0.02), claim("b", "noise", 0.04),
        claim("b", "a", 0.02, backbone="dien"), claim("b", "a", 0.02, metric="ece"),
        claim("b", "a", 0.02, slice="cold"),
        claim("form", "none", 0.02, suite="contrastive"), claim("form", "none-profile", 0.03, suite="contrastive"),
        claim("page", "popularity", 0.02, suite="retrieval"), claim("page", "title", 0.03, suite="retrieval"),
    ]  # fmt: skip
    adjusted = [0.02, 0.03, 0.03, 0.04, 0.04, 0.02, 0.02, 0.02, 0.02, 0.03, 0.02, 0.03]
    assert [row.p_holm for row in with_holm(claims)] == pytest.approx(adjusted)


def test_a_folder_is_named_by_all_that_shapes_a_training(world: World) -> None:
    text = next(arm for arm in ladder(["title"]) if arm.key == "printed")
    cell = Cell("B0", "deepfm", text, 0, 1e-3)
    known = cell_folder(world, cell)

    def changed(**sections: dict[str, object]) -> World:
        tree = world.settings.model_dump()
        return replace(
            world, settings=Settings.model_validate({**tree, **{k: tree[k] | v for k, v in sections.items()}})
        )

    others = {
        "fold": cell_folder(world, replace(cell, fold="B1")),
        "backbone": cell_folder(world, replace(cell, backbone="din")),
        "seed": cell_folder(world, replace(cell, seed=1)),
        "rate": cell_folder(world, replace(cell, learning_rate=2e-3)),
        "pairs": cell_folder(world, replace(cell, arm=replace(text, pairs="random"))),
        "rows": cell_folder(world, replace(cell, arm=replace(text, rows="noise"))),
        "labels": cell_folder(
            replace(world, folds=world.folds | {"B0": replace(world.folds["B0"], content_hash="x")}), cell
        ),
        "users": cell_folder(
            replace(world, folds=world.folds | {"B0": replace(world.folds["B0"], user_vectors="x")}), cell
        ),
        "text": cell_folder(replace(world, item_vectors={"title": "x"}), cell),
        "epochs": cell_folder(changed(evaluate={"epochs": 9}), cell),
        "width": cell_folder(changed(train={"dim": 9}), cell),
        "ties": cell_folder(changed(history={"ties": "shuffle"}), cell),
        "swing": cell_folder(changed(swing={"preset": "yang"}), cell),
    }
    assert len({known, *others.values()}) == 1 + len(others)
    same = [
        cell_folder(world, replace(cell, arm=replace(text, key="another", label="name"))),
        cell_folder(changed(evaluate={"jobs": 7}), cell),
        cell_folder(changed(train={"device": "cpu"}), cell),
    ]
    assert set(same) == {known}


@pytest.mark.parametrize(("patience", "trained_with"), [(None, 9), (2, 2)])
def test_no_training_stops_early_unless_asked_to(world: World, patience: int | None, trained_with: int) -> None:
    tree = world.settings.model_dump()
    tree["evaluate"] |= {"epochs": 9, "patience": patience}
    asked = replace(world, settings=Settings.model_validate(tree))
    settings = train_settings(asked, Cell("B0", "deepfm", ID_30, 0, 1e-3))
    assert (settings.epochs, settings.patience) == (9, trained_with)


def test_labels_decide_no_split_and_name_the_content(world: World) -> None:
    other = [(user, item, 1 - liked, part) for user, item, liked, part in rows(0)]
    folds = [user_fold("B0", given) for given in (rows(0), other)]
    assert folds[0].split_hash == folds[1].split_hash
    assert content_hash(folds[0], []) != content_hash(folds[1], [])


def test_nulls_of_vectors(world: World) -> None:
    files = world.folds["B0"]
    arm = Arm("a", "a", text="title", profile=True)
    own, shuffled, noise = (
        load_encodings(world, files, replace(arm, rows=kind), 3) for kind in ("own", "shuffled", "noise")
    )
    assert load_encodings(world, files, Arm("a", "a"), 3) == {}
    assert load_encodings(world, files, Arm("a", "a", text="title"), 3).keys() == {"item"}
    for side in ("user", "item"):
        assert not own[side].equal(shuffled[side])
        assert sorted(map(tuple, own[side].tolist())) == sorted(map(tuple, shuffled[side].tolist()))
    assert noise["item"].mean().item() == pytest.approx(3, abs=1)
    assert not noise["item"].equal(own["item"])


@pytest.mark.parametrize("top_k", [3, 25])
def test_random_pairs_are_others_of_the_paired(world: World, top_k: int) -> None:
    files = world.folds["B0"]
    data = load_fold(world, files, None)
    options = {"top_k": top_k, "normalized": False, "seed": 5}
    swing = load_samplers(files, Arm("a", "a"), data, **options)["item"]
    random = load_samplers(files, Arm("a", "a", pairs="random"), data, **options)["item"]
    paired = np.flatnonzero(swing.sizes.numpy() > 0)
    assert np.array_equal(np.flatnonzero(random.sizes.numpy() > 0), paired)
    assert set(random.sizes[paired].tolist()) == {min(top_k, len(paired) - 1)}
    for anchor in paired:
        drawn = random.candidates[anchor]
        drawn = drawn[drawn >= 0].tolist()
        assert anchor not in drawn
        assert set(drawn) <= set(paired.tolist())
        assert len(set(drawn)) == len(drawn)


def test_pairs_of_another_split_are_refused(world: World) -> None:
    files = replace(world.folds["B0"], split_hash="0" * 64)
    with pytest.raises(ArtifactError, match="the fold is 000000000000"):
        load_samplers(files, ID_30, load_fold(world, world.folds["B0"], None), top_k=3, normalized=False, seed=0)


def test_a_fold_is_prepared_once(world: World) -> None:
    files = world.folds["B0"]
    before = {path.name: path.stat().st_mtime_ns for path in files.folder.iterdir()}
    again = fold_files(world.root, user_fold("B0", rows(0)), world.settings)
    assert again == files
    assert {path.name: path.stat().st_mtime_ns for path in files.folder.iterdir()} == before
    flipped = [(user, item, 1 - liked, part) for user, item, liked, part in rows(0)]
    assert fold_files(world.root, user_fold("B0", flipped), world.settings).content_hash != files.content_hash
    after = {path.name: path.stat().st_mtime_ns for path in files.folder.iterdir()}
    assert all(after[name] > before[name] for name in before)
