"""Every example once an epoch, in an order that seed and epoch decide, from files larger than the buffer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kellm_features.errors import DataError
from kellm_features.training.data import CtrData, Examples
from kellm_features.training.loader import (
    ROW_GROUP,
    Batch,
    BatchLoader,
    ExampleFiles,
    ExampleSource,
    ExampleTable,
    write_examples,
)
from tests.training.small import flat, small_data

ROWS, BATCH = 1000, 64


@pytest.fixture(scope="module")
def data() -> CtrData:
    return small_data()


def examples(rows: int = ROWS) -> Examples:
    """Rows that can be told apart: `label` holds their numbers, which only tables in memory keep."""
    rng = np.random.default_rng(0)
    user, item = (torch.from_numpy(rng.integers(0, high, rows)) for high in (4, 6))
    return Examples(user, item, torch.arange(rows, dtype=torch.float32))


class Groups(ExampleTable):
    """Groups of 100 rows."""

    def __init__(self, table: Examples) -> None:
        self.table = table
        self.group_rows = [min(100, len(table) - at) for at in range(0, len(table), 100)]

    def read(self, group: int) -> Examples:
        at = slice(group * 100, group * 100 + 100)
        return Examples(self.table.user[at], self.table.item[at], self.table.label[at])


def load(source: ExampleSource | Examples | Path, data: CtrData, **options: int | bool) -> BatchLoader:
    return BatchLoader(source, data, BATCH, **{"seed": 7, "epoch": 0, "training": True} | options)


def order(batches: BatchLoader | Iterator[Batch]) -> list[float]:
    return torch.cat([batch.label for batch in batches]).tolist()


@pytest.mark.parametrize("buffer_rows", [100, 350, ROWS])
def test_every_row_once_in_an_order_of_the_epoch(data: CtrData, buffer_rows: int) -> None:
    source = Groups(examples())
    first = load(source, data, buffer_rows=buffer_rows)
    assert len(first) == len(list(first)) == 16
    assert [len(batch.label) for batch in first] == [BATCH] * 15 + [ROWS % BATCH]
    assert order(first) == order(first)
    orders = [
        order(load(source, data, buffer_rows=buffer_rows, epoch=epoch, seed=seed))
        for epoch, seed in ((0, 7), (1, 7), (0, 8))
    ]
    for rows in orders:
        assert sorted(rows) == list(range(ROWS))
    assert len({tuple(rows) for rows in orders}) == 3


def test_a_buffer_that_holds_all_shuffles_evenly(data: CtrData) -> None:
    """Over 300 epochs the row in front is from each tenth of the rows about 30 times."""
    small = examples(200)
    fronts = []
    for epoch in range(300):
        batches = iter(BatchLoader(Groups(small), data, 10, seed=7, epoch=epoch, training=True))
        fronts.append(int(next(batches).label[0]) // 20)
    counts = np.bincount(fronts, minlength=10)
    assert ((counts - 30) ** 2 / 30).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


def test_groups_leave_no_trace_in_a_buffer_that_holds_all(data: CtrData) -> None:
    assert order(load(Groups(examples()), data)) == order(load(examples(), data))
    assert order(load(Groups(examples()), data, buffer_rows=500)) != order(load(examples(), data))


def test_rows_stay_in_place_without_training(data: CtrData) -> None:
    source = Groups(examples())
    assert order(load(source, data, training=False, buffer_rows=300)) == list(range(ROWS))
    for batch in load(source, data, training=False):
        expected = data.features(batch.user, batch.item)
        assert all(torch.equal(value, flat(expected)[name]) for name, value in flat(batch.features).items())


def test_held_rows_never_exceed_the_buffer_and_a_batch(data: CtrData, tmp_path: Path) -> None:
    """The file has five times the rows that the buffer holds."""

    class Counted(ExampleFiles):
        rows_read = 0

        def read(self, group: int) -> Examples:
            rows = super().read(group)
            self.rows_read += len(rows)
            return rows

    write_examples(examples(), tmp_path / "train.parquet", group_rows=100)
    source = Counted(tmp_path / "train.parquet", users=4, items=6)
    given, most = 0, 0
    for batch in load(source, data, buffer_rows=200):
        most = max(most, source.rows_read - given)
        given += len(batch.label)
    assert source.rows_read == given == ROWS
    assert 200 <= most < 200 + BATCH

    with pytest.raises(DataError, match=r"a row group has 100 examples and the buffer room for 99.*65,536"):
        load(tmp_path / "train.parquet", data, buffer_rows=99)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data: CtrData, workers: int, training: bool) -> None:
    source = examples()
    state = torch.get_rng_state()
    alone = list(load(source, data, training=training))
    several = list(load(source, data, training=training, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == len(several)
    for one, other in zip(alone, several, strict=True):
        for name in ("user", "item", "label", "whole_user", "whole_item"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        theirs = flat(other.features)
        assert all(torch.equal(value, theirs[name]) for name, value in flat(one.features).items())


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_process(data: CtrData, world: int) -> None:
    source = examples(15 * BATCH + 1)  # the last batch leaves some ranks without an example
    alone = list(load(source, data))
    shares = [list(load(source, data, rank=rank, world=world)) for rank in range(world)]
    assert all(len(share) == len(alone) for share in shares)
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        for name in ("user", "item", "label"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        for name in ("whole_user", "whole_item"):
            assert all(torch.equal(getattr(part, name), getattr(whole, name)) for part in parts)
        features = [flat(part.features) for part in parts]
        for name, values in flat(whole.features).items():
            assert torch.equal(torch.cat([part[name] for part in features]), values), name


def test_what_is_hidden_differs_by_batch_and_epoch(data: CtrData) -> None:
    one = Examples(torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS))
    flags = [batch.features.flags for epoch in (0, 1) for batch in load(one, data, epoch=epoch)]
    assert len({tuple(batch.flatten().tolist()) for batch in flags}) == len(flags)


def test_files_hold_what_memory_holds(data: CtrData, tmp_path: Path) -> None:
    table = examples(ROW_GROUP + 100)
    table = Examples(table.user, table.item, (table.label % 3 == 0).float())
    write_examples(table, tmp_path / "train.parquet")
    assert pq.ParquetFile(tmp_path / "train.parquet").metadata.num_row_groups == 2
    for folder, parts in (("a", [table]), ("b", [Examples(*columns) for columns in zip(*halves(table), strict=True)])):
        for number, part in enumerate(parts):
            write_examples(part, tmp_path / folder / f"part-{number}.parquet")
        files = ExampleFiles(tmp_path / folder, users=4, items=6)
        read = [files.read(group) for group in range(len(files.group_rows))]
        for name in ("user", "item", "label"):
            assert torch.equal(torch.cat([getattr(part, name) for part in read]), getattr(table, name))
            assert getattr(read[0], name).dtype == getattr(table, name).dtype
    memory, file = (BatchLoader(s, data, 4096, seed=1, epoch=2, training=True) for s in (table, tmp_path / "a"))
    for one, other in zip(memory, file, strict=True):
        assert torch.equal(one.item, other.item)
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.features.flags, other.features.flags)
    assert not list(tmp_path.glob("**/*.tmp"))


def halves(table: Examples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [column.split(len(table) // 2 + 1) for column in (table.user, table.item, table.label)]


def table_of(**columns: pa.Array) -> pa.Table:
    ids = pa.array([0, 1, 2], pa.int32())
    return pa.table({"user": ids, "item": ids, "liked": pa.array([True, False, True])} | columns)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of().drop_columns("item"), "column item is seen as no such column; int32 is accepted"),
        (table_of(user=pa.array(["a", "b", "c"])), "column user is seen as string; int32"),
        (table_of().slice(0, 0), "holds no examples"),
        (table_of(item=pa.array([0, 6, 2], pa.int32())), "item 6, and the catalogue 0 to 5"),
        (table_of(user=pa.array([0, -1, 2], pa.int32())), "user -1, and the catalogue 0 to 3"),
        (table_of(liked=pa.array([True, None, False])), "1 nulls in liked"),
    ],
)
def test_bad_tables_are_named(data: CtrData, tmp_path: Path, table: pa.Table, message: str) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=message) as error:
        list(load(path, data))
    assert "bad.parquet" in str(error.value)


def test_bad_files_are_named(data: CtrData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet does not exist"):
        load(tmp_path / "none.parquet", data)
    (tmp_path / "text.parquet").write_text("user,item,liked\n")
    with pytest.raises(DataError, match=r"text\.parquet is no readable Parquet file"):
        load(tmp_path / "text.parquet", data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no examples"):
        load(tmp_path / "empty", data)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_in_the_middle_is_named_by_workers_too(data: CtrData, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "train.parquet"
    table = examples(10_000)
    write_examples(table, path, group_rows=1000)
    column = pq.ParquetFile(path).metadata.row_group(4).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^\S*train\.parquet: row group 4 is unreadable \(.*\): write it again$"):
        list(load(path, data, training=False, workers=workers, buffer_rows=1000))
