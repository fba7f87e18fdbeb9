"""The evaluation's SWING lists, which are computed without Spark, against the Spark job."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from kellm_features.evaluation.swing import swing_lists
from kellm_spark.swing import swing_pairs


@pytest.mark.spark
def test_the_spark_job_gives_the_same_rows(spark: SparkSession) -> None:
    """Popular items first; users have gaps."""
    rng = np.random.default_rng(4)
    user, item = np.nonzero(rng.random((70, 24)) < 2.5 / (1 + 0.2 * np.arange(24)) / 2)
    user = user * 7 + 3
    frame = spark.createDataFrame(pd.DataFrame({"user_id": user, "item_id": item}))
    rows = swing_pairs(frame, side="item", preset="yang", top_k=5).orderBy("anchor_id", "rank").collect()
    anchors, neighbors, scores = swing_lists(user, item, 25, top_k=5)
    assert len(anchors) == 24 * 5
    assert [(r.anchor_id, r.neighbor_id) for r in rows] == list(zip(anchors.tolist(), neighbors.tolist(), strict=True))
    assert [r.score for r in rows] == pytest.approx(scores.tolist(), rel=1e-11)
