"""Candidates by one equi-join: items and pages hang out hooks, and meet where two are alike.

A hook is a text. `full:` carries the key of a page's whole name, `part:` that of a piece of it; an item asks for both,
with its whole name and its pieces. The cost is that of names, never of items x pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kellm_features.errors import ConfigError
from kellm_spark.evidence import defined_as, defined_year, split_title, title_kind
from kellm_spark.linking.options import LinkOptions
from kellm_spark.naming import compact, item_names, key, parts, serial_key, unowned
from kellm_spark.tables import aliases

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    Rows = Iterator[pa.RecordBatch]

MIN_FUZZY_LENGTH = 6
"""Shorter keys are one edit away from too many others ("Heat", "Beat")."""
MIN_PREFIX_WORDS = 3
"""A name cut short must have this many words left: "Everything You Always Wanted to Know About Sex"."""
LEAD_LENGTH = 400
"""Characters of a lead in which a page says by what other names it goes."""
_BLOCK_LENGTH = 4
"""A misspelt name must share this many characters with the right one, at its start or at its end."""
_MAY_BE_PART = ("full:", "part:")
"""Hooks where the one name may be a piece of the other: what the page says then counts."""
Hook = tuple[str, str, str, str]
"""How the name was got, the name, its key, the hook."""

_FOUND = pa.schema(
    [
        ("page_how", pa.string()), ("found_as", pa.string()), ("found_key", pa.string()), ("hook", pa.string()),
        ("wiki_page_id", pa.int64()), ("wiki_title", pa.string()), ("page_year", pa.int32()), ("kind", pa.string()),
        ("is_disambiguation", pa.bool_()), ("by_lead", pa.bool_()), ("lead", pa.string()),
    ]
)  # fmt: skip
_FOUND_SQL = (
    "page_how string, found_as string, found_key string, hook string, wiki_page_id bigint, wiki_title string, "
    "page_year int, kind string, is_disambiguation boolean, by_lead boolean, lead string"
)
_MATCH = (
    "how", "name", "key", "page_how", "found_as", "found_key", "wiki_page_id", "wiki_title", "page_year", "kind",
    "is_disambiguation", "by_lead", "lead", "similarity",
)  # fmt: skip


def with_candidates(items: DataFrame, pages: DataFrame, options: LinkOptions) -> DataFrame:
    """Each item with the pages that one of its names meets.

    Args:
        items: item_id, title, year.
        pages: `schemas.PAGES`.
        options: kinds of page, years and similarity that may differ.

    Returns:
        The items with `candidates`, an array of structs (null where there is none): `how` the item's name was got
        (main, aka; head, tail, rest, serial for a piece; whole for the main name asking for pieces; prefix; fuzzy) with
        name and key; `page_how` the page's (title, display, redirect; head, tail, rest, serial) with found_as and
        found_key; the page's id, title, year, first kind; whether it is a disambiguation page; `by_lead`, whether kind
        and year are its lead's word alone; the beginning of its lead where it may be asked; `similarity` in [0, 1] of
        the keys where `how` is fuzzy, else 1.
    """
    from pyspark.sql import functions as sf

    id_type = dict(items.dtypes)["item_id"]
    wanted = items.mapInArrow(
        _item_rows(options), f"item_id {id_type}, how string, name string, key string, hook string"
    )
    found = _own_pages(pages).mapInArrow(_page_rows(options), _FOUND_SQL)
    longest = sf.greatest(sf.length("key"), sf.length("found_key"))
    # Only a fuzzy match has keys that may differ; the lengths alone rule most pairs out.
    close_enough = options.min_similarity - 1e-9  # one edit in ten letters is 0.9, give or take a rounding
    near = sf.abs(sf.length("key") - sf.length("found_key")) <= (1 - close_enough) * longest
    fuzzy = sf.col("how") == "fuzzy"
    similarity = sf.when(fuzzy, 1 - sf.levenshtein("key", "found_key") / longest).otherwise(sf.lit(1.0))
    matches = (
        wanted.join(found, "hook")
        .where(~fuzzy | near)
        .withColumn("similarity", similarity)
        .where(sf.col("similarity") >= close_enough)
        .groupBy("item_id")
        .agg(sf.collect_set(sf.struct(*_MATCH)).alias("candidates"))
    )
    return items.join(matches, "item_id", "left")


def _own_pages(pages: DataFrame) -> DataFrame:
    """Pages that are no redirect, each with the titles that lead to it (`aliases`, null where there are none)."""
    from pyspark.sql import functions as sf

    own = pages.where("redirect_to is null").select(
        "wiki_page_id",
        "wiki_title",
        "display_title",
        "is_disambiguation",
        "evidence",
        "year",
        sf.substring("lead", 1, LEAD_LENGTH).alias("lead"),
    )
    return own.join(aliases(pages), "wiki_title", "left")


def linkable_titles(items: DataFrame, titles: DataFrame, *, domain: str = "movies") -> DataFrame:
    """The titles of pages that `link_items` could look at, for reading no more of a dump than these.

    What shows only inside a page is not known here: names that a page calls itself, and whether a misspelt name is
    that of a film of the right year.

    Args:
        items: item_id, title, year.
        titles: wiki_title of every page and redirect.
        domain: as of `link_items`, but for articles.

    Returns:
        wiki_title, each once, in no particular order.

    Raises:
        ConfigError: an unknown domain, or articles, whose titles mention pages anywhere in them.
    """
    options = LinkOptions(domain=domain)
    if not options.kinds:
        raise ConfigError(f"{domain} mention pages anywhere in their titles: read the dump whole, without a catalogue")
    items = items.select("item_id", "title", "year")
    id_type = dict(items.dtypes)["item_id"]
    wanted = items.mapInArrow(
        _item_rows(options), f"item_id {id_type}, how string, name string, key string, hook string"
    )

    def hooks(batches: Rows) -> Rows:
        for batch in batches:
            rows = [
                (title, hook[3])
                for title in batch.column(0).to_pylist()
                for hook in _whole_hooks("title", split_title(title)[0]) + _part_hooks(split_title(title)[0])
            ]
            yield pa.RecordBatch.from_pylist(
                [{"wiki_title": title, "hook": hook} for title, hook in rows],
                schema=pa.schema([("wiki_title", pa.string()), ("hook", pa.string())]),
            )

    found = titles.select("wiki_title").mapInArrow(hooks, "wiki_title string, hook string")
    return found.join(wanted.select("hook").distinct(), "hook", "left_semi").select("wiki_title").distinct()


def item_hooks(title: str, year: int | None, options: LinkOptions) -> Iterator[Hook]:
    """Every hook that an item hangs out."""
    for place, name in enumerate(item_names(title)):
        name_key = key(name)
        if not name_key:
            continue
        yield "aka" if place else "main", name, name_key, f"full:{compact(name_key)}"
        if place:
            continue
        yield "whole", name, name_key, f"part:{compact(name_key)}"
        for how, piece, piece_key in _pieces(name):
            yield how, piece, piece_key, f"full:{compact(piece_key)}"
        if serial := serial_key(name):
            yield "serial", name, name_key, f"serial:{serial}"
        if prefix := _prefix(name_key):
            yield "prefix", name, name_key, prefix
        if year is not None and len(name_key) >= MIN_FUZZY_LENGTH:
            for near in range(year - options.year_tolerance, year + options.year_tolerance + 1):
                for block in _blocks(name_key):
                    yield "fuzzy", name, name_key, f"{near}:{block}"


def page_hooks(page: dict[str, Any], options: LinkOptions) -> Iterator[Hook]:
    """Every hook that a page answers to.

    Args:
        page: wiki_title, display_title, aliases (redirects), evidence, year.
        options: kinds of page that count.
    """
    kind, year, _ = _subject(page)
    title = split_title(page["wiki_title"])[0]
    names = [("title", title), ("title", page["wiki_title"])]
    names += [("title", page["display_title"])] if page["display_title"] else []
    for alias in page["aliases"] or []:
        # "Forrest Gump (song)" leading to the film's page says that the song is told of there.
        if title_kind(alias) in (None, *options.kinds):
            names.append(("redirect", split_title(alias)[0]))
    for how, name in dict.fromkeys(names):
        yield from _whole_hooks(how, name)
    if kind in options.kinds and year is not None:
        for name in dict.fromkeys((title, page["display_title"] or title)):
            yield from _part_hooks(name)
            name_key = key(name)
            if len(name_key) >= MIN_FUZZY_LENGTH:
                for block in _blocks(name_key):
                    yield "title", name, name_key, f"{year}:{block}"


def _subject(page: dict[str, Any]) -> tuple[str | None, int | None, bool]:
    """Kind and year of a page, and whether its lead alone tells them: no title, infobox or category does."""
    if page["evidence"]:
        return page["evidence"][0], page["year"], False
    lead = page["lead"] or ""
    kind = defined_as(lead)
    return (kind, defined_year(lead), True) if kind else (None, page["year"], False)


def _whole_hooks(how: str, name: str) -> list[Hook]:
    name_key = key(name)
    return [(how, name, name_key, f"full:{compact(name_key)}")] if name_key else []


def _part_hooks(name: str) -> list[Hook]:
    hooks = [(how, piece, piece_key, f"part:{compact(piece_key)}") for how, piece, piece_key in _pieces(name)]
    name_key = key(name)
    if serial := serial_key(name):
        hooks.append(("serial", name, name_key, f"serial:{serial}"))
    if prefix := _prefix(name_key):
        hooks.append(("prefix", name, name_key, prefix))
    return hooks


def _pieces(name: str) -> Iterator[tuple[str, str, str]]:
    """What may stand for a name: how it was got, the piece, its key."""
    split = parts(name)
    if split:
        for how, piece in zip(("head", "tail"), split, strict=True):
            if piece_key := key(piece):
                yield how, piece, piece_key
    rest = unowned(name)
    if rest and (rest_key := key(rest)):
        yield "rest", rest, rest_key


def _prefix(name_key: str) -> str | None:
    words = name_key.split()
    return f"first:{' '.join(words[:MIN_PREFIX_WORDS])}" if len(words) >= MIN_PREFIX_WORDS else None


def _blocks(name_key: str) -> tuple[str, str]:
    letters = compact(name_key)
    return "start:" + letters[:_BLOCK_LENGTH], "end:" + letters[-_BLOCK_LENGTH:]


def _item_rows(options: LinkOptions) -> Callable[[Rows], Rows]:
    def parse(batches: Rows) -> Rows:
        for batch in batches:
            found = [
                (item["item_id"], *hook)
                for item in batch.to_pylist()
                for hook in item_hooks(item["title"], item["year"], options)
            ]
            types = [batch.schema.field("item_id").type] + [pa.string()] * 4
            names = ("item_id", "how", "name", "key", "hook")
            yield _columns(found, pa.schema(list(zip(names, types, strict=True))))

    return parse


def _page_rows(options: LinkOptions) -> Callable[[Rows], Rows]:
    def parse(batches: Rows) -> Rows:
        for batch in batches:
            found = [
                (*hook, page["wiki_page_id"], page["wiki_title"], year, kind, bool(page["is_disambiguation"]), by_lead,
                 page["lead"] if kind in options.kinds and hook[3].startswith(_MAY_BE_PART) else None)
                for page in batch.to_pylist()
                for kind, year, by_lead in [_subject(page)]
                for hook in page_hooks(page, options)
            ]  # fmt: skip
            yield _columns(found, _FOUND)

    return parse


def _columns(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
