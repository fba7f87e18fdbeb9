"""`swing_pairs`: options and interactions in, pairs out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from kellm_spark.swing.blocks import block_pairs
from kellm_spark.swing.csr import csr_pairs
from kellm_spark.swing.interactions import check_interactions
from kellm_spark.swing.parameters import Mode, Side, SwingOptions, swing_parameters

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

CSR_MAX_BYTES = 512 * 2**20
"""Of ids that the driver collects in mode auto, half of Spark's default limit: 33 million pairs of integers."""


@dataclass(frozen=True)
class SwingPlan:
    """The pairs, not computed yet, and what was counted while they were planned."""

    pairs: DataFrame
    mode: str
    rows: int
    """Interactions given."""
    dropped: dict[str, int]
    """Reason -> interactions left out; zeros are left out too."""
    targets: int
    """Items or users with an interaction left."""
    capped: int
    """Targets with more witnesses than the cap."""
    tasks: int
    """Of the stage that computes the scores."""


def plan_swing(
    interactions: DataFrame,
    options: SwingOptions,
    *,
    before: datetime | str | int | float | None = None,
    time_column: str | None = None,
) -> SwingPlan:
    """Check the interactions and plan the pairs; see `swing_pairs`."""
    checked = check_interactions(interactions, before, time_column)
    mode = options.mode
    if mode == "auto":
        mode = "csr" if checked.id_bytes <= CSR_MAX_BYTES else "block"
    spread = (csr_pairs if mode == "csr" else block_pairs)(checked, options)
    dropped = {"not before the cut": checked.later, **spread.counts.dropped}
    return SwingPlan(
        pairs=spread.pairs,
        mode=mode,
        rows=checked.rows,
        dropped={reason: n for reason, n in dropped.items() if n},
        targets=spread.counts.targets,
        capped=spread.counts.capped,
        tasks=spread.tasks,
    )


def swing_pairs(
    interactions: DataFrame,
    *,
    side: Side,
    preset: str = "pai-rec",
    alpha: float | None = None,
    alpha1: float | None = None,
    beta: float | None = None,
    top_k: int = 100,
    max_witnesses: int | None = None,
    min_user_items: int = 1,
    max_user_items: int | None = None,
    max_item_users: int | None = None,
    before: datetime | str | int | float | None = None,
    time_column: str | None = None,
    mode: Mode = "auto",
) -> DataFrame:
    """The most similar items of every item, or users of every user.

    For items, s(i,j) = Σ over unordered pairs u < v of users who have both i and j of
    w_u·w_v / (alpha + |I_u ∩ I_v|), with w_u = (alpha1 + |I_u|)^(-beta). For users, items and users swap places.
    Below, a *target* is one that is paired (an item), and its *witnesses* are those who have it (users).

    A row counts once however often it is repeated. Every count, |I_u| and |I_u ∩ I_v| too, is taken after duplicates,
    rows at or after `before`, items over `max_item_users` and users outside their limits are gone, in this order.
    Without `before`, the rows given are the rows used: pass train interactions only.

    Scores are exact unless `max_witnesses` is set. Then a target with d > m witnesses is paired over the m with the
    smallest xxhash64(seed, target, witness), the same however rows are spread and tasks retried, against their whole
    rows; scores are multiplied by d(d-1)/m(m-1), which makes them unbiased, and no longer symmetric.

    It uses the DataFrame API alone, so it runs under Spark Connect too. Input is checked, and in mode csr collected,
    when this is called; scores are computed when the result is.

    Args:
        interactions: columns user_id and item_id (integers or strings, no nulls), and a timestamp for `before`;
            others are ignored.
        side: whether items or users are paired.
        preset: a row of `PRESETS`; `alpha`, `alpha1` and `beta` override its values.
        alpha: alpha >= 0 of the denominator.
        alpha1: alpha1 >= 0 of the weights.
        beta: exponent of the weights; 0 weighs all alike.
        top_k: neighbours kept of each target.
        max_witnesses: most witnesses paired for one target; None pairs all, up to `MAX_EXACT_WITNESSES`.
        min_user_items: users with fewer distinct items are left out.
        max_user_items: users with more distinct items are left out; None keeps all.
        max_item_users: items with more distinct users are left out; None keeps all.
        before: leave out rows at or after this moment (ISO 8601, UTC unless it names a zone; a number: epoch seconds).
        time_column: a timestamp, a date or epoch seconds, for `before`; None: event_timestamp, else timestamp.
        mode: "csr" holds the graph once on the driver and once on each host; "block" shuffles it; "auto" takes csr
            while the ids fit in `CSR_MAX_BYTES`. Both give the same pairs.

    Returns:
        `schemas.PAIRS`: anchor_id, neighbor_id (ids as given, integers as int64), score (float64 > 0, 12 significant
        digits), common (int32, witnesses in common among those paired, >= 2), rank (int32; 1 is best; equal scores
        by neighbor_id). In no particular order.

    Raises:
        SchemaError: a column is missing or has another type.
        DataError: an id or a needed timestamp is null, or nothing is left after the filters.
        ConfigError: a parameter is out of range, or a target has too many witnesses to be exact.
    """
    options = SwingOptions(
        side=side,
        parameters=swing_parameters(preset, alpha, alpha1, beta),
        top_k=top_k,
        max_witnesses=max_witnesses,
        min_user_items=min_user_items,
        max_user_items=max_user_items,
        max_item_users=max_item_users,
        mode=mode,
    )
    return plan_swing(interactions, options, before=before, time_column=time_column).pairs
