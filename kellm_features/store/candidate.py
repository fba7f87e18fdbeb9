"""One view of a version to be promoted, beside the same view of the active version: what the gates measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kellm_features.store.layout import ViewSpec
from kellm_features.store.scan import Dtype, Numbering, Scan, number_ids, read_keys, scan

CORPUS = 20_000
"""Common ids among which neighbours are sought."""

Codes = NDArray[np.int64]
"""Ids as places in `Numbering.ids`."""


@dataclass(frozen=True)
class ViewCheck:
    """An embedding view of a version, and where the active version's rows of it lie."""

    spec: ViewSpec
    candidate: Path | str
    """Its partition: a Parquet file or a folder of them, a path or a URI."""
    active: Path | str | None = None
    """The active version's; None where there is none."""
    dtype: Dtype = "float32"
    """What the online layout keeps of a component: float16 in the packed one. Vectors are rounded to it before
    anything is measured, so that the gates see what is served."""


@dataclass(frozen=True)
class Candidate:
    """What was read. R is the candidate's rows, U the ids of both versions, n the sampled common ids."""

    view: str
    dtype: Dtype
    alone: str
    """Why there is nothing to compare with; empty where there is."""
    ids: Numbering
    codes: Codes
    """(R,) the rows' ids."""
    served: NDArray[np.bool_]
    """(R,) false on the rows that withdraw an id."""
    has: NDArray[np.bool_]
    """(U,) ids that the candidate serves."""
    had: NDArray[np.bool_]
    """(U,) ids that the active version serves."""
    vectors: Scan
    previous: Scan | None
    corpus: Codes
    """(n,) common ids in random order, the same of both versions."""
    corpus_vectors: NDArray[np.float32]
    """(n, E) the candidate's; NaN where it has no finite one."""
    corpus_before: NDArray[np.float32]
    """(n, E') the active version's."""
    online: Codes
    """Ids to be read back online."""
    online_vectors: NDArray[np.float32]
    """What should come back; NaN where the partition has no finite vector."""
    gone: Codes
    """Ids that should not be found online: withdrawn, or in the active version alone."""

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(R,) rows whose vector is finite and as long as most."""
        return ~np.isnan(self.vectors.norms)


def read_candidate(check: ViewCheck, sample: int, *, against: str | None, seed: int) -> Candidate:
    """Read a view's ids and vectors, and those of the active version where there is one.

    Args:
        check: the view.
        sample: ids to be read back online, and as many that should not be found.
        against: the active version's name, for messages.
        seed: of the samples, which depend on nothing else but the sets of ids.

    Raises:
        StoreError: a partition is missing, unreadable or not of this view.
    """
    paths = [check.candidate] if check.active is None else [check.candidate, check.active]
    columns = [read_keys(path, check.spec) for path in paths]
    ids = number_ids([keys for keys, _ in columns], paths)
    rows, deleted = ids.codes[0], columns[0][1]
    has = ids.mask(rows[~deleted])
    had = ids.mask(ids.codes[1][~columns[1][1]]) if check.active is not None else np.zeros_like(has)
    common = has & had
    rng = np.random.default_rng(seed)
    corpus = _draw(rng, common, CORPUS)
    online = _draw(rng, has, sample)
    gone = _draw(rng, (ids.mask(rows[deleted]) | had) & ~has, sample)

    previous = None
    averaged = np.zeros_like(has)
    if check.active is not None:
        codes, dead = ids.codes[1], columns[1][1]
        previous = scan(
            check.active, check.spec, averaged=common[codes] & ~dead, places=_places(corpus, codes, dead, len(has))
        )
        averaged = common & ids.mask(codes[~np.isnan(previous.norms)])  # one set of ids for both means
    wanted = np.union1d(corpus, online)
    vectors = scan(
        check.candidate,
        check.spec,
        averaged=averaged[rows] & ~deleted,
        places=_places(wanted, rows, deleted, len(has)),
        dtype=check.dtype,
    )
    return Candidate(
        view=check.spec.name,
        dtype=check.dtype,
        alone=_alone(check, against, had),
        ids=ids,
        codes=rows,
        served=~deleted,
        has=has,
        had=had,
        vectors=vectors,
        previous=previous,
        corpus=corpus,
        corpus_vectors=vectors.picked[np.searchsorted(wanted, corpus)],
        corpus_before=previous.picked if previous is not None else np.zeros((0, 0), dtype=np.float32),
        online=online,
        online_vectors=vectors.picked[np.searchsorted(wanted, online)],
        gone=gone,
    )


def _draw(rng: np.random.Generator, among: NDArray[np.bool_], most: int) -> Codes:
    """Some of the ids at random, in random order."""
    codes = np.flatnonzero(among)
    return rng.choice(codes, min(most, len(codes)), replace=False)


def _places(wanted: Codes, rows: Codes, deleted: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    """Per row its place among the wanted ids, -1 where it is none of them."""
    place = np.full(size, -1, dtype=np.int64)
    place[wanted] = np.arange(len(wanted))
    return np.where(deleted, -1, place[rows])


def _alone(check: ViewCheck, against: str | None, had: NDArray[np.bool_]) -> str:
    if check.active is None:
        return "no version is active" if against is None else f"{against} has no {check.spec.name}"
    return "" if had.any() else f"{against or 'the active version'} serves no rows of this view"
