"""A published version, and a server over it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kellm_features.store.layout import ITEM_EMBEDDING
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import SQLITE_TYPE

from .server import (
    LIMITS,
    Server,
    Store,
    serving,
    write_repo,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    repo = tmp_path_factory.mktemp("sqlite")
    return Store(write_repo(repo, f"  type: {SQLITE_TYPE}\n  path: online.db\n"))


@pytest.fixture(scope="module")
def vectors(store: Store) -> dict[int, np.ndarray]:
    return store.publish("v1", [1, 2, 3, -(2**63), 2**63 - 1], seed=1)


@pytest.fixture(scope="module")
def server(store: Store, vectors: dict[int, np.ndarray]) -> Iterator[Server]:
    with serving({ITEM_EMBEDDING.name: EmbeddingReader.from_repo(store.repo)}, limits=LIMITS) as server:
        yield server
