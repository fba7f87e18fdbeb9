"""Items to Wikipedia pages: by name, year and evidence, right or silent.

Names are joined on a key, so the cost is that of one equi-join and never items x pages. Each item then looks at its
own few candidates. A page is linked only when it is of the right kind, its year fits, and no other page fits as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kellm_features.errors import ConfigError, DataError, SchemaError
from kellm_spark.evidence import split_title, title_kind
from kellm_spark.naming import exact_fold, item_names, key, leading_article, numerals, short_key

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    Rows = Iterator[pa.RecordBatch]

DOMAINS: dict[str, tuple[str, ...]] = {
    "movies": ("film", "television"),
    "books": ("book",),
    "music": ("song", "album", "band"),
    "games": ("game",),
}
"""Kinds of page that the items of a domain may link to, the natural one first."""

MIN_FUZZY_LENGTH = 6
"""Shorter keys are one edit away from too many others ("Heat", "Beat")."""
_BLOCK_LENGTH = 4
"""A misspelt name must share this many characters with the right one, at its start or at its end."""
_SURENESS = {"exact": 1.0, "normalized": 0.97, "redirect": 0.95, "aka": 0.93, "subtitle": 0.85, "fuzzy": 0.9}
_YEAR_STEP = 0.08
"""Taken off for each year between item and page."""
_NO_YEAR = 0.65
"""What a match is worth when the year of one side is unknown."""
_OTHER_KIND = 0.9
"""What the further kinds of a domain are worth: a television film among films."""
_TIE = 0.015
"""Two pages whose scores are no further apart are not told apart; less than any difference above makes."""


@dataclass(frozen=True)
class _Rules:
    kinds: tuple[str, ...]
    year_tolerance: int


@dataclass(frozen=True)
class _Candidate:
    score: float
    method: str
    page_id: int
    title: str


def link_items(
    items: DataFrame,
    pages: DataFrame,
    *,
    domain: str = "movies",
    year_tolerance: int = 1,
    min_similarity: float = 0.9,
) -> DataFrame:
    """One row per item: the page that it is about, or the reason why none was chosen.

    An item's names (articles moved to the front, also-known-as titles) are folded to keys and joined with those of
    page titles without disambiguator, display titles, and redirects, which count for the page they lead to. Where
    that gives no page, a name without its subtitle may do (same year, single candidate), and then a misspelt one (key
    of 6 characters or more, years within tolerance, equal numerals). Pages of another kind and disambiguation pages
    are never linked; two pages that fit equally well are "ambiguous".

    Args:
        items: columns item_id, title, year (int or null); others are ignored.
        pages: `schemas.PAGES`.
        domain: a key of `DOMAINS`.
        year_tolerance: years by which item and page may differ.
        min_similarity: 1 - Levenshtein/max(length) of two keys, for a misspelt name.

    Returns:
        `schemas.LINKS`, one row per item in no particular order. Linked: page, link_score in (0, 1], method (exact,
        normalized, redirect, aka, subtitle, fuzzy), runner_up = the next best page, reason null. Not linked: page and
        method null, link_score 0, runner_up = the page that came nearest, reason "no candidate", "disambiguation
        only", "wrong kind", "year mismatch" or "ambiguous".

    Raises:
        SchemaError: a column is missing.
        DataError: an item has no id or title, or an id is repeated.
        ConfigError: unknown domain, or a number out of range.
    """
    from pyspark.sql import functions as sf

    if domain not in DOMAINS:
        raise ConfigError(f"link.domain is {domain!r}; known: {', '.join(DOMAINS)}")
    if year_tolerance < 0:
        raise ConfigError(f"link.year_tolerance is {year_tolerance}; accepted: 0 or more")
    if not 0 < min_similarity <= 1:
        raise ConfigError(f"link.min_similarity is {min_similarity}; accepted: above 0, up to 1")
    _check(items, pages)
    rules = _Rules(DOMAINS[domain], year_tolerance)
    told = sf.regexp_extract("title", r"\((1[89]\d\d|20\d\d)\)\s*$", 1)  # a year that the catalogue left in the title
    year = sf.coalesce(sf.col("year"), sf.when(told != "", told)).cast("int")
    items = items.select("item_id", "title", year.alias("year"))
    id_type = dict(items.dtypes)["item_id"]
    wanted = items.mapInArrow(
        _item_names(rules), f"item_id {id_type}, how string, name string, key string, hook string"
    )
    found = _with_redirects(pages).mapInArrow(
        _page_names(rules),
        "page_how string, found_as string, found_key string, hook string, wiki_page_id bigint, wiki_title string, "
        "page_year int, kind string, is_disambiguation boolean",
    )
    longest = sf.greatest(sf.length("key"), sf.length("found_key"))
    similarity = 1 - sf.levenshtein("key", "found_key") / longest
    # Only a fuzzy match has keys that may differ; the lengths alone rule most pairs out.
    close_enough = min_similarity - 1e-9  # one edit in ten letters is 0.9, give or take a rounding
    near = (sf.abs(sf.length("key") - sf.length("found_key")) <= (1 - close_enough) * longest) & (
        similarity >= close_enough
    )
    matches = (
        wanted.join(found, "hook")
        .withColumn("similarity", sf.when(sf.col("how") == "fuzzy", similarity).otherwise(sf.lit(1.0)))
        .where((sf.col("how") != "fuzzy") | near)
        .groupBy("item_id")
        .agg(
            sf.collect_set(
                sf.struct(
                    "how", "name", "key", "page_how", "found_as", "found_key", "wiki_page_id", "wiki_title",
                    "page_year", "kind", "is_disambiguation", "similarity",
                )
            ).alias("candidates")
        )
    )  # fmt: skip
    return items.join(matches, "item_id", "left").mapInArrow(
        _decisions(rules),
        f"item_id {id_type}, wiki_page_id bigint, wiki_title string, link_score double, method string, "
        "runner_up string, reason string",
    )


def _check(items: DataFrame, pages: DataFrame) -> None:
    from pyspark.sql import functions as sf

    needed = {
        "items": (items, ("item_id", "title", "year")),
        "pages": (pages, ("wiki_page_id", "wiki_title")),
    }
    for table, (frame, columns) in needed.items():
        missing = [name for name in columns if name not in frame.columns]
        if missing:
            raise SchemaError(
                f"{table}: column {', '.join(map(repr, missing))} is missing; seen: {', '.join(frame.columns)}"
            )
    seen = items.agg(
        sf.count("*").alias("rows"),
        sf.count_distinct("item_id").alias("ids"),
        sf.count_if(sf.col("item_id").isNull()).alias("no_id"),
        sf.count_if(sf.col("title").isNull()).alias("no_title"),
    ).first()
    assert seen is not None
    if seen["no_id"] or seen["no_title"]:
        raise DataError(
            f"items: {seen['no_id']:,} rows without item_id and {seen['no_title']:,} without title, of "
            f"{seen['rows']:,}; every item needs both"
        )
    if seen["ids"] != seen["rows"]:
        raise DataError(f"items: {seen['rows']:,} rows hold {seen['ids']:,} different item_id; each may stand once")


def _with_redirects(pages: DataFrame) -> DataFrame:
    """Pages that are no redirect, each with the titles that lead to it."""
    from pyspark.sql import functions as sf

    # A redirect to a redirect is a slip that bots mend: one more step is followed, no further.
    leads = pages.where("redirect_to is not null").select(
        sf.col("wiki_title").alias("alias"),
        sf.regexp_replace(sf.split("redirect_to", "#")[0], "_", " ").alias("target"),
    )
    second = leads.select(sf.col("alias").alias("target"), sf.col("target").alias("further"))
    aliases = (
        leads.join(second, "target", "left")
        .select(sf.coalesce("further", "target").alias("wiki_title"), "alias")
        .groupBy("wiki_title")
        .agg(sf.collect_set("alias").alias("aliases"))
    )
    own = pages.where("redirect_to is null").select(
        "wiki_page_id", "wiki_title", "display_title", "is_disambiguation", "evidence", "year"
    )
    return own.join(aliases, "wiki_title", "left")


def _item_names(rules: _Rules) -> Callable[[Rows], Rows]:
    """Every hook that an item hangs out: one row for each way in which a page may match it."""

    def rows(item: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
        for place, name in enumerate(item_names(item["title"])):
            name_key = key(name)
            if not name_key:
                continue
            yield "aka" if place else "main", name, name_key, f"name:{_compact(name_key)}"
            if place:
                continue
            yield "subtitle", name, name_key, f"longer:{_compact(name_key)}"
            short = short_key(name)
            if short:
                yield "subtitle", name, short, f"shorter:{_compact(short)}"
            if item["year"] is not None and len(name_key) >= MIN_FUZZY_LENGTH:
                for year in range(item["year"] - rules.year_tolerance, item["year"] + rules.year_tolerance + 1):
                    for block in _blocks(name_key):
                        yield "fuzzy", name, name_key, f"{year}:{block}"

    def parse(batches: Rows) -> Rows:
        for batch in batches:
            found = [(item["item_id"], *row) for item in batch.to_pylist() for row in rows(item)]
            columns = list(zip(*found, strict=True)) if found else [()] * 5
            types = [batch.schema.field("item_id").type] + [pa.string()] * 4
            yield pa.RecordBatch.from_arrays(
                [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)],
                names=["item_id", "how", "name", "key", "hook"],
            )

    return parse


_PAGE_NAMES = pa.schema(
    [
        ("page_how", pa.string()), ("found_as", pa.string()), ("found_key", pa.string()), ("hook", pa.string()),
        ("wiki_page_id", pa.int64()), ("wiki_title", pa.string()), ("page_year", pa.int32()), ("kind", pa.string()),
        ("is_disambiguation", pa.bool_()),
    ]
)  # fmt: skip


def _page_names(rules: _Rules) -> Callable[[Rows], Rows]:
    """Every hook that a page answers to."""

    def rows(page: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
        kind = (page["evidence"] or [None])[0]
        names = [("title", split_title(page["wiki_title"])[0]), ("title", page["wiki_title"])]
        names += [("title", page["display_title"])] if page["display_title"] else []
        for alias in page["aliases"] or []:
            # "Forrest Gump (song)" leading to the film's page says that the song is told of there.
            if title_kind(alias) in (None, *rules.kinds):
                names.append(("redirect", split_title(alias)[0]))
        for page_how, name in dict.fromkeys(names):
            name_key = key(name)
            if not name_key:
                continue
            yield page_how, name, name_key, f"name:{_compact(name_key)}"
            if page_how != "title" or kind not in rules.kinds or page["year"] is None:
                continue
            yield page_how, name, name_key, f"shorter:{_compact(name_key)}"
            short = short_key(name)
            if short:
                yield page_how, name, short, f"longer:{_compact(short)}"
            if len(name_key) >= MIN_FUZZY_LENGTH:
                for block in _blocks(name_key):
                    yield page_how, name, name_key, f"{page['year']}:{block}"

    def parse(batches: Rows) -> Rows:
        for batch in batches:
            found = [
                (*row, page["wiki_page_id"], page["wiki_title"], page["year"], (page["evidence"] or [None])[0],
                 bool(page["is_disambiguation"]))
                for page in batch.to_pylist()
                for row in rows(page)
            ]  # fmt: skip
            columns = list(zip(*found, strict=True)) if found else [()] * len(_PAGE_NAMES)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, _PAGE_NAMES.types, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=_PAGE_NAMES)

    return parse


def _compact(name_key: str) -> str:
    """Without blanks: "Mouse Hunt" and "MouseHunt" are one name."""
    return name_key.replace(" ", "")


def _blocks(name_key: str) -> tuple[str, str]:
    letters = _compact(name_key)
    return "start:" + letters[:_BLOCK_LENGTH], "end:" + letters[-_BLOCK_LENGTH:]


def _decisions(rules: _Rules) -> Callable[[Rows], Rows]:
    """Each item with its candidates to one row of `schemas.LINKS`."""

    def parse(batches: Rows) -> Rows:
        for batch in batches:
            rows = [decide(item, rules) for item in batch.to_pylist()]
            schema = pa.schema(
                [
                    ("item_id", batch.schema.field("item_id").type), ("wiki_page_id", pa.int64()),
                    ("wiki_title", pa.string()), ("link_score", pa.float64()), ("method", pa.string()),
                    ("runner_up", pa.string()), ("reason", pa.string()),
                ]
            )  # fmt: skip
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return parse


def decide(item: dict[str, Any], rules: _Rules) -> dict[str, Any]:
    """Choose among an item's candidates, or say why not."""
    fitting: dict[str, dict[int, _Candidate]] = {"name": {}, "subtitle": {}, "fuzzy": {}}
    refused: list[tuple[int, int, str, str]] = []  # how near it came (less is nearer), page, title, reason
    for match in item["candidates"] or []:
        page_id, title = match["wiki_page_id"], match["wiki_title"]
        gap = None if None in (item["year"], match["page_year"]) else abs(item["year"] - match["page_year"])
        tier = match["how"] if match["how"] in ("subtitle", "fuzzy") else "name"
        if match["is_disambiguation"]:
            reason, distance = "disambiguation only", 20_000
        elif match["kind"] not in rules.kinds:
            reason, distance = "wrong kind", 10_000
        elif gap is not None and gap > rules.year_tolerance:
            reason, distance = "year mismatch", gap
        elif (tier == "subtitle" and gap != 0) or (
            tier == "fuzzy" and numerals(match["key"]) != numerals(match["found_key"])
        ):
            continue
        elif gap and leading_article(match["name"]) != leading_article(match["found_as"]):
            # "The Boys" of 1997 is not "Boys" of 1996: two differences are one too many.
            reason, distance = "year mismatch", gap
        else:
            method = _method(match)
            year = _NO_YEAR if gap is None else 1 - _YEAR_STEP * gap
            kind = 1.0 if match["kind"] == rules.kinds[0] else _OTHER_KIND
            score = round(_SURENESS[method] * year * kind * match["similarity"], 6)
            best = fitting[tier].get(page_id)
            if best is None or score > best.score:
                fitting[tier][page_id] = _Candidate(score, method, page_id, title)
            continue
        if tier == "name":
            refused.append((distance, page_id, title, reason))
    for candidates in fitting.values():
        ranked = sorted(candidates.values(), key=lambda c: (-c.score, c.page_id))
        if not ranked:
            continue
        best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
        if second and (best.score - second.score <= _TIE or best.method == "subtitle"):
            return _row(item, None, best.title, "ambiguous")
        return _row(item, best, second.title if second else None, None)
    if refused:
        _, _, title, reason = min(refused)
        return _row(item, None, title, reason)
    return _row(item, None, None, "no candidate")


def _method(match: dict[str, Any]) -> str:
    if match["how"] in ("subtitle", "fuzzy", "aka"):
        return str(match["how"])
    if match["page_how"] == "redirect":
        return "redirect"
    return "exact" if exact_fold(match["name"]) == exact_fold(match["found_as"]) else "normalized"


def _row(item: dict[str, Any], chosen: _Candidate | None, runner_up: str | None, reason: str | None) -> dict[str, Any]:
    return {
        "item_id": item["item_id"],
        "wiki_page_id": chosen.page_id if chosen else None,
        "wiki_title": chosen.title if chosen else None,
        "link_score": chosen.score if chosen else 0.0,
        "method": chosen.method if chosen else None,
        "runner_up": runner_up,
        "reason": reason,
    }
