"""Artefacts of a small run in the schemas of the stages before; repositories to publish them into; Redis servers."""

from __future__ import annotations

import itertools
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from kellm_features import schemas
from kellm_features.artifacts import Artifact, Manifest
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport

T1 = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
T2 = datetime(2026, 3, 8, 12, 0, 0, 750_000, tzinfo=UTC)


@dataclass
class Run:
    """One run directory: the tables that the stages before `publish` wrote, by (stage, file)."""

    folder: Path
    tables: dict[tuple[str, str], pa.Table]

    def write(self) -> None:
        for (stage, file), table in self.tables.items():
            schemas.write_table(table, self.folder / stage / file, SCHEMAS[stage, file])

    def context(self, repo: Path) -> StageContext:
        out, work = self.folder / ".publish.new", self.folder / ".work" / "publish"
        for path in (out, work):
            path.mkdir(parents=True, exist_ok=True)
        inputs = {stage: artifact(self.folder / stage, {}) for stage, _ in self.tables}
        settings = Settings.model_validate({"store": {"repo": repo}})
        return StageContext(settings, self.folder, out, work, inputs, {}, "split")

    def vectors(self, entity: str = "item") -> dict[Any, np.ndarray]:
        """Id -> float32 vector, as the export wrote it."""
        table = self.tables["export", f"{entity}_embeddings.parquet"]
        rows = zip(table[f"{entity}_id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
        return {key: np.array(vector, dtype=np.float32) for key, vector in rows}


SCHEMAS = {
    ("export", "item_embeddings.parquet"): schemas.ITEM_EMBEDDINGS,
    ("export", "user_embeddings.parquet"): schemas.USER_EMBEDDINGS,
    ("generate", "item_descriptions.parquet"): schemas.ITEM_DESCRIPTIONS,
    ("link", "links.parquet"): schemas.LINKS,
    ("swing", "item_pairs.parquet"): schemas.PAIRS,
    ("swing", "user_pairs.parquet"): schemas.PAIRS,
}


def artifact(path: Path, notes: dict[str, Any]) -> Artifact:
    return Artifact(
        path,
        Manifest(
            stage=path.name,
            run_id="20260301T120000Z-00000000",
            version="0",
            created=T1,
            config_hash="",
            split_hash="split",
            output_hash="",
            notes=notes,
        ),
    )


@pytest.fixture(scope="session")
def published_artifact() -> Callable[[Path, StageReport], Artifact]:
    """The artefact that the pipeline makes of a publish's report."""
    return lambda path, report: artifact(path, report.notes)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """`make_run(folder, version, when, seed, items=..., users=..., text=str|int)` writes the artefacts of one run."""

    def make(
        folder: Path,
        version: str = "v1",
        when: datetime = T1,
        seed: int = 1,
        items: range = range(1, 51),
        users: range = range(1, 31),
        key: Callable[[int], Any] = int,
        dim: int = 8,
    ) -> Run:
        rng = np.random.default_rng(seed)
        item_ids, user_ids = [key(i) for i in items], [key(u) for u in users]

        def embeddings(name: str, ids: list[Any]) -> pa.Table:
            vectors = rng.standard_normal((len(ids), dim)).astype(np.float32)
            count = len(ids)
            return pa.table(
                {
                    name: ids,
                    "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
                    "embedding_version": [version] * count,
                    "model_id": ["adapter"] * count,
                    "content_hash": [f"{version}-{i}" for i in ids],
                    "event_timestamp": pa.array([when] * count, schemas.TIMESTAMP),
                    "created_timestamp": pa.array([when] * count, schemas.TIMESTAMP),
                }
            )

        def pairs(ids: list[Any]) -> pa.Table:
            """Every id but the last has 0 to 29 neighbours, so that some have more than are served."""
            rows = []
            for place, anchor in enumerate(ids[:-1]):
                others = [other for other in ids if other != anchor][: place % 30]
                scores = sorted(rng.random(len(others)), reverse=True)
                rows += [
                    {"anchor_id": anchor, "neighbor_id": other, "score": score, "common": 2, "rank": rank}
                    for rank, (other, score) in enumerate(zip(others, scores, strict=True), start=1)
                ]
            rng.shuffle(rows)  # a Spark folder promises no order
            return pa.Table.from_pylist(rows, schema=schemas.PAIRS.arrow(pa.array(ids).type))

        linked = [i % 3 != 0 for i in items]
        tables = {
            ("export", "item_embeddings.parquet"): embeddings("item_id", item_ids),
            ("export", "user_embeddings.parquet"): embeddings("user_id", user_ids),
            ("generate", "item_descriptions.parquet"): pa.table(
                {
                    "item_id": item_ids,
                    "description": [f"About {i}, told for {version}: “naïve”." for i in item_ids],
                    "description_source": ["template"] * len(item_ids),
                    "prompt_hash": [f"p{i}" for i in item_ids],
                    "model_id": ["template-1"] * len(item_ids),
                    "grounding": pa.array([1.0 if on else None for on in linked], pa.float32()),
                    "prompt_tokens": pa.array([0] * len(item_ids), pa.int32()),
                    "completion_tokens": pa.array([0] * len(item_ids), pa.int32()),
                    "factors": pa.nulls(len(item_ids), pa.map_(pa.string(), pa.string())),
                }
            ),
            ("link", "links.parquet"): pa.table(
                {
                    "item_id": item_ids,
                    "wiki_page_id": pa.array([1000 + i if on else None for i, on in zip(items, linked, strict=True)]),
                    "wiki_title": pa.array([f"Film {i}" if on else None for i, on in zip(items, linked, strict=True)]),
                    "link_score": [1.0 if on else 0.0 for on in linked],
                    "method": pa.array(["exact" if on else None for on in linked]),
                    "runner_up": pa.nulls(len(item_ids), pa.string()),
                    "reason": pa.array([None if on else "no candidate" for on in linked]),
                }
            ),
            ("swing", "item_pairs.parquet"): pairs(item_ids),
            ("swing", "user_pairs.parquet"): pairs(user_ids),
        }
        run = Run(folder, tables)
        run.write()
        return run

    return make


@contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server of our own that listens on a port of the loopback interface; ended with the block."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder) as server:
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline, f"{command[0]} does not listen on {port}"
                    assert server.poll() is None, f"{command[0]} ended with {server.returncode}"
                    time.sleep(0.02)
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """`with start_server(command, port, folder)`: any server, ready when it listens."""
    return running


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port of the loopback interface that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def start_redis(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Callable[..., Any]:
    """`with start_redis(*options, port=...) as port`: a redis-server that keeps nothing on disk."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")

    @contextmanager
    def start(*options: str, port: int | None = None) -> Iterator[int]:
        folder, chosen = tmp_path_factory.mktemp("redis"), port or free_port()
        listen = ["--port", str(chosen)] if "--tls-port" not in options else []
        command = ["redis-server", *listen, "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *options]
        with running([option.replace("{port}", str(chosen)) for option in command], chosen, folder):
            yield chosen

    return start


@pytest.fixture(scope="session")
def redis_port(start_redis: Callable[..., Any]) -> Iterator[int]:
    """One redis-server for the whole run; a repository takes a `db` of its own, or a project name."""
    with start_redis("--databases", "10000") as port:
        yield port


OWN_VIEWS = '''"""What a team has beside the knowledge views: a view of its own, pushed to, and services."""

from datetime import timedelta
from pathlib import Path

from feast import FeatureService, FeatureView, Field, FileSource, PushSource
from feast.types import Float64, Int64

from definitions import item, item_description, item_knowledge_embedding, user_knowledge_embedding
from kellm_features.store.views import consumer_service

rows = FileSource(path=str(Path(__file__).parent / "data" / "clicks.parquet"), timestamp_field="event_timestamp")
item_clicks = FeatureView(
    name="item_clicks",
    entities=[item],
    ttl=timedelta(hours=1),
    schema=[Field(name="clicks", dtype=Int64), Field(name="rate", dtype=Float64)],
    source=PushSource(name="clicks_push", batch_source=rows),
)
ranker_on_v1 = consumer_service("ranker_on_v1", [item_knowledge_embedding[["embedding"]]], version="v1")
mixed = consumer_service("mixed", [item_knowledge_embedding, item_description[["description"]], item_clicks])
precomputed = FeatureService(name="precomputed", features=[item_knowledge_embedding], precompute_online=True)
'''


@pytest.fixture(scope="session")
def make_repo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_repo(folder, online="type: …", id_type=…, ttl=…)` makes a repository that the template makes.

    `online` are the lines below `online_store`, None for the template's SQLite; with `ttl` a row is kept for an hour.
    The definitions are applied once per kind and copied: applying costs seconds.
    """
    from kellm_features.store.definitions import APPLIED, Applied, _hash_definitions, apply_definitions
    from kellm_features.store.scaffold import write_feature_repo

    applied: dict[tuple[str, bool], Path] = {}

    def make(folder: Path, online: str | None = None, *, id_type: Any = "int64", ttl: bool = False) -> Path:
        kind = (id_type, ttl)
        if kind not in applied:
            first = tmp_path_factory.mktemp("applied") / "feature_repo"
            write_feature_repo(first, project="films", id_type=id_type)
            (first / "own_views.py").write_text(OWN_VIEWS)
            if ttl:
                told = (first / "definitions.py").read_text()
                kept = told.replace('/ "data", ', '/ "data", ttl=__import__("datetime").timedelta(hours=1), ')
                assert kept != told
                (first / "definitions.py").write_text(kept)
            (first / "data").mkdir()
            apply_definitions(first, [], id_type)
            applied[kind] = first
        shutil.copytree(applied[kind], folder)
        path = folder / "feature_store.yaml"
        if online is not None:
            tree = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({**tree, "online_store": yaml.safe_load(online)}))
        # What was applied is what this copy defines, whatever its online store.
        record = folder / "data" / APPLIED
        told = Applied.model_validate_json(record.read_text())
        record.write_text(told.model_copy(update={"definitions": _hash_definitions(folder)}).model_dump_json())
        return folder

    return make


@dataclass
class Shop:
    """A repository on one kind of online store, and the runs that were published into it."""

    repo: Path
    kind: str
    runs: dict[str, Run]

    def vectors(self, version: str, ids: Any, entity: str = "item") -> np.ndarray:
        """(N, E) float32 as the store serves them: rounded to float16 in the packed layout."""
        known = self.runs[version].vectors(entity)
        exact = np.stack([known[key] for key in ids])
        return exact.astype(np.float16).astype(np.float32) if self.kind == "packed" else exact

    def publish(self, run: Run, version: str) -> None:
        from kellm_features.store import rollout

        self.runs[version] = run
        rollout.publish(self.repo, rollout.run_inputs(run.folder), version=version)

    def promote(self, version: str) -> None:
        """Whatever the gates say: random vectors have no neighbours in common."""
        from kellm_features.store import rollout

        rollout.promote(self.repo, version, force=True)

    def promote_under_load(self, request: Callable[[random.Random], str], *, threads: int, turns: int) -> None:
        """Ask in threads while v2 and v1 are promoted by turns, each until an answer came of it.

        Args:
            request: asks, checks the answer and returns its version; what it raises is raised here.
            threads: so many ask, each with a generator of its own.
            turns: promotes.
        """
        served: list[str] = []
        done = threading.Event()

        def work(seed: int) -> None:
            rng = random.Random(seed)
            while not done.is_set():
                served.append(request(rng))

        with ThreadPoolExecutor(threads) as pool:
            asking = [pool.submit(work, seed) for seed in range(threads)]
            try:
                for version in itertools.islice(itertools.cycle(("v2", "v1")), turns):
                    self.promote(version)
                    before, deadline = len(served), time.monotonic() + 60
                    while version not in served[before:] and not any(thread.done() for thread in asking):
                        assert time.monotonic() < deadline, f"{version} is not served"
                        time.sleep(0.01)
            finally:
                done.set()
            for thread in asking:
                thread.result()

    def store(self) -> Any:
        """A Feast client of its own, with nothing cached."""
        from feast import FeatureStore

        return FeatureStore(str(self.repo))


@pytest.fixture(scope="session")
def redis_db(redis_port: int) -> Callable[[], str]:
    """Lines of `online_store` for a Redis database that nobody else has."""
    used = iter(range(10_000))

    def lines(options: str = "") -> str:
        return (
            "type: kellm_features.store.redis.KellmRedisOnlineStore\n"
            f'connection_string: "127.0.0.1:{redis_port},db={next(used)}"\n{options}'
        )

    return lines


@pytest.fixture(scope="session")
def make_shop(
    make_repo: Callable[..., Path],
    make_run: Callable[..., Run],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[..., Shop]:
    """`make_shop(kind)`: v1 (items 1 to 50) is served, and v2 (items 2 to 51) published and not promoted."""

    def make(
        kind: str,
        *,
        key: Callable[[int], Any] = int,
        ttl: bool = False,
        versions: int = 2,
        seed_from: int = 1,
        when: datetime = T1,
        **run: Any,
    ) -> Shop:
        folder = tmp_path_factory.mktemp(kind)
        online = None
        if kind != "sqlite":
            online = request.getfixturevalue("redis_db")("layout: packed" if kind == "packed" else "")
        repo = make_repo(folder / "feature_repo", online, id_type="int64" if key is int else "string", ttl=ttl)
        shop = Shop(repo, kind, {})
        for number in range(1, versions + 1):
            moment, seed = when + (number - 1) * (T2 - T1), seed_from + number - 1
            items = range(number, 50 + number)
            made = make_run(folder / f"run{number}", f"v{number}", moment, seed, items=items, key=key, **run)
            shop.publish(made, f"v{number}")
            if number == 1:
                shop.promote("v1")
        return shop

    return make
