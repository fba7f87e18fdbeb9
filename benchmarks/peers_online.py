"""What bench_online.py measures, each call a process of its own: filling an online store, and reading from it.

python benchmarks/peers_online.py artefact|feast|kellm|read|float16 JSON

JSON holds the arguments of the function of that name; the answer is one JSON object on the last line of stdout.
Imports stand in the functions: a process pays for what it uses.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Answer = dict[str, Any]
Vectors = NDArray[np.float32]
Request = Callable[[NDArray[np.int64]], Vectors | Awaitable[Vectors]]
VIEW = "item_knowledge_embedding"
WARM_UP = 20
BLOCK = 20_000
"""Rows of vectors made at a time: all impls see the same ones, whatever the number of items."""


def vectors_of(start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Unit vectors of the items start..stop-1, stop - start <= BLOCK and start a multiple of it."""
    rows = np.random.default_rng([dim, start]).standard_normal((stop - start, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def vectors_at(ids: NDArray[np.int64], dim: int, items: int) -> NDArray[np.float32]:
    """Unit vectors of any items."""
    rows = np.empty((len(ids), dim), dtype=np.float32)
    for start in range(0, items, BLOCK):
        held = (ids >= start) & (ids < start + BLOCK)
        if held.any():
            rows[held] = vectors_of(start, min(start + BLOCK, items), dim)[ids[held] - start]
    return rows


def artefact(path: str, partition: str, items: int, dim: int) -> Answer:
    """Write what the export stage would, and the same rows as the partition that stock Feast reads."""
    import datetime

    import pyarrow as pa

    from kellm_features import schemas
    from kellm_features.store.layout import ITEM_EMBEDDING
    from kellm_features.store.partitions import build_partition, read_release, write_partition

    flat = np.concatenate(
        [vectors_of(start, min(start + BLOCK, items), dim).ravel() for start in range(0, items, BLOCK)]
    )
    when = datetime.datetime(2026, 3, 1, 12, 0, 0, 250_000, datetime.UTC)
    moment = pa.repeat(pa.scalar(when, schemas.TIMESTAMP), items)
    table = pa.table(
        {
            "item_id": np.arange(items),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat), dim).cast(pa.list_(pa.float32())),
            "embedding_version": pa.repeat("v20260301T120000Z-0123abcd", items),
            "model_id": pa.repeat("adapter:0123456789abcdef", items),
            "content_hash": [f"{item * 0x9E3779B97F4A7C15 % 2**64:016x}" for item in range(items)],
            "event_timestamp": moment,
            "created_timestamp": moment,
        }
    )
    schemas.write_table(table, Path(path), schemas.ITEM_EMBEDDINGS)
    release = read_release({VIEW: Path(path)})
    rows = release.tables[VIEW]
    nothing = pa.array([], rows.schema.field("item_id").type)
    stamps = (release.event, release.created)
    write_partition(build_partition(rows, nothing, ITEM_EMBEDDING, release.id_type, stamps), Path(partition))
    return {}


def feast(repo: str) -> Answer:
    """Stock Feast: materialize the one view."""
    import datetime

    from feast import FeatureStore

    end = datetime.datetime(2026, 3, 2, tzinfo=datetime.UTC)
    FeatureStore(repo_path=repo).materialize(end - datetime.timedelta(days=7), end, feature_views=[VIEW])
    return {"peak_mib": peak_mib()}


def kellm(repo: str, artefact: str) -> Answer:
    """Ours: publish the artefact, which writes the partition and the online rows."""
    from kellm_features.store.rollout import publish

    publish(repo, {VIEW: Path(artefact)})
    return {"peak_mib": peak_mib()}


def peak_mib() -> float:
    """The largest resident memory that this process ever had, and on top of it that of its largest child."""
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would begin with the parent's memory
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def read(repos: dict[str, str], kinds: dict[str, str], items: int, dim: int, sizes: list[int], rounds: int) -> Answer:
    """CPU and wall milliseconds of each request, all impls in turns within one process.

    Args:
        repos: impl -> its repository.
        kinds: impl -> "feast" (get_online_features), "reader" (EmbeddingReader.get) or "async" (get_async).
        items: ids are drawn from 0..items-1.
        dim: of the vectors.
        sizes: ids per request.
        rounds: requests of each impl and size that are measured.
    """
    draw = np.random.default_rng(0)
    requests = {impl: REQUESTS[kinds[impl]](repo) for impl, repo in repos.items()}
    exact: dict[str, bool] = {}
    samples: dict[str, dict[int, list[tuple[float, float]]]] = {impl: {size: [] for size in sizes} for impl in repos}
    cases = [(impl, size) for impl in repos for size in sizes]

    async def rounds_of() -> None:
        for impl, request in requests.items():  # right before fast
            ids = draw.choice(items, max(sizes), replace=False)
            truth = vectors_at(ids, dim, items)
            answer = request(ids)
            got = answer if isinstance(answer, np.ndarray) else await answer
            exact[impl] = bool(np.array_equal(got, truth))
            if not np.abs(got - truth).max() <= 2**-11 * np.abs(truth).max():
                raise SystemExit(f"{impl} does not read what was written")
        for turn in range(WARM_UP + rounds):
            for impl, size in random.sample(cases, len(cases)):
                ids = draw.choice(items, size, replace=False)
                wall, cpu = time.perf_counter(), time.process_time()
                answer = requests[impl](ids)
                if not isinstance(answer, np.ndarray):
                    await answer
                spent = (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3
                if turn >= WARM_UP:
                    samples[impl][size].append(spent)

    asyncio.run(rounds_of())
    return {"samples": samples, "exact": exact}


def _feast_request(repo: str) -> Request:
    from feast import FeatureStore

    store = FeatureStore(repo_path=repo)
    (view,) = (view.name for view in store.list_feature_views() if view.name.startswith(VIEW))
    features = [f"{view}:embedding"]

    def request(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = [{"item_id": item} for item in ids.tolist()]
        answer = store.get_online_features(features=features, entity_rows=rows).to_dict()
        return np.array(answer["embedding"], dtype=np.float32)

    return request


def _reader_request(repo: str) -> Request:
    from kellm_features.store.reader import EmbeddingReader

    reader = EmbeddingReader.from_repo(repo)
    return lambda ids: reader.get(ids, on_missing="raise").values


def _async_request(repo: str) -> Request:
    from kellm_features.store.reader import EmbeddingReader

    reader = EmbeddingReader.from_repo(repo)

    async def request(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return (await reader.get_async(ids, on_missing="raise")).values

    return request


REQUESTS: dict[str, Callable[[str], Request]] = {
    "feast": _feast_request,
    "reader": _reader_request,
    "async": _async_request,
}


def float16(queries: int, items: int, dim: int) -> Answer:
    """What the packed layout costs in accuracy: vectors there and back, and the neighbours of some of them."""
    import pyarrow as pa

    from kellm_features.store import packed

    exact = vectors_of(0, items, dim)
    column = pa.ListArray.from_arrays(pa.array(np.arange(0, exact.size + 1, dim), pa.int32()), pa.array(exact.ravel()))
    coarse, _ = packed.decode_rows(packed.encode_rows(column, 0, []), dim)
    wide = [_unit(rows) for rows in (exact, coarse)]
    overlap, worst, squares = 0, 0.0, 0.0
    for start in range(0, queries, 500):
        stop = min(start + 500, queries)
        cosines = [_cosines(rows, start, stop) for rows in wide]
        lost = cosines[0] - cosines[1]
        worst = max(worst, float(np.abs(lost).max()))
        squares += float((lost**2).sum())
        for one, other in zip(*(np.argpartition(-found, 10)[:, :10] for found in cosines), strict=True):
            overlap += len(np.intersect1d(one, other))
    return {
        "max_abs_error": float(np.abs(exact - coarse).max()),
        "rms_cosine_error": (squares / (queries * items)) ** 0.5,
        "max_cosine_error": worst,
        "overlap_at_10": overlap / (10 * queries),
    }


def _unit(rows: Vectors) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _cosines(rows: NDArray[np.float64], start: int, stop: int) -> NDArray[np.float64]:
    """Cosines of some rows to all, those to themselves as 0."""
    found: NDArray[np.float64] = rows[start:stop] @ rows.T
    found[np.arange(stop - start), np.arange(start, stop)] = 0
    return found


if __name__ == "__main__":
    CALLS = {call.__name__: call for call in (artefact, feast, kellm, read, float16)}
    print(json.dumps(CALLS[sys.argv[1]](**json.loads(sys.argv[2]))))
