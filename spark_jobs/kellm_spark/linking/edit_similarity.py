"""The way of KELLMRec: the page whose title has the highest edit similarity, whatever that is.

Here to be compared with: it links every item, and its cost is items x pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from kellm_features.errors import DataError
from kellm_spark.tables import links_ddl

if TYPE_CHECKING:
    import numpy as np
    from pyspark.sql import DataFrame

_ROWS = 64
"""Titles compared at a time: bounds the matrix of similarities."""


def edit_similarity_links(items: DataFrame, pages: DataFrame, kinds: tuple[str, ...]) -> DataFrame:
    """Each item with the page of its domain whose title is nearest.

    arXiv 2403.06642 v1, Equation 5, prints L_edit / max(length), which is a distance: the highest similarity needs one
    minus it. Titles are compared as they stand, disambiguators included; equals go to the smaller page id.

    Args:
        items: item_id, title (without its year).
        pages: `schemas.PAGES`; redirects and disambiguation pages are no candidates. Their titles are held by the
            driver and by each worker.
        kinds: kinds of page that are candidates.

    Returns:
        `schemas.LINKS`, every item linked; link_score is the similarity, method "edit-similarity", runner_up the next.

    Raises:
        DataError: there is no candidate page.
    """
    from pyspark.sql import functions as sf

    candidates = (
        pages.where("redirect_to is null and not is_disambiguation")
        .where(sf.get("evidence", sf.lit(0)).isin(*kinds))
        .select("wiki_page_id", "wiki_title")
        .orderBy("wiki_page_id")
        .toArrow()
    )
    if not candidates.num_rows:
        raise DataError(f"no page is a {' or '.join(kinds)}: nothing to compare titles with")
    return items.select("item_id", "title").mapInArrow(
        _nearest(candidates["wiki_page_id"].to_pylist(), candidates["wiki_title"].to_pylist()),
        links_ddl(items),
    )


def similarities(titles: list[str], others: list[str]) -> np.ndarray:
    """1 - Levenshtein(a, b) / max(length), (len(titles), len(others)) float64."""
    import numpy as np
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    return cdist(titles, others, scorer=Levenshtein.normalized_similarity, dtype=np.float64)


def _nearest(ids: list[int], titles: list[str]) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import numpy as np

        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                rows = batch.slice(start, _ROWS)
                scores = similarities(rows.column("title").to_pylist(), titles)
                order = np.argsort(-scores, axis=1, kind="stable")[:, :2]
                best = order[:, 0]
                yield pa.RecordBatch.from_pydict(
                    {
                        "item_id": rows.column("item_id"),
                        "wiki_page_id": pa.array([ids[place] for place in best], pa.int64()),
                        "wiki_title": pa.array([titles[place] for place in best], pa.string()),
                        "link_score": pa.array(scores[np.arange(len(best)), best], pa.float64()),
                        "method": pa.array(["edit-similarity"] * len(best), pa.string()),
                        "runner_up": pa.array([titles[row[1]] if len(row) > 1 else None for row in order], pa.string()),
                        "reason": pa.nulls(len(best), pa.string()),
                    }
                )

    return parse
