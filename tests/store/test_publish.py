"""Publishing into a real Feast repository, promoting and reading, against the vectors as the export wrote them."""

from __future__ import annotations

import fcntl
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kellm_features import EmbeddingReader, Embeddings
from kellm_features.errors import StoreError
from kellm_features.settings import Settings, VerifySettings
from kellm_features.store import publish as publishing
from kellm_features.store import rollout
from kellm_features.store.join import training_join
from kellm_features.store.layout import VIEWS
from kellm_features.store.scaffold import write_feature_repo
from kellm_features.store.stage import run as run_stage
from kellm_features.store.stage import why_stale

from .marks import FEAST

T2 = pd.Timestamp("2026-03-08T12:00:00.75Z").to_pydatetime()
LENIENT = VerifySettings(max_centroid_drift=2, min_neighbor_overlap=0)
"""The vectors of these runs are random, each version's anew."""
pytestmark = FEAST


def fetch(repo: Path, ids: Any, **options: Any) -> Embeddings:
    with EmbeddingReader.from_repo(repo, **options) as reader:
        return reader.get(ids)


def inputs(run: Any) -> dict[str, Path]:
    return rollout.run_inputs(run.folder)


def partitions(repo: Path) -> list[str]:
    return sorted(str(path.relative_to(repo / "data")) for path in repo.rglob("*.parquet"))


@dataclass
class Story:
    """A repository to which v1 was published and promoted, then v2: killed at first, run again after that."""

    project: Path
    repo: Path
    first: Any
    second: Any
    reports: dict[str, Any]
    after_first: Embeddings
    after_kill: Embeddings
    status_after_kill: rollout.Status
    stale_after_kill: str | None
    after_publish: Embeddings


@pytest.fixture(scope="module")
def story(tmp_path_factory, make_run, published_artifact) -> Story:
    project = tmp_path_factory.mktemp("project")
    repo = project / "feature_repo"
    # v2 drops item 50 and gains item 51
    first = make_run(project / "run1", "v1")
    second = make_run(project / "run2", "v2", T2, 2, items=[*range(1, 50), 51])
    reports = {"v1": run_stage(first.context(repo))}
    after_first = fetch(repo, [1, 50, 51])
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(publishing, "_write_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            rollout.publish(repo, inputs(second), split_hash="split")
    after_kill, status_after_kill = fetch(repo, [1, 50, 51]), rollout.status(repo)
    stale = why_stale(Settings.model_validate({"store": {"repo": repo}}), published_artifact(project, reports["v1"]))
    rollout.publish(repo, inputs(second), split_hash="split")
    after_publish = fetch(repo, [1, 50, 51])
    context = second.context(repo)
    store = context.settings.store.model_copy(update={"verify": LENIENT})
    reports["v2"] = run_stage(
        type(context)(**{**vars(context), "settings": context.settings.model_copy(update={"store": store})})
    )
    return Story(
        project, repo, first, second, reports, after_first, after_kill, status_after_kill, stale, after_publish
    )


def test_the_repository_is_made_from_the_template(story):
    assert (story.repo / "definitions.py").read_text() == (
        Path(__file__).parents[2] / "feature_repo" / "definitions.py"
    ).read_text()


def test_reports_tell_version_rows_and_repository(story):
    report = story.reports["v2"]
    assert (report.rows_in, report.rows_out) == (80, 80)
    assert report.notes["version"] == "v2"
    assert report.notes["promoted"] is True
    assert report.notes["repo"] == str(story.repo)
    assert report.notes["rows"]["item_knowledge_embedding"] == 50
    assert report.notes["rows"]["user_knowledge_embedding"] == 30


def test_the_first_version_is_served_bit_equal(story):
    vectors = story.first.vectors()
    np.testing.assert_array_equal(story.after_first.values[:2], np.stack([vectors[1], vectors[50]]))
    assert np.isnan(story.after_first.values[2]).all()
    assert story.after_first.found.tolist() == [True, True, False]
    assert story.after_first.version == "v1"


def test_a_killed_publish_leaves_the_version_before_serving(story):
    np.testing.assert_array_equal(story.after_kill.values, story.after_first.values)
    assert story.stale_after_kill is None
    assert [(v.name, v.state) for v in story.status_after_kill.versions] == [("v2", "unfinished"), ("v1", "serving")]


def test_publishing_serves_nothing_until_it_is_promoted(story):
    np.testing.assert_array_equal(story.after_publish.values, story.after_first.values)
    assert story.after_publish.version == "v1"


def test_running_again_completes_and_duplicates_nothing(story):
    written = [f"{spec.name}/{version}.parquet" for spec in VIEWS for version in ("v1", "v2")]
    assert partitions(story.repo) == sorted(written)
    assert [(v.name, v.state) for v in rollout.status(story.repo).versions] == [("v2", "serving"), ("v1", "published")]


def test_the_second_version_serves_and_the_dropped_item_does_not(story):
    vectors = story.second.vectors()
    ids = sorted(vectors)
    got = fetch(story.repo, [*ids, 50, 999])
    np.testing.assert_array_equal(got.values[:-2], np.stack([vectors[i] for i in ids]))
    assert np.isnan(got.values[-2:]).all()
    assert got.found.tolist() == [True] * 50 + [False, False]
    assert got.version == "v2"
    age = (pd.Timestamp.now("UTC") - pd.Timestamp(T2)).total_seconds()
    assert got.age_s[:-2] == pytest.approx(age, abs=30)
    assert np.isnan(got.age_s[-2:]).all()


def test_users_are_served(story):
    vectors = story.second.vectors("user")
    got = fetch(story.repo, np.array([7, 30, 7]), view="user_knowledge_embedding")
    np.testing.assert_array_equal(got.values, np.stack([vectors[7], vectors[30], vectors[7]]))


def test_a_version_that_is_not_active_can_be_read_by_its_name(story):
    got = fetch(story.repo, [1, 50], version="v1")
    assert got.version == "v1"
    np.testing.assert_array_equal(got.values, np.stack([story.first.vectors()[i] for i in (1, 50)]))


def test_a_stock_client_at_the_project_root_gets_the_same(story, monkeypatch):
    from feast import FeatureStore

    monkeypatch.chdir(story.project)
    answer = FeatureStore("feature_repo").get_online_features(
        ["item_knowledge_embedding:embedding"], [{"item_id": 1}, {"item_id": 50}]
    )
    served = answer.to_dict()["embedding"]
    np.testing.assert_array_equal(np.array(served[0], dtype=np.float32), story.second.vectors()[1])
    assert served[1] is None


def test_every_view_holds_what_the_artefacts_held(story):
    from feast import FeatureStore

    store = FeatureStore(str(story.repo))
    features = [f"{v.name}:{name}" for v in VIEWS if v.entity == "item" for name, _ in v.features]
    served = store.get_online_features(features, [{"item_id": i} for i in (2, 3)], full_feature_names=True).to_dict()
    assert served["item_description__description"] == [f"About {i}, told for v2: “naïve”." for i in (2, 3)]
    assert served["item_wiki_link__wiki_page_id"] == [1002, None]
    assert served["item_wiki_link__reason"] == [None, "no candidate"]
    assert served["item_knowledge_embedding__embedded_at"] == [int(T2.timestamp())] * 2
    pairs = [p for p in story.second.tables["swing", "item_pairs.parquet"].to_pylist() if p["anchor_id"] == 3]
    pairs.sort(key=lambda pair: pair["rank"])
    assert served["item_swing_neighbors__neighbor_ids"][1] == [pair["neighbor_id"] for pair in pairs]
    assert served["item_swing_neighbors__scores"][1] == [pair["score"] for pair in pairs]


def test_the_feature_service_serves_both_embeddings(story):
    from feast import FeatureStore

    store = FeatureStore(str(story.repo))
    rows = [{"item_id": 1, "user_id": 2}]
    served = store.get_online_features(store.get_feature_service("ranker_v1"), rows, full_feature_names=True).to_dict()
    for name, vector in (("item", story.second.vectors()[1]), ("user", story.second.vectors("user")[2])):
        got = served[f"{name}_knowledge_embedding__embedding"][0]
        np.testing.assert_array_equal(np.array(got, dtype=np.float32), vector)


def test_history_returns_the_version_of_the_moment_and_keeps_every_row(story, monkeypatch):
    from feast import FeatureStore

    monkeypatch.chdir(story.project)
    moments = {
        "before": (pd.Timestamp("2026-02-01", tz="UTC"), None),
        "v1": (pd.Timestamp("2026-03-05", tz="UTC"), story.first.vectors()),
        "v2": (pd.Timestamp("2026-03-09", tz="UTC"), story.second.vectors()),
    }
    rows = [
        {"item_id": item, "event_timestamp": moment, "when": name}
        for name, (moment, _) in moments.items()
        for item in (1, 50, 51, 999, 1)  # one row twice: both must come back
    ]
    entity = pd.DataFrame(rows)
    job = FeatureStore("feature_repo").get_historical_features(entity, ["item_knowledge_embedding:embedding"])
    joined = job.to_df()
    assert len(joined) == len(entity)
    assert sorted(zip(joined["when"], joined["item_id"], strict=True)) == sorted(
        (row["when"], row["item_id"]) for row in rows
    )
    for row in joined.itertuples():
        vector = (moments[row.when][1] or {}).get(row.item_id)
        if vector is None:
            assert row.embedding is None
        else:
            np.testing.assert_array_equal(np.asarray(row.embedding, dtype=np.float32), vector)


def test_why_stale_tells_what_is_wrong(story, tmp_path, published_artifact):
    repo = tmp_path / "feature_repo"
    shutil.copytree(story.repo, repo)
    settings = Settings.model_validate({"store": {"repo": repo}})
    first, second = (published_artifact(tmp_path, story.reports[version]) for version in ("v1", "v2"))
    assert why_stale(settings, first) is None  # another version is served: that was somebody's decision
    assert why_stale(settings, second) is None
    named = Settings.model_validate({"store": {"repo": repo, "version": "v9"}})
    assert why_stale(named, second) == "published as v2, wanted as v9"
    (repo / "data" / "item_description" / "v2.parquet").rename(tmp_path / "kept")
    assert "v2.parquet is gone" in why_stale(settings, second)
    (tmp_path / "kept").rename(repo / "data" / "item_description" / "v2.parquet")
    rollout.promote(repo, "v1", force=True)
    assert rollout.prune(repo, 1, grace_s=0) == []  # v2 was published last
    (repo / "data" / "online.db").unlink()
    assert "no longer holds version v2" in why_stale(settings, second)
    shutil.rmtree(repo)
    assert "holds no feature_store.yaml" in why_stale(settings, second)


def test_a_published_version_that_waits_is_promoted_by_the_next_run(story, tmp_path, make_run, published_artifact):
    repo = tmp_path / "feature_repo"
    context = make_run(tmp_path / "run", "v1").context(repo)
    store = context.settings.store.model_copy(update={"promote": False})
    settings = context.settings.model_copy(update={"store": store})
    report = run_stage(type(context)(**{**vars(context), "settings": settings}))
    artifact = published_artifact(tmp_path, report)
    with pytest.raises(StoreError, match=r"version v1 is published and waits for  kellm promote v1"):
        fetch(repo, [1])
    assert why_stale(settings, artifact) is None
    assert why_stale(context.settings, artifact) == "version v1 is published and was not promoted"
    assert rollout.promote(repo).name == "v1"
    assert fetch(repo, [1]).found.all()


def test_a_moved_repository_that_lost_its_online_store_is_published_to_again(story, tmp_path):
    repo = tmp_path / "moved"
    shutil.copytree(story.repo, repo)
    (repo / "data" / "online.db").unlink()
    before = partitions(repo)
    with pytest.raises(StoreError, match="nothing is published: run  kellm publish"):
        fetch(repo, [1])
    rollout.publish(repo, inputs(story.first))
    rollout.promote(repo)
    assert partitions(repo) == before
    got = fetch(repo, [1, 50, 51])
    np.testing.assert_array_equal(got.values[:2], np.stack([story.first.vectors()[i] for i in (1, 50)]))
    assert got.found.tolist() == [True, True, False]


def test_a_version_never_changes(story, tmp_path, make_run):
    changed = make_run(tmp_path / "run", "v1", seed=9)
    before = (partitions(story.repo), rollout.status(story.repo))
    with pytest.raises(
        StoreError, match=r"version 'v1' was published on .* with other rows of .*, and a version never"
    ):
        rollout.publish(story.repo, inputs(changed))
    assert (partitions(story.repo), rollout.status(story.repo)) == before


def test_a_version_can_be_given_a_name(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    run = make_run(tmp_path / "run", "v1")
    assert rollout.publish(repo, inputs(run), version="nightly-7").name == "nightly-7"
    assert rollout.promote(repo).name == "nightly-7"
    from feast import FeatureStore

    rows = FeatureStore(str(repo)).get_online_features(["item_knowledge_embedding:embedding_version"], [{"item_id": 1}])
    assert rows.to_dict()["embedding_version"] == ["nightly-7"]
    with pytest.raises(StoreError, match=r"the version's name is '\.\./x'; accepted: up to 100 letters"):
        rollout.publish(repo, inputs(run), version="../x")


def test_a_version_carries_its_split_and_the_join_refuses_another(story):
    now = pd.Timestamp("2026-03-20", tz="UTC")
    events = pa.table({"item_id": [1, 51], "event_timestamp": [now, now]})
    assert training_join(events, story.repo, split_hash="split").found.all()  # the stage passed it on
    with pytest.raises(StoreError, match=r"version v2 was trained on split split and the events are of split other"):
        training_join(events, story.repo, split_hash="other")
    unknown = pa.table({"item_id": [999], "event_timestamp": [now]})
    assert not training_join(unknown, story.repo, split_hash="other").found.any()  # no vector is used


def test_views_whose_rows_did_not_change_are_shared(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    first = make_run(tmp_path / "run", "v1")
    one = rollout.publish(repo, inputs(first))
    two = rollout.publish(repo, inputs(first), version="v2")
    same = {name for name in one.views if one.views[name].number == two.views[name].number}
    assert same == {"item_description", "item_wiki_link", "item_swing_neighbors", "user_swing_neighbors"}
    rollout.promote(repo, "v2", force=True)
    assert rollout.prune(repo, 1, grace_s=0) == ["v1"]
    from feast import FeatureStore

    rows = FeatureStore(str(repo)).get_online_features(["item_wiki_link:wiki_title"], [{"item_id": 2}])
    assert rows.to_dict()["wiki_title"] == ["Film 2"]


def test_embeddings_alone_are_a_version_too(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    run = make_run(tmp_path / "run", "v1")
    name = "item_knowledge_embedding"
    assert list(rollout.publish(repo, {name: inputs(run)[name]}).views) == [name]
    rollout.promote(repo)
    np.testing.assert_array_equal(fetch(repo, [3]).values[0], run.vectors()[3])
    with pytest.raises(StoreError, match=r"version v1 holds no user_knowledge_embedding; it holds item_knowledge"):
        fetch(repo, [3], view="user_knowledge_embedding")
    with pytest.raises(StoreError, match=r"it needs item_knowledge_embedding or user_knowledge_embedding"):
        rollout.publish(repo, {"item_description": inputs(run)["item_description"]})


def test_ids_of_another_type_are_refused_and_leave_nothing(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo, id_type="int64")
    run = make_run(tmp_path / "run", key=str)
    with pytest.raises(StoreError, match=r"with ids of type int64 and this run has string ids: set id_type in"):
        rollout.publish(repo, inputs(run))
    assert partitions(repo) == []
    assert rollout.status(repo).versions == ()


def test_string_ids(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    run = make_run(tmp_path / "run", key=lambda i: f"tt{i:04d}é")
    rollout.publish(repo, inputs(run))
    rollout.promote(repo)
    got = fetch(repo, ["tt0001é", "tt0001", "tt0050é"])
    assert got.found.tolist() == [True, False, True]
    np.testing.assert_array_equal(got.values[[0, 2]], np.stack([run.vectors()[i] for i in ("tt0001é", "tt0050é")]))
    with pytest.raises(StoreError, match=r"id 1 is not a string, and ids of item_knowledge_embedding are strings"):
        fetch(repo, ["tt0001é", 1])


def test_two_publishers_at_once(story):
    with (story.repo / "data" / ".publish.lock").open("r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another publish into .* is running \(process \d+ since"):
            rollout.publish(story.repo, inputs(story.second))
        with pytest.raises(StoreError, match=r"another publish into .* is running"):
            rollout.prune(story.repo, 1)


def test_a_folder_that_is_no_repository_is_left_alone(tmp_path, make_run):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    run = make_run(tmp_path / "run")
    with pytest.raises(StoreError, match=r"is not empty and holds no feature_store.yaml"):
        rollout.publish(tmp_path / "home", inputs(run))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_definitions_that_feast_refuses_publish_nothing(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo)
    (repo / "broken.py").write_text("raise ValueError('no such column: ünique')\n")
    run = make_run(tmp_path / "run")
    with pytest.raises(
        StoreError, match=r"feast apply failed in .* \(ValueError: no such column: ünique\): nothing was"
    ):
        rollout.publish(repo, inputs(run))
    assert partitions(repo) == []
    assert rollout.status(repo).versions == ()
    (repo / "broken.py").unlink()
    assert rollout.publish(repo, inputs(run)).state == "published"


def test_an_online_store_that_overwrites_in_place_is_refused(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo)
    yaml = (repo / "feature_store.yaml").read_text()
    (repo / "feature_store.yaml").write_text(
        yaml.replace("kellm_features.store.sqlite.KellmSqliteOnlineStore", "sqlite")
    )
    run = make_run(tmp_path / "run")
    with pytest.raises(StoreError, match=r"online_store.type is 'sqlite', which overwrites rows in place .* set it to"):
        rollout.publish(repo, inputs(run))


def test_reading_errors_tell_what_to_do(story, tmp_path):
    with pytest.raises(StoreError, match=r"id 'abc' is not an int64, and ids of item_knowledge_embedding are"):
        fetch(story.repo, [1, "abc"])
    with pytest.raises(StoreError, match=r"id 1\.5 is not an int64"):
        fetch(story.repo, [1.5])
    with pytest.raises(StoreError, match=r"id True is not an int64"):
        fetch(story.repo, ["x", True][1:])
    with pytest.raises(StoreError, match=r"one row of int64; an array of shape \(1, 1\) was given"):
        fetch(story.repo, np.array([[1]]))
    with pytest.raises(StoreError, match=r"'item_description' holds no embeddings; those that do: item_knowledge_emb"):
        fetch(story.repo, [1], view="item_description")
    with pytest.raises(StoreError, match=r"holds no feature_store.yaml"):
        fetch(tmp_path, [1])
    with pytest.raises(StoreError, match=r"the store holds no version 'v7'; it holds v1, v2"):
        fetch(story.repo, [1], version="v7")
    write_feature_repo(tmp_path / "fresh")
    with pytest.raises(StoreError, match=r"nothing is published: run  kellm publish  and  kellm promote"):
        fetch(tmp_path / "fresh", [1])
    assert not (tmp_path / "fresh" / "data").exists()  # reading makes nothing
    with (
        EmbeddingReader.from_repo(story.repo) as reader,
        pytest.raises(StoreError, match=r"of version v2 lacks 777, 778: publish a version that holds them"),
    ):
        reader.get([1, 777, 2, 778], on_missing="raise")


def test_nothing_asked_for_is_nothing_fetched(story):
    got = fetch(story.repo, [])
    assert got.values.shape == (0, 8)
    assert got.found.shape == got.age_s.shape == (0,)


def test_one_request_takes_more_ids_than_sqlite_has_parameters(story):
    got = fetch(story.repo, range(1, 40_001))
    assert got.found.sum() == 50


def test_rollback_prune_and_grace(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    runs = {name: make_run(tmp_path / name, name, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    write_feature_repo(repo)
    with pytest.raises(StoreError, match="nothing is published: run  kellm publish"):
        rollout.rollback(repo)
    for name, run in runs.items():
        rollout.publish(repo, inputs(run))
        rollout.promote(repo, name, force=True)
    assert rollout.rollback(repo).name == "b"
    assert rollout.rollback(repo).name == "a"
    with pytest.raises(StoreError, match="there is no version to roll back to: a is the only one that was served"):
        rollout.rollback(repo)
    np.testing.assert_array_equal(fetch(repo, [5]).values[0], runs["a"].vectors()[5])
    assert rollout.prune(repo, 1, grace_s=3600) == []  # b was served a moment ago
    assert rollout.prune(repo, 1, grace_s=0) == ["b"]
    with pytest.raises(StoreError, match=r"the store holds no version 'b'; it holds a, c"):
        rollout.promote(repo, "b")
    with pytest.raises(StoreError, match=r"prune was to keep 0 versions"):
        rollout.prune(repo, 0)
    assert fetch(repo, [5]).version == "a"
    assert "item_knowledge_embedding/b.parquet" in partitions(repo)  # history for training
    rollout.publish(repo, inputs(runs["b"]))  # and back, from the same rows
    rollout.promote(repo, "b", force=True)
    np.testing.assert_array_equal(fetch(repo, [5]).values[0], runs["b"].vectors()[5])


def test_a_version_that_fails_its_gates_is_not_promoted(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    rollout.publish(repo, inputs(make_run(tmp_path / "run1", "v1")))
    rollout.promote(repo)
    rollout.publish(repo, inputs(make_run(tmp_path / "run2", "v2", T2, items=range(1, 26))))
    found = rollout.verify(repo)
    assert not found.passed
    with pytest.raises(StoreError, match=r"version v2 is not promoted, it fails .* coverage is 0\.5, accepted ≥ 0\.95"):
        rollout.promote(repo)
    assert fetch(repo, [30]).version == "v1"
    assert [(v.name, v.verified) for v in rollout.status(repo).versions] == [("v2", False), ("v1", True)]
    mild = VerifySettings(min_coverage=0.4, max_centroid_drift=2, min_neighbor_overlap=0)
    assert rollout.promote(repo, settings=mild).name == "v2"
    since = rollout.status(repo).since
    assert since is not None
    assert abs((datetime.now(UTC) - since).total_seconds()) < 60
