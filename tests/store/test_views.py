"""The Feast objects: what the factories make, and what the on-demand views compute in a real repository."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_features.errors import StoreError
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING, VIEWS, ViewSpec

from .marks import FEAST

pytestmark = FEAST

T1 = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
T2 = datetime(2026, 3, 8, 12, 0, 0, 750_000, tzinfo=UTC)
WITHDRAWN, OTHER_VERSION, ZERO, MISSING = 7, 8, 9, 99
"""Ids with a null row, with a row of another version (users only), with a zero vector, and without a row."""
YAML = """\
project: films
provider: local
registry: data/registry.db
online_store:
  type: feast.infra.online_stores.sqlite.SqliteOnlineStore
  path: data/online.db
offline_store:
  type: duckdb
entity_key_serialization_version: 3
"""
DEFINITIONS = """\
from pathlib import Path

from kellm_features.store.views import knowledge_objects

globals().update(knowledge_objects(Path(__file__).parent / "data"))
"""
AFFINITY = ["item_user_affinity:dot", "item_user_affinity:cosine"]


def vectors(entity: str, version: str) -> np.ndarray:
    """(10, 8) float32: one row per id 0 to 9."""
    values = np.random.default_rng([ord(entity[0]), ord(version[-1])]).standard_normal((10, 8)).astype(np.float32)
    values[ZERO] = 0
    return values


def write_partition(repo: Path, spec: ViewSpec, version: str, when: datetime) -> None:
    rows: list[dict[str, Any]] = []
    for key, vector in enumerate(vectors(spec.entity, version)):
        row = {
            "embedding": vector.tolist(),
            "embedding_version": "v0" if key == OTHER_VERSION and spec.entity == "user" else version,
            "embedded_at": int(when.timestamp()),
        }
        gone = key == WITHDRAWN
        rows.append({spec.join_key: key, "event_timestamp": when, "created_timestamp": when, "is_deleted": gone})
        rows[-1].update(dict.fromkeys(row) if gone else row)
    folder = repo / "data" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=spec.arrow("int64")), folder / f"{version}.parquet")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with stock stores and versions v1 and v2, applied from another directory; v2 is served."""
    folder = tmp_path_factory.mktemp("feast") / "feature_repo"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(YAML)
    (folder / "definitions.py").write_text(DEFINITIONS)
    for spec in (ITEM_EMBEDDING, USER_EMBEDDING):
        write_partition(folder, spec, "v1", T1)
        write_partition(folder, spec, "v2", T2)
    command = [sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli(prog_name='feast')"]
    done = subprocess.run(
        [*command, "-c", str(folder), "apply"], cwd=folder.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    from feast import FeatureStore

    store = FeatureStore(str(folder))
    store.materialize(T1, T2, feature_views=[ITEM_EMBEDDING.name, USER_EMBEDDING.name])
    return folder


@pytest.fixture(scope="module")
def store(repo: Path):
    from feast import FeatureStore

    return FeatureStore(str(repo))


def expected(items: list[int], users: list[int], version: str) -> tuple[np.ndarray, np.ndarray]:
    """Dot and cosine in float64, NaN for the ids that have none."""
    pairs = [
        (a.astype(float), b.astype(float))
        for a, b in zip(vectors("item", version)[items], vectors("user", version)[users], strict=True)
    ]
    dot = np.array([sum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs])
    with np.errstate(invalid="ignore"):
        return dot, dot / np.array([np.sqrt((a**2).sum() * (b**2).sum()) for a, b in pairs])


def test_affinity_online(store) -> None:
    items, users = [1, 2, 3, ZERO, WITHDRAWN, 1, MISSING, 1, 1], [4, 4, 6, 1, 1, WITHDRAWN, 1, MISSING, OTHER_VERSION]
    rows = [{"item_id": i, "user_id": u} for i, u in zip(items, users, strict=True)]
    got = store.get_online_features(AFFINITY, rows, full_feature_names=True).to_dict()
    dot, cosine = expected(items[:4], users[:4], "v2")
    np.testing.assert_allclose(got["item_user_affinity__dot"][:4], dot, rtol=1e-12)
    np.testing.assert_allclose(got["item_user_affinity__cosine"][:3], cosine[:3], rtol=1e-12)
    assert got["item_user_affinity__dot"][4:] == [None] * 5
    assert got["item_user_affinity__cosine"][3:] == [None] * 6  # a zero vector has no direction
    assert set(got) == {"item_id", "user_id", "item_user_affinity__dot", "item_user_affinity__cosine"}


def test_affinity_of_nothing_but_missing_ids(store) -> None:
    rows = [{"item_id": MISSING, "user_id": MISSING}]
    got = store.get_online_features(AFFINITY, rows, full_feature_names=True).to_dict()
    assert got["item_user_affinity__dot"] == got["item_user_affinity__cosine"] == [None]


def test_affinity_under_short_names_is_refused(store) -> None:
    """Feast would hand the user's vector over as the item's."""
    rows = [{"item_id": 1, "user_id": 2}]
    with pytest.raises(ValueError, match="full_feature_names=True"):
        store.get_online_features(AFFINITY, rows).to_dict()


def test_age_online(store) -> None:
    rows = [{"item_id": 1}, {"item_id": WITHDRAWN}, {"item_id": MISSING}]
    for full, name in ((False, "age_s"), (True, "item_embedding_age__age_s")):
        before = time.time()
        ages = store.get_online_features(["item_embedding_age:age_s"], rows, full_feature_names=full).to_dict()[name]
        assert before <= ages[0] + int(T2.timestamp()) <= time.time()
        assert ages[1:] == [None, None]


@pytest.mark.parametrize("timestamp", ["event_timestamp", "shown_at"])
def test_both_in_a_historical_join(store, timestamp: str) -> None:
    import pandas as pd

    hour = timedelta(hours=1)
    rows = pd.DataFrame(
        {
            "row": range(5),
            "item_id": [1, 1, 1, WITHDRAWN, MISSING],
            "user_id": [4, 4, 4, 4, 4],
            timestamp: [T2 - hour, T2 + hour, T1 - hour, T2 + hour, T2 + hour],
        }
    )
    features = [*AFFINITY, "item_embedding_age:age_s"]
    got = store.get_historical_features(rows, features, full_feature_names=True).to_df().sort_values("row")
    dots = [expected([1], [4], version)[0][0] for version in ("v1", "v2")]
    np.testing.assert_allclose(got["item_user_affinity__dot"], [*dots, np.nan, np.nan, np.nan], rtol=1e-12)
    cosines = [expected([1], [4], version)[1][0] for version in ("v1", "v2")]
    np.testing.assert_allclose(got["item_user_affinity__cosine"], [*cosines, np.nan, np.nan, np.nan], rtol=1e-12)
    week_less_hour = (T2 - hour).timestamp() - int(T1.timestamp())
    hour_s = (T2 + hour).timestamp() - int(T2.timestamp())
    ages = got["item_embedding_age__age_s"]
    np.testing.assert_allclose(ages, [week_less_hour, hour_s, np.nan, np.nan, np.nan], rtol=0, atol=1e-5)


def test_a_server_without_this_library_computes_them(repo: Path) -> None:
    code = f"""
import sys
sys.modules["kellm_features"] = None  # importing it raises
from feast import FeatureStore
features = {[*AFFINITY, "item_embedding_age:age_s"]!r}
rows = [{{"item_id": 1, "user_id": 4}}]
print(FeatureStore({str(repo)!r}).get_online_features(features, rows, full_feature_names=True).to_dict())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    got = ast.literal_eval(told.splitlines()[-1])
    np.testing.assert_allclose(got["item_user_affinity__dot"], expected([1], [4], "v2")[0], rtol=1e-12)
    assert got["item_embedding_age__age_s"][0] > 0


def test_another_view_is_not_accepted() -> None:
    from kellm_features.store.on_demand import item_embedding_age_view, item_user_affinity_view
    from kellm_features.store.views import item_entity, item_knowledge_views

    views = item_knowledge_views(Path("data"), item_entity())
    with pytest.raises(StoreError, match="reads user_knowledge_embedding and was given the view 'item_description'"):
        item_user_affinity_view(views[0], views[1])
    with pytest.raises(StoreError, match="reads item_knowledge_embedding"):
        item_embedding_age_view(views[1])


def test_all_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast import FileSource

    from kellm_features.store.views import knowledge_objects

    monkeypatch.chdir(tmp_path)
    objects = knowledge_objects(Path("data"))
    on_demand, service = {"item_user_affinity", "item_embedding_age"}, {"ranker_v1"}
    assert set(objects) == {"item", "user", *(spec.name for spec in VIEWS)} | on_demand | service
    assert all(name == made.name for name, made in objects.items())
    for spec in VIEWS:
        view = objects[spec.name]
        assert isinstance(view.batch_source, FileSource)
        assert view.batch_source.path == str(tmp_path / "data" / spec.name)
        assert view.ttl == timedelta(0)
    served = {spec.name: objects[spec.name].tags["kellm.serves"] for spec in VIEWS}
    assert served["item_knowledge_embedding"] == served["user_knowledge_embedding"] == "embedding"
    assert served["item_description"] == "description"
    assert objects["ranker_v1"].tags == {}


def test_spark_sources_and_ttl(tmp_path: Path) -> None:
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource

    from kellm_features.store.views import knowledge_objects

    for data, folder in (("s3a://bucket/films/data/", "s3a://bucket/films/data"), (tmp_path, str(tmp_path))):
        objects = knowledge_objects(data, "string", ttl=timedelta(days=14), source="spark")
        for spec in VIEWS:
            source = objects[spec.name].batch_source
            assert isinstance(source, SparkSource)
            assert (source.path, source.file_format) == (f"{folder}/{spec.name}/*.parquet", "parquet")
            assert (source.timestamp_field, source.created_timestamp_column) == ("event_timestamp", "created_timestamp")
            assert objects[spec.name].ttl == timedelta(days=14)


def test_what_views_refuse(tmp_path: Path) -> None:
    from kellm_features.store.views import knowledge_objects

    with pytest.raises(StoreError, match="source is 'hive'; accepted: 'file' or 'spark'"):
        knowledge_objects(tmp_path, source="hive")
    with pytest.raises(StoreError, match="ttl is -1 day"):
        knowledge_objects(tmp_path, ttl=timedelta(days=-1))
    with pytest.raises(StoreError, match="id_type is 'uuid'"):
        knowledge_objects(tmp_path, "uuid")


def test_a_service_tells_the_version_that_it_needs(store) -> None:
    from kellm_features.store.views import VERSION_TAG, consumer_service, item_entity, item_knowledge_views

    embedding = item_knowledge_views(Path("data"), item_entity())[0]
    pinned = consumer_service("ranker_v2", [embedding[["embedding"]]], version="v2", owner="a@b", tags={"team": "x"})
    assert pinned.tags == {"team": "x", VERSION_TAG: "v2"}
    assert pinned.owner == "a@b"
    assert consumer_service("explorer", [embedding]).tags == {}
    store.apply([pinned])
    again = store.get_feature_service("ranker_v2")
    assert again.tags["kellm.embedding_version"] == "v2"
    got = store.get_online_features(again, [{"item_id": 1}]).to_dict()
    np.testing.assert_array_equal(np.array(got["embedding"][0], np.float32), vectors("item", "v2")[1])


def test_what_a_service_refuses() -> None:
    from kellm_features.store.views import VERSION_TAG, consumer_service, item_entity, item_knowledge_views

    views = item_knowledge_views(Path("data"), item_entity())
    for name, version in (("", "v1"), ("ranker", "")):
        with pytest.raises(StoreError, match="give neither as empty text"):
            consumer_service(name, views, version=version)
    with pytest.raises(StoreError, match="'ranker' has no views"):
        consumer_service("ranker", [])
    with pytest.raises(StoreError, match="pass version="):
        consumer_service("ranker", views, tags={VERSION_TAG: "v1"})
