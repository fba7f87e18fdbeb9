"""The work folder beside the output: what finished shards and half-finished ones leave for the next run.

    OUT.work/job.json                   side and number of shards
    OUT.work/shard-00017/*.jsonl        completions, one log per attempt at the shard (`CompletionStore`)
    OUT.work/shard-00017.parquet        descriptions of the shard, and in its footer what they were made of

Attempts at one shard may run at the same time (speculation; an executor that its driver thinks dead): each writes a log
and a table of its own, and the table gets its name by a rename.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kellm_features.errors import ConfigError, DataError
from kellm_features.knowledge.completions import MOST_LOGS, CompletionStore
from kellm_features.schemas import Column

KEY = b"kellm.key"
TOLD = b"kellm.told"
FAILED = (
    Column("failed_hash", pa.string(), nullable=True),
    Column("failed_model", pa.string(), nullable=True),
    Column("failed_reason", pa.string(), nullable=True),
)
"""Of a request that failed for good, beside the text that stands in for its answer."""
LOG_LIVES_S = 24 * 3600.0
"""A log that has not grown for so long belongs to no running attempt: no engine waits a day for its server."""
_JOB = "job.json"
_FILE_URI = re.compile(r"file:(?://(?:localhost)?)?(/.*)")
"""With the path as it stands: Hadoop, which finds the output, decodes no %20 either."""
_GLOB = frozenset("[]{}*?\\")
"""Hadoop's patterns; with its escape, \\, a name that holds them is not found either."""


@dataclass(frozen=True)
class Work:
    """The folder, as driver and executors see it."""

    folder: Path

    def begin(self, side: str, shards: int) -> None:
        """Make the folder, or go on in it.

        Raises:
            DataError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            temporary = self.folder / f".{_JOB}.{uuid.uuid4().hex}.tmp"
            temporary.write_text(json.dumps({"side": side, "shards": shards}), encoding="utf-8")
            temporary.replace(self.folder / _JOB)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written ({error.strerror}): name another with --work") from error

    def shards(self, side: str, wanted: int | None) -> int | None:
        """The number of shards of an earlier run, or what is wanted where there was none.

        Raises:
            ConfigError: the earlier run was of the other side, or had another number of shards.
        """
        path = self.folder / _JOB
        if not path.exists():
            return wanted
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            before_side, before = str(told["side"]), int(told["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not readable: remove {self.folder}, or name another with --work") from error
        if before_side != side:
            raise ConfigError(f"{self.folder} holds the work of --side {before_side}, not {side}: name another --out")
        if wanted not in (None, before):
            raise ConfigError(
                f"--shards is {wanted}, and {self.folder} holds the work of {before}: an id's finished text stands in "
                f"its shard; leave --shards out, or remove the folder to ask for everything again"
            )
        return before

    def tidy(self) -> None:
        """One log of those that no attempt can be writing to any more, where many have gathered in a shard: the
        driver's part, before any task runs."""
        before = time.time() - LOG_LIVES_S
        for folder in self.folder.glob("shard-*"):
            old = [log for log in folder.glob("*.jsonl") if log.stat().st_mtime < before]
            if len(old) > MOST_LOGS:
                with suppress(FileNotFoundError):  # an attempt cleared the new log's temporary name: the old ones stay
                    CompletionStore(folder, alone=False).merge(old)

    def check_seen(self) -> None:
        """Raises DataError where this executor does not see the folder that the driver made."""
        if not (self.folder / _JOB).exists():
            raise DataError(
                f"{self.folder} is not there on an executor: the work folder has to be on a file system that the "
                "driver and all executors see under one path; name one with --work"
            )

    def store(self, shard: int) -> CompletionStore:
        """The completions of a shard, which other attempts may be writing to."""
        return CompletionStore(self.folder / f"shard-{shard:05d}", alone=False)

    def table(self, shard: int) -> Path:
        """Where a shard's descriptions are written."""
        return self.folder / f"shard-{shard:05d}.parquet"

    def finished(self, shard: int, key: str) -> dict[str, Any] | None:
        """What was told of a shard's table, if it was made of what this key stands for."""
        try:
            metadata = pq.read_metadata(self.table(shard)).metadata or {}
            told = json.loads(metadata[TOLD]) if metadata.get(KEY) == key.encode() else None
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):
            return None
        return told if isinstance(told, dict) else None

    def write(self, shard: int, key: str, table: pa.Table, told: dict[str, Any]) -> None:
        """Put a shard's table in place, whole."""
        labelled = table.replace_schema_metadata({KEY: key.encode(), TOLD: json.dumps(told).encode()})
        temporary = self.folder / f".shard-{shard:05d}.{uuid.uuid4().hex}.tmp"
        with temporary.open("wb") as handle:
            pq.write_table(labelled, handle, compression="zstd")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(self.table(shard))


def work_folder(out: str, work: str | None) -> Path:
    """The folder that `--work` names, else `OUT.work`; absolute, because executors start elsewhere.

    Raises:
        ConfigError: it would be in an object store, where nothing can be appended to a log, or Spark could not read
            in it.
    """
    named = work or f"{out.rstrip('/')}.work"
    if local := _FILE_URI.fullmatch(named):
        named = local[1]
    elif "://" in named:
        raise ConfigError(
            f"the work folder {named} is not a path: completions are appended to logs, for which a file system that is "
            "mounted on the driver and all executors is needed; name a folder there with --work (--out may be anywhere)"
        )
    folder = Path(named).expanduser().absolute()
    if odd := sorted(set(str(folder)) & _GLOB):
        raise ConfigError(
            f"the work folder {folder} has {' '.join(odd)} in its path, which Spark reads as a pattern: name another "
            "with --work"
        )
    return folder
