"""What is asked for one item or user, what its answer is held against, and the text that comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from kellm_features.knowledge.domain import Domain
from kellm_features.knowledge.engines.base import Prompt
from kellm_features.knowledge.facts import Event, ItemFacts, Page, UserFacts, item_facts, who
from kellm_features.knowledge.grounding import source_text
from kellm_features.knowledge.prompts import item_prompt, user_prompt
from kellm_features.schemas import TableSchema

Source = Literal["llm", "template", "extract"]


@dataclass(frozen=True)
class Request:
    """A prompt, and what its answer must keep to."""

    prompt: Prompt
    pages: tuple[Page, ...] = ()
    """Linked to the item, the best first: what the answer is held against and, where it is no use, replaced by."""
    by_history: bool = False
    """Written again when the user's history changed, and not when a digest in the prompt alone did."""

    def source(self) -> str:
        """The text that names, years and numbers of the answer are looked up in; empty where nothing is known."""
        facts = self.prompt.facts
        if isinstance(facts, UserFacts):
            genres = dict.fromkeys(genre for event in facts.events for genre in event.genres)
            return "\n".join([self.prompt.user, *genres]) if facts.events else ""
        return source_text(facts.name, facts.genres, self.pages) if any(page.has_text for page in self.pages) else ""


@dataclass(frozen=True)
class DeadLetter:
    """A request that failed for good."""

    prompt_hash: str
    model_id: str
    reason: str
    """One line: what was seen."""


@dataclass(frozen=True)
class Description:
    """One row of a description table, without its id, and what is left to do for it."""

    text: str
    source: Source
    prompt_hash: str
    model_id: str
    grounding: float | None = None
    prompt_tokens: int = 0
    """Of all requests that were made for the row, refused answers included."""
    completion_tokens: int = 0
    factors: Mapping[str, str] | None = None
    failed: DeadLetter | None = None
    """Its request, where that failed; the text is another engine's then."""
    waiting: bool = False
    """Whether the run's budget ended before its turn came."""


def item_request(
    domain: Domain,
    title: str,
    year: int | None,
    genres: Sequence[str],
    pages: Sequence[Page] = (),
    *,
    by_factor: bool = False,
) -> Request:
    """What is asked for one item of the catalogue.

    Args:
        domain: templates, factors and budgets.
        title: of the catalogue.
        year: of the catalogue, where known.
        genres: of the catalogue.
        pages: linked to the item, the best first; none: a closed-book prompt.
        by_factor: ask for one text per factor.
    """
    facts = item_facts(domain, title, year, genres, pages)
    return Request(item_prompt(domain, facts, pages, by_factor=by_factor), tuple(pages))


def user_request(
    domain: Domain,
    user: Mapping[str, Any],
    history: Sequence[tuple[Event, str]],
    *,
    by_factor: bool = False,
    by_history: bool = True,
) -> Request:
    """What is asked for one user.

    Args:
        domain: templates, factors and budgets.
        user: gender, age and occupation, each None where unknown.
        history: events in time order with the descriptions of their items; nothing later than the history's cut.
        by_factor: ask for one text per factor.
        by_history: write the profile again only when the events changed.
    """
    facts = UserFacts(
        plural=domain.plural,
        who=who(domain.consumer, user["gender"], user["age"], user["occupation"]),
        events=tuple(event for event, _ in history),
    )
    prompt = user_prompt(domain, facts, [digest for _, digest in history], by_factor=by_factor)
    return Request(prompt, by_history=by_history)


def descriptions_table(rows: Mapping[Any, Description], schema: TableSchema, id_type: pa.DataType) -> pa.Table:
    """Descriptions by id as a table of `ITEM_DESCRIPTIONS` or `USER_DESCRIPTIONS`, sorted by id."""
    ids = sorted(rows)
    texts = [rows[key] for key in ids]
    columns = [
        ids,
        [row.text for row in texts],
        [row.source for row in texts],
        [row.prompt_hash for row in texts],
        [row.model_id for row in texts],
        [row.grounding for row in texts],
        [row.prompt_tokens for row in texts],
        [row.completion_tokens for row in texts],
        [None if row.factors is None else list(row.factors.items()) for row in texts],
    ]
    return pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema.arrow(id_type))


def is_item(prompt: Prompt) -> bool:
    """Whether a prompt asks for an item's description."""
    return isinstance(prompt.facts, ItemFacts)
