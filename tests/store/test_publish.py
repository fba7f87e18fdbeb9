"""Publishing into a real Feast repository and fetching from it, against the vectors as the export wrote them."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kellm_features.errors import StoreError
from kellm_features.settings import Settings
from kellm_features.store import publish as publishing
from kellm_features.store.fetch import FetchedEmbeddings, fetch_embeddings
from kellm_features.store.layout import VIEWS, read_published
from kellm_features.store.publish import run as publish
from kellm_features.store.publish import why_stale
from kellm_features.store.scaffold import write_feature_repo

T2 = pd.Timestamp("2026-03-08T12:00:00.75Z").to_pydatetime()
WARNINGS = (
    "ignore::DeprecationWarning",  # feast, ibis and their dependencies call what newer releases deprecate
    "ignore::FutureWarning",
    "ignore::ResourceWarning",  # feast leaves SQLite connections to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",  # the same, reported from the collector
)
pytestmark = [pytest.mark.feast, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]


@dataclass
class Story:
    """A repository to which v1 was published, then v2: killed at first, run again after that."""

    project: Path
    repo: Path
    first: Any
    second: Any
    reports: dict[str, Any]
    after_first: FetchedEmbeddings
    after_kill: FetchedEmbeddings
    stale_after_kill: str | None
    partitions_after_kill: list[str]


def partitions(repo: Path) -> list[str]:
    return sorted(str(path.relative_to(repo / "data")) for path in repo.rglob("*.parquet"))


@pytest.fixture(scope="module")
def story(tmp_path_factory, make_run, published_artifact) -> Story:
    project = tmp_path_factory.mktemp("project")
    repo = project / "feature_repo"
    # v2 drops item 50 and gains item 51
    first = make_run(project / "run1", "v1")
    second = make_run(project / "run2", "v2", T2, 2, items=[*range(1, 50), 51])
    reports = {"v1": publish(first.context(repo))}
    after_first = fetch_embeddings(repo, [1, 50, 51])
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(publishing, "_serve", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(second.context(repo))
    after_kill = fetch_embeddings(repo, [1, 50, 51])
    settings = Settings.model_validate({"store": {"repo": repo}})
    stale = why_stale(settings, published_artifact(project, reports["v1"]))
    left = partitions(repo)
    reports["v2"] = publish(second.context(repo))
    return Story(project, repo, first, second, reports, after_first, after_kill, stale, left)


def test_the_repository_is_made_from_the_template(story):
    assert (story.repo / "definitions.py").read_text() == (
        Path(__file__).parents[2] / "feature_repo" / "definitions.py"
    ).read_text()


def test_reports_tell_version_rows_and_repository(story):
    report = story.reports["v2"]
    assert (report.rows_in, report.rows_out) == (80, 80)
    assert report.notes["version"] == "v2"
    assert report.notes["repo"] == str(story.repo)
    assert report.notes["rows"]["item_knowledge_embedding"] == 50
    assert report.notes["rows"]["user_knowledge_embedding"] == 30
    assert report.notes["withdrawn"]["item_knowledge_embedding"] == 1
    assert (
        json.loads((story.second.folder / ".publish.new" / "published.json").read_text())["current"]["version"] == "v2"
    )


def test_the_first_version_is_served_bit_equal(story):
    vectors = story.first.vectors()
    np.testing.assert_array_equal(story.after_first.values[:2], np.stack([vectors[1], vectors[50]]))
    assert np.isnan(story.after_first.values[2]).all()
    assert story.after_first.found.tolist() == [True, True, False]
    assert story.after_first.version == ["v1", "v1", None]


def test_a_killed_publish_leaves_the_version_before_serving(story):
    np.testing.assert_array_equal(story.after_kill.values, story.after_first.values)
    assert story.stale_after_kill is None


def test_running_again_completes_and_duplicates_nothing(story):
    assert partitions(story.repo) == story.partitions_after_kill
    assert len(story.partitions_after_kill) == 12
    record = read_published(story.repo)
    assert [p.version for p in (record.current, *record.previous)] == ["v2", "v1"]
    assert not (story.repo / "data" / ".publishing.json").exists()


def test_the_second_version_serves_and_the_dropped_item_does_not(story):
    vectors = story.second.vectors()
    ids = sorted(vectors)
    got = fetch_embeddings(story.repo, [*map(str, ids), "50", "999"])
    assert got.ids == [*ids, 50, 999]
    np.testing.assert_array_equal(got.values[:-2], np.stack([vectors[i] for i in ids]))
    assert np.isnan(got.values[-2:]).all()
    assert got.found.tolist() == [True] * 50 + [False, False]
    assert got.version == ["v2"] * 50 + [None, None]
    age = (pd.Timestamp.now("UTC") - pd.Timestamp(T2)).total_seconds()
    assert got.age_s[:-2] == pytest.approx(age, abs=30)
    assert np.isnan(got.age_s[-2:]).all()


def test_users_are_served(story):
    vectors = story.second.vectors("user")
    got = fetch_embeddings(story.repo, [7, 30], view="user_knowledge_embedding")
    np.testing.assert_array_equal(got.values, np.stack([vectors[7], vectors[30]]))


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
    assert why_stale(settings, second) is None
    assert "serves version v2 now, this run made v1" in why_stale(settings, first)
    (repo / "data" / "online.db").rename(tmp_path / "online.db")
    assert "online.db is gone" in why_stale(settings, second)
    (tmp_path / "online.db").rename(repo / "data" / "online.db")
    (repo / "data" / "item_description" / "v2.parquet").unlink()
    assert "v2.parquet is gone" in why_stale(settings, second)
    (repo / "data" / "published.json").write_text("{")
    assert "is not a record of this version of kellm" in why_stale(settings, second)
    shutil.rmtree(repo)
    assert "nothing is published in" in why_stale(settings, second)


def test_an_older_version_is_served_again_in_a_moved_repository_without_its_online_store(story, tmp_path):
    repo = tmp_path / "moved"
    shutil.copytree(story.repo, repo)
    (repo / "data" / "online.db").unlink()
    report = publish(story.first.context(repo))
    assert report.notes["partitions"]["item_knowledge_embedding"] == "data/item_knowledge_embedding/v1.r2.parquet"
    assert report.notes["partitions"]["item_wiki_link"] == "data/item_wiki_link/v1.r2.parquet"
    got = fetch_embeddings(repo, [1, 50, 51])
    np.testing.assert_array_equal(got.values[:2], np.stack([story.first.vectors()[i] for i in (1, 50)]))
    assert got.found.tolist() == [True, True, False]
    assert [p.version for p in read_published(repo).previous] == ["v2", "v1"]


def test_a_version_never_changes(story, tmp_path, make_run):
    changed = make_run(tmp_path / "run", "v1", seed=9)
    before = (partitions(story.repo), (story.repo / "data" / "published.json").read_text())
    with pytest.raises(StoreError, match=r"version 'v1' was published into .* a version never changes"):
        publish(changed.context(story.repo))
    assert (partitions(story.repo), (story.repo / "data" / "published.json").read_text()) == before


def test_ids_of_another_type_are_refused_and_leave_nothing(tmp_path, make_run):
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo, id_type="int64")
    run = make_run(tmp_path / "run", key=str)
    with pytest.raises(StoreError, match=r"item ids of type int64 and this run has string ids: set id_type in"):
        publish(run.context(repo))
    assert partitions(repo) == []
    assert read_published(repo) is None
    assert not (repo / "data" / ".publishing.json").exists()
    with pytest.raises(StoreError, match=r"nothing is published in"):  # applied by then
        fetch_embeddings(repo, [1])


def test_two_publishers_at_once(story):
    with (story.repo / "data" / ".publish.lock").open("r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another publish into .* is running \(process \d+ since"):
            publish(story.second.context(story.repo))


def test_a_folder_that_is_no_repository_is_left_alone(tmp_path, make_run):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    run = make_run(tmp_path / "run")
    with pytest.raises(StoreError, match=r"is not empty and holds no feature_store.yaml"):
        publish(run.context(tmp_path / "home"))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_fetch_errors_tell_what_to_do(story, tmp_path):
    with pytest.raises(StoreError, match=r"item id 'abc' is not an integer, and ids are int64 here"):
        fetch_embeddings(story.repo, ["1", "abc"])
    with pytest.raises(StoreError, match=r"does not fit in int64"):
        fetch_embeddings(story.repo, [2**63])
    with pytest.raises(StoreError, match=r"known there: item_knowledge_embedding, user_knowledge_embedding"):
        fetch_embeddings(story.repo, [1], view="nothing")
    with pytest.raises(StoreError, match=r"'item_description' holds no embeddings"):
        fetch_embeddings(story.repo, [1], view="item_description")
    with pytest.raises(StoreError, match=r"holds no feature_store.yaml"):
        fetch_embeddings(tmp_path, [1])
    write_feature_repo(tmp_path / "fresh")
    with pytest.raises(StoreError, match=r"run  kellm publish"):
        fetch_embeddings(tmp_path / "fresh", [1])


def test_nothing_asked_for_is_nothing_fetched(story):
    got = fetch_embeddings(story.repo, [])
    assert got.values.shape == (0, 8)
    assert got.found.shape == got.age_s.shape == (0,)


def test_every_missing_vector_has_the_published_length(story):
    got = fetch_embeddings(story.repo, [999])
    assert got.values.shape == (1, 8)
    assert np.isnan(got.values).all()


def test_one_request_takes_more_ids_than_sqlite_has_parameters(story):
    got = fetch_embeddings(story.repo, range(1, 40_001))
    assert got.found.sum() == 50
