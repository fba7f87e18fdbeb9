"""What a run of stage `generate` would ask its engines for: texts, tokens, seconds and money, before any is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.engines.base import Prompt
from kellm_features.knowledge.engines.template import TemplateEngine
from kellm_features.knowledge.generate import TABLES, items_by_engine, open_store, users_by_engine
from kellm_features.knowledge.inputs import InputPath, Inputs
from kellm_features.knowledge.requests import Request
from kellm_features.knowledge.text import estimate_tokens
from kellm_features.knowledge.writer import FORM_TOKENS, Writer
from kellm_features.schemas import read_table
from kellm_features.settings import Settings

PER_MILLION = 1_000_000


@dataclass(frozen=True)
class Rates:
    """What tokens cost."""

    tokens_per_s: float | None = None
    """Answer tokens that the engine writes in a second; None: unknown."""
    prompt_price: float | None = None
    """Of a million prompt tokens, in any currency; None: unknown."""
    answer_price: float | None = None
    """Of a million answer tokens."""


@dataclass(frozen=True)
class Estimate:
    """What one engine would be asked for on one side. Requests that turn out to need a second answer are not in it."""

    side: str
    engine: str
    texts: int
    to_do: int
    """Texts without a finished answer; 0 for an engine that writes from facts."""
    prompt_tokens: int
    """Estimated from the prompts' bytes."""
    answer_tokens: int
    """At the finished answers' mean length, where there are any; else the most that could be."""
    seconds: float | None
    money: float | None


def estimate(settings: Settings, path: InputPath, work: Path, finished: Path | None, rates: Rates) -> list[Estimate]:
    """Estimates per side and engine.

    Args:
        settings: of the run.
        path: of the stage's inputs.
        work: the stage's work folder, whose finished answers are not asked for again.
        finished: the stage's last artefact, whose item descriptions stand for those that profiles will quote.
        rates: speed and prices.

    Raises:
        ConfigError, DataError, SchemaError, EngineError: as the stage would.
    """
    inputs = Inputs(settings, path)
    generate = settings.generate
    items, users = (open_store(work, side, generate) for side in TABLES)
    writer = Writer(generate, inputs.domain, items)
    estimates = []
    if generate.side in ("both", "item"):
        for name, ids in items_by_engine(inputs).items():
            requests = inputs.item_requests(ids)
            estimates.append(_estimate("item", name, requests, writer, items, generate.max_tokens, rates))
    if generate.side in ("both", "user"):
        digests = _digests(inputs, writer, finished)
        for name, ids in users_by_engine(inputs).items():
            requests = inputs.user_requests(ids, digests)
            most = generate.user_max_tokens or generate.max_tokens
            estimates.append(_estimate("user", name, requests, writer.on(users), users, most, rates))
    return estimates


def _estimate(
    side: str,
    engine: str,
    requests: Sequence[Request],
    writer: Writer,
    store: CompletionStore,
    max_tokens: int,
    rates: Rates,
) -> Estimate:
    prompts = writer.to_do(engine, requests, max_tokens)
    prompt_tokens = sum(map(_tokens, prompts))
    each = min(store.mean_answer_tokens() or max_tokens, max_tokens)
    answer_tokens = round(each * len(prompts))
    seconds = answer_tokens / rates.tokens_per_s if rates.tokens_per_s else None
    money = None
    if rates.prompt_price is not None or rates.answer_price is not None:
        spent = prompt_tokens * (rates.prompt_price or 0) + answer_tokens * (rates.answer_price or 0)
        money = spent / PER_MILLION
    return Estimate(side, engine, len(requests), len(prompts), prompt_tokens, answer_tokens, seconds, money)


def _tokens(prompt: Prompt) -> int:
    return estimate_tokens(prompt.system) + estimate_tokens(prompt.user) + FORM_TOKENS


def _digests(inputs: Inputs, writer: Writer, finished: Path | None) -> Mapping[Any, str]:
    """Descriptions as the last run wrote them, and templates of the items that have none."""
    name, schema = TABLES["item"]
    columns = ["item_id", "description"]
    known: dict[Any, str] = {}
    if finished is not None:
        table = read_table(finished / name, schema, columns)
        known = dict(zip(table["item_id"].to_pylist(), table["description"].to_pylist(), strict=True))
    missing = [item_id for item_id in inputs.item_order if item_id not in known]
    texts = writer.fill_in(TemplateEngine(), inputs.item_requests(missing), inputs.settings.generate.max_tokens)
    return known | {item_id: row.text for item_id, row in zip(missing, texts, strict=True)}
