"""Completions of a slow engine, kept on disk under content hashes so that none is ever paid for twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from kellm_features.knowledge.engines.base import Completion


class CompletionStore:
    """An append-only folder of small JSON-lines shards, hash → completion.

    Each shard is written whole under a temporary name and then renamed: a kill loses the shard in the making and no
    other. A shard is named by its hashes, so that writing it twice is harmless. An unreadable shard is set aside:
    its completions are generated again.
    """

    def __init__(self, folder: Path) -> None:
        """Open, or begin, the store in a folder that outlives the run."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Completion] = {}
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for shard in sorted(folder.glob("*.jsonl")):
            self._read(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Completion:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def append(self, completions: Mapping[str, Completion]) -> None:
        """Keep finished completions; they are on disk when this returns."""
        if not completions:
            return
        name = hashlib.sha256("".join(sorted(completions)).encode()).hexdigest()[:24]
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as handle:
            for key, completion in sorted(completions.items()):
                handle.write(json.dumps({"hash": key, **dataclasses.asdict(completion)}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(self._folder / f"{name}.jsonl")
        self._known.update(completions)

    def _read(self, shard: Path) -> None:
        try:
            rows = [json.loads(line) for line in shard.read_text(encoding="utf-8").splitlines()]
            self._known.update({row.pop("hash"): Completion(**row) for row in rows})
        except (ValueError, TypeError, KeyError, OSError):
            shard.replace(shard.with_suffix(".unreadable"))
