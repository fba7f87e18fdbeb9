"""Links to Wikipedia: how much of the catalogue they cover, and why the rest has none."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from kellm_features.report.charts import Bar, bars
from kellm_features.report.view import RunView

EXAMPLES = 3


@dataclass(frozen=True)
class Links:
    """Coverage of the links, in items: one item may have several pages."""

    items: int
    linked: int
    interaction_share: float
    """Share of train interactions that are with linked items."""
    methods: tuple[Bar, ...]
    reasons: tuple[Bar, ...]


def coverage(view: RunView) -> Links:
    """Coverage by method, and abstentions by reason."""
    rows = view.links.to_pylist()
    items = {row["item_id"] for row in rows}
    linked = [row for row in rows if row["wiki_page_id"] is not None]
    linked_ids = {row["item_id"] for row in linked}
    all_interactions = sum(view.interactions.values())
    covered = sum(count for key, count in view.interactions.items() if key in linked_ids)
    abstained: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        if row["wiki_page_id"] is None:
            abstained[row["reason"] or "no reason given"].append(row["item_id"])
    methods = Counter(method for _, method in {(row["item_id"], row["method"] or "no method given") for row in linked})
    return Links(
        len(items),
        len(linked_ids),
        covered / (all_interactions or 1),
        tuple(bars([(method, count, "") for method, count in methods.items()], len(items))),
        tuple(bars([(why, len(keys), _examples(view, keys)) for why, keys in abstained.items()], len(items))),
    )


def _examples(view: RunView, keys: list[Any]) -> str:
    first = sorted(keys, key=lambda key: -view.interactions.get(key, 0))[:EXAMPLES]
    return ", ".join(view.label(key) for key in first)
