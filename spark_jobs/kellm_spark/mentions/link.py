"""Articles to the Wikipedia pages that their titles mention, several per article: by name and prior, right or silent.

Names (page titles and redirects) are found in titles by Aho-Corasick automata, one for each block of names. A name is
in the block of its rarest word, and a title goes to the blocks of its words: no automaton holds more than its share
of the names, and none that lacks a word in the catalogue is in any. `spelling` is how a text is cut into units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kellm_features.errors import ConfigError
from kellm_features.schemas import LINKS
from kellm_spark.evidence import split_title
from kellm_spark.mentions.meaning import Hit, Name, choose, read
from kellm_spark.mentions.spelling import Spelled, first_small, has_capital, spell
from kellm_spark.tables import aliases, check_columns, check_items, links_ddl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    Rows = Iterator[pa.RecordBatch]

WORKS = frozenset({"film", "film series", "television", "book", "song", "album", "game"})
"""Kinds of page that are called by words of every day; all other kinds are entities: people, places, organizations."""

FREQUENT, MIN_FREQUENT = 0.05, 20
"""A word in more than this share of all titles, and in more than so many, is a stop word of this catalogue: a name of
such words alone tells its articles from no others ("Reuters", the platform's own name)."""
MAX_TITLE = 1000
"""Characters of a title that are read: it is a title, not a text."""
_TITLES_PER_BLOCK, _MIN_BLOCKS, _MAX_BLOCKS = 2000, 8, 2048
"""A block takes milliseconds to hand over. With 7 M names all used, 2,048 blocks hold 3,400 names each."""


def link_mentions(items: DataFrame, pages: DataFrame, *, max_links: int = 5) -> DataFrame:
    """The pages that each item's title mentions, or the reason why there is none.

    Names are page titles without disambiguator, and redirects, for the page that they lead to. They are compared
    without accents and case, at word boundaries (in scripts without blanks, anywhere). Of overlapping ones the longest
    counts, then the leftmost; but first, what spelling and prior rule out is left out.

    Spelling: where the title's capitals tell names from words, a name must have its own. A single word must be no
    common noun (the page's lead writes it small) and stand beside no other capitalised word. Where capitals tell
    nothing (headlines, first words), a single word counts for an entity only, and beside stop words only. Stop words,
    numbers and words of `FREQUENT` titles are no names.

    Prior: a name as it stands in a page's title, or a redirect's, means that page (its primary topic). Else, or where
    that is a disambiguation page, the pages called so with a disambiguator compete by (1 + redirects to the page) *
    sqrt(1 + characters of its lead), and the first is linked if it weighs 4 times the second. A name that no page has
    as it stands is ambiguous: what it first means is not among these pages.

    link_score = method * spelling * kind * prior, with
        method: 1 for a title, 0.95 for a redirect;
        spelling: 1 where capitals say that it is a name, 0.9 where they tell nothing but the name is of several words
            (or of 3 unspaced characters), 0.7 for a single word (or 2 characters, or a work of two words) there;
        kind: 1 for an entity, 0.95 for a work (film, book, song, ...), 0.85 where nothing is known, 0.5 for a common
            noun;
        prior: 1 for a primary topic, 0.9 where other pages share its name, the share of the weights where pages
            compete, 0.8 for the only page that competes.

    Args:
        items: columns item_id, title; others are ignored.
        pages: `schemas.PAGES`.
        max_links: most pages of one item.

    Returns:
        `schemas.LINKS` in no particular order. One row per item and page: method "mention" or "mention-redirect",
        runner_up = the next page that the same mention could mean, reason null. An item without any has one row: page
        and method null, link_score 0, reason "no mention", "stop words only" (names that stand there as mere words)
        or "ambiguous mention" (runner_up = the page that came nearest).

    Raises:
        SchemaError: a column is missing.
        DataError: an item has no id or title, or an id is repeated.
        ConfigError: max_links below 1.
    """
    from pyspark.sql import functions as sf

    if max_links < 1:
        raise ConfigError(f"max_links is {max_links}; accepted: 1 or more")
    count = check_items(items, ("item_id", "title"))
    check_columns(
        pages, "pages", ("wiki_page_id", "wiki_title", "redirect_to", "is_disambiguation", "evidence", "lead")
    )
    frequent = max(MIN_FREQUENT, int(FREQUENT * count))
    n_blocks = min(max(math.ceil(count / _TITLES_PER_BLOCK), _MIN_BLOCKS), _MAX_BLOCKS)
    id_type = dict(items.dtypes)["item_id"]
    items = items.select("item_id", sf.substring("title", 1, MAX_TITLE).alias("title"))

    words = items.mapInArrow(_title_tokens, f"item_id {id_type}, title string, token string")
    vocabulary = words.groupBy("token").agg(sf.count("*").alias("titles"))
    block = sf.pmod(sf.crc32(sf.col("token").cast("binary")), sf.lit(n_blocks)).alias("block")
    # No more than 1 / FREQUENT words of each title can be so frequent: a small table, and the blocks stay even.
    hubs = sf.broadcast(vocabulary.where(sf.col("titles") > frequent).select("token"))
    titles = words.join(hubs, "token", "left_anti").select(block, "item_id", "title")
    names = (
        _names(pages)
        .select(sf.struct("*").dropFields("tokens").alias("name"), sf.size("tokens").alias("tokens"),
                sf.explode("tokens").alias("token"))
        .join(vocabulary, "token")
        .groupBy("name", "tokens")
        .agg(sf.count("*").alias("known"), sf.min(sf.struct("titles", "token")).alias("rarest"))
        .where((sf.col("known") == sf.col("tokens")) & (sf.col("rarest.titles") <= frequent))
        .select("name", sf.col("rarest.token").alias("token"))
        .select(block, "name.*")
    )  # fmt: skip
    hits = names.groupBy("block").cogroup(titles.groupBy("block")).applyInArrow(_find, f"item_id {id_type}, {_HIT}")
    found = hits.groupBy("item_id").agg(sf.collect_list(sf.struct(*_HIT_NAMES)).alias("hits"))
    return items.join(found, "item_id", "left").mapInArrow(
        _decide(max_links),
        links_ddl(items),
    )


_HIT = "start int, stop int, page_id bigint, title string, score double, method string, runner_up string, reason string"
_HIT_NAMES = [column.split()[0] for column in _HIT.split(", ")]
_HIT_TYPES = dict(
    zip(_HIT_NAMES, (pa.int32(), pa.int32(), pa.int64(), pa.string(), pa.float64(), *[pa.string()] * 3), strict=True)
)


def _title_tokens(batches: Rows) -> Rows:
    for batch in batches:
        rows = [(item["item_id"], item["title"], token) for item in batch.to_pylist()
                for token in spell(item["title"], title=True).tokens]  # fmt: skip
        yield _batch(rows, {"item_id": batch.schema.field("item_id").type, "title": pa.string(), "token": pa.string()})


def _names(pages: DataFrame) -> DataFrame:
    """Every name of every page that is no redirect: the fields of `Name`, `key` and `tokens`."""

    own = pages.where("redirect_to is null").select(
        "wiki_page_id", "wiki_title", "is_disambiguation", "evidence", "lead"
    )
    return (
        own.mapInArrow(_page_facts, _types(_FACTS))
        .join(aliases(pages).withColumnRenamed("wiki_title", "title"), "title", "left")
        .mapInArrow(_page_names, _types({**_NAME, "tokens": pa.list_(pa.string())}))
    )


_FACTS = {
    "page_id": pa.int64(), "title": pa.string(), "kind": pa.string(), "common": pa.bool_(), "proper": pa.bool_(),
    "is_disambiguation": pa.bool_(), "lead_characters": pa.int64(),
}  # fmt: skip
_NAME = {
    "key": pa.string(), "spelling": pa.string(), "primary": pa.bool_(), "redirect": pa.bool_(), "page_id": pa.int64(),
    "title": pa.string(), "kind": pa.string(), "common": pa.bool_(), "proper": pa.bool_(),
    "is_disambiguation": pa.bool_(), "weight": pa.float64(),
}  # fmt: skip


def _types(columns: dict[str, pa.DataType]) -> str:
    """The columns in Spark's words."""
    said = {pa.int64(): "bigint", pa.float64(): "double", pa.bool_(): "boolean", pa.list_(pa.string()): "array<string>"}
    return ", ".join(f"`{name}` {said.get(kind, 'string')}" for name, kind in columns.items())


def _page_facts(batches: Rows) -> Rows:
    """What a page tells of its names; its lead, which is long, goes no further than here."""
    for batch in batches:
        rows = []
        for page in batch.to_pylist():
            evidence, lead = page["evidence"] or [], page["lead"] or ""
            kind = ("work" if evidence[0] in WORKS else "entity") if evidence else "unknown"
            common, proper = _written(split_title(page["wiki_title"])[0], lead)
            rows.append((page["wiki_page_id"], page["wiki_title"], kind, common, proper,
                         bool(page["is_disambiguation"]), len(lead)))  # fmt: skip
        yield _batch(rows, _FACTS)


def _written(name: str, lead: str) -> tuple[bool, bool]:
    """Whether a text writes a name small ("the heat of the sun"), and whether only with a capital inside a sentence."""
    small = name[:1].lower() + name[1:]
    if small == name:
        return False, False
    if has_capital(name[1:]):  # "The Beatles", which a sentence writes "the Beatles"
        return False, True
    if any(True for _ in _places(small, lead)):
        return True, False
    before = (lead[:at].rstrip(" \"“'‘(«") for at in _places(name, lead))
    return False, any(text and text[-1] not in ".!?:\n" for text in before)


def _places(name: str, text: str) -> Iterator[int]:
    """Where a name stands in a text, at word boundaries."""
    at = text.find(name)
    while at >= 0:
        end = at + len(name)
        if not (text[at - 1 : at].isalnum() or text[end : end + 1].isalnum()):
            yield at
        at = text.find(name, end)


def _page_names(batches: Rows) -> Rows:
    for batch in batches:
        rows = []
        for page in batch.to_pylist():
            aliases = page["aliases"] or []
            weight = (1 + len(aliases)) * math.sqrt(1 + page["lead_characters"])
            for name, spelled, primary, redirect in _spellings(page["title"], sorted(aliases), page["common"]):
                # What the lead says, it says of the title: a redirect may be another word.
                rows.append((spelled.key, name, primary, redirect, page["page_id"], page["title"], page["kind"],
                             page["common"], page["proper"] and not redirect, page["is_disambiguation"], weight,
                             spelled.tokens))  # fmt: skip
        yield _batch(rows, {**_NAME, "tokens": pa.list_(pa.string())})


def _spellings(title: str, aliases: Sequence[str], common: bool) -> Iterator[tuple[str, Spelled, bool, bool]]:
    """A page's names: as written and in units, whether as a whole title, whether a redirect's. One for each key."""
    name, disambiguator = split_title(title)
    own = spell(name)
    best: dict[str, tuple[str, Spelled, bool, bool]] = {own.key: (name, own, not disambiguator, False)}
    for alias in aliases:
        bare, disambiguator = split_title(alias)
        spelled = spell(bare)
        primary = not disambiguator
        known = best.get(spelled.key)
        if known is None or (primary and not known[2] and (known[3] or _same_case(known[1], spelled))):
            best[spelled.key] = (bare, spelled, primary, True)
        elif known[3] and primary == known[2]:
            # "Princess diana" is a help for typing; of common nouns "Global Heating" is.
            capitals = [sum(map(has_capital, one.units)) for one in (spelled, known[1])]
            if capitals[0] < capitals[1] if common else capitals[0] > capitals[1]:
                best[spelled.key] = (bare, spelled, primary, True)
    return (found for found in best.values() if found[1].is_name and found[1].tokens)


def _same_case(one: Spelled, other: Spelled) -> bool:
    """Whether two names have the same capitals; MediaWiki gives every title its first."""
    return first_small(one.units) == first_small(other.units)


def _find(names: pa.Table, titles: pa.Table) -> pa.Table:
    """The hits of one block: its names, looked for in the titles that have a word of the block."""
    import ahocorasick

    id_type = titles.schema.field("item_id").type
    rows: list[tuple[Any, ...]] = []
    if names.num_rows and titles.num_rows:
        rows_of: dict[str, list[int]] = {}
        for row, key in enumerate(names["key"].to_pylist()):
            rows_of.setdefault(key, []).append(row)
        automaton = ahocorasick.Automaton()
        for key in rows_of:
            automaton.add_word(key, key)
        automaton.make_automaton()
        known: dict[str, list[Name]] = {}  # only what is found is decoded
        # A title comes once for each of its words in this block.
        for item_id, text in dict(zip(titles["item_id"].to_pylist(), titles["title"].to_pylist(), strict=True)).items():
            title = spell(text, title=True)
            for end, key in automaton.iter(title.key):
                if key not in known:
                    known[key] = _decode(names.take(rows_of[key]))
                stop = title.ends[end + 1]
                hit = read(known[key], title, stop - len(known[key][0].spelled.keys), stop)
                rows.append((item_id, *(getattr(hit, name) for name in _HIT_NAMES)))
    return pa.Table.from_batches([_batch(rows, {"item_id": id_type, **_HIT_TYPES})])


def _decode(names: pa.Table) -> list[Name]:
    rows = names.drop_columns(["block", "key"]).to_pylist()
    return [Name(spell(row.pop("spelling")), **row) for row in rows]


def _decide(max_links: int) -> Callable[[Rows], Rows]:
    """Each item with its hits to its rows of `schemas.LINKS`."""

    def decide(batches: Rows) -> Rows:
        for batch in batches:
            rows = [
                (item["item_id"], *row)
                for item in batch.to_pylist()
                for row in choose(item["title"], [Hit(**hit) for hit in item["hits"] or []], max_links)
            ]
            types = LINKS.arrow(batch.schema.field("item_id").type)
            yield _batch(rows, dict(zip(types.names, types.types, strict=True)))

    return decide


def _batch(rows: Sequence[tuple[Any, ...]], columns: dict[str, pa.DataType]) -> pa.RecordBatch:
    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    arrays = [pa.array(column, kind) for column, kind in zip(values, columns.values(), strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))
