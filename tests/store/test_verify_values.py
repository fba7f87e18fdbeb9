"""What the gates measure: against brute force in float64, whatever the order of rows, the batches and the sample."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kellm_features.settings import VerifySettings
from kellm_features.store import candidate, gates, scan
from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.verify import Gate, ViewCheck, verify_version

from .versions import DIM, check, failed, measured, nudged, online, rotated, vectors


def test_the_worst_ids_are_named_where_neighbours_changed(tmp_path):
    before = vectors(300)
    now = before | {key: -before[key] for key in (17, 4)}
    verification = check(tmp_path, now, before, min_neighbor_overlap=0.9999)
    assert {"4", "17"} <= set(failed(verification)["neighbor_overlap"])


def test_float16_is_what_is_measured_where_it_is_what_is_served(tmp_path):
    rows = vectors(40)
    half = online(rows, np.float16)
    assert check(tmp_path, rows, rows, fetch=half, dtype="float16").passed
    assert list(failed(check(tmp_path, rows, rows, fetch=half))) == ["online_unequal"]
    assert list(failed(check(tmp_path, rows, rows, dtype="float16"))) == ["online_unequal"]
    big = rows | {6: np.full(DIM, 70_000, dtype=np.float32)}
    assert failed(check(tmp_path, big, max_norm=1e9)) == {}
    assert failed(check(tmp_path, big, max_norm=1e9, fetch=half, dtype="float16")) == {"non_finite": ("6",)}
    small = rows | {6: np.full(DIM, 1e-9, dtype=np.float32)}  # float16 rounds it to zero
    assert failed(check(tmp_path, small, min_norm=1e-9)) == {}
    assert list(failed(check(tmp_path, small, min_norm=1e-9, dtype="float16", fetch=online(small, np.float16)))) == [
        "norms"
    ]


def test_centred_vectors_have_no_centroid_to_drift(tmp_path):
    rows = np.stack(list(vectors(100).values())).astype(np.float64)
    centred = dict(enumerate((rows - rows.mean(axis=0)).astype(np.float32)))
    drift = next(gate for gate in check(tmp_path, rotated(centred), centred).gates if gate.name == "centroid_drift")
    assert drift.skipped


def test_two_ids_have_no_neighbours_to_compare(tmp_path):
    rows = vectors(2)
    assert next(g for g in check(tmp_path, rows, rows).gates if g.name == "neighbor_overlap").skipped
    assert check(tmp_path, vectors(1)).passed


def test_measured_values_are_those_of_brute_force(tmp_path):
    before = vectors(150)
    now = nudged(before, 0.8) | {200: np.ones(DIM, dtype=np.float32), 201: np.ones(DIM, dtype=np.float32)}
    for key in (3, 4):
        del now[key]
    found = measured(check(tmp_path, now, before))
    common = sorted(set(now) & set(before))
    X = np.array([now[key] for key in now], dtype=np.float64)
    U = X / np.linalg.norm(X, axis=1, keepdims=True)
    cosines = U @ U.T
    assert found["mean_cosine"] == pytest.approx(cosines[~np.eye(len(U), dtype=bool)].mean(), rel=1e-6)
    assert found["norms"] == pytest.approx(np.linalg.norm(X, axis=1).min(), rel=1e-12)
    assert found["duplicates"] == 1 / 150
    A, B = (np.array([rows[key] for key in common], dtype=np.float64) for rows in (now, before))
    a, b = A.mean(axis=0), B.mean(axis=0)
    assert found["centroid_drift"] == pytest.approx(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6)
    assert found["neighbor_overlap"] == pytest.approx(overlap(A, B, 10), abs=1e-9)
    assert 0.2 < found["neighbor_overlap"] < 0.9


def overlap(A: np.ndarray, B: np.ndarray, k: int) -> float:
    """Mean |top-k ∩ top-k| / k over all rows, by sorting."""
    nearest = []
    for rows in (A, B):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -2)
        nearest.append(np.argsort(-cosines, axis=1)[:, :k])
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*nearest, strict=True)]))


def test_small_views_compare_fewer_neighbours(tmp_path):
    before, now = vectors(31), nudged(vectors(31), 0.5)
    found = measured(check(tmp_path, now, before))["neighbor_overlap"]
    A, B = (np.stack(list(rows.values())).astype(np.float64) for rows in (now, before))
    assert found == pytest.approx(overlap(A, B, 3), abs=1e-9)


def test_samples_are_the_same_ids_in_both_versions_whatever_the_order_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(candidate, "CORPUS", 60)
    monkeypatch.setattr(gates, "QUERIES", 20)
    before = vectors(400)
    now = rotated(before)
    limits = {"max_centroid_drift": 2, "sample": 30}
    plain = check(tmp_path, now, before, **limits)
    assert measured(plain)["neighbor_overlap"] == 1  # other ids would give 0.1
    assert "20 ids among 60" in next(gate.detail for gate in plain.gates if gate.name == "neighbor_overlap")
    backwards = check(tmp_path, dict(reversed(now.items())), before, **limits)
    assert [gate.model_dump(exclude={"measured"}) for gate in backwards.gates] == [
        gate.model_dump(exclude={"measured"}) for gate in plain.gates
    ]
    assert measured(backwards) == pytest.approx(measured(plain), rel=1e-9)  # sums in another order


def test_a_seed_draws_the_same_sample_and_another_seed_another(tmp_path):
    rows, asked = vectors(400), []
    answer = online(rows)

    def fetch(view, ids):
        asked.append(list(ids))
        return answer(view, ids)

    first, again, other = (check(tmp_path, rows, fetch=fetch, sample=30, seed=seed) for seed in (1, 1, 2))
    assert asked[0] == asked[1] != asked[2]
    assert len(set(asked[0])) == 30
    assert first.gates == again.gates
    assert other.seed == 2


def test_large_samples_are_asked_for_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "FETCH_ROWS", 7)
    rows, sizes = vectors(40), []
    answer = online({key: row for key, row in rows.items() if key not in {8, 33}})

    def fetch(view, ids):
        sizes.append(len(ids))
        return answer(view, ids)

    assert failed(check(tmp_path, rows, fetch=fetch)) == {"online_missing": ("8", "33")}
    assert sizes == [7] * 5 + [5]


def test_batches_and_files_do_not_change_what_is_measured(tmp_path, monkeypatch):
    before = vectors(100)
    now = nudged(before, 0.5) | {7: None, 50: np.zeros(DIM, dtype=np.float32), 51: before[1][:3]}
    served = online({key: row for key, row in now.items() if row is not None and len(row) == DIM})
    whole = check(tmp_path, now, before, fetch=served)
    monkeypatch.setattr(scan, "BATCH_ROWS", 7)
    small = check(tmp_path, now, before, fetch=served)
    table = pq.read_table(tmp_path / "now.parquet")
    (tmp_path / "folder").mkdir()
    for part, start in enumerate((0, 33, 66)):
        pq.write_table(table.slice(start, 33 if part < 2 else None), tmp_path / f"folder/part-{part}.zstd.parquet")
    (tmp_path / "folder/_SUCCESS").touch()
    view = ViewCheck(ITEM_EMBEDDING, f"file://{tmp_path}/folder", tmp_path / "before.parquet")
    parts = verify_version("v2", [view], served, VerifySettings(), against="v1")
    for other in (small, parts):
        assert measured(other) == pytest.approx(measured(whole), rel=1e-12)
        assert failed(other)["non_finite"] == ("7",)
        assert failed(other)["norms"] == ("50",)
        assert failed(other)["other_dimension"] == ("51",)


@settings(max_examples=25, deadline=None)
@given(now=st.sets(st.integers(0, 60), min_size=1), before=st.sets(st.integers(0, 60), min_size=1), text=st.booleans())
def test_ids_are_compared_as_sets(tmp_path_factory, now, before, text):
    folder = tmp_path_factory.mktemp("sets")
    mine, theirs = (
        {f"é{key}" if text else key - 30: np.full(4, key + 1, dtype=np.float32) for key in keys}
        for keys in (now, before)
    )
    verification = check(folder, mine, theirs, min_coverage=1, max_duplicates=1, max_mean_cosine=1)
    lost = sorted(set(theirs) - set(mine))
    assert measured(verification)["coverage"] == len(set(theirs) & set(mine)) / len(theirs)
    assert failed(verification) == ({"coverage": tuple(map(str, lost[:10]))} if lost else {})


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 50), size=st.integers(25, 80))
def test_overlap_does_not_see_rotation_length_or_ties(seed, scale, size):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((size, DIM))
    rows[rng.integers(0, size, size // 2)] = rows[0]  # duplicates tie exactly
    turn, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
    now, before = (gates._unit(matrix.astype(np.float32)) for matrix in (scale * rows @ turn, rows))
    assert (gates.neighbor_shares(now, before, size, 7) == 1).all()


@given(row=st.integers(0, 19), component=st.integers(0, DIM - 1), bit=st.integers(0, 31))
@settings(max_examples=25, deadline=None)
def test_one_bit_is_seen(tmp_path_factory, row, component, bit):
    rows = vectors(20)
    bits = np.stack(list(rows.values())).view(np.uint32)
    bits[row, component] ^= np.uint32(1 << bit)
    store = dict(zip(rows, bits.view(np.float32), strict=True))
    verification = check(tmp_path_factory.mktemp("bit"), rows, fetch=online(store))
    assert failed(verification) == {"online_unequal": (str(row + 1),)}


@given(measured=st.floats(-1e6, 1e6), limit=st.floats(-1e6, 1e6))
def test_a_number_is_never_shown_on_the_other_side_of_its_limit(measured, limit):
    gate = Gate(name="g", view="v", passed=measured <= limit, measured=measured, maximum=limit, detail="")
    shown, accepted = float(gate.value.replace(",", "")), float(gate.limit.removeprefix("≤ "))
    assert (shown > accepted, shown == accepted) == (measured > limit, measured == limit)


def test_an_id_that_is_broken_in_the_active_version_drifts_no_centroid(tmp_path):
    before = vectors(40)
    now = before | {3: -1000 * before[3]}
    assert measured(check(tmp_path, now, before, max_norm=1e9))["centroid_drift"] > 0.5
    broken = before | {3: [np.nan, *before[3][1:]]}
    assert measured(check(tmp_path, now, broken, max_norm=1e9))["centroid_drift"] < 1e-9


def test_the_usual_length_is_that_of_most_vectors_not_of_the_first(tmp_path):
    rows = vectors(20) | {1: np.ones(3, dtype=np.float32)}
    fetch = online({key: row for key, row in rows.items() if key > 1})
    verification = check(tmp_path, rows, fetch=lambda view, ids: (fetch(view, ids)[0], np.ones(len(ids), bool)))
    assert failed(verification) == {"other_dimension": ("1",)}


def test_vectors_of_the_same_components_in_another_order_are_no_duplicates(tmp_path):
    rows = vectors(20)
    turned = {key + 100: row[::-1].copy() for key, row in rows.items()}
    assert measured(check(tmp_path, rows | turned))["duplicates"] == 0
