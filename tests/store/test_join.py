"""The training join against a loop over events and rows, and against Feast's own historical join."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_features.errors import StoreError
from kellm_features.store import offline
from kellm_features.store.join import TrainingJoin, training_join
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING, ViewSpec
from kellm_features.store.scaffold import write_feature_repo

FEAST_WARNINGS = (
    "ignore::DeprecationWarning",  # feast, ibis and their dependencies call what newer releases deprecate
    "ignore::FutureWarning",
    "ignore::ResourceWarning",  # feast leaves SQLite connections to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",  # the same, reported from the collector
)
STOCK_YAML = """\
project: kellm
provider: local
registry: data/registry.db
online_store: {type: sqlite, path: data/online.db}
offline_store: {type: duckdb}
entity_key_serialization_version: 3
"""
T0 = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
UTC_US = pa.timestamp("us", tz="UTC")


class Row(NamedTuple):
    """A row of a partition; without a vector it withdraws its id."""

    id: Any
    event: datetime
    created: datetime
    vector: list[float] | None


def day(days: float) -> datetime:
    return T0 + timedelta(days=days)


def table_of(rows: list[Row], spec: ViewSpec = ITEM_EMBEDDING) -> pa.Table:
    values = [
        {
            spec.join_key: row.id,
            "embedding": row.vector,
            "event_timestamp": row.event,
            "created_timestamp": row.created,
            "is_deleted": row.vector is None,
        }
        for row in rows
    ]
    id_type = "string" if rows and isinstance(rows[0].id, str) else "int64"
    return pa.Table.from_pylist(values, schema=spec.arrow(id_type))


def write(repo: Path, version: str, rows: list[Row] | pa.Table, spec: ViewSpec = ITEM_EMBEDDING, **how: Any) -> Path:
    path = repo / "data" / spec.name / f"{version}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows if isinstance(rows, pa.Table) else table_of(rows, spec), path, compression="zstd", **how)
    return path


def events_of(ids: list[Any], times: list[Any], type_: pa.DataType | None = None) -> pa.Table:
    return pa.table({"item_id": pa.array(ids, type_), "event_timestamp": pa.array(times, UTC_US)})


def vectors_of(join: TrainingJoin) -> list[list[float] | None]:
    """One vector an event, looked up through the index alone."""
    return [join.values[place].tolist() if place >= 0 else None for place in join.index.tolist()]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """v1 from day 0 holds 1, 2 and 3; v2 from day 10 holds 1, 2 and 4 and withdraws 3."""
    v1 = [Row(item, day(0), day(0), [item, 1.0]) for item in (1, 2, 3)]
    v2 = [Row(item, day(10), day(10), [item, 2.0]) for item in (1, 2)]
    v2 += [Row(3, day(10), day(10), None), Row(4, day(10), day(10), [4.0, 2.0])]
    write(tmp_path, "v1", v1)
    write(tmp_path, "v2", v2)
    return tmp_path


def test_events_get_the_version_of_their_time_in_their_order(repo, caplog):
    ids = [3, 1, 4, 1, 9, 3, 1, 1, None, 4]
    times = [day(d) for d in (5, 20, 5, 10, 20, 20, 9.99999, -1, 20, 20)]
    with caplog.at_level(logging.INFO, "kellm_features.store.join"):
        join = training_join(events_of(ids, times), repo)
    assert vectors_of(join) == [[3, 1], [1, 2], None, [1, 2], None, None, [1, 1], None, None, [4, 2]]
    assert join.found.tolist() == [True, True, False, True, False, False, True, False, False, True]
    assert list(zip(join.ids.tolist(), join.versions, strict=True)) == [(1, "v1"), (3, "v1"), (1, "v2"), (4, "v2")]
    assert join.valid_from.tolist() == [day(d).replace(tzinfo=None) for d in (0, 0, 10, 10)]
    age = [d and d * 86400 for d in (5, 10, None, 0, None, None, 9.99999, None, None, 10)]
    np.testing.assert_allclose(join.age_s, np.array(age, dtype=float), rtol=0, atol=1e-6)
    assert "10 events in and out, 5 without a vector: 4 not known at their time, 1 withdrawn, 0 past" in caplog.text


def test_take_repeats_vectors_and_leaves_nan(repo):
    join = training_join(events_of([1, 9, 1, 3], [day(20)] * 4), repo)
    wanted = np.array([[1, 2], [np.nan] * 2, [1, 2], [np.nan] * 2], dtype=np.float32)
    np.testing.assert_array_equal(join.take(), wanted)
    np.testing.assert_array_equal(join.take(slice(1, 3)), wanted[1:3])
    np.testing.assert_array_equal(join.take(np.array([3, 0])), wanted[[3, 0]])
    assert join.values.tolist() == [[1, 2]]  # taking changed nothing
    assert join.take().dtype == np.float32


def test_a_pinned_version_holds_at_any_time(repo):
    events = events_of([1, 3, 1, 4], [day(-5), day(5), day(20), day(5)])
    later = training_join(events, repo, version="v2")
    assert vectors_of(later) == [[1, 2], None, [1, 2], [4, 2]]
    np.testing.assert_array_equal(later.age_s, [-15 * 86400, np.nan, 10 * 86400, -5 * 86400])
    earlier = training_join(events, repo, version="v1")
    assert vectors_of(earlier) == [[1, 1], [3, 1], [1, 1], None]
    assert set(earlier.versions) == {"v1"}


def test_ttl_counts_from_the_row_and_includes_its_end(repo):
    times = [day(3), day(3) + timedelta(microseconds=1), day(13), day(14)]
    join = training_join(events_of([1] * 4, times), repo, ttl=timedelta(days=3))
    assert vectors_of(join) == [[1, 1], None, [1, 2], None]
    # the row of the time is too old, and no older one stands in for it
    assert vectors_of(training_join(events_of([1], [day(14)]), repo, ttl=timedelta(days=3))) == [None]


def expected(versions: dict[str, list[Row]], id_: Any, time: datetime, pinned: str | None, ttl: timedelta | None):
    """The row that an event gets, by looking at every row."""
    best: tuple | None = None
    for version in sorted(versions):
        for place, row in enumerate(versions[version]):
            if row.id != id_ or (pinned and version != pinned) or (not pinned and row.event > time):
                continue
            rank = (row.event, row.created, version, place)
            best = max(best, (rank, version, row)) if best else (rank, version, row)
    if best is None or best[2].vector is None or (ttl and time - best[2].event > ttl):
        return None
    return best[1], best[0][3], best[2]


@pytest.mark.parametrize("key", [int, lambda number: f"tt{number:03d}é"], ids=["int64", "string"])
@pytest.mark.parametrize("seed", range(25))
def test_like_a_loop_over_events_and_rows(tmp_path, monkeypatch, seed, key):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(offline, "BATCH_BYTES", int(rng.integers(1, 50)))  # batches of 1 to 4 vectors
    versions: dict[str, list[Row]] = {}
    for number in range(rng.integers(1, 5)):
        rows = []
        for id_ in rng.integers(0, 12, rng.integers(1, 30)).tolist():  # unsorted, an id several times
            event, created = (day(int(d)) for d in rng.integers(0, 5, 2))  # few days: many are equal
            vector = None if rng.random() < 0.2 else rng.standard_normal(3).astype(np.float32).tolist()
            rows.append(Row(key(id_), event, created, vector))
        rows.append(Row(key(0), day(0), day(0), [0.5] * 3))
        versions[f"v{number}"] = rows
        write(tmp_path, f"v{number}", rows, row_group_size=int(rng.integers(1, 9)))
    count = 60
    ids = [None if draw == 14 else key(draw) for draw in rng.integers(0, 15, count).tolist()]
    times = [day(float(d)) for d in rng.choice([-1, 0, 0.5, 1, 2, 3, 4, 9], count)]
    chunks = [events_of(ids[:7], times[:7]), events_of(ids[7:], times[7:])]
    pinned = str(rng.choice(list(versions))) if seed % 3 == 0 else None
    ttl = timedelta(days=2) if seed % 2 else None

    join = training_join(pa.concat_tables(chunks), tmp_path, version=pinned, ttl=ttl)

    wanted = [
        None if id_ is None else expected(versions, id_, time, pinned, ttl)
        for id_, time in zip(ids, times, strict=True)
    ]
    assert join.found.tolist() == [want is not None for want in wanted]
    assert vectors_of(join) == [want and want[2].vector for want in wanted]
    for place, want, time, age in zip(join.index.tolist(), wanted, times, join.age_s.tolist(), strict=True):
        if want:
            version, _, row = want
            assert (join.versions[place], join.ids[place]) == (version, row.id)
            assert join.valid_from[place].item() == row.event.replace(tzinfo=None)
            assert age == pytest.approx((time - row.event).total_seconds(), abs=1e-6)
    used = {want[:2] for want in wanted if want}
    assert len(join.values) == len(join.ids) == len(join.versions) == len(used)
    assert set(join.index[join.found].tolist()) == set(range(len(used)))


@pytest.mark.feast
@pytest.mark.filterwarnings(*FEAST_WARNINGS)
def test_like_feast(tmp_path, monkeypatch):
    """Row by row and bit by bit what `get_historical_features` returns on duckdb, without and with a ttl."""
    rng = np.random.default_rng(4)
    repo = tmp_path / "feature_repo"
    write_feature_repo(repo)
    (repo / "feature_store.yaml").write_text(STOCK_YAML)
    with (repo / "definitions.py").open("a") as handle:
        handle.write(
            "from datetime import timedelta\nfrom feast import FeatureView\n"
            "lasting = globals()['item_knowledge_embedding']\n"
            "fading = FeatureView(name='fading', entities=[globals()['item']], ttl=timedelta(days=8),\n"
            "                     schema=lasting.schema, source=lasting.batch_source)\n"
        )
    for number in range(3):
        rows = [
            Row(i, day(10 * number), day(10 * number), rng.standard_normal(6).tolist())
            for i in range(number, 40 + number)
        ]
        rows += [Row(i, day(10 * number), day(10 * number), None) for i in range(number)]
        if number == 2:  # the same moment as v0's, made later
            rows += [Row(50 + i, day(0), day(3), rng.standard_normal(6).tolist()) for i in range(5)]
        else:
            rows += [Row(50 + i, day(0), day(number), rng.standard_normal(6).tolist()) for i in range(5)]
        write(repo, f"v{number}", rows)
    apply = [sys.executable, "-P", "-c", "from feast.cli.cli import cli; cli()", "apply"]
    done = subprocess.run(apply, cwd=repo, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    days = rng.choice([-1, 0, 5, 8, 9, 10, 15, 20, 25, 40], 400)
    entity = pd.DataFrame(
        {
            "item_id": rng.integers(0, 60, 400),
            "event_timestamp": pd.to_datetime([day(float(d)) for d in days], utc=True).as_unit("us"),
        }
    )
    entity = pd.concat([entity, entity.iloc[:50]], ignore_index=True)  # events that occur twice
    entity["place"] = np.arange(len(entity))

    from feast import FeatureStore

    monkeypatch.chdir(repo)
    features = ["item_knowledge_embedding:embedding", "fading:embedding"]
    answer = FeatureStore(".").get_historical_features(entity, features, full_feature_names=True).to_arrow()
    answer = answer.sort_by("place")
    assert answer["place"].to_pylist() == list(range(len(entity)))
    found = {}
    for view, ttl in (("item_knowledge_embedding", None), ("fading", timedelta(days=8))):
        join = training_join(entity, repo, ttl=ttl)
        assert vectors_of(join) == answer[f"{view}__embedding"].to_pylist()
        found[view] = join.found.sum()
    assert 0 < found["fading"] < found["item_knowledge_embedding"] < len(entity)


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("year", [1960, 2026])
def test_times_of_any_unit_and_zone(tmp_path, unit, zone, year):
    since = datetime(year, 1, 1, tzinfo=UTC)
    write(tmp_path, "v1", [Row(1, since, since, [1.0])])
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    at = int(since.timestamp()) * scale
    times = pa.array([at - 1, at, at + 1], pa.int64()).cast(pa.timestamp(unit, tz=zone))
    join = training_join(pa.table({"item_id": [1, 1, 1], "event_timestamp": times}), tmp_path)
    assert join.found.tolist() == [False, True, True]
    assert join.age_s[1] == 0


def test_pandas(repo):
    frame = pd.DataFrame(
        {"when": pd.to_datetime([day(20), day(5), day(5)], utc=True), "movie": pd.array([1, 3, None], "Int64")},
        index=[7, 7, 2],
    )
    join = training_join(frame, repo, id_column="movie", timestamp_column="when")
    assert vectors_of(join) == [[1, 2], [3, 1], None]


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.null()]
)
def test_string_ids_in_every_shape(tmp_path, type_):
    write(tmp_path, "v1", [Row("a", day(0), day(0), [1.0]), Row("b", day(0), day(0), [2.0])])
    ids = [None, None, None] if type_ == pa.null() else ["b", None, "c"]
    join = training_join(events_of(ids, [day(1)] * 3, type_), tmp_path)
    assert vectors_of(join) == ([None] * 3 if type_ == pa.null() else [[2.0], None, None])


@pytest.mark.parametrize("type_", [pa.int16(), pa.uint64(), pa.dictionary(pa.int8(), pa.int32())])
def test_int_ids_in_every_shape(repo, type_):
    assert vectors_of(training_join(events_of([2, 9], [day(1)] * 2, type_), repo)) == [[2, 1], None]


@pytest.mark.parametrize("type_", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.large_list(pa.float32())])
def test_lists_in_every_shape(tmp_path, type_):
    rows = [Row(i, day(0), day(0), None if i % 3 == 0 else [i, -i]) for i in range(10)]
    table = table_of(rows)
    place = table.schema.get_field_index("embedding")
    vectors = pa.array([row.vector for row in rows], type_)
    write(tmp_path, "v1", table.set_column(place, "embedding", vectors), row_group_size=4)
    join = training_join(events_of([8, 3, 1, 4], [day(1)] * 4), tmp_path)
    assert vectors_of(join) == [[8, -8], None, [1, -1], [4, -4]]


def test_users(tmp_path):
    write(tmp_path, "v1", [Row(5, day(0), day(0), [1.0])], USER_EMBEDDING)
    events = pa.table({"user_id": [6, 5], "event_timestamp": pa.array([day(1)] * 2, UTC_US)})
    assert vectors_of(training_join(events, str(tmp_path), view="user_knowledge_embedding")) == [None, [1.0]]


def test_nothing_found_and_nothing_asked(repo):
    none = training_join(events_of([1, 99], [day(-1), day(5)]), repo)
    assert none.values.shape == (0, 2)
    assert none.take().shape == (2, 2)
    assert np.isnan(none.take()).all()
    empty = training_join(events_of([], [], pa.int64()), repo)
    assert (len(empty), empty.values.shape, empty.take().shape) == (0, (0, 2), (0, 2))


def test_vectors_of_another_length_matter_only_where_they_are_needed(repo):
    write(repo, "v3", [Row(1, day(20), day(20), [1.0, 2.0, 3.0])])
    assert vectors_of(training_join(events_of([1, 1], [day(5), day(15)]), repo)) == [[1, 1], [1, 2]]
    assert vectors_of(training_join(events_of([1], [day(25)]), repo)) == [[1, 2, 3]]
    across = events_of([1, 1], [day(5), day(25)])
    with pytest.raises(StoreError, match=r"several lengths \(2 in v1, 3 in v3\).*pin one version"):
        training_join(across, repo)
    assert vectors_of(training_join(across, repo, version="v3")) == [[1, 2, 3]] * 2


def test_few_of_many_rows(tmp_path):
    write(tmp_path, "v1", [Row(i, day(0), day(0), None if i % 7 == 0 else [i, -i]) for i in range(1000)])
    join = training_join(events_of([997, 7, 150, 801, 150], [day(1)] * 5), tmp_path)
    assert vectors_of(join) == [[997, -997], None, [150, -150], [801, -801], [150, -150]]
    assert join.ids.tolist() == [150, 801, 997]


def test_row_groups_without_wanted_rows_are_not_read(tmp_path):
    path = write(tmp_path, "v1", [Row(i, day(0), day(0), [i] * 64) for i in range(30)], row_group_size=10)
    group = pq.ParquetFile(path).metadata.row_group(1)
    columns = [group.column(number) for number in range(group.num_columns)]
    broken = next(column for column in columns if column.path_in_schema.startswith("embedding."))
    start = broken.dictionary_page_offset or broken.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + broken.total_compressed_size] = b"\xff" * broken.total_compressed_size
    path.write_bytes(content)
    join = training_join(events_of([25, 3], [day(1)] * 2), tmp_path)
    assert vectors_of(join) == [[25] * 64, [3] * 64]
    with pytest.raises(StoreError, match=r"v1\.parquet cannot be read \(.+\): restore it"):
        training_join(events_of([13], [day(1)]), tmp_path)


GOOD = {"item_id": [1], "event_timestamp": pa.array([day(1)], UTC_US)}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (GOOD, r"events is a dict; accepted: a pyarrow.Table or a pandas.DataFrame"),
        (pa.table({"id": [1]}), r"no columns named 'item_id' and needs one, it has id: set id_column"),
        (pd.DataFrame({"item_id": [1]}), r"no columns named 'event_timestamp'"),
        (pa.Table.from_arrays([*GOOD.values(), [1]], [*GOOD, "item_id"]), r"2 columns named 'item_id'"),
        (pa.table(GOOD | {"item_id": ["1"]}), r"item_id is of type string, and the ids of .* are int64: cast"),
        (pa.table(GOOD | {"item_id": [1.0]}), r"item_id is of type double"),
        (pa.table(GOOD | {"item_id": pa.array([2**63], pa.uint64())}), r"ids that are no int64"),
        (pa.table(GOOD | {"event_timestamp": [date(2026, 3, 2)]}), r"of type date32.* choose the moment"),
        (pa.table(GOOD | {"event_timestamp": ["2026-03-02"]}), r"event_timestamp is of type string; accepted"),
        (pa.table(GOOD | {"event_timestamp": pa.array([None], UTC_US)}), r"null in 1 of 1 rows: drop"),
        (pa.table(GOOD | {"event_timestamp": pa.array([2**60], pa.timestamp("s"))}), r"times out of range"),
        (pd.DataFrame({"item_id": [1, "a"], "event_timestamp": [T0, T0]}), r"item_id and event_timestamp cannot be"),
    ],
)
def test_what_is_wrong_with_events(repo, events, message):
    with pytest.raises(StoreError, match=message):
        training_join(events, repo)


def test_what_is_wrong_with_the_question(repo, tmp_path_factory):
    events = pa.table(GOOD)
    with pytest.raises(StoreError, match=r"no version 'v9'; there are: v1, v2"):
        training_join(events, repo, version="v9")
    with pytest.raises(StoreError, match=r"accepted: item_knowledge_embedding or user_knowledge_embedding"):
        training_join(events, repo, view="item_description")
    with pytest.raises(StoreError, match=r"ttl is 0:00:00; accepted: a positive timedelta"):
        training_join(events, repo, ttl=timedelta(0))
    with pytest.raises(StoreError, match=r"nothing is published in .*run  kellm publish"):
        training_join(events, tmp_path_factory.mktemp("empty"))


def without(name: str) -> pa.Table:
    return table_of([Row(1, day(0), day(0), [1.0, 2.0])]).drop_columns([name])


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            without("is_deleted"),
            r"is no partition of item_knowledge_embedding: column is_deleted is missing",
        ),
        (
            without("embedding").append_column("embedding", pa.array([[1.0, 2.0]])),
            r"embedding is list<.*double>, acc",
        ),
        (without("event_timestamp").append_column("event_timestamp", pa.array([1])), r"event_timestamp is int64, acc"),
        (without("item_id").append_column("item_id", pa.array(["1"])), r"v1\.parquet has ids of type int64, .*v0"),
        (without("is_deleted").append_column("is_deleted", pa.array([None], pa.bool_())), r"is_deleted is null in 1 r"),
        (
            without("created_timestamp").append_column("created_timestamp", pa.array([1], pa.timestamp("ns"))),
            r"v0\.parquet cannot be read .*would lose data",
        ),
        (without("embedding").append_column("embedding", pa.array([None], pa.list_(pa.float32()))), r"hold no vector"),
        (
            without("embedding").append_column("embedding", pa.array([[1, None]], pa.list_(pa.float32()))),
            r"1 nulls within vectors",
        ),
        (table_of([Row(1, day(0), day(0), [1.0, 2.0]), Row(2, day(0), day(0), [1.0])]), r"lengths 2 and 1"),
    ],
)
def test_what_is_wrong_with_a_partition(tmp_path, partition, message):
    write(tmp_path, "v0", partition)
    write(tmp_path, "v1", [Row(3, day(0), day(0), [3.0, 1.0])])
    with pytest.raises(StoreError, match=message):
        training_join(pa.table(GOOD), tmp_path)


def test_a_file_that_is_no_parquet_and_files_that_do_not_count(repo):
    folder = repo / "data" / ITEM_EMBEDDING.name
    for name in (".v3.parquet", "_v3.parquet", "v3.parquet.tmp"):
        (folder / name).write_text("half written")
    assert vectors_of(training_join(pa.table(GOOD), repo)) == [[1, 1]]
    (folder / "v3.parquet").write_text("half written")
    with pytest.raises(StoreError, match=r"v3\.parquet cannot be read"):
        training_join(pa.table(GOOD), repo)
    assert vectors_of(training_join(pa.table(GOOD), repo, version="v1")) == [[1, 1]]


def test_a_version_may_be_a_folder_of_parts(repo):
    folder = repo / "data" / ITEM_EMBEDDING.name / "v3.parquet"
    folder.mkdir()
    for part in (5, 6):
        pq.write_table(table_of([Row(part, day(20), day(20), [part, 3.0])]), folder / f"part-{part}.zstd.parquet")
    (folder / "_SUCCESS").touch()
    join = training_join(events_of([6, 1, 5, 6], [day(30)] * 4), repo)
    assert vectors_of(join) == [[6, 3], [1, 2], [5, 3], [6, 3]]
    assert list(join.versions) == ["v2", "v3", "v3"]
    for part in folder.iterdir():
        part.unlink()
    with pytest.raises(StoreError, match=r"v3\.parquet hold no Parquet"):
        training_join(pa.table(GOOD), repo, version="v3")


def test_only_withdrawn_ids(tmp_path):
    write(tmp_path, "v1", [Row(1, day(0), day(0), None)])
    with pytest.raises(StoreError, match=r"holds no vector, only withdrawn ids"):
        training_join(pa.table(GOOD), tmp_path)


def test_it_needs_neither_feast_nor_pandas():
    code = (
        "import sys, kellm_features.store.join\n"
        "print(sorted({'feast', 'pandas', 'torch', 'pyspark', 'duckdb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
