"""Descriptions from requests: finished completions from the store, missing ones from an engine, unfit ones replaced."""

from __future__ import annotations

import copy
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
from kellm_features.knowledge.facts import ItemFacts
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
    spent: int = 0
    """Tokens booked against the budget: those that an answer tells, and the most that could be where it tells none."""
    seconds: float = 0.0
    models: dict[str, str] = field(default_factory=dict)

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

    def on(self, store: CompletionStore) -> Writer:
        """The same writer, with its engines and its account, on another store."""
        twin = copy.copy(self)
        twin._store = store
        return twin

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
        seconds = self._second_asks(engine, asks, drafts, requests, max_tokens)
        before = self.usage.generated
        self._generate(engine, list(seconds.values()), f"{label} again", max_tokens)
        self.usage.again += self.usage.generated - before
        return [
            self._choose(engine, request, ask, drafts[place], seconds.get(place), max_tokens)
            for place, (ask, request) in enumerate(zip(asks, requests, strict=True))
        ]

    def to_do(self, name: str, requests: Sequence[Request], max_tokens: int) -> list[Prompt]:
        """The prompts that `write` would ask the engine for, of an engine whose completions are kept."""
        engine = self.engine(name)
        if engine.source == "template":
            return []
        asks = [self._ask(engine, request, request.prompt, max_tokens) for request in requests]
        drafts = [self._draft(ask, request) for ask, request in zip(asks, requests, strict=True)]
        seconds = self._second_asks(engine, asks, drafts, requests, max_tokens)
        missing = {ask.key: ask for ask in [*asks, *seconds.values()] if self._key(ask) not in self._store}
        return [ask.prompt for ask in missing.values()]

    def _second_asks(
        self,
        engine: Engine,
        asks: Sequence[_Ask],
        drafts: Sequence[_Draft | None],
        requests: Sequence[Request],
        max_tokens: int,
    ) -> dict[int, _Ask]:
        """Place -> what is asked where the first answer is no good, and there is a source to keep to."""
        return {
            place: self._ask(engine, request, ask_again(self.domain, request.prompt), max_tokens)
            for place, (ask, draft, request) in enumerate(zip(asks, drafts, requests, strict=True))
            if self._key(ask) in self._store and not self._is_good(draft) and request.source()
        }

    def _ask(self, engine: Engine, request: Request, prompt: Prompt, max_tokens: int) -> _Ask:
        key = prompt_hash(engine, self.domain, prompt, max_tokens)
        if not request.by_history:
            return _Ask(key, prompt)
        again = prompt is not request.prompt
        return _Ask(key, prompt, history_hash(engine, self.domain, prompt, max_tokens, again=again))

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
        if not waiting:
            return
        if self.settings.budget_tokens is None:
            # Prompts of like length meet in one batch; the longest come first, so that memory peaks early.
            waiting.sort(key=lambda ask: (-len(ask.prompt.user), ask.key))
        most = engine.shard_size  # starts an engine that has not started yet, which is no part of its speed
        answered, started = 0, time.monotonic()
        with track(label, len(waiting), "texts") as advance:
            while shard := self._affordable(waiting, most, max_tokens):
                del waiting[: len(shard)]
                with ExitStack() as asking:
                    answers = engine.generate([ask.prompt for ask in shard], max_tokens=max_tokens)
                    if isinstance(answers, Generator):
                        asking.callback(answers.close)  # what is in flight ends with this run, not when memory is freed
                    for answer in self._keep(engine, shard, answers, max_tokens):
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
        left = self.settings.budget_tokens - self.usage.spent
        shard = []
        for ask in waiting[:most]:
            left -= most_tokens(ask.prompt) + max_tokens
            if left < 0:
                break
            shard.append(ask)
        return shard

    def _keep(
        self, engine: Engine, shard: Sequence[_Ask], answers: Iterator[tuple[int, Answer]], max_tokens: int
    ) -> Iterator[Answer]:
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
                self.usage.spent += most_tokens(ask.prompt) + max_tokens
                self._fail(ask.key, answer)
            else:
                told = answer.prompt_tokens + answer.completion_tokens
                self.usage.spent += told or most_tokens(ask.prompt) + max_tokens
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
        if not failure.transient:
            return
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
            cut_off = completion.finish_reason == "length"
            factors = parse_factors(completion.text, list(ask.prompt.schema["properties"]), cut_off=cut_off)
            facts = ask.prompt.facts
            said = factors_as_prose("", factors)
            text = factors_as_prose(facts.name, factors) if factors and isinstance(facts, ItemFacts) else said
        else:
            text = said = clean(completion)
        if not text:
            self.usage.unfit += 1
            return None
        draft = _Draft(text, factors, self._score_once(key, ask, said, request))
        if not self._is_good(draft):
            self.usage.ungrounded += 1
        return draft

    def _score_once(self, key: str, ask: _Ask, said: str, request: Request) -> float | None:
        """What the model said against its source; of an answer that outlives its prompt, against its prompt's own."""
        if not ask.purpose:
            return _score(said, request)
        if not self._store.is_scored(key):
            self._store.keep_score(key, _score(said, request))
        return self._store.score(key)

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
        told = next((text for page in request.pages for _, text in page.ordered(self.domain.sections)), "")
        if isinstance(facts, ItemFacts) and told:
            text = extract(facts, told, max_tokens)
            return Description(text, "extract", _combined(*parts, told), "extract", _score(text, request))
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


def extract(facts: ItemFacts, told: str, max_tokens: int) -> str:
    """Title and year, then a page's own first sentences, within a budget of estimated tokens."""
    lead = split_sentences(told)
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
