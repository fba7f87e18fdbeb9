"""Descriptions from requests: finished completions from the store, missing ones from an engine, unfit ones replaced."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from kellm_features.errors import EngineError
from kellm_features.knowledge.answers import clean
from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.domain import Domain
from kellm_features.knowledge.engines import Answer, Closable, Completion, Engine, Failure, Prompt, load_engine
from kellm_features.knowledge.engines.template import TemplateEngine
from kellm_features.knowledge.factors import factors_as_prose, parse_factors
from kellm_features.knowledge.facts import ItemFacts, Page
from kellm_features.knowledge.grounding import grounding
from kellm_features.knowledge.prompts import ask_again, history_hash, prompt_hash
from kellm_features.knowledge.requests import DeadLetter, Description, Request
from kellm_features.knowledge.text import cut_to_tokens, split_sentences, take_sentences
from kellm_features.progress import track
from kellm_features.settings import GenerateSettings

logger = logging.getLogger(__name__)

LEAST_BYTES_PER_TOKEN = 3
"""UTF-8 bytes per token of a list of names, the densest text that was measured: a budget is reserved by it."""
FORM_TOKENS = 64
"""Of a chat form around system and user text: reserved with each prompt."""


@dataclass
class Usage:
    """What the slow engines were asked for in this run."""

    generated: int = 0
    cache_hits: int = 0
    unfit: int = 0
    ungrounded: int = 0
    again: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    models: dict[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens

    def notes(self) -> dict[str, Any]:
        """Figures for the manifest."""
        rate = self.completion_tokens / self.seconds if self.seconds else 0.0
        return {
            "generated": self.generated,
            "cache_hits": self.cache_hits,
            "asked_again": self.again,
            "unfit_answers": self.unfit,
            "ungrounded_answers": self.ungrounded,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "generation_seconds": round(self.seconds, 2),
            "tokens_per_s": round(rate, 1),
        }


@dataclass(frozen=True)
class _Ask:
    """One prompt under its hash, and under the hash of what alone asks for another answer."""

    key: str
    prompt: Prompt
    purpose: str = ""


@dataclass(frozen=True)
class _Draft:
    """A usable answer."""

    text: str
    factors: Mapping[str, str] | None
    grounding: float | None


class Writer:
    """Runs requests through engines, taking finished completions of slow ones from the store.

    An answer that is no use, or says what its source does not tell, is asked for once more; where the second is no
    better, an extract of the page or a template takes its place.
    """

    def __init__(self, settings: GenerateSettings, domain: Domain, store: CompletionStore) -> None:
        self.settings = settings
        self.domain = domain
        self.usage = Usage()
        self._store = store
        self._engines: dict[str, Engine] = {}
        self._template = TemplateEngine()
        self._failed: dict[str, str] = {}
        self._failed_in_a_row = 0

    def engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = load_engine(name, self.settings)
        return self._engines[name]

    def close(self) -> None:
        """End the engines that hold something."""
        for engine in self._engines.values():
            if isinstance(engine, Closable):
                engine.close()
        self._engines.clear()

    def write(self, name: str, requests: Sequence[Request], label: str, max_tokens: int) -> list[Description]:
        """One description per request, in order.

        Where the budget does not suffice, the first requests are served.

        Raises:
            EngineError: the engine failed for good; what it had finished is kept for the next run.
        """
        if not requests:
            return []
        engine = self.engine(name)
        self.usage.models[engine.model_id] = engine.revision
        if engine.source == "template":
            return self.fill_in(engine, requests, max_tokens)
        asks = [self._ask(engine, request, request.prompt, max_tokens) for request in requests]
        self._generate(engine, asks, label, max_tokens)
        drafts = [self._draft(ask, request) for ask, request in zip(asks, requests, strict=True)]
        seconds: dict[int, _Ask] = {}
        for place, (ask, request) in enumerate(zip(asks, requests, strict=True)):
            if self._key(ask) in self._store and not self._is_good(drafts[place]) and request.source():
                seconds[place] = self._ask(engine, request, ask_again(self.domain, request.prompt), max_tokens)
        self._generate(engine, list(seconds.values()), f"{label} again", max_tokens)
        self.usage.again += len(seconds)
        return [
            self._choose(engine, request, ask, drafts[place], seconds.get(place), max_tokens)
            for place, (ask, request) in enumerate(zip(asks, requests, strict=True))
        ]

    def to_do(self, name: str, requests: Sequence[Request], max_tokens: int) -> list[Prompt]:
        """The prompts that `write` would ask the engine for, of an engine whose completions are kept."""
        engine = self.engine(name)
        if engine.source == "template":
            return []
        asks = {ask.key: ask for ask in (self._ask(engine, r, r.prompt, max_tokens) for r in requests)}
        return [ask.prompt for ask in asks.values() if self._key(ask) not in self._store]

    def _ask(self, engine: Engine, request: Request, prompt: Prompt, max_tokens: int) -> _Ask:
        key = prompt_hash(engine, self.domain, prompt, max_tokens)
        if not request.by_history:
            return _Ask(key, prompt)
        again = "" if prompt is request.prompt else "again:"
        return _Ask(key, prompt, again + history_hash(engine, self.domain, prompt, max_tokens))

    def _key(self, ask: _Ask) -> str:
        """Where the answer to a prompt stands, or would stand: under its hash, or under that of an older prompt which
        differed in nothing that asks for another answer."""
        older = self._store.reusable(ask.purpose) if ask.purpose and ask.key not in self._store else None
        return older or ask.key

    def _generate(self, engine: Engine, asks: Sequence[_Ask], label: str, max_tokens: int) -> None:
        """Ask for what the store lacks; each answer is on disk before the next is waited for."""
        missing = {ask.key: ask for ask in asks if self._key(ask) not in self._store}
        self.usage.cache_hits += len(asks) - len(missing)
        waiting = list(missing.values())
        if self.settings.budget_tokens is None:
            # Prompts of like length meet in one batch; the longest come first, so that memory peaks early.
            waiting.sort(key=lambda ask: (-len(ask.prompt.user), ask.key))
        answered, started = 0, time.monotonic()
        with track(label, len(waiting), "texts") as advance:
            while shard := self._affordable(waiting, engine.shard_size, max_tokens):
                del waiting[: len(shard)]
                with ExitStack() as asking:
                    answers = engine.generate([ask.prompt for ask in shard], max_tokens=max_tokens)
                    if isinstance(answers, Generator):
                        asking.callback(answers.close)  # what is in flight ends with this run, not when memory is freed
                    for answer in self._keep(engine, shard, answers):
                        answered += answer.completion_tokens if isinstance(answer, Completion) else 0
                        advance(1, f"{answered / (time.monotonic() - started):.0f} tokens/s")
        self.usage.seconds += time.monotonic() - started
        if waiting:
            budget = self.settings.budget_tokens
            logger.info("%s: the budget of %s tokens ends before %d texts", label, budget, len(waiting))

    def _affordable(self, waiting: Sequence[_Ask], most: int, max_tokens: int) -> list[_Ask]:
        """The next requests that the budget surely suffices for, at most a shard of them."""
        if self.settings.budget_tokens is None:
            return list(waiting[:most])
        left = self.settings.budget_tokens - self.usage.tokens
        shard = []
        for ask in waiting[:most]:
            left -= most_tokens(ask.prompt) + max_tokens
            if left < 0:
                break
            shard.append(ask)
        return shard

    def _keep(self, engine: Engine, shard: Sequence[_Ask], answers: Iterator[tuple[int, Answer]]) -> Iterator[Answer]:
        """The engine's answers, each kept before it is given on."""
        unanswered = set(range(len(shard)))
        for place, answer in answers:
            if place not in unanswered:
                raise EngineError(
                    f"the engine of {engine.model_id} answered request {place} of {len(shard)} twice, or out of range: "
                    "an engine must answer each request once"
                )
            unanswered.remove(place)
            ask = shard[place]
            if isinstance(answer, Failure):
                self._fail(ask.key, answer)
            else:
                self._failed_in_a_row = 0
                self._store.add(ask.key, answer, ask.purpose)
                self.usage.generated += 1
                self.usage.prompt_tokens += answer.prompt_tokens
                self.usage.completion_tokens += answer.completion_tokens
            yield answer
        if unanswered:
            raise EngineError(
                f"the engine of {engine.model_id} left {len(unanswered)} of {len(shard)} requests unanswered: "
                "an engine must answer each request once"
            )

    def _fail(self, key: str, failure: Failure) -> None:
        self._failed[key] = failure.reason
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.settings.max_failures:
            raise EngineError(
                f"{self._failed_in_a_row} requests in a row failed (generate.max_failures), the last one with: "
                f"{failure.reason}. What was finished is kept, and the next run goes on from there"
            )

    def _draft(self, ask: _Ask, request: Request) -> _Draft | None:
        """The answer made fit to store; None where there is none, or none that can be used."""
        key = self._key(ask)
        if key not in self._store:
            return None
        completion = self._store[key]
        factors: dict[str, str] | None = None
        if ask.prompt.schema is not None:
            factors = parse_factors(completion.text, list(ask.prompt.schema["properties"]))
            facts = ask.prompt.facts
            text = factors_as_prose(facts.name if isinstance(facts, ItemFacts) else "", factors) if factors else ""
        else:
            text = clean(completion)
        if not text:
            self.usage.unfit += 1
            return None
        draft = _Draft(text, factors, _score(text, request))
        if not self._is_good(draft):
            self.usage.ungrounded += 1
        return draft

    def _is_good(self, draft: _Draft | None) -> bool:
        return draft is not None and (draft.grounding is None or draft.grounding >= self.settings.min_grounding)

    def _choose(
        self, engine: Engine, request: Request, first: _Ask, draft: _Draft | None, second: _Ask | None, max_tokens: int
    ) -> Description:
        """The first answer where it is good, else the second, else what replaces both."""
        asks = [first] if second is None else [first, second]
        ask = asks[-1]
        if second is not None:
            draft = self._draft(second, request)
        key = self._key(ask)
        if draft is not None and self._is_good(draft):
            row = Description(draft.text, "llm", key, engine.model_id, draft.grounding, factors=draft.factors)
        else:
            row = self._fall_back(key, request, max_tokens)
            if key not in self._store:
                reason = self._failed.get(ask.key)
                failed = None if reason is None else DeadLetter(key, engine.model_id, reason)
                row = replace(row, failed=failed, waiting=failed is None)
        spent = [self._store[k] for k in map(self._key, asks) if k in self._store]
        return replace(
            row,
            prompt_tokens=sum(completion.prompt_tokens for completion in spent),
            completion_tokens=sum(completion.completion_tokens for completion in spent),
        )

    def _fall_back(self, key: str, request: Request, max_tokens: int) -> Description:
        """An extract of the page where there is one, else a template: never an unusable answer."""
        facts = request.prompt.facts
        parts = [key, prompt_hash(self._template, self.domain, request.prompt, max_tokens)]
        if isinstance(facts, ItemFacts) and request.pages and request.pages[0].lead.strip():
            page = request.pages[0]
            text = extract(facts, page, max_tokens)
            return Description(text, "extract", _combined(*parts, page.lead), "extract", _score(text, request))
        (row,) = self.fill_in(self._template, [request], max_tokens)
        return replace(row, prompt_hash=_combined(*parts))

    def fill_in(self, engine: Engine, requests: Sequence[Request], max_tokens: int) -> list[Description]:
        """Texts of an engine that writes from facts."""
        texts = dict(engine.generate([request.prompt for request in requests], max_tokens=max_tokens))
        rows = []
        for place, request in enumerate(requests):
            answer = texts[place]
            if isinstance(answer, Failure):
                raise EngineError(f"the engine of {engine.model_id} failed: {answer.reason}")
            facts = request.prompt.facts
            rows.append(
                Description(
                    answer.text,
                    "template",
                    prompt_hash(engine, self.domain, request.prompt, max_tokens),
                    engine.model_id,
                    _score(answer.text, request),
                    factors=dict(facts.by_factor) if self.settings.factors and isinstance(facts, ItemFacts) else None,
                )
            )
        return rows


def most_tokens(prompt: Prompt) -> int:
    """An upper estimate of a prompt's tokens."""
    return -(-(len(prompt.system.encode()) + len(prompt.user.encode())) // LEAST_BYTES_PER_TOKEN) + FORM_TOKENS


def extract(facts: ItemFacts, page: Page, max_tokens: int) -> str:
    """Title and year, then the page's own first sentences, within a budget of estimated tokens."""
    lead = split_sentences(page.lead)
    head = f"{facts.name}:"
    text = take_sentences([head, *lead], max_tokens)
    return text if len(text) > len(head) else cut_to_tokens(f"{head} {lead[0]}", max_tokens)


def _score(text: str, request: Request) -> float | None:
    """The share of a text's names, years and numbers that stand in its source; None where there is no source.

    An item's text without any of them scores 0: it tells nothing that could be checked. A user's is none the worse for
    it, as a taste can be told without names, and has no score.
    """
    if not (source := request.source()):
        return None
    found = grounding(text, source)
    return found.score if found.claims or isinstance(request.prompt.facts, ItemFacts) else None


def _combined(*hashes: str) -> str:
    return hashlib.sha256("\0".join(hashes).encode()).hexdigest()
