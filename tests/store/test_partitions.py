"""Partitions of a release: neighbours, withdrawn ids, timestamps, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_features import schemas
from kellm_features.errors import DataError, SchemaError, StoreError
from kellm_features.store.layout import ITEM_DESCRIPTION, ITEM_NEIGHBORS, Partition, Publication, Published, ViewSpec
from kellm_features.store.partitions import Release, build_partition, live_rows, read_release, stamp
from kellm_features.store.publish import INPUTS, _read_journal, _withdrawn, _write_partitions

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def release_of(run) -> Release:
    return read_release({view: run.folder / stage / file for view, (stage, file) in INPUTS.items()})


def replace_column(run, file: str, name: str, values) -> None:
    table = run.tables["export", file]
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, values), run.folder / "export" / file)


def test_release_has_the_rows_of_every_artefact_sorted_by_key(tmp_path, make_run):
    run = make_run(tmp_path, items=range(50, 0, -1))
    release = release_of(run)
    assert (release.version, release.id_type, release.dim) == ("v1", "int64", 8)
    rows = release.tables["item_knowledge_embedding"]
    assert rows["item_id"].to_pylist() == list(range(1, 51))
    for key, vector in zip(rows["item_id"].to_pylist(), rows["embedding"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.array(vector, dtype=np.float32), run.vectors()[key])


@pytest.mark.parametrize("key", [int, lambda i: f"tt{i:04d}"])
def test_neighbours_are_the_first_twenty_by_rank(tmp_path, make_run, key):
    run = make_run(tmp_path, key=key)
    wanted: dict = {}
    for pair in sorted(run.tables["swing", "item_pairs.parquet"].to_pylist(), key=lambda pair: pair["rank"]):
        ids, scores = wanted.setdefault(pair["anchor_id"], ([], []))
        if len(ids) < 20:
            ids.append(pair["neighbor_id"])
            scores.append(pair["score"])
    served = release_of(run).tables["item_swing_neighbors"].to_pylist()
    assert {row["item_id"]: (row["neighbor_ids"], row["scores"]) for row in served} == wanted
    assert max(len(row["neighbor_ids"]) for row in served) == 20


def test_of_several_links_the_surest_is_served(tmp_path, make_run):
    run = make_run(tmp_path, items=range(1, 5))  # items 1, 2 and 4 are linked, 3 is not
    links = run.tables["link", "links.parquet"]
    more = pa.Table.from_pylist(
        [
            {"item_id": item, "wiki_page_id": page, "wiki_title": "More", "link_score": score, "method": "mention"}
            for item, page, score in [(1, 9, 0.4), (4, 8, 1.0), (4, 7, 1.0), (1, 8, 0.6)]
        ],
        schema=links.schema,
    )
    schemas.write_table(pa.concat_tables([more, links]), tmp_path / "link" / "links.parquet", schemas.LINKS)
    rows = release_of(run).tables["item_wiki_link"].to_pylist()
    assert [(row["item_id"], row["wiki_page_id"]) for row in rows] == [(1, 1001), (2, 1002), (3, None), (4, 7)]


def test_pairs_may_be_a_spark_folder_and_may_be_empty(tmp_path, make_run):
    run = make_run(tmp_path)
    pairs = run.tables["swing", "item_pairs.parquet"]
    file = tmp_path / "swing" / "item_pairs.parquet"
    file.unlink()
    for part, rows in enumerate((pairs.slice(0, 100), pairs.slice(100))):
        schemas.write_table(rows, file / f"part-0000{part}.snappy.parquet", schemas.PAIRS)
    (file / "_SUCCESS").touch()
    schemas.write_table(pairs.slice(0, 0), tmp_path / "swing" / "user_pairs.parquet", schemas.PAIRS)
    tables = release_of(run).tables
    assert tables["item_swing_neighbors"].equals(
        release_of(make_run(tmp_path / "again")).tables["item_swing_neighbors"]
    )
    assert tables["user_swing_neighbors"].num_rows == 0


def test_ids_that_a_version_lacks_are_withdrawn_by_a_null_row(tmp_path, make_run):
    old, new = (
        release_of(make_run(tmp_path / v, v, items=items)) for v, items in (("a", range(1, 6)), ("b", range(3, 8)))
    )
    spec, stamps = ITEM_DESCRIPTION, (NOW, NOW)
    first = tmp_path / "first.parquet"
    pq.write_table(build_partition(old.tables[spec.name], pa.array([], pa.int64()), spec, "int64", stamps), first)
    gone = _withdrawn([first], spec, new.tables[spec.name])
    second = tmp_path / "second.parquet"
    pq.write_table(build_partition(new.tables[spec.name], gone, spec, "int64", stamps), second)
    rows = {row["item_id"]: row for row in pq.read_table(second).to_pylist()}
    assert sorted(rows) == [1, 2, 3, 4, 5, 6, 7]
    assert [key for key, row in rows.items() if row["is_deleted"]] == [1, 2]
    assert {rows[1][name] for name, _ in spec.features} == {None}
    assert live_rows(second, spec).to_pylist() == new.tables[spec.name].to_pylist()


def test_stamps_are_always_later_than_what_is_served(tmp_path, make_run):
    release = release_of(make_run(tmp_path))
    assert stamp(release, None, NOW) == (release.event, release.created)
    for served in (release.event - timedelta(days=1), release.event, NOW, NOW + timedelta(days=9)):
        partition = Partition(file="f", rows=1, withdrawn=0, event=served, created=served)
        assert stamp(release, partition, NOW) > (served, served)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item_id", pa.array([1, 1, *range(3, 51)]), r"item_id 1 appears more than once"),
        ("embedding_version", pa.array(["v1"] * 49 + ["v2"]), r"one table is one version"),
        ("embedding_version", pa.array(["../evil"] * 50), r"embedding_version is '../evil'"),
        ("embedding_version", pa.array(["v2"] * 50), r"both must come from one export"),
        ("embedding", pa.array([[1.0, float("nan")]] * 50, pa.list_(pa.float32())), r"50 embedding values are NaN"),
        ("embedding", pa.array([[1.0]] * 49 + [[1.0, 2.0]], pa.list_(pa.float32())), r"lengths \['1', '2'\]"),
        ("embedding", pa.array([[1.0, 2.0]] * 50, pa.list_(pa.float32())), r"length 2, user embeddings 8"),
        ("item_id", pa.array([str(i) for i in range(50)]), r"all ids of one run must be of one type"),
        ("event_timestamp", pa.nulls(50, schemas.TIMESTAMP), r"event_timestamp is null in 50 rows"),
    ],
)
def test_bad_embeddings_are_refused(tmp_path, make_run, column, values, message):
    run = make_run(tmp_path)
    replace_column(run, "item_embeddings.parquet", column, values)
    with pytest.raises(StoreError, match=message):
        release_of(run)


def test_missing_and_empty_and_wrong_tables_are_refused(tmp_path, make_run):
    run = make_run(tmp_path)
    file = tmp_path / "export" / "item_embeddings.parquet"
    pq.write_table(run.tables["export", file.name].slice(0, 0), file)
    with pytest.raises(StoreError, match="holds no rows: there is nothing to publish"):
        release_of(run)
    pq.write_table(run.tables["export", file.name].drop(["model_id"]), file)
    with pytest.raises(SchemaError, match="'model_id' is missing"):
        release_of(run)
    file.unlink()
    with pytest.raises(DataError, match="does not exist"):
        release_of(run)


def write(repo: Path, release: Release, current: Publication | None = None) -> Publication:
    views = _write_partitions(repo, release, current, _read_journal(repo))
    return Publication(version=release.version, published_at=NOW, dim=release.dim, views=views)


def files(repo: Path) -> list[str]:
    return sorted(str(path.relative_to(repo / "data")) for path in repo.rglob("*.parquet"))


def test_a_killed_publish_is_taken_over_and_nothing_is_written_twice(tmp_path, make_run):
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    release = release_of(make_run(tmp_path))
    first = write(repo, release)
    before = {name: (repo / name).stat().st_mtime_ns for name in first.files.values()}
    (repo / "data" / ".staging").mkdir()
    (repo / "data" / ".staging" / "item_description").write_bytes(b"half")
    assert write(repo, release).views == first.views
    assert {name: (repo / name).stat().st_mtime_ns for name in first.files.values()} == before
    assert len(files(repo)) == 6


def test_a_killed_publish_of_another_version_is_superseded_with_its_ids(tmp_path, make_run):
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    served = write(repo, release_of(make_run(tmp_path / "a", "a")))
    (repo / "data" / ".publishing.json").unlink()
    killed = write(repo, release_of(make_run(tmp_path / "b", "b", NOW, 2, items=range(1, 61))), served)
    back = write(repo, release_of(make_run(tmp_path / "a", "a")), served)
    spec: ViewSpec = ITEM_NEIGHBORS
    assert back.files[spec.name] == "data/item_swing_neighbors/a.r2.parquet"
    rows = pq.read_table(repo / back.files["item_knowledge_embedding"])
    assert rows.filter(rows["is_deleted"])["item_id"].to_pylist() == list(range(51, 61))
    assert all(back.views[name].event > killed.views[name].event for name in killed.views if name.startswith("item"))


def test_unchanged_views_keep_their_partition(tmp_path, make_run):
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    first = write(repo, release_of(make_run(tmp_path / "a", "a")))
    (repo / "data" / ".publishing.json").unlink()
    second = write(repo, release_of(make_run(tmp_path / "b", "b")), first)
    changed = {name for name in first.views if first.views[name] != second.views[name]}
    assert changed == {"item_knowledge_embedding", "user_knowledge_embedding", "item_description"}


def test_the_record_survives_a_round_trip(tmp_path, make_run):
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    record = Published(id_type="int64", stores=[], current=write(repo, release_of(make_run(tmp_path))), previous=[])
    assert Published.model_validate_json(record.model_dump_json()) == record
