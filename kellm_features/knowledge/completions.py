"""Completions of a slow engine, kept on disk under content hashes so that none is ever paid for twice."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from kellm_features.knowledge.engines.base import Completion

logger = logging.getLogger(__name__)

MOST_LOGS = 32
"""Logs beyond which one is made of them: each run that generates anything leaves one."""
SYNC_EVERY = 64
"""Completions between two waits for the disk. A killed process loses none of them; a machine without power may."""


class CompletionStore:
    """A folder of append-only logs, hash → completion: one line per completion, written as soon as it is known.

    A kill loses the line in the making and no other: a last line without its end is passed over. A line that cannot
    be read is left out with a warning, and its text is generated again. Each process opens a log of its own, so that
    nothing is ever written behind a torn line, and several may write at a time.
    """

    def __init__(self, folder: Path, *, forget: bool = False, alone: bool = True) -> None:
        """Open the store in a folder that outlives the run; nothing is written before the first `add`.

        Args:
            folder: of the logs; it need not exist.
            forget: begin anew, and delete what is kept at the first `add`.
            alone: no other process writes to the folder. Where one may, the logs are left as they are.
        """
        self._folder = folder
        self._known: dict[str, Completion] = {}
        self._reusable: dict[str, str] = {}
        self._scores: dict[str, float | None] = {}
        self._log: TextIO | None = None
        self._unsynced = 0
        self._logs = sorted(folder.glob("*.jsonl"), key=lambda log: (log.stat().st_mtime_ns, log.name))
        self._forget, self._alone = forget, alone
        for log in [] if forget else self._logs:
            for line in _whole_lines(log):
                self._remember(line, log)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Completion:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> CompletionStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reusable(self, purpose: str) -> str | None:
        """The hash of the newest completion that was added for a purpose, or None."""
        return self._reusable.get(purpose)

    def mean_answer_tokens(self) -> float | None:
        """Tokens of an answer on average; None where there is none yet."""
        spent = [completion.completion_tokens for completion in self._known.values()]
        return sum(spent) / len(spent) if spent else None

    def add(self, key: str, completion: Completion, purpose: str = "") -> None:
        """Keep a finished completion; a kill after this loses it no more.

        Args:
            key: hash of everything that shaped it.
            completion: the answer.
            purpose: hash of the part of it whose change alone asks for another answer; `reusable` finds it again.
        """
        self._write({"hash": key, **dataclasses.asdict(completion)} | ({"purpose": purpose} if purpose else {}))
        self._keep(key, completion, purpose)

    def keep_score(self, key: str, score: float | None) -> None:
        """Keep the grounding of an answer that outlives its prompt, which a later prompt's source could not tell."""
        if self._log is not None:  # of an answer of this run: a run that asks for nothing writes nothing
            self._write({"hash": key, "score": score})
        self._scores[key] = score

    def is_scored(self, key: str) -> bool:
        """Whether `keep_score` was told of an answer."""
        return key in self._scores

    def score(self, key: str) -> float | None:
        """What `keep_score` was told."""
        return self._scores[key]

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is None:
            self._log = self._begin()
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._unsynced += 1
        if self._unsynced >= SYNC_EVERY:
            self._sync()

    def close(self) -> None:
        """Wait until all is on disk, and end the log."""
        if self._log is not None:
            self._sync()
            self._log.close()
            self._log = None

    def _begin(self) -> TextIO:
        """Tidy the folder up, and open a log."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if self._forget:
            for log in self._logs:
                log.unlink(missing_ok=True)
        elif self._alone and len(self._logs) > MOST_LOGS:
            self.merge(self._logs)
        return (self._folder / f"{uuid.uuid4().hex[:16]}.jsonl").open("a", encoding="utf-8")

    def _sync(self) -> None:
        if self._log is not None and self._unsynced:
            os.fsync(self._log.fileno())
            self._unsynced = 0

    def _keep(self, key: str, completion: Completion, purpose: str) -> None:
        self._known[key] = completion
        if purpose:
            self._reusable[purpose] = key

    def _remember(self, line: str, log: Path) -> None:
        try:
            row = json.loads(line)
            key, purpose = row.pop("hash"), row.pop("purpose", "")
            if row.keys() == {"score"}:
                self._scores[key] = row["score"]
                return
            completion = Completion(**row)
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s holds a line that is no completion (%.40r…): its text is generated again", log, line)
            return
        self._keep(key, completion, purpose)

    def merge(self, logs: Sequence[Path]) -> None:
        """Make one log of all that is known, and delete these, which nobody may be writing to any more.

        A kill between the two steps leaves both, which is harmless.
        """
        purposes = {key: purpose for purpose, key in self._reusable.items()}
        temporary = self._folder / f".{uuid.uuid4().hex[:16]}.tmp"
        with temporary.open("w", encoding="utf-8") as handle:
            for key, completion in self._known.items():
                row = {"hash": key, **dataclasses.asdict(completion)}
                handle.write(json.dumps(row | ({"purpose": purposes[key]} if key in purposes else {})) + "\n")
            for key, score in self._scores.items():
                handle.write(json.dumps({"hash": key, "score": score}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(self._folder / f"{temporary.stem.lstrip('.')}.jsonl")
        for log in logs:
            log.unlink(missing_ok=True)


def _whole_lines(log: Path) -> Iterator[str]:
    """Lines that were written to their end. Only \\n ends one: a text may hold other line breaks."""
    with log.open(encoding="utf-8", errors="replace", newline="\n") as handle:
        for line in handle:
            if line.endswith("\n"):
                yield line[:-1]
