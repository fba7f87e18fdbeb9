"""Training events with the vector that was served at their time: a point-in-time join that keeps every row.

The result is an index into one matrix, not a table of vectors: a million events over 200,000 items share at most
200,000 vectors a version, and a model looks them up as it looks up any embedding.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kellm_features.errors import StoreError, first_line
from kellm_features.store.layout import DATA, EVENT_TIMESTAMP, ITEM_EMBEDDING, VIEWS, ViewSpec
from kellm_features.store.offline import (
    Ints,
    OfflinePartition,
    OfflineRows,
    codes,
    compared_type,
    microseconds,
    open_partitions,
    read_rows,
    read_vectors,
)

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Times = NDArray[np.datetime64]
MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, eq=False)
class TrainingJoin:
    """R events in the order they came, over U vectors of length E, each row of a partition at most once."""

    index: Ints
    """(R,) row of `values` for each event, −1 where nothing was known at its time."""
    values: NDArray[np.float32]
    """(U, E) the vectors that some event needs, bit-equal to the partition's."""
    ids: NDArray[np.int64] | NDArray[np.object_]
    """(U,) the id of each vector, int64 or str."""
    versions: NDArray[np.object_]
    """(U,) str, the version of each vector."""
    valid_from: Times
    """(U,) datetime64[us] in UTC: `event_timestamp` of each vector's row."""
    event_times: Times
    """(R,) datetime64[us] in UTC: the events' times."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def found(self) -> NDArray[np.bool_]:
        """(R,) whether the event has a vector."""
        return self.index >= 0

    @property
    def age_s(self) -> NDArray[np.float64]:
        """(R,) seconds from the vector's `event_timestamp` to the event, NaN where missing.

        Negative only with a pinned version: that vector did not exist yet when the event took place.
        """
        age = np.full(len(self.index), np.nan)
        found = self.found
        age[found] = (self.event_times[found] - self.valid_from[self.index[found]]) / np.timedelta64(1, "s")
        return age

    def take(self, rows: slice | Ints | None = None) -> NDArray[np.float32]:
        """One vector an event, (R, E) float32 or those of `rows` alone; NaN where missing.

        Repeats a vector for each of its events: take a batch at a time where R x E does not fit in memory.
        """
        index = self.index if rows is None else self.index[rows]
        if not len(self.values):
            return np.full((len(index), self.values.shape[1]), np.nan, dtype=np.float32)
        vectors = self.values.take(index, axis=0)  # −1 takes the last row, to be overwritten
        vectors[index < 0] = np.nan
        return vectors


def training_join(
    events: pa.Table | pd.DataFrame,
    repo: Path | str,
    *,
    view: str = ITEM_EMBEDDING.name,
    version: str | None = None,
    id_column: str | None = None,
    timestamp_column: str = EVENT_TIMESTAMP,
    ttl: timedelta | None = None,
    split_hash: str | None = None,
) -> TrainingJoin:
    """Join training events to a view's offline partitions; no event is dropped, repeated or moved.

    Without `version`, an event gets what Feast's `get_historical_features` gives: of its id's rows with
    `event_timestamp` at or before the event's, the one with the greatest (event_timestamp, created_timestamp), and of
    equal ones the last by file name and place in the file. Where that row withdraws the id, the event has no vector.
    Every version in the folder counts, promoted or not.

    With `version`, every event gets that version's vector, **whatever its time**: for a model that will be served
    with this one embedding and must not learn from spaces that no longer exist. This looks past the event's time. An
    embedding trained on interactions up to its publication has seen the very events that you train and evaluate on,
    so that offline metrics come out too high: evaluate on events after the version's own time (`age_s` > 0).

    Args:
        events: one row an event; other columns are ignored.
        repo: the Feast repository, whose `data/VIEW/VERSION.parquet` (files, or folders of them) are read.
        view: a view with embeddings.
        version: pin one version, by its name.
        id_column: the events' column of ids, of the repository's type; default: the view's join key. An event with
            a null id has no vector.
        timestamp_column: the events' times, a timestamp of any unit; one without a time zone is UTC, as in Feast.
        ttl: a row older than this at the event's time counts as missing; None: a row holds until the next one.
        split_hash: of the split that the events were taken from (in the manifest of `ingest`). Embeddings trained on
            another split have seen what this one holds back.

    Returns:
        R events over U distinct vectors. Memory: those vectors, some arrays of R, and one batch of a Parquet file.

    Raises:
        StoreError: the view or version is not known, nothing is published, a column is missing or of another type, a
            time is null, a vector is of another split, the needed versions have vectors of several lengths, or a
            partition cannot be read.
    """
    spec = _spec(view)
    if ttl is not None and ttl <= timedelta(0):
        raise StoreError(f"ttl is {ttl}; accepted: a positive timedelta, or None where a row holds until the next one")
    id_column = id_column or spec.join_key
    table = _as_table(events, list(dict.fromkeys([id_column, timestamp_column])))
    with ExitStack() as open_files:
        partitions = open_partitions(Path(repo) / DATA / spec.name, spec, version, open_files)
        ids = _ids(table.column(id_column), id_column, partitions[0])
        times = _times(table.column(timestamp_column), timestamp_column)
        distinct = pc.unique(ids).drop_null()
        rows = read_rows(partitions, spec, distinct)
        chosen = _latest(rows, codes(ids, distinct), None if version else times)
        chosen, why = _without_stale(chosen, rows, times, ttl)

        found = chosen >= 0
        needed = np.zeros(len(rows.code), dtype=bool)
        needed[chosen[found]] = True
        index = np.full(len(chosen), -1, dtype=np.int64)
        index[found] = (np.cumsum(needed) - 1)[chosen[found]]
        partition = rows.partition[needed]
        _check_split(partitions, partition, split_hash)
        values = read_vectors(partitions, partition, rows.place[needed])
    logger.info("%s: %d events in and out, %d without a vector: %s", view, len(index), np.sum(~found), why)
    return TrainingJoin(
        index=index,
        values=values,
        ids=distinct.take(pa.array(rows.code[needed])).to_numpy(zero_copy_only=False),
        versions=np.array([each.version for each in partitions], dtype=object)[partition],
        valid_from=rows.event[needed].view("datetime64[us]"),
        event_times=times.view("datetime64[us]"),
    )


def _check_split(partitions: Sequence[OfflinePartition], used: Ints, split_hash: str | None) -> None:
    for number in np.unique(used) if split_hash else ():
        seen = partitions[number].split_hash
        if seen not in (None, split_hash):
            raise StoreError(
                f"version {partitions[number].version} was trained on split {str(seen)[:12]} and the events are of "
                f"split {str(split_hash)[:12]}: its vectors have seen events that this split holds back; pin a version "
                f"of this split, or publish one"
            )


def _spec(view: str) -> ViewSpec:
    known = {spec.name: spec for spec in VIEWS if spec.holds_embeddings}
    if view not in known:
        raise StoreError(f"view is {view!r}; accepted: {' or '.join(known)}, the views that hold embeddings")
    return known[view]


def _as_table(events: pa.Table | pd.DataFrame, columns: list[str]) -> pa.Table:
    pandas = sys.modules.get("pandas")  # whoever has a DataFrame has imported it
    is_frame = pandas is not None and isinstance(events, pandas.DataFrame)
    if not is_frame and not isinstance(events, pa.Table):
        raise StoreError(f"events is a {type(events).__name__}; accepted: a pyarrow.Table or a pandas.DataFrame")
    names = list(events.columns) if is_frame else events.column_names
    for name in columns:
        if names.count(name) != 1:
            raise StoreError(
                f"events has {names.count(name) or 'no'} columns named {name!r} and needs one, it has "
                f"{', '.join(map(str, names[:20])) or 'none at all'}: set id_column and timestamp_column"
            )
    if not is_frame:
        return events.select(columns)
    try:
        return pa.Table.from_pandas(events[columns], preserve_index=False)
    except pa.ArrowException as error:  # such as numbers and text in one column
        raise StoreError(f"the events' {' and '.join(columns)} cannot be read ({first_line(error)})") from error


def _ids(column: pa.ChunkedArray, name: str, partition: OfflinePartition) -> pa.ChunkedArray:
    seen = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if compared_type(seen) not in (partition.id_type, pa.null()):
        raise StoreError(
            f"the events' {name} is of type {seen}, and the ids of {partition.path.parent} are {partition.id_type}: "
            f"cast the column to that"
        )
    try:
        return column.cast(seen).cast(partition.id_type)
    except pa.ArrowInvalid as error:  # of the integers only uint64 can
        raise StoreError(f"the events' {name} holds ids that are no int64 ({first_line(error)})") from error


def _times(column: pa.ChunkedArray, name: str) -> Ints:
    if not pa.types.is_timestamp(column.type):
        raise StoreError(
            f"the events' {name} is of type {column.type}; accepted: a timestamp in s, ms, us or ns, with a time zone "
            f"or in UTC. Of a mere day, choose the moment at which the vector was looked up"
        )
    if column.null_count:
        raise StoreError(
            f"the events' {name} is null in {column.null_count} of {len(column)} rows: drop these events or fill it"
        )
    if column.type.unit == "ns":  # rounded down, before 1970 too: partitions know whole microseconds
        nanos: Ints = column.cast(pa.int64()).to_numpy()
        return nanos // 1000
    try:
        return microseconds(column)
    except pa.ArrowInvalid as error:
        raise StoreError(f"the events' {name} holds times out of range ({first_line(error)})") from error


def _latest(rows: OfflineRows, wanted: Ints, times: Ints | None) -> Ints:
    """(R,) the last row of each wanted id, at or before its time where times are given; −1 where there is none.

    (id, time) becomes one integer, so that one binary search finds the row: the id's code, times the number of
    distinct moments and one, plus how many moments have passed.
    """
    order = np.lexsort((rows.created, rows.event, rows.code))  # stable: equal rows stay in the order of the files
    code = keys = rows.code[order]
    asked = wanted
    if times is not None:
        moments = np.unique(rows.event)
        keys = code * (len(moments) + 1) + np.searchsorted(moments, rows.event[order], side="right")
        asked = wanted * (len(moments) + 1) + np.searchsorted(moments, times, side="right")
    last = np.searchsorted(keys, asked, side="right") - 1
    some = np.flatnonzero(last >= 0)
    own = some[code[last[some]] == wanted[some]]  # else the last row is of the id before
    chosen = np.full(len(wanted), -1, dtype=np.int64)
    chosen[own] = order[last[own]]
    return chosen


def _without_stale(chosen: Ints, rows: OfflineRows, times: Ints, ttl: timedelta | None) -> tuple[Ints, str]:
    """The chosen rows without those that withdraw their id or are past the ttl, and why events have none."""
    known = np.flatnonzero(chosen >= 0)
    withdrawn = rows.deleted[chosen[known]]
    past = np.zeros(len(known), dtype=bool)
    if ttl is not None:
        past = ~withdrawn & (times[known] - rows.event[chosen[known]] > ttl // MICROSECOND)
    kept = chosen.copy()
    kept[known[withdrawn | past]] = -1
    unknown = len(chosen) - len(known)
    return kept, f"{unknown} not known at their time, {withdrawn.sum()} withdrawn, {past.sum()} past the ttl"
