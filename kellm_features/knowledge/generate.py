"""Stage `generate`: one description per item and one profile per user."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from kellm_features.errors import DataError
from kellm_features.knowledge.domain import domain_path, load_domain
from kellm_features.knowledge.facts import Event, ItemFacts, Page, UserFacts, item_facts, who
from kellm_features.knowledge.modelfiles import model_files
from kellm_features.knowledge.prompts import item_prompt, user_prompt
from kellm_features.knowledge.text import cut_to_tokens
from kellm_features.knowledge.writer import Description, Writer
from kellm_features.schemas import (
    INTERACTIONS,
    ITEM_DESCRIPTIONS,
    ITEMS,
    LINKS,
    PAGES,
    USER_DESCRIPTIONS,
    USERS,
    TableSchema,
    id_type_of,
    read_table,
    write_table,
)
from kellm_features.settings import Settings
from kellm_features.stages import StageContext, StageReport

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SAMPLES = 12
EXCERPT_TOKENS = 120


def input_files(settings: Settings) -> dict[str, Path]:
    """The domain's TOML and the model's files where the settings name some by path."""
    generate = settings.generate
    files: dict[str, Path] = {}
    if domain := domain_path(generate.domain):
        files["domain"] = domain
    model = Path(generate.model).expanduser()
    if "transformers" in (generate.engine, generate.fallback_engine, generate.user_engine) and model.exists():
        files |= {"model": model} if model.is_file() else {f"model/{n}": p for n, p in model_files(model).items()}
    return files


def run(ctx: StageContext) -> StageReport:
    """Describe every item, then every user.

    The `limit` items most popular among the train rows go to `engine`, all others to `fallback_engine`, users to
    `user_engine`. Profiles see the rows that `assign_roles` calls history, and no others.

    Raises:
        ConfigError: an unknown domain, or one with a faulty template.
        EngineError: an unknown engine, or one that failed for good; what it had finished is kept for the next run.
        SchemaError: an input lacks a column.
    """
    settings = ctx.settings.generate
    domain = load_domain(settings.domain)
    items = read_table(ctx.input("ingest", "items.parquet"), ITEMS)
    users = read_table(ctx.input("ingest", "users.parquet"), USERS)
    interactions = read_table(ctx.input("ingest", "interactions.parquet"), INTERACTIONS).to_pandas()
    links = read_table(ctx.input("link", "links.parquet"), LINKS)
    pages = _read_pages(ctx.input("wiki", "pages.parquet"), links)
    writer = Writer(settings, domain, ctx.work / "completions")

    rows = items.to_pylist()
    facts = {
        row["item_id"]: item_facts(domain, row["title"], row["year"], row["genres"], pages.get(row["item_id"], ()))
        for row in rows
    }
    order = _by_popularity(facts, interactions)
    described = _describe_items(writer, facts, pages, order)
    _write(described, items, "item_id", ITEM_DESCRIPTIONS, ctx.out / "item_descriptions.parquet")

    history = _history(interactions, ctx.settings, facts, described)
    profiles = _describe_users(writer, users.to_pylist(), history)
    _write(profiles, users, "user_id", USER_DESCRIPTIONS, ctx.out / "user_descriptions.parquet")

    grounded = sum(any(page.has_text for page in of_item) for of_item in pages.values())
    notes = {
        "domain": domain.name,
        "items_by_source": dict(Counter(d.source for d in described.values())),
        "users_by_source": dict(Counter(d.source for d in profiles.values())),
        "items_grounded": grounded,
        "items_without_page": len(rows) - grounded,
        **writer.usage.notes(),
        "samples": _samples(described, facts, pages, order),
    }
    logger.info("descriptions: items %s, users %s", notes["items_by_source"], notes["users_by_source"])
    return StageReport(
        rows_in=len(rows) + users.num_rows,
        rows_out=len(described) + len(profiles),
        models=dict(sorted(writer.usage.models.items())),
        notes=notes,
    )


def _describe_items(
    writer: Writer, facts: Mapping[Any, ItemFacts], pages: Mapping[Any, Sequence[Page]], order: Sequence[Any]
) -> dict[Any, Description]:
    settings = writer.settings
    count = len(order) if settings.limit is None else settings.limit
    described: dict[Any, Description] = {}
    for name, ids in ((settings.engine, order[:count]), (settings.fallback_engine, order[count:])):
        prompts = [item_prompt(writer.domain, facts[i], pages.get(i, ()), settings.page_tokens) for i in ids]
        best = [pages[i][0] if i in pages else None for i in ids]
        texts = writer.write(name, prompts, f"describe {writer.domain.plural}", best)
        described.update(zip(ids, texts, strict=True))
    return described


def _describe_users(
    writer: Writer, users: Sequence[Mapping[str, Any]], history: Mapping[Any, Sequence[tuple[Event, str]]]
) -> dict[Any, Description]:
    domain, settings = writer.domain, writer.settings
    prompts = []
    for user in users:
        seen = history.get(user["user_id"], ())
        facts = UserFacts(
            plural=domain.plural,
            who=who(domain.consumer, user["gender"], user["age"], user["occupation"]),
            events=tuple(event for event, _ in seen),
        )
        prompts.append(user_prompt(domain, facts, [digest for _, digest in seen], settings.profile_tokens))
    texts = writer.write(settings.user_engine, prompts, "profile users", [None] * len(prompts))
    return dict(zip((user["user_id"] for user in users), texts, strict=True))


def _history(
    interactions: pd.DataFrame,
    settings: Settings,
    facts: Mapping[Any, ItemFacts],
    described: Mapping[Any, Description],
) -> dict[Any, list[tuple[Event, str]]]:
    """Per user the history's events in time order, each with the description of its item."""
    from kellm_features.data.history import assign_roles

    roles = assign_roles(
        interactions,
        split=settings.data.split,
        max_history=settings.history.max_events,
        ties=settings.history.ties,
        seed=settings.run.seed,
    )
    known = roles[roles["role"].eq("history")]
    found: dict[Any, list[tuple[Event, str]]] = {}
    columns = (known[name].tolist() for name in ("user_id", "item_id", "rating", "liked"))
    for user_id, item_id, rating, liked in zip(*columns, strict=True):
        item = facts[item_id]
        event = Event(item.title, item.year, item.genres, None if rating != rating else float(rating), bool(liked))
        found.setdefault(user_id, []).append((event, described[item_id].text))
    return found


def _by_popularity(facts: Mapping[Any, ItemFacts], interactions: pd.DataFrame) -> list[Any]:
    """All items, those with the most train rows first, equals by id."""
    counts = interactions.loc[interactions["split"].eq("train"), "item_id"].value_counts().to_dict()
    return sorted(facts, key=lambda item_id: (-counts.get(item_id, 0), item_id))


def _read_pages(path: Path, links: pa.Table) -> dict[Any, list[Page]]:
    """The linked pages alone, by item, the best first; an article may mention several."""
    linked = links.filter(pc.is_valid(links["wiki_page_id"])).sort_by(
        [("item_id", "ascending"), ("link_score", "descending"), ("wiki_page_id", "ascending")]
    )
    dataset = ds.dataset(path, format="parquet")
    PAGES.check(dataset.schema, str(path))
    wanted = dataset.to_table(
        columns=["wiki_page_id", "wiki_title", "lead", "sections"],
        filter=pc.field("wiki_page_id").isin(linked["wiki_page_id"].unique()),
    )
    pages = {
        row["wiki_page_id"]: Page(
            row["wiki_title"], row["lead"], tuple((s["name"] or "", s["text"] or "") for s in row["sections"])
        )
        for row in wanted.to_pylist()
    }
    by_item: dict[Any, list[Page]] = {}
    for link in linked.select(["item_id", "wiki_page_id"]).to_pylist():
        if link["wiki_page_id"] not in pages:
            raise DataError(
                f"{path}: page {link['wiki_page_id']}, to which item {link['item_id']!r} is linked, is not there: "
                "run  kellm run --from wiki"
            )
        by_item.setdefault(link["item_id"], []).append(pages[link["wiki_page_id"]])
    return by_item


def _write(rows: Mapping[Any, Description], table: pa.Table, key: str, schema: TableSchema, path: Path) -> None:
    ids = sorted(rows)
    columns = [
        ids,
        [rows[i].text for i in ids],
        [rows[i].source for i in ids],
        [rows[i].prompt_hash for i in ids],
        [rows[i].model_id for i in ids],
    ]
    arrow = schema.arrow(id_type_of(table.schema, key))
    write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema=arrow), path, schema)


def _samples(
    described: Mapping[Any, Description],
    facts: Mapping[Any, ItemFacts],
    pages: Mapping[Any, Sequence[Page]],
    order: Sequence[Any],
) -> list[dict[str, Any]]:
    """The most popular items, half of them of the first source, so that each source is seen."""
    by_source: dict[str, list[Any]] = {}
    for item_id in order:
        by_source.setdefault(described[item_id].source, []).append(item_id)
    share = max(1, SAMPLES // max(1, len(by_source)))
    chosen = [item_id for ids in by_source.values() for item_id in ids[:share]][:SAMPLES]
    return [
        {
            "item_id": item_id,
            "title": facts[item_id].name,
            "wiki_title": pages[item_id][0].title if item_id in pages else None,
            "source_excerpt": cut_to_tokens(pages[item_id][0].lead, EXCERPT_TOKENS) if item_id in pages else None,
            "description": described[item_id].text,
            "description_source": described[item_id].source,
        }
        for item_id in chosen
    ]
