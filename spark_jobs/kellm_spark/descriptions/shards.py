"""What a Python worker does with a shard: requests of its rows, completions from its engine, one table."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from kellm_features import __version__
from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.domain import Domain
from kellm_features.knowledge.engines import Engine, load_engine
from kellm_features.knowledge.facts import Event, Page, known_genres
from kellm_features.knowledge.generate import LOCAL_ENGINES
from kellm_features.knowledge.localmodel import local_model
from kellm_features.knowledge.modelfiles import model_files
from kellm_features.knowledge.requests import Description, Request, descriptions_table, item_request, user_request
from kellm_features.knowledge.text import bare_title
from kellm_features.knowledge.writer import Writer
from kellm_features.schemas import ITEM_DESCRIPTIONS, USER_DESCRIPTIONS
from kellm_features.settings import GenerateSettings, Settings, show_gpus
from kellm_spark.descriptions.work import FAILED, Work

Side = Literal["item", "user"]
Batches = Iterator[pa.RecordBatch]
TOLD_DDL = "shard int, key string, told string"
_TOLD = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("told", pa.string())])
SCHEMAS = {"item": ITEM_DESCRIPTIONS, "user": USER_DESCRIPTIONS}


@dataclass(frozen=True)
class ShardTask:
    """What every shard of a job has in common. It travels to the workers, and holds no secret."""

    side: Side
    settings: Settings
    domain: Domain
    work: Work
    run: str = ""
    """Tells this run from others that the same worker processes serve."""

    @property
    def engine(self) -> str:
        """Of the rows that the settings do not give to `fallback_engine`."""
        generate = self.settings.generate
        return generate.engine if self.side == "item" else generate.user_engine

    @property
    def max_tokens(self) -> int:
        """Of one answer."""
        generate = self.settings.generate
        return generate.max_tokens if self.side == "item" else generate.user_max_tokens or generate.max_tokens

    def key(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """SHA-256 of all that shapes a shard's table: its rows, the settings, the domain, the model, this version."""
        generate = self.settings.generate
        parts = [__version__, self.side, self.settings.shaping("generate"), self.domain.model_dump()]
        digest = hashlib.sha256(json.dumps([*parts, _model_stamp(generate, self.engine)], default=str).encode())
        for row in rows:
            digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


def shard_writer(task: ShardTask) -> Callable[[Batches], Batches]:
    """For `mapInArrow`: writes the table of each shard in a partition; one row per shard (`TOLD_DDL`) comes back.

    Several shards may share a partition; a shard's rows have to follow one another.
    """

    def write(batches: Batches) -> Batches:
        rows = (row for batch in batches for row in batch.to_pylist())
        for shard, of_shard in itertools.groupby(rows, key=itemgetter("shard")):
            key, told = write_shard(task, shard, list(of_shard))
            yield pa.RecordBatch.from_pylist([{"shard": shard, "key": key, "told": json.dumps(told)}], schema=_TOLD)

    return write


def write_shard(task: ShardTask, shard: int, rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Write a shard's table, unless it is there and nothing in it is left to do.

    Returns:
        The key under which the table stands, and figures: what the table holds (rows, by_source, dead_letters, tokens
        that its texts cost, models) and what this call did (`run`, empty where it did nothing).

    Raises:
        EngineError: the engine failed for good, or `generate.max_failures` requests in a row did, be it over several
            shards of this process; what was finished is kept for the next attempt.
    """
    task.work.check_seen()
    key = task.key(rows)
    finished = task.work.finished(shard, key)
    if finished is not None and not finished["dead_letters"]:
        return key, {**finished, "run": {}}
    started = time.monotonic()
    with task.work.store(shard) as store:
        writer = WorkerWriter(task, store)
        described = _describe(task, writer, rows)
    told = {
        "rows": len(rows),
        "by_source": dict(Counter(row.source for row in described.values())),
        "dead_letters": sum(row.failed is not None for row in described.values()),
        "prompt_tokens": sum(row.prompt_tokens for row in described.values()),
        "completion_tokens": sum(row.completion_tokens for row in described.values()),
        "models": dict(sorted(writer.usage.models.items())),
    }
    task.work.write(shard, key, _table(task.side, described), told)
    notes = writer.usage.notes()
    counted = ("generated", "cache_hits", "asked_again", "unfit_answers", "ungrounded_answers")
    return key, {**told, "run": {**{k: notes[k] for k in counted}, "seconds": time.monotonic() - started}}


class WorkerWriter(Writer):
    """A writer whose engines and count of failures outlive it: a worker process loads a model once, and notices a dead
    server however few rows a shard has."""

    _failures: ClassVar[dict[str, int]] = {}
    """Run -> requests that failed in a row, for the run that this process serves."""

    def __init__(self, task: ShardTask, store: CompletionStore) -> None:
        super().__init__(task.settings.generate, task.domain, store)
        self._run = task.run
        self._failed_in_a_row = self._failures.get(task.run, 0)

    def write(self, name: str, requests: Sequence[Request], label: str, max_tokens: int) -> list[Description]:
        try:
            return super().write(name, requests, label, max_tokens)
        finally:
            self._failures.clear()
            self._failures[self._run] = self._failed_in_a_row

    def engine(self, name: str) -> Engine:
        return _engine(name, self.settings.model_dump_json())


@functools.lru_cache(maxsize=2)  # a job has two at most: the engine, and the one for short histories
def _engine(name: str, settings: str) -> Engine:
    _show_own_gpus()
    return load_engine(name, GenerateSettings.model_validate_json(settings))


def _show_own_gpus() -> None:
    """Hide the GPUs that Spark gave to other tasks of this machine: an engine takes the first that it sees."""
    from pyspark import TaskContext

    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context is not None else None
    if gpu is not None:
        show_gpus(gpu.addresses)


def _describe(task: ShardTask, writer: Writer, rows: Sequence[Mapping[str, Any]]) -> dict[Any, Description]:
    generate, name = task.settings.generate, f"{task.side}_id"
    requests: dict[str, dict[Any, Request]] = {}
    for row in rows:
        short = task.side == "user" and len(row["events"]) < generate.min_history
        engine = generate.fallback_engine if short else task.engine
        requests.setdefault(engine, {})[row[name]] = _request(task, row)
    described: dict[Any, Description] = {}
    for engine, of_engine in requests.items():
        texts = writer.write(engine, list(of_engine.values()), f"{task.side}s", task.max_tokens)
        described.update(zip(of_engine, texts, strict=True))
    return described


def _request(task: ShardTask, row: Mapping[str, Any]) -> Request:
    generate, domain = task.settings.generate, task.domain
    if task.side == "item":
        pages = [
            Page(page["wiki_title"], page["lead"], tuple((s["name"] or "", s["text"] or "") for s in page["sections"]))
            for page in row["pages"]
        ]
        return item_request(domain, row["title"], row["year"], row["genres"], pages, by_factor=generate.factors)
    history = [
        (
            Event(
                bare_title(event["title"]),
                event["year"],
                known_genres(event["genres"]),
                event["rating"],
                event["liked"],
            ),
            event["description"] or "",
        )
        for event in row["events"]
    ]
    by_history = generate.user_refresh == "history"
    return user_request(domain, row, history, by_factor=generate.factors, by_history=by_history)


def _table(side: Side, described: Mapping[Any, Description]) -> pa.Table:
    """`schemas.ITEM_DESCRIPTIONS` or `USER_DESCRIPTIONS` by id, and what failed (`work.FAILED`)."""
    is_text = any(isinstance(key, str) for key in described)
    table = descriptions_table(described, SCHEMAS[side], pa.string() if is_text else pa.int64())
    failed = [described[key].failed for key in sorted(described)]
    columns = (
        [letter and letter.prompt_hash for letter in failed],
        [letter and letter.model_id for letter in failed],
        [letter and letter.reason for letter in failed],
    )
    for column, values in zip(FAILED, columns, strict=True):
        table = table.append_column(column.name, pa.array(values, pa.string()))
    return table


def _model_stamp(generate: GenerateSettings, engine: str) -> Any:
    """What tells that another model would be loaded, without loading one: a commit, or sizes and times of files."""
    if engine not in LOCAL_ENGINES:
        return None
    path = Path(generate.model).expanduser()
    if not path.exists():
        return local_model(generate).revision
    files = model_files(path) if path.is_dir() else {path.name: path}
    return {name: (file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()}
