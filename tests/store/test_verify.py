"""The gates: each passes on good rows and fails on rows that are broken in just its way, naming the right ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kellm_features.cli.rollout_tables import verification_table
from kellm_features.errors import ConfigError, StoreError
from kellm_features.settings import Settings, VerifySettings, load_settings
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.verify import Verification, ViewCheck, verify_version

from .versions import DIM, check, failed, measured, nudged, online, rotated, vectors, write

COMPARISONS = {"coverage", "centroid_drift", "neighbor_overlap"}
ALL = (
    "rows repeated_ids coverage non_finite other_dimension norms duplicates mean_cosine centroid_drift "
    "neighbor_overlap online_missing online_unequal online_withdrawn"
).split()


@pytest.mark.parametrize("key", [int, lambda i: f"tt{i:04d}"])
def test_a_good_version_passes_every_gate_and_skips_none(tmp_path, key):
    before = {key(at): row for at, row in vectors().items()}
    now = nudged(before)
    del now[key(7)]
    verification = check(tmp_path, now, before)
    assert [gate.name for gate in verification.gates] == ALL
    assert not any(gate.skipped for gate in verification.gates)
    assert verification.passed
    assert verification.failures() == []
    assert (verification.version, verification.against) == ("v2", "v1")
    assert measured(verification)["coverage"] == 199 / 200


def test_views_are_verified_apart(tmp_path):
    items, users = vectors(), vectors(seed=1)
    users[3] = np.zeros(DIM, dtype=np.float32)
    views = [
        ViewCheck(ITEM_EMBEDDING, write(tmp_path / "i.parquet", items)),
        ViewCheck(USER_EMBEDDING, write(tmp_path / "u.parquet", users, spec=USER_EMBEDDING)),
    ]
    stores = {"item_knowledge_embedding": online(items), "user_knowledge_embedding": online(users)}
    verification = verify_version("v1", views, lambda view, ids: stores[view](view, ids), VerifySettings())
    assert [(gate.view, gate.name, gate.ids) for gate in verification.gates if not gate.passed] == [
        ("user_knowledge_embedding", "norms", ("3",))
    ]


def test_no_rows(tmp_path):
    verification = check(tmp_path, {}, vectors(20))
    assert failed(verification) == {"rows": (), "coverage": tuple(map(str, range(1, 11)))}
    assert measured(verification)["rows"] == measured(verification)["coverage"] == 0
    assert measured(verification)["online_withdrawn"] == 0


def test_repeated_ids(tmp_path):
    rows = vectors(20)
    verification = check(tmp_path, [*rows.items(), (3, rows[3]), (5, rows[5]), (5, rows[5])])
    assert failed(verification) == {"repeated_ids": ("3", "5")}
    assert measured(verification) | {"repeated_ids": 2, "rows": 20} == measured(verification)
    write(tmp_path / "both.parquet", rows, withdrawn=(4,))  # served and withdrawn
    view = ViewCheck(ITEM_EMBEDDING, tmp_path / "both.parquet")
    assert failed(verify_version("v", [view], online(rows), VerifySettings())) == {"repeated_ids": ("4",)}


def test_coverage_names_the_lost_ids_and_its_limit_is_inclusive(tmp_path):
    before = vectors(200)
    lost = range(11, 22)
    now = {key: row for key, row in nudged(before).items() if key not in lost} | {500: before[1] + 1}
    verification = check(tmp_path, now, before)
    assert failed(verification) == {"coverage": tuple(map(str, range(11, 21)))}  # ten are named
    assert measured(verification)["coverage"] == 189 / 200
    assert verification.failures() == [
        "item_knowledge_embedding: coverage is 0.945, accepted ≥ 0.95: 11 of the active version's 200 ids missing; "
        "ids 11, 12, 13, 14, 15, 16, 17, 18, 19, 20"
    ]
    now[11] = before[11]
    assert check(tmp_path, now, before).passed  # 0.95


def test_non_finite(tmp_path):
    rows = vectors(40)
    broken = {3: np.nan, 5: np.inf, 7: -np.inf, 9: None}
    now = {key: [*row[:4], broken.get(key, row[4]), *row[5:]] for key, row in rows.items()} | {11: None}
    verification = check(tmp_path, now, rows, fetch=online(rows))
    assert failed(verification) == {"non_finite": ("3", "5", "7", "9", "11")}
    sound = np.stack([row for key, row in rows.items() if key not in {*broken, 11}])
    assert measured(verification)["norms"] == pytest.approx(np.linalg.norm(sound, axis=1).min(), rel=1e-6)
    assert measured(verification)["centroid_drift"] == pytest.approx(0, abs=0.02)


def test_withdrawn_rows_do_not_count(tmp_path):
    rows = vectors(30)
    write(tmp_path / "w.parquet", rows, withdrawn=tuple(range(31, 90)))
    verification = verify_version(
        "v", [ViewCheck(ITEM_EMBEDDING, tmp_path / "w.parquet")], online(rows), VerifySettings()
    )
    assert verification.passed
    assert measured(verification)["rows"] == 30
    table = pq.read_table(tmp_path / "w.parquet").to_pylist()  # another publisher may leave the old vector
    table = [row | {"embedding": row["embedding"] or [0.0] * DIM} for row in table]
    pq.write_table(pa.Table.from_pylist(table, schema=ITEM_EMBEDDING.arrow("int64")), tmp_path / "w.parquet")
    again = verify_version("v", [ViewCheck(ITEM_EMBEDDING, tmp_path / "w.parquet")], online(rows), VerifySettings())
    assert again.gates == verification.gates


def test_other_dimension(tmp_path):
    rows = vectors(40)
    odd = rows | {4: rows[4][:8], 6: np.zeros(0, dtype=np.float32)}
    assert failed(check(tmp_path, odd, rows, fetch=online(rows))) == {"other_dimension": ("4", "6")}
    longer = {key: np.append(row, np.float32(0)) for key, row in rows.items()}
    verification = check(tmp_path, longer, rows)
    assert failed(verification) == {"other_dimension": tuple(map(str, range(1, 11)))}
    skipped = [gate.name for gate in verification.gates if gate.skipped]
    assert skipped == ["centroid_drift", "online_withdrawn"]  # neighbours do not depend on the length
    assert measured(verification)["neighbor_overlap"] == 1
    empty = dict.fromkeys(rows, np.zeros(0, dtype=np.float32))
    assert failed(check(tmp_path, empty))["other_dimension"] == tuple(map(str, range(1, 11)))


@pytest.mark.parametrize(("factor", "furthest"), [(0, 0.0), (1e-9, None), (1e4, None)])
def test_norms(tmp_path, factor, furthest):
    rows = vectors(40)
    rows[12] = rows[12] * np.float32(factor)
    verification = check(tmp_path, rows)
    assert failed(verification) == {"norms": ("12",)}
    expected = np.linalg.norm(rows[12].astype(np.float64)) if furthest is None else furthest
    assert measured(verification)["norms"] == pytest.approx(expected, rel=1e-9)
    assert ("1 of them zero" in verification.failures()[0]) == (factor == 0)


def test_duplicates(tmp_path):
    rows = vectors(40)
    rows |= dict.fromkeys(range(10, 31), rows[2])
    verification = check(tmp_path, rows, rows)
    assert failed(verification) == {"duplicates": ("2", *map(str, range(10, 19)))}
    assert measured(verification)["duplicates"] == 21 / 40


def test_mean_cosine_sees_a_collapse_without_duplicates(tmp_path):
    towards = np.ones(DIM)
    rows = {key: (towards + 0.01 * row).astype(np.float32) for key, row in vectors(40).items()}
    assert failed(check(tmp_path, rows)) == {"mean_cosine": ()}


def test_a_rotated_space_fails_by_its_drift_alone(tmp_path):
    before = vectors()
    verification = check(tmp_path, rotated(before), before)
    assert failed(verification) == {"centroid_drift": ()}
    assert measured(verification)["neighbor_overlap"] == 1
    assert check(tmp_path, rotated(before), before, max_centroid_drift=2).passed


def test_vectors_on_the_wrong_ids_fail_by_their_neighbours_alone(tmp_path):
    before = vectors(300)
    order = np.random.default_rng(3).permutation(list(before))
    verification = check(tmp_path, {int(key): before[at] for key, at in zip(order, before, strict=True)}, before)
    assert list(failed(verification)) == ["neighbor_overlap"]
    assert measured(verification)["neighbor_overlap"] == pytest.approx(10 / 299, abs=0.03)
    assert measured(verification)["centroid_drift"] < 1e-9


@pytest.mark.parametrize(
    ("name", "change", "ids"),
    [
        ("online_missing", lambda rows: [rows.pop(key) for key in (3, 8)], ("3", "8")),
        ("online_unequal", lambda rows: rows.update({5: np.nextafter(rows[5], np.float32(9))}), ("5",)),
        ("online_unequal", lambda rows: rows.update({1: rows[2], 2: rows[1]}), ("1", "2")),
        ("online_withdrawn", lambda rows: rows.update({41: rows[1]}), ("41",)),
    ],
)
def test_the_online_store_holds_what_the_partition_holds(tmp_path, name, change, ids):
    rows = vectors(40)
    store = dict(rows)
    change(store)
    before = rows | {41: rows[1], 42: rows[1]}
    assert failed(check(tmp_path, rows, before, fetch=online(store))) == {name: ids}


def test_ids_that_should_be_gone_are_those_withdrawn_and_those_of_the_active_version(tmp_path):
    rows = vectors(20)
    stale = online(rows | {31: rows[1], 32: rows[1]})
    for withdrawn, before in (((31, 32), None), ((), rows | {31: rows[1], 32: rows[1]}), ((31,), {32: rows[1]})):
        active = None if before is None else write(tmp_path / "before.parquet", before)
        view = ViewCheck(ITEM_EMBEDDING, write(tmp_path / "now.parquet", rows, withdrawn), active)
        limits = VerifySettings(min_coverage=0)
        assert failed(verify_version("v", [view], stale, limits)) == {"online_withdrawn": ("31", "32")}


def test_an_online_store_that_finds_whatever_is_asked_is_caught(tmp_path):
    """Stock Feast reports ids that Redis does not have as present."""
    rows = vectors(40)
    fetch = online(rows)
    verification = check(
        tmp_path, rows, rows | {99: rows[1]}, fetch=lambda view, ids: (fetch(view, ids)[0], np.ones(len(ids), bool))
    )
    assert failed(verification) == {"online_withdrawn": ("99",)}


def test_online_vectors_of_another_length(tmp_path):
    rows = vectors(20)
    short = {key: row[:8] for key, row in rows.items()}
    assert list(failed(check(tmp_path, rows, fetch=online(short)))) == ["online_unequal"]


def test_nothing_active_skips_the_comparisons_and_says_so(tmp_path):
    rows = vectors(20)
    first = check(tmp_path, rows)
    assert {gate.name for gate in first.gates if gate.skipped} == COMPARISONS | {"online_withdrawn"}
    assert first.passed
    assert {gate.detail for gate in first.gates if gate.name in COMPARISONS} == {"no version is active"}
    for theirs, why in ((None, "v1 has no item_knowledge_embedding"), ({}, "v1 serves no rows of this view")):
        active = None if theirs is None else write(tmp_path / "empty.parquet", theirs)
        view = ViewCheck(ITEM_EMBEDDING, tmp_path / "now.parquet", active)
        later = verify_version("v2", [view], online(rows), VerifySettings(), against="v1")
        assert {gate.detail for gate in later.gates if gate.name in COMPARISONS} == {why}
        assert later.passed


def test_json_and_back(tmp_path):
    verification = check(tmp_path, vectors(20) | {3: None}, vectors(25), min_coverage=0.5)
    assert not verification.passed
    assert verification.settings == VerifySettings(min_coverage=0.5)
    assert Verification.model_validate_json(verification.model_dump_json()) == verification


def test_table_names_what_failed_and_takes_no_markup_from_ids(tmp_path):
    rows = {f"[red]{key}": row for key, row in vectors(20).items()}
    now = rows | {"[red]5": np.zeros(DIM, dtype=np.float32)}
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    with console.file:
        console.print(verification_table(check(tmp_path, now, rows)))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == "Verification of v2 against v1: 1 of 13 gates failed".split()
    assert ["norms", "FAILED", "0", "1e-06", "…", "1000"] in [line[:6] for line in lines]
    assert ["ids", "[red]5"] in lines
    assert sum("FAILED" in line for line in lines) == 1
    assert sum("passed" in line for line in lines) == 11
    assert ["online_withdrawn", "skipped", "-"] in [line[:3] for line in lines]


def test_refused_partitions(tmp_path):
    rows = vectors(5)
    good = write(tmp_path / "good.parquet", rows)

    def refuse(path: Path | str, message: str, active: Path | None = None) -> None:
        with pytest.raises(StoreError, match=message):
            verify_version("v", [ViewCheck(ITEM_EMBEDDING, path, active)], online(rows), VerifySettings())

    refuse(tmp_path / "none.parquet", "none.parquet cannot be read")
    (tmp_path / "text.parquet").write_text("no Parquet")
    refuse(tmp_path / "text.parquet", "text.parquet cannot be read")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no Parquet file in")
    table = pq.read_table(good)
    pq.write_table(table.drop(["is_deleted"]), tmp_path / "lacks.parquet")
    refuse(tmp_path / "lacks.parquet", r"lacks the columns \['is_deleted'\]")
    wide = table.column("embedding").cast(pa.list_(pa.float64()))
    pq.write_table(table.set_column(1, "embedding", wide), tmp_path / "wide.parquet")
    refuse(tmp_path / "wide.parquet", r"a partition of item_knowledge_embedding holds list<float32>")
    nameless = pa.array([1, None, 3, 4, 5])
    pq.write_table(table.set_column(0, "item_id", nameless), tmp_path / "nameless.parquet")
    refuse(tmp_path / "nameless.parquet", "1 rows have no item_id")
    text = write(tmp_path / "text_ids.parquet", {f"a{key}": row for key, row in rows.items()})
    refuse(text, "string ids .* has int64 ids", active=good)


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: (np.zeros((n, DIM)), np.ones(n, bool)),
        lambda n: (np.zeros((n - 1, DIM), np.float32), np.ones(n, bool)),
        lambda n: (np.zeros((n, DIM), np.float32), np.ones(n + 1, bool)),
        lambda n: (np.zeros(n, np.float32), np.ones(n, bool)),
    ],
)
def test_an_answer_of_another_shape_is_refused(tmp_path, answer):
    with pytest.raises(StoreError, match="asked for 5 ids, the online reader returned"):
        check(tmp_path, vectors(5), fetch=lambda view, ids: answer(len(ids)))


def test_limits_are_checked_together(tmp_path):
    assert Settings().store.verify == VerifySettings()
    (tmp_path / "kellm.toml").write_text("[store.verify]\nmin_norm = 2.0\nmax_norm = 1.0\n")
    with pytest.raises(ConfigError, match="min_norm = 2 lies above max_norm = 1"):
        load_settings(tmp_path / "kellm.toml")
