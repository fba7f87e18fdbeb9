"""Prompts of items and users, within token budgets, and the hash of everything that shapes their text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from kellm_features.knowledge.domain import Domain, ItemPrompts, UserPrompts
from kellm_features.knowledge.engines.base import Engine, Prompt
from kellm_features.knowledge.factors import factor_schema
from kellm_features.knowledge.facts import Event, ItemFacts, Page, UserFacts
from kellm_features.knowledge.text import as_data, cut_to_tokens, estimate_tokens, squeeze

MIN_SECTION_TOKENS = 16
"""A section is not begun where less of the budget is left: a few words tell nothing."""


def item_prompt(
    domain: Domain,
    facts: ItemFacts,
    pages: Sequence[Page],
    page_tokens: int | None = None,
    *,
    by_factor: bool = False,
) -> Prompt:
    """The prompt of one item: grounded where a page with text is linked, closed-book otherwise (KELLMRec Table 2).

    Args:
        domain: templates and section order.
        facts: of the item.
        pages: the linked pages, the best first.
        page_tokens: budget of the text of all pages, in estimated tokens; None: the domain's.
        by_factor: ask for one text per factor.
    """
    if page_tokens is None:
        page_tokens = domain.budget.page_tokens
    factors = ", ".join(domain.item.factors)
    fields = {
        "title": _line(facts.name),
        "year": str(facts.year) if facts.year is not None else "unknown",
        "genres": _line(", ".join(facts.genres)) or "unknown",
        "factors": factors,
    }
    if any(page.has_text for page in pages):
        fields["page"] = _delimited("page", page_text(pages, domain.sections, page_tokens))
        user = domain.item.grounded
    else:
        user = domain.item.closed_book
    return _prompt(domain.item, user.format_map(fields), facts, by_factor)


def page_text(pages: Sequence[Page], sections: Sequence[str], tokens: int) -> str:
    """Page text within a budget of estimated tokens: the leads, then sections as `sections` orders them.

    The text that no longer fits is cut at a sentence; what follows it is left out. One line a lead or section, its name
    first. Of several pages the leads share the budget, what a short one leaves going to the next, and each begins with
    its page's title; then the first page's sections come before the second's.
    """
    pages = [page for page in pages if page.has_text]
    several = len(pages) > 1
    leads: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for page in pages:
        for name, text in page.ordered(sections):
            named = " - ".join(filter(None, (page.title if several else "", name)))
            (others if name else leads).append((named, text))
    lines: list[str] = []
    for place, (name, text) in enumerate(leads + others):
        left = tokens - sum(map(estimate_tokens, lines))
        if left < MIN_SECTION_TOKENS:
            break
        share = left // (len(leads) - place) if place < len(leads) else left
        lines.append(cut_to_tokens(f"{name}: {squeeze(text)}" if name else text, max(share, MIN_SECTION_TOKENS)))
    return as_data("\n".join(lines))


def user_prompt(
    domain: Domain,
    facts: UserFacts,
    descriptions: Sequence[str],
    profile_tokens: int | None = None,
    *,
    by_factor: bool = False,
) -> Prompt:
    """The prompt of one user: who it is, the history in time order, and what its items are (KELLMRec Table 2).

    Args:
        domain: templates.
        facts: demographics and history; nothing later than the history's cut may be in them.
        descriptions: of the history's items, in the same order; empty where there is none.
        profile_tokens: budget of history and descriptions together, in estimated tokens. The newest are kept: first
            as many events as fit, then as many digests. None: the domain's.
        by_factor: ask for one text per factor.
    """
    left = domain.budget.profile_tokens if profile_tokens is None else profile_tokens
    lines: list[str] = []
    for event in reversed(facts.events):
        line = as_data(f"- {squeeze(_said(event))}")
        if (left := left - estimate_tokens(line)) < 0:
            break
        lines.append(line)
    digests: list[str] = []
    for description in list(reversed(descriptions))[: len(lines)]:
        digest = as_data(cut_to_tokens(description, domain.budget.digest_tokens))
        if not digest:
            continue
        if (left := left - estimate_tokens(digest) - 1) < 0:
            break
        digests.append(f"- {digest}")
    factors = ", ".join(domain.user.factors)
    fields = {
        "demographics": _line(facts.who),
        "history": _delimited("history", "\n".join(reversed(lines))),
        "descriptions": _delimited("descriptions", "\n".join(reversed(digests))),
        "factors": factors,
    }
    return _prompt(domain.user, domain.user.prompt.format_map(fields), facts, by_factor)


def ask_again(domain: Domain, prompt: Prompt) -> Prompt:
    """The prompt whose first answer said what its source does not tell, with a closing sentence that forbids it."""
    part = domain.item if isinstance(prompt.facts, ItemFacts) else domain.user
    closing = part.again.format(factors=", ".join(part.factors))
    return dataclasses.replace(prompt, user=f"{prompt.user}\n{closing}")


def prompt_hash(engine: Engine, domain: Domain, prompt: Prompt, max_tokens: int) -> str:
    """SHA-256 of everything that shapes the text: template version, model, revision, sampling, limit, and the prompt
    in the form that the engine reads (rendered text and schema for a language model, facts for templates)."""
    read: object = dataclasses.asdict(prompt.facts)
    if engine.source == "llm":
        read = [prompt.system, prompt.user, prompt.schema]
    return _hash(engine, domain, max_tokens, read)


def history_hash(engine: Engine, domain: Domain, prompt: Prompt, max_tokens: int, *, again: bool) -> str:
    """SHA-256 of what `prompt_hash` covers, of a user's prompt, but for the digests of the items in the history.

    `again`: of a prompt by `ask_again`.
    """
    read = [
        prompt.system,
        domain.user.prompt,
        domain.budget.model_dump(),
        dataclasses.asdict(prompt.facts),
        prompt.schema,
        domain.user.again if again else "",
    ]
    return _hash(engine, domain, max_tokens, read)


def _hash(engine: Engine, domain: Domain, max_tokens: int, read: object) -> str:
    parts = [domain.name, domain.version, engine.model_id, engine.revision, engine.sampling, max_tokens, read]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _prompt(part: ItemPrompts | UserPrompts, user: str, facts: ItemFacts | UserFacts, by_factor: bool) -> Prompt:
    factors = ", ".join(part.factors)
    system = part.system.format(factors=factors)
    if not by_factor:
        return Prompt(system, user, facts)
    return Prompt(f"{system}\n{part.by_factor.format(factors=factors)}", user, facts, factor_schema(part.factors))


def _said(event: Event) -> str:
    rating = "" if event.rating is None else f"rated {event.rating:g}, "
    return f"{event.name}: {rating}{'liked' if event.liked else 'not liked'}"


def _line(text: str) -> str:
    return squeeze(as_data(text))


def _delimited(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>"
