"""Partitions of a release: neighbours, withdrawn ids, timestamps, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_features import schemas
from kellm_features.errors import DataError, SchemaError, StoreError
from kellm_features.store.layout import ITEM_DESCRIPTION, ITEM_EMBEDDING
from kellm_features.store.partitions import (
    Release,
    build_partition,
    content_hash,
    live_batches,
    read_release,
    same_rows,
    stamp,
    withdrawn_ids,
    write_partition,
)
from kellm_features.store.rollout import run_inputs

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def release_of(run) -> Release:
    return read_release(run_inputs(run.folder))


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
    write_partition(build_partition(old.tables[spec.name], pa.array([], pa.int64()), spec, "int64", stamps), first)
    gone = withdrawn_ids([first], spec, new.tables[spec.name])
    second = tmp_path / "second.parquet"
    write_partition(build_partition(new.tables[spec.name], gone, spec, "int64", stamps), second)
    rows = {row["item_id"]: row for row in pq.read_table(second).to_pylist()}
    assert sorted(rows) == [1, 2, 3, 4, 5, 6, 7]
    assert [key for key, row in rows.items() if row["is_deleted"]] == [1, 2]
    assert {rows[1][name] for name, _ in spec.features} == {None}
    live = pa.Table.from_batches(live_batches(second, spec))
    assert live.to_pylist() == new.tables[spec.name].to_pylist()
    assert same_rows(second, spec, new.tables[spec.name])
    assert not same_rows(second, spec, new.tables[spec.name].slice(1))
    assert not same_rows(second, spec, old.tables[spec.name])
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_partition_tells_when_its_vectors_were_made_and_nothing_of_withdrawn_ones(tmp_path, make_run):
    release = release_of(make_run(tmp_path, items=range(1, 4)))
    rows = release.tables[ITEM_EMBEDDING.name]
    table = build_partition(rows, pa.array([9]), ITEM_EMBEDDING, "int64", (release.event, NOW))
    assert table.schema.equals(ITEM_EMBEDDING.arrow("int64"))
    assert table["embedded_at"].to_pylist() == [int(release.event.timestamp())] * 3 + [None]


def test_content_hashes_tell_rows_apart_and_not_how_they_are_chunked(tmp_path, make_run):
    rows = release_of(make_run(tmp_path)).tables[ITEM_EMBEDDING.name]
    chunked = pa.concat_tables([rows.slice(0, 7), rows.slice(7)])
    assert content_hash(chunked) == content_hash(rows)
    assert content_hash(rows.slice(0, 49)) != content_hash(rows)
    hashes = pa.array(["x", *rows["content_hash"].to_pylist()[1:]])
    assert content_hash(rows.set_column(4, "content_hash", hashes)) != content_hash(rows)


def test_a_partition_that_cannot_be_written_leaves_nothing(tmp_path, make_run):
    release = release_of(make_run(tmp_path / "run"))
    rows = release.tables[ITEM_DESCRIPTION.name]
    table = build_partition(rows, pa.array([], pa.int64()), ITEM_DESCRIPTION, "int64", (NOW, NOW))
    (tmp_path / "out" / "v1.parquet" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_partition(table, tmp_path / "out" / "v1.parquet")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v1.parquet"]


def test_stamps_are_always_later_than_those_before(tmp_path, make_run):
    release = release_of(make_run(tmp_path))
    assert stamp(release, [], NOW) == (release.event, release.created)
    for before in (release.event - timedelta(days=1), release.event, NOW, NOW + timedelta(days=9)):
        earlier = [(release.event - timedelta(days=2), NOW), (before, before)]
        assert stamp(release, earlier, NOW) > max(earlier)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item_id", pa.array([1, 1, *range(3, 51)]), r"item_id 1 appears more than once"),
        ("embedding_version", pa.array(["v1"] * 49 + ["v2"]), r"one table is one version"),
        ("embedding_version", pa.array(["../evil"] * 50), r"the version's name is '\.\./evil'; accepted"),
        ("embedding_version", pa.array(["v2"] * 50), r"both must come from one export"),
        ("embedding", pa.array([[1.0, float("nan")]] * 50, pa.list_(pa.float32())), r"50 embedding values are NaN"),
        ("embedding", pa.array([[1.0]] * 49 + [[1.0, 2.0]], pa.list_(pa.float32())), r"lengths \['1', '2'\]"),
        (
            "embedding",
            pa.array([[1.0, 2.0]] * 50, pa.list_(pa.float32())),
            r"item_knowledge_embedding has length 2 and user_knowledge_embedding has length 8: both must be equal",
        ),
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
