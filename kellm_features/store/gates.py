"""The single gates: each turns what was read of a view into one number beside its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from kellm_features.errors import StoreError
from kellm_features.settings import VerifySettings
from kellm_features.store.candidate import Candidate, Codes
from kellm_features.store.verification import Gate

Fetch = Callable[[str, list[int | str]], tuple[NDArray[np.float32], NDArray[np.bool_]]]
"""`fetch(view, ids)`: (N, E) float32 and (N,) found, read from the candidate's rows in the online store."""

SHOWN_IDS = 10
QUERIES = 500
"""Ids whose neighbours are compared: the mean overlap has a standard error of at most 0.02, and with 20,000 ids to
search among and 384 components it costs 15 GFLOP."""
IDS_PER_NEIGHBOR = 10
"""In a small view k is lowered to a tenth of the ids, so that unrelated versions overlap by a tenth at most."""
TIE = 1e-5
"""Cosines this close are equal: ten times what float32 loses over 384 components. Duplicates tie exactly, and which
of them comes first says nothing."""
NO_DIRECTION = 1e-3
"""A mean this short beside the vectors is what is left of a centring, and so is its direction."""
QUERY_CHUNK = 128
FETCH_ROWS = 1000


def row_gates(view: Candidate, settings: VerifySettings) -> Iterator[Gate]:
    """Rows, repeated ids, coverage: ids alone."""
    withdrawn = int((~view.served).sum())
    rows = int(view.has.sum())
    yield _gate(view, "rows", rows, f"{_ids(rows)} served, {withdrawn:,} withdrawn", minimum=1)
    repeated = np.flatnonzero(np.bincount(view.codes, minlength=len(view.has)) > 1)
    yield _gate(
        view, "repeated_ids", len(repeated), f"{_ids(len(repeated))} in more than one row", maximum=0, codes=repeated
    )
    if view.alone:
        yield _skipped(view, "coverage", view.alone)
        return
    before, lost = int(view.had.sum()), np.flatnonzero(view.had & ~view.has)
    detail = f"{len(lost):,} of the active version's {_ids(before)} missing"
    yield _gate(view, "coverage", (before - len(lost)) / before, detail, minimum=settings.min_coverage, codes=lost)


def vector_gates(view: Candidate, settings: VerifySettings) -> Iterator[Gate]:
    """Non-finite and odd vectors, norms, duplicates, mean cosine: the candidate by itself."""
    vectors, usable = view.vectors, view.usable
    lengths = vectors.lengths
    broken = view.served & ((lengths < 0) | ((lengths == vectors.dim) & (lengths > 0) & ~usable))
    rounded = " in float16" if view.dtype == "float16" else ""
    yield _gate(
        view,
        "non_finite",
        int(broken.sum()),
        f"{int(broken.sum()):,} of {int(view.served.sum()):,} vectors null or not finite{rounded}",
        maximum=0,
        codes=view.codes[broken],
    )
    rival = view.previous.dim if view.previous is not None else 0
    wanted = rival or vectors.dim
    odd = (lengths >= 0) & ((lengths != wanted) | (lengths == 0))
    detail = f"length {wanted:,}" + (", as in the active version" if rival else "")
    if odd.any():
        seen = ", ".join(f"{length:,}" for length in np.unique(lengths[odd])[:3])
        detail = f"{int(odd.sum()):,} of {int(view.served.sum()):,} vectors of length {seen}, not {wanted:,} as " + (
            "in the active version" if rival else "most"
        )
    yield _gate(view, "other_dimension", int(odd.sum()), detail, maximum=0, codes=view.codes[odd])

    norms = vectors.norms[usable]
    if not len(norms):
        for name in ("norms", "duplicates", "mean_cosine"):
            yield _skipped(view, name, "no finite vector")
        return
    low, high = float(norms.min()), float(norms.max())
    outside = (norms < settings.min_norm) | (norms > settings.max_norm)
    detail = f"from {low:.4g} to {high:.4g}"
    if outside.any():
        detail += f"; {int(outside.sum()):,} outside, {int((norms[outside] == 0).sum()):,} of them zero"
    yield _gate(
        view,
        "norms",
        high if low >= settings.min_norm and high > settings.max_norm else low,
        detail,
        minimum=settings.min_norm,
        maximum=settings.max_norm,
        codes=view.codes[usable][outside],
    )
    _, group, sizes = np.unique(vectors.hashes[usable], return_inverse=True, return_counts=True)
    largest = int(sizes.max())
    yield _gate(
        view,
        "duplicates",
        (len(norms) - len(sizes)) / len(norms),
        f"{len(sizes):,} of {len(norms):,} vectors differ, at most {largest:,} are equal",
        maximum=settings.max_duplicates,
        codes=view.codes[usable][group == sizes.argmax()],
    )
    pointing = int((norms > 0).sum())
    if pointing < 2:
        yield _skipped(view, "mean_cosine", "fewer than two vectors that are not zero")
        return
    # |Σu|² = n + Σ of the n(n-1) cosines of different unit vectors
    cosine = (float(vectors.unit_sum @ vectors.unit_sum) - pointing) / (pointing * (pointing - 1))
    yield _gate(view, "mean_cosine", cosine, f"over {pointing:,} vectors", maximum=settings.max_mean_cosine)


def comparison_gates(view: Candidate, settings: VerifySettings) -> Iterator[Gate]:
    """Centroid drift and neighbour overlap with the active version."""
    if view.alone:
        yield _skipped(view, "centroid_drift", view.alone)
        yield _skipped(view, "neighbor_overlap", view.alone)
        return
    yield _drift(view, settings)
    yield _overlap(view, settings)


def online_gates(view: Candidate, fetch: Fetch) -> Iterator[Gate]:
    """What the online store returns for sampled ids, beside the partition.

    Raises:
        StoreError: the answer's shapes are not those of the question.
    """
    if len(view.online):
        values, found = _fetch(view, fetch, view.online)
        missing = view.online[~found]
        detail = f"{len(missing):,} of {len(view.online):,} sampled ids not found"
        yield _gate(view, "online_missing", len(missing), detail, maximum=0, codes=missing)
        expected = view.online_vectors
        sound = found & np.isfinite(expected).all(axis=1) & (expected.shape[1] > 0)
        if values.shape[1] == expected.shape[1]:
            differ = (values.view(np.uint32) != expected.view(np.uint32)).any(axis=1) & sound
            detail = f"{int(differ.sum()):,} of {int(sound.sum()):,} vectors differ from the partition's"
        else:
            differ = sound
            detail = f"vectors have length {values.shape[1]:,} online and {expected.shape[1]:,} in the partition"
        yield _gate(view, "online_unequal", int(differ.sum()), detail, maximum=0, codes=view.online[differ])
    else:
        yield _skipped(view, "online_missing", "the version serves no ids")
        yield _skipped(view, "online_unequal", "the version serves no ids")
    if len(view.gone):
        _, found = _fetch(view, fetch, view.gone)
        detail = f"{int(found.sum()):,} of {len(view.gone):,} sampled ids found that the version lacks"
        yield _gate(view, "online_withdrawn", int(found.sum()), detail, maximum=0, codes=view.gone[found])
    else:
        yield _skipped(view, "online_withdrawn", "no id was withdrawn")


def _drift(view: Candidate, settings: VerifySettings) -> Gate:
    name, now, before = "centroid_drift", view.vectors, view.previous
    assert before is not None
    if now.dim != before.dim:
        return _skipped(view, name, f"length {now.dim:,} now, {before.dim:,} in the active version")
    if not now.averaged or not before.averaged:
        return _skipped(view, name, "no common id has a finite vector in both versions")
    if any(np.linalg.norm(scan.mean) <= NO_DIRECTION * np.nanmean(scan.norms) for scan in (now, before)):
        return _skipped(view, name, "the vectors are centred: their mean has no direction")
    cosine = float(now.mean @ before.mean / (np.linalg.norm(now.mean) * np.linalg.norm(before.mean)))
    drift = max(0.0, 1 - cosine)
    detail = f"over {now.averaged:,} common ids"
    if drift > settings.max_centroid_drift:
        detail += "; what learned on the active vectors cannot read these: retrain it, or the adapter from its seed"
    return _gate(view, name, drift, detail, maximum=settings.max_centroid_drift)


def _overlap(view: Candidate, settings: VerifySettings) -> Gate:
    """Rotation and length of the vectors do not matter, so that other dimensions can be compared as well."""
    name = "neighbor_overlap"
    now, before = _unit(view.corpus_vectors), _unit(view.corpus_before)
    both = np.isfinite(now).all(axis=1) & np.isfinite(before).all(axis=1)
    codes = view.corpus[both]
    if not both.all():
        now, before = now[both], before[both]
    size = len(codes)
    if size < 3 or not now.shape[1] or not before.shape[1]:
        return _skipped(view, name, "fewer than three common ids have a direction in both versions")
    k = max(1, min(settings.neighbors, (size - 1) // IDS_PER_NEIGHBOR))
    shares = neighbor_shares(now, before, min(QUERIES, size), k)
    worst = codes[np.lexsort((codes[: len(shares)], shares))[:SHOWN_IDS]]
    detail = f"k = {k}, {len(shares):,} ids among {size:,}; chance {k / (size - 1):.2g}"
    mean = float(shares.mean())
    return _gate(view, name, mean, detail, minimum=settings.min_neighbor_overlap, codes=worst)


def neighbor_shares(now: NDArray[np.float32], before: NDArray[np.float32], queries: int, k: int) -> NDArray[np.float64]:
    """For each of the first rows, the share of its k nearest now that were among its k nearest before.

    A row that was as near as the k-th nearest counts among them (see `TIE`).

    Args:
        now: (n, E) unit vectors.
        before: (n, E') unit vectors of the same ids.
        queries: rows to take, Q.
        k: neighbours, below n.

    Returns:
        (Q,) float64 in [0, 1].
    """
    shares = np.empty(queries)
    for start in range(0, queries, QUERY_CHUNK):
        rows = np.arange(start, min(start + QUERY_CHUNK, queries))
        cosines = now[rows] @ now.T
        earlier = before[rows] @ before.T
        cosines[np.arange(len(rows)), rows] = earlier[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        bound = -np.partition(-earlier, k - 1, axis=1)[:, k - 1 : k] - TIE
        shares[rows] = (np.take_along_axis(earlier, nearest, axis=1) >= bound).mean(axis=1)
    return shares


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their norms, taken in float64; NaN where the norm is 0."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    norms[norms == 0] = np.nan
    unit = np.empty_like(vectors)
    np.divide(vectors, norms[:, None], out=unit, casting="same_kind")
    return unit


def _fetch(view: Candidate, fetch: Fetch, codes: Codes) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    values, found = [], []
    for start in range(0, len(codes), FETCH_ROWS):
        keys = view.ids.keys(codes[start : start + FETCH_ROWS])
        rows, present = fetch(view.view, keys)
        if rows.ndim != 2 or rows.dtype != np.float32 or len(rows) != len(keys) or present.shape != (len(keys),):
            raise StoreError(
                f"{view.view}: asked for {len(keys)} ids, the online reader returned {rows.dtype} {rows.shape} and "
                f"found {present.shape}; accepted are float32 ({len(keys)}, E) and ({len(keys)},)"
            )
        values.append(rows)
        found.append(present.astype(np.bool_))
    return np.ascontiguousarray(np.concatenate(values)), np.concatenate(found)


def _gate(
    view: Candidate,
    name: str,
    measured: float,
    detail: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    codes: Codes | None = None,
) -> Gate:
    passed = (minimum is None or measured >= minimum) and (maximum is None or measured <= maximum)
    shown = () if passed or codes is None else view.ids.keys(np.unique(codes)[:SHOWN_IDS])
    return Gate(
        name=name,
        view=view.view,
        passed=passed,
        measured=measured,
        minimum=minimum,
        maximum=maximum,
        detail=detail,
        ids=tuple(map(str, shown)),
    )


def _skipped(view: Candidate, name: str, why: str) -> Gate:
    return Gate(name=name, view=view.view, passed=True, skipped=True, detail=why)


def _ids(count: int) -> str:
    return "1 id" if count == 1 else f"{count:,} ids"
