"""The gates that a published version passes before it is promoted.

A gate measures one number of one embedding view and holds it against one limit. Where a version is active, the
candidate is compared with it on the ids that both hold, by two numbers that fail for different reasons:

| adapter trained again, MovieLens-100K, items / users | centroid_drift | neighbor_overlap |
|---|---|---|
| same seed, a tenth of the interactions and pairs gone | 0.01 / 0.01 | 0.34 / 0.37 |
| another seed: a rotated space | 1.12 / 0.99 | 0.31 / 0.36 |
| the same vectors on the wrong ids | 0.00 / 0.00 | 0.00 / 0.01 |

`centroid_drift` asks whether it is still the same space, which a ranker needs that learned on the active version's
vectors. It sees a rotation, and nothing of what happens around an unmoved mean. `neighbor_overlap` asks whether an id
still means the same; cosines do not see a rotation. The defaults in `VerifySettings` lie between these figures.

A partition is read twice, ids first, then vectors as a stream. Memory is that of the ids, 40 bytes per row and the
sampled vectors (20,000 of each version).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from kellm_features.settings import VerifySettings
from kellm_features.store.candidate import ViewCheck, read_candidate
from kellm_features.store.gates import Fetch, comparison_gates, online_gates, row_gates, vector_gates
from kellm_features.store.verification import Gate, Verification

__all__ = ["Fetch", "Gate", "Verification", "ViewCheck", "verify_version"]


def verify_version(
    version: str,
    views: Sequence[ViewCheck],
    fetch: Fetch,
    settings: VerifySettings,
    *,
    against: str | None = None,
    seed: int = 0,
) -> Verification:
    """Measure a published version and hold it against the limits. One that fails is told, never raised.

    | gate | measured | accepted |
    |---|---|---|
    | rows | ids that the view serves | at least 1 |
    | repeated_ids | ids in more than one row, rows that withdraw included | 0 |
    | coverage | share of the active version's ids that the candidate has | `min_coverage` |
    | non_finite | vectors that are null or hold null, NaN, infinity or what float16 cannot hold | 0 |
    | other_dimension | vectors of another length than the active version's, or else than most | 0 |
    | norms | the norm furthest out, or else the smallest | `min_norm` … `max_norm` |
    | duplicates | share of vectors that repeat an earlier one bit for bit | `max_duplicates` |
    | mean_cosine | mean cosine of two different ids | `max_mean_cosine` |
    | centroid_drift | cosine distance between the mean vectors of the common ids | `max_centroid_drift` |
    | neighbor_overlap | mean share of the k nearest that were among the k nearest | `min_neighbor_overlap` |
    | online_missing | sampled ids that the online store does not find | 0 |
    | online_unequal | sampled ids whose online vector differs from the partition's in any bit | 0 |
    | online_withdrawn | sampled ids that the version does not have and the online store finds | 0 |

    Args:
        version: the candidate's name.
        views: its embedding views.
        fetch: reads the candidate's rows online, whatever version is active; called with up to 1000 ids.
        settings: limits and sample sizes.
        against: name of the active version, if any.
        seed: of all samples; the same seed and rows give the same gates.

    Raises:
        StoreError: a partition is missing, unreadable or not of its view, or `fetch` answers in wrong shapes; and what
            `fetch` raises.
    """
    gates: list[Gate] = []
    for check in views:
        view = read_candidate(check, settings.sample, against=against, seed=seed)
        gates += row_gates(view, settings)
        gates += vector_gates(view, settings)
        gates += comparison_gates(view, settings)
        gates += online_gates(view, fetch)
    return Verification(
        version=version,
        against=against,
        checked_at=datetime.now(UTC),
        seed=seed,
        settings=settings,
        gates=tuple(gates),
    )
