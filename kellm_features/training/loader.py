"""Batches of examples in a seeded order, streamed from Parquet files: what they hold may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kellm_features.errors import DataError, first_line
from kellm_features.training.data import CtrData, Examples
from kellm_features.training.features import Features

EXAMPLES = pa.schema([("user", pa.int32()), ("item", pa.int32()), ("liked", pa.bool_())])
"""Columns of a file of examples: indices into the catalogue of users and of items, and the label."""
ROW_GROUP = 65_536
"""Rows of a group, the unit that is read and shuffled: half a MiB."""
_ORDER, _NOISE, _GROUPS = 1, 2, 2**31  # keys of what an epoch draws here; the trainer has those from 3 on


class Batch(NamedTuple):
    """One rank's share of a batch, and whose ids the whole batch holds."""

    user: Tensor
    """(b,) int64 indices; b is 0 where a last batch is smaller than the number of ranks."""
    item: Tensor
    """(b,) int64 indices."""
    label: Tensor
    """(b,) float32."""
    features: Features
    whole_user: Tensor
    """(B,) int64: of all ranks."""
    whole_item: Tensor
    """(B,) int64: of all ranks."""


class ExampleSource(Protocol):
    """Examples in groups of rows, each read by itself."""

    @property
    def group_rows(self) -> Sequence[int]:
        """Rows of each group."""

    def read(self, group: int) -> Examples:
        """One group."""


class ExampleTable:
    """Examples in memory, in the same groups as `write_examples` makes."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self.group_rows = [min(ROW_GROUP, len(examples) - at) for at in range(0, len(examples), ROW_GROUP)]

    def read(self, group: int) -> Examples:
        """One group."""
        return _rows(self._examples, slice(group * ROW_GROUP, (group + 1) * ROW_GROUP))


class ExampleFiles:
    """Examples in Parquet files with the columns `EXAMPLES`; footers are read at once, rows when they are asked for.

    Args:
        path: a file, or a folder of `*.parquet`, read in the order of their names.
        users: users in the catalogue.
        items: items in the catalogue.

    Raises:
        DataError: no such file, not Parquet, a missing column or a wrong type, no rows.
    """

    def __init__(self, path: Path, users: int, items: int) -> None:
        self._limits = {"user": users, "item": items}
        self._groups: list[tuple[Path, int]] = []
        self.group_rows: list[int] = []
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            rows = _footer(file)
            self._groups += [(file, group) for group in range(len(rows))]
            self.group_rows += rows
        if not sum(self.group_rows):
            raise DataError(f"{path} holds no examples: one Parquet file or a folder of them with rows is accepted")

    def read(self, group: int) -> Examples:
        """One group.

        Raises:
            DataError: damaged rows, nulls, or indices outside the catalogue.
        """
        path, number = self._groups[group]
        try:
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(number, columns=EXAMPLES.names, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: row group {number} is unreadable ({first_line(error)}): write it again"
            ) from error
        for name in EXAMPLES.names:
            if nulls := table.column(name).null_count:
                raise DataError(f"{path}: row group {number} has {nulls} nulls in {name}; none are accepted")
        user, item = (torch.from_numpy(table.column(name).to_numpy().astype(np.int64)) for name in self._limits)
        for name, index in (("user", user), ("item", item)):
            outside = index[(index < 0) | (index >= self._limits[name])]
            if len(outside):
                raise DataError(
                    f"{path}: row group {number} has {name} {int(outside[0])}, and the catalogue 0 to "
                    f"{self._limits[name] - 1}: it was made from other data; write it again"
                )
        return Examples(user, item, torch.from_numpy(table.column("liked").to_numpy().astype(np.float32)))


class BatchLoader:
    """One epoch's batches; iterating over it again gives the same ones.

    Training: groups of rows are drawn in random order until a buffer is full, and the buffer's rows are shuffled;
    examples that fit the buffer as a whole are so in an order drawn evenly from all, however they are grouped. Every
    random choice comes from (seed, epoch), and what is hidden in the features of a batch from (seed, epoch, number of
    the batch): batches are the same for any number of workers, and those of the ranks are together the batches of one
    process.

    Each worker and each rank reads all rows, nine bytes each, and prepares the features of its own alone.

    Args:
        source: examples, in memory or in files (see `ExampleFiles`).
        data: describes them.
        batch_size: examples of a batch, over all ranks; the last one may be smaller.
        seed: of the run.
        epoch: number of the epoch, at least 0.
        training: shuffle, and hide ids and events; else: in the order of the source, with nothing hidden.
        workers: processes that prepare features; 0: this one. One pays where preparing takes longer than handing
            over: with 4,000 items, histories of 30 and 2,048 examples a batch 1.3 ms against 2 ms.
        rank: of this process.
        world: number of ranks; each takes a contiguous share of every batch.
        buffer_rows: rows held for shuffling, in every worker; 20 bytes each, and as much again while they are shuffled.

    Raises:
        DataError: see `ExampleFiles`; a group with more rows than the buffer.
    """

    def __init__(
        self,
        source: ExampleSource | Examples | Path,
        data: CtrData,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        training: bool,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer_rows: int = 1_048_576,
    ) -> None:
        if isinstance(source, Path):
            source = ExampleFiles(source, len(data.user_ids), len(data.item_ids))
        elif isinstance(source, Examples):
            source = ExampleTable(source)
        largest = max(source.group_rows, default=0)
        if largest > buffer_rows:
            raise DataError(
                f"a row group has {largest:,} examples and the buffer room for {buffer_rows:,}: write the examples "
                f"with smaller row groups ({ROW_GROUP:,}), or give a larger buffer"
            )
        self.rows = sum(source.group_rows)
        """Examples of an epoch, over all ranks."""
        self._batch_size = batch_size
        self._loader: DataLoader[Batch | DataError] = DataLoader(
            _Stream(source, data, batch_size, seed, epoch, training, rank, world, buffer_rows),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            generator=torch.Generator(),  # its draw of the workers' seeds must not move the global generator
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            DataError: see `ExampleFiles.read`.
        """
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def write_examples(examples: Examples, path: Path, group_rows: int = ROW_GROUP) -> None:
    """Write a Parquet file with the columns `EXAMPLES`; it appears under its name when it is whole.

    Raises:
        DataError: it cannot be written.
    """
    columns = (examples.user.int(), examples.item.int(), examples.label > 0)
    table = pa.Table.from_arrays([pa.array(column.numpy()) for column in columns], schema=EXAMPLES)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary, row_group_size=group_rows)
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or first_line(error)}): free space or choose another folder"
        ) from error


class _Stream(IterableDataset[Any]):
    """The batches that this worker of this rank prepares; a bad file ends them with its error as the last one.

    Raised in a worker it would reach the trainer as a traceback in the text of another error.
    """

    def __init__(
        self,
        source: ExampleSource,
        data: CtrData,
        batch_size: int,
        seed: int,
        epoch: int,
        training: bool,
        rank: int,
        world: int,
        buffer_rows: int,
    ) -> None:
        self.source = source
        self.data = data
        self.batch_size = batch_size
        self.key = (seed, epoch)
        self.training = training
        self.rank = rank
        self.world = world
        self.buffer_rows = buffer_rows

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        try:
            for number, whole in enumerate(self._examples()):
                if number % step == first:
                    yield self._batch(number, whole)
        except DataError as error:
            yield error

    def _batch(self, number: int, whole: Examples) -> Batch:
        generator = _generator(*self.key, _NOISE, number) if self.training else None
        part = slice(len(whole) * self.rank // self.world, len(whole) * (self.rank + 1) // self.world)
        mine = _rows(whole, part)
        features = self.data.features(whole.user, whole.item, generator, part)
        return Batch(mine.user, mine.item, mine.label, features, whole.user, whole.item)

    def _examples(self) -> Iterator[Examples]:
        """Batches of all ranks; a buffer's last rows, too few for one, go into the next buffer."""
        generator = _generator(*self.key, _ORDER)
        left: list[Examples] = []
        for groups in self._buffers():
            held = _joined([*left, *(self.source.read(group) for group in groups)])
            if self.training:
                held = _rows(held, torch.randperm(len(held), generator=generator))
            whole = len(held) - len(held) % self.batch_size
            for at in range(0, whole, self.batch_size):
                yield _copied(held, slice(at, at + self.batch_size))
            left = [_copied(held, slice(whole, None))]
        if left and len(left[0]):
            yield left[0]

    def _buffers(self) -> Iterator[list[int]]:
        """Groups that fill a buffer, each in the order of the source."""
        sizes = self.source.group_rows
        generator = _generator(*self.key, _GROUPS)
        order = torch.randperm(len(sizes), generator=generator).tolist() if self.training else range(len(sizes))
        chosen: list[int] = []
        filled = 0
        for group in order:
            if filled + sizes[group] > self.buffer_rows:
                yield sorted(chosen)
                chosen, filled = [], 0
            chosen.append(group)
            filled += sizes[group]
        if chosen:
            yield sorted(chosen)


def _footer(path: Path) -> list[int]:
    """Rows of each group, after a look at the columns."""
    try:
        with pq.ParquetFile(path) as file:
            metadata, found = file.metadata, file.schema_arrow
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: one Parquet file of examples or a folder is accepted") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no readable Parquet file ({first_line(error)}): write it again") from error
    for column in EXAMPLES:
        seen = found.field(column.name).type if column.name in found.names else "no such column"
        if seen != column.type:
            raise DataError(f"{path}: column {column.name} is seen as {seen}; {column.type} is accepted")
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _rows(examples: Examples, rows: slice | Tensor) -> Examples:
    return Examples(examples.user[rows], examples.item[rows], examples.label[rows])


def _copied(examples: Examples, rows: slice) -> Examples:
    """Rows with memory of their own: a slice would keep its buffer alive, and take it whole to another process."""
    part = _rows(examples, rows)
    return Examples(part.user.clone(), part.item.clone(), part.label.clone())


def _joined(parts: list[Examples]) -> Examples:
    user, item, label = zip(*((part.user, part.item, part.label) for part in parts), strict=True)
    return Examples(torch.cat(user), torch.cat(item), torch.cat(label))


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _as_is(batch: Any) -> Any:
    return batch
