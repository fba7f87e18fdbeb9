"""Disambiguation pages in any language: those that call a template which holds `__DISAMBIG__`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kellm_features.schemas import PAGES
from kellm_spark.dump.rows import TEMPLATE_NAMESPACE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def disambiguation_templates(parsed: DataFrame) -> list[str]:
    """The templates that hold `__DISAMBIG__`, and redirects to them: names as articles call them, lower case, sorted.

    Args:
        parsed: `rows.PARSED`. A wiki has a few dozens of such templates.
    """
    from pyspark.sql import functions as sf

    templates = parsed.where(sf.col("namespace") == TEMPLATE_NAMESPACE)
    holding = [row[0] for row in templates.where("is_disambiguation").select("wiki_title").collect()]
    redirects = templates.where(sf.col("redirect_to").isin(holding)).select("wiki_title").collect() if holding else []
    # "Template:Wikipedia:X" exists: the namespace ends at the first colon.
    return sorted({title.partition(":")[2].strip().lower() for title in [*holding, *(row[0] for row in redirects)]})


def resolve_pages(parsed: DataFrame) -> DataFrame:
    """`rows.PARSED` to `schemas.PAGES`: articles and redirects, disambiguation pages marked. It reads the input twice.

    Skipped pages are left out: `job.tally` counts them.
    """
    from pyspark.sql import functions as sf

    articles = articles_of(parsed)
    templates = disambiguation_templates(parsed)
    if templates:
        calls = sf.arrays_overlap("templates", sf.array(*map(sf.lit, templates)))
        articles = articles.withColumn("is_disambiguation", sf.col("is_disambiguation") | calls)
    return articles.select(*PAGES.names)


def articles_of(parsed: DataFrame) -> DataFrame:
    """The articles and redirects among `rows.PARSED`."""
    return parsed.where("namespace = 0 and skipped is null")
