"""`feast monitor` on views that hold arrays: stock Feast 0.67 gives such a view no metrics at all."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kellm_features.store.layout import ITEM_EMBEDDING, ITEM_NEIGHBORS

from .marks import FEAST

pytestmark = FEAST

WHEN = datetime(2026, 3, 1, 12, tzinfo=UTC)
VECTORS = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
NO_VECTOR, WITHDRAWN = 3, 7
YAML = """\
project: films
provider: local
registry: data/registry.db
online_store:
  type: feast.infra.online_stores.sqlite.SqliteOnlineStore
  path: data/online.db
offline_store:
  type: kellm_features.store.duckdb.KellmDuckDBOfflineStore
entity_key_serialization_version: 3
"""


def test_feast_monitor(tmp_path: Path) -> None:
    """The folder's name holds a quote, which comes into SQL; to Feast an array of strings is a category."""
    from feast import FeatureStore
    from feast.monitoring.monitoring_service import MonitoringService

    from kellm_features.store.views import item_entity, item_knowledge_views

    repo = tmp_path / "it's a repo"
    repo.mkdir()
    (repo / "feature_store.yaml").write_text(YAML)
    stamps = {"event_timestamp": WHEN, "created_timestamp": WHEN}
    embeddings, neighbors = [], []
    for i, vector in enumerate(VECTORS):
        ids = {"item_id": str(i), "is_deleted": i == WITHDRAWN, **stamps}
        told = {"embedding": None if i == NO_VECTOR else vector.tolist(), "embedding_version": "v1", "embedded_at": 1}
        embeddings.append(ids if i == WITHDRAWN else ids | told)
        near = {"neighbor_ids": [str(n) for n in range(i)], "scores": [3.0] * min(i, 4)}
        neighbors.append(ids if i == WITHDRAWN else ids | near)
    for spec, rows in ((ITEM_EMBEDDING, embeddings), (ITEM_NEIGHBORS, neighbors)):
        (repo / "data" / spec.name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, spec.arrow("string")), repo / "data" / spec.name / "v1.parquet")

    item = item_entity("string")
    embedding_view, _, _, neighbors_view = item_knowledge_views(repo / "data", item, "string")
    store = FeatureStore(str(repo))
    store.apply([item, embedding_view, neighbors_view])
    command = [sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli(prog_name='feast')", "monitor", "run"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True, timeout=120)
    assert "Failed to" not in done.stderr
    assert "Feature views computed: 2\n" in done.stdout

    metrics = MonitoringService(store).get_feature_metrics("films", granularity="baseline")
    got = {metric["feature_name"]: metric for metric in metrics}
    assert {metric["row_count"] for metric in metrics if metric["histogram"]} == {19}  # not the withdrawn one

    norms = np.linalg.norm(np.delete(VECTORS, [NO_VECTOR, WITHDRAWN], axis=0).astype(float), axis=1)
    embedding = got["embedding"]
    assert (embedding["null_count"], sum(embedding["histogram"]["counts"])) == (1, 18)
    told = [embedding[name] for name in ("mean", "stddev", "min_val", "max_val", "p50")]
    computed = [norms.mean(), norms.std(ddof=1), norms.min(), norms.max(), np.median(norms)]
    np.testing.assert_allclose(told, computed, rtol=1e-12)

    lengths = np.delete(np.arange(20), WITHDRAWN)
    assert got["neighbor_ids"]["feature_type"] == "numeric"
    assert got["neighbor_ids"]["null_count"] == got["scores"]["null_count"] == 0  # an empty array is no null
    np.testing.assert_allclose(got["neighbor_ids"]["mean"], lengths.mean(), rtol=1e-12)
    np.testing.assert_allclose(got["scores"]["mean"], (3 * np.sqrt(np.minimum(lengths, 4))).mean(), rtol=1e-12)
    assert got["embedding_version"]["histogram"]["values"] == [{"value": "v1", "count": 19}]
