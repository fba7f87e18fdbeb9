from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.errors import ArtifactError, DataError
from kellm_features.report.neighbours import (
    best_known_items,
    nearest,
    neighbours_before_after,
    swing_agreement,
)

RAW_DEGREES = [0, 10, 25, 45, 70, 100, 135, 175, 220, 270, 300, 330]
ADAPTED_DEGREES = [0, 90, 25, 110, 70, 4, 135, 175, 220, 270, 2, 330]


def brute_force(vectors: np.ndarray, anchor: int, k: int) -> list[tuple[int, float]]:
    """One pair at a time in float64; a stable sort keeps the order of the rows among ties."""
    v = vectors.astype(np.float64)
    found = []
    for row in range(len(v)):
        if row != anchor:
            norms = np.sqrt(sum(v[row] ** 2)) * np.sqrt(sum(v[anchor] ** 2))
            found.append((row, float(sum(v[row] * v[anchor]) / norms) if norms else 0.0))
    return sorted(found, key=lambda pair: -pair[1])[:k]


@pytest.mark.parametrize(("count", "k"), [(2, 1), (3, 5), (40, 7), (700, 10)])
def test_nearest_against_brute_force(count: int, k: int) -> None:
    vectors = np.random.default_rng(count).normal(size=(count, 9)).astype(np.float32) * 3
    vectors[0] = 0
    ids = np.arange(count) * 10 + 5
    anchors = [int(key) for key in ids[: min(count, 300)]]
    found, cosines = nearest(vectors, ids, anchors, k)
    assert found.shape == cosines.shape == (len(anchors), min(k, count - 1))
    for row in range(len(anchors)):
        expected = brute_force(vectors, row, k)
        assert np.allclose(cosines[row], [cosine for _, cosine in expected], atol=2e-6)
        if row:  # everything ties with the zero vector
            assert found[row].tolist() == [int(ids[other]) for other, _ in expected]


@given(st.lists(st.sampled_from([(1, 0), (0, 1), (-1, 0), (0, -1)]), min_size=2, max_size=12), st.integers(1, 12))
def test_ties_keep_the_order_of_the_rows(axes: list[tuple[int, int]], k: int) -> None:
    """Axis vectors have exact cosines: 1, 0 and -1."""
    vectors = np.array(axes, dtype=np.float32)
    ids = np.array([f"id{n}" for n in range(len(axes))], dtype=object)
    found, cosines = nearest(vectors, ids, ["id0"], k)
    expected = brute_force(vectors, 0, k)
    assert found[0].tolist() == [f"id{row}" for row, _ in expected]
    assert cosines[0].tolist() == [cosine for _, cosine in expected]


def test_an_unknown_anchor_is_named() -> None:
    with pytest.raises(DataError, match="item 99 has no vector; 2 items have one"):
        nearest(np.eye(2, dtype=np.float32), np.array([1, 2]), [99], 1)


def test_best_known_items_count_train_rows_and_break_ties_by_id(make_run: Callable[..., Path]) -> None:
    run = make_run("ingest")
    assert best_known_items(run, 4) == [1, 2, 3, 4]
    assert best_known_items(run, 100) == [1, 2, 3, 4, 5]  # item 12 has test rows only


def by_angle(degrees: list[int], anchor: int, k: int) -> list[tuple[int, float]]:
    """Nearest by the angle between them, best first."""
    gaps = {
        n: min(abs(d - degrees[anchor - 1]), 360 - abs(d - degrees[anchor - 1]))
        for n, d in enumerate(degrees, 1)
        if n != anchor
    }
    return [(n, float(np.cos(np.radians(gap)))) for n, gap in sorted(gaps.items(), key=lambda row: row[1])[:k]]


def test_before_and_after(make_run: Callable[..., Path]) -> None:
    rows = neighbours_before_after(make_run(), k=3)
    assert [(row.item_id, row.interactions) for row in rows] == [(1, 6), (2, 5), (3, 4), (4, 4), (5, 3)]
    assert rows[0].title == "One (1991)"
    for row in rows:
        for side, degrees in ((row.before, RAW_DEGREES), (row.after, ADAPTED_DEGREES)):
            expected = by_angle(degrees, row.item_id, 3)
            assert [near.cosine for near in side] == pytest.approx([cosine for _, cosine in expected], abs=1e-6)
            if len({round(cosine, 6) for _, cosine in expected}) == 3:
                assert [near.item_id for near in side] == [n for n, _ in expected]
    assert [(near.item_id, near.is_swing) for near in rows[0].before] == [(2, False), (3, False), (12, False)]
    assert [(near.item_id, near.is_swing) for near in rows[0].after] == [(11, True), (6, True), (3, False)]


def test_marks_stop_at_the_rank_asked_for(make_run: Callable[..., Path]) -> None:
    run = make_run()
    assert not neighbours_before_after(run, anchors=[1], swing_top=20)[0].before[0].is_swing  # SWING ranks item 2 21st
    assert neighbours_before_after(run, anchors=[1], swing_top=21)[0].before[0].is_swing
    (row,) = neighbours_before_after(run, anchors=[9], k=50)
    assert (len(row.before), row.interactions) == (11, 0)
    assert neighbours_before_after(run, anchors=[]) == []


def test_agreement_with_swing(make_run: Callable[..., Path]) -> None:
    """Anchors 1 to 4 have SWING neighbours; counted by hand from the angles."""
    run = make_run()
    swing = {1: {11, 6}, 2: {11}, 3: {11}, 4: {2}}
    agreement = swing_agreement(run, k=2)
    for share, degrees in ((agreement.before, RAW_DEGREES), (agreement.after, ADAPTED_DEGREES)):
        hits = [len({n for n, _ in by_angle(degrees, anchor, 2)} & near) for anchor, near in swing.items()]
        assert share == pytest.approx(sum(hits) / 8)
    assert agreement.anchors == 4
    assert agreement.after > agreement.before


def test_a_missing_stage_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run("ingest", "swing", "encode")
    with pytest.raises(ArtifactError, match=r"need the output of 'export'.*kellm run --out .* --until export"):
        neighbours_before_after(run)
