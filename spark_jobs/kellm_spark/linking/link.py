"""One row per item: the page that it is about, or the reason why none was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kellm_features.schemas import PAGES
from kellm_spark.linking.decision import decisions
from kellm_spark.linking.edit_similarity import edit_similarity_links
from kellm_spark.linking.hooks import with_candidates
from kellm_spark.linking.options import LinkOptions
from kellm_spark.linking.overrides import override_links
from kellm_spark.mentions import link_mentions
from kellm_spark.tables import check_columns, check_items, links_ddl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def link_items(
    items: DataFrame, pages: DataFrame, options: LinkOptions | None = None, overrides: DataFrame | None = None
) -> DataFrame:
    """Link items to pages.

    By `names`, an item's names (articles moved to the front, also-known-as titles) are folded to keys and joined with
    those of page titles without disambiguator, display titles, and redirects, which count for the page they lead to.
    Where no page fits, the first of these may, if it is alone and the year is right: a name that only one side gives a
    subtitle, a series or an owner; a name cut short; a misspelt one (key of 6 characters or more, equal numerals); and
    a long name whose year is a few off. Pages of another kind and disambiguation pages are never linked; two pages
    that fit equally well are "ambiguous". `docs/linking.md` has the rules with examples.

    The items of `articles` are linked to all pages that their titles mention (`mentions.link_mentions`).

    Args:
        items: columns item_id, title, year (int or null); others are ignored.
        pages: `schemas.PAGES`.
        options: domain, method and tolerances; None: the defaults.
        overrides: item_id and page (both string), see `kellm_features.overrides`; they win over all else.

    Returns:
        `schemas.LINKS` in no particular order, one row per item (of articles: per link). Linked: page, link_score in
        (0, 1], method (exact, normalized, redirect, aka, subtitle, possessive, prefix, fuzzy, year; edit-similarity;
        mention, mention-redirect; override), runner_up = the next best page, reason null. Not linked: page and method
        null, link_score 0, runner_up = the page that came nearest, and reason ("no candidate", "disambiguation only",
        "wrong kind", "year mismatch", "unconfirmed", "ambiguous"; of articles those of `link_mentions`; "override").

    Raises:
        SchemaError: a column is missing.
        DataError: an item has no id or title, an id is repeated, or an override names a page that is not there.
    """
    from pyspark.sql import functions as sf

    options = options or LinkOptions()
    check_columns(pages, "pages", [name for name in PAGES.names if name not in ("sections", "categories")])
    check_items(items, ("item_id", "title", "year"))
    told = sf.regexp_extract("title", r"\((1[89]\d\d|20\d\d)\)\s*$", 1)  # a year that the catalogue left in the title
    year = sf.coalesce(sf.col("year"), sf.when(told != "", told)).cast("int")
    items = items.select("item_id", "title", year.alias("year"))
    decided = None
    if overrides is not None:
        decided = override_links(items, pages, overrides, one_page=options.domain != "articles")
        items = items.join(decided.select("item_id"), "item_id", "left_anti")
    links = _links(items, pages, options)
    return links if decided is None else links.unionByName(decided)


def _links(items: DataFrame, pages: DataFrame, options: LinkOptions) -> DataFrame:
    if options.domain == "articles":
        return link_mentions(items, pages, max_links=options.max_links)
    if options.method == "edit-similarity":
        return edit_similarity_links(items, pages, options.kinds)
    return with_candidates(items, pages, options).mapInArrow(
        decisions(options),
        links_ddl(items),
    )
