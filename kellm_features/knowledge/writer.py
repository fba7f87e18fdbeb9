"""Descriptions from prompts: finished completions from the store, missing ones from the engine, unfit ones replaced."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kellm_features.errors import EngineError
from kellm_features.knowledge.answers import clean
from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.domain import Domain
from kellm_features.knowledge.engines import Completion, Engine, Prompt, load_engine
from kellm_features.knowledge.engines.template import TemplateEngine
from kellm_features.knowledge.facts import ItemFacts, Page
from kellm_features.knowledge.prompts import prompt_hash
from kellm_features.knowledge.text import cut_to_tokens, split_sentences, take_sentences
from kellm_features.progress import track
from kellm_features.settings import GenerateSettings

Source = Literal["llm", "template", "extract"]


@dataclass(frozen=True)
class Description:
    """One row of a description table, without its id."""

    text: str
    source: Source
    prompt_hash: str
    model_id: str


@dataclass
class Usage:
    """What the slow engines were asked for in this run."""

    generated: int = 0
    cache_hits: int = 0
    unfit: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    models: dict[str, str] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        """Figures for the manifest."""
        rate = self.completion_tokens / self.seconds if self.seconds else 0.0
        return {
            "generated": self.generated,
            "cache_hits": self.cache_hits,
            "unfit_answers": self.unfit,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "generation_seconds": round(self.seconds, 2),
            "tokens_per_s": round(rate, 1),
        }


class Writer:
    """Runs prompts through engines, taking finished completions of slow ones from the store."""

    def __init__(self, settings: GenerateSettings, domain: Domain, folder: Path) -> None:
        self.settings = settings
        self.domain = domain
        self.usage = Usage()
        self._store = CompletionStore(folder)
        self._engines: dict[str, Engine] = {}
        self._template = TemplateEngine()

    def engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = load_engine(name, self.settings)
        return self._engines[name]

    def write(
        self, name: str, prompts: Sequence[Prompt], label: str, pages: Sequence[Page | None]
    ) -> list[Description]:
        """One description per prompt, in order; `pages` are what an unusable answer falls back to."""
        if not prompts:
            return []
        engine = self.engine(name)
        self.usage.models[engine.model_id] = engine.revision
        limit = self.settings.max_tokens
        keys = [prompt_hash(engine, self.domain, prompt, limit) for prompt in prompts]
        if engine.source == "template":
            texts = self._complete(engine, prompts)
            return [
                Description(text.text, "template", key, engine.model_id) for text, key in zip(texts, keys, strict=True)
            ]
        self._fill_store(engine, dict(zip(keys, prompts, strict=True)), label)
        rows = []
        for key, prompt, page in zip(keys, prompts, pages, strict=True):
            answer = clean(self._store[key])
            rows.append(
                Description(answer, "llm", key, engine.model_id) if answer else self._fall_back(key, prompt, page)
            )
        return rows

    def _fill_store(self, engine: Engine, prompts: Mapping[str, Prompt], label: str) -> None:
        """Generate what the store lacks, shard by shard: a shard is on disk before the next one is begun."""
        missing = [key for key in prompts if key not in self._store]
        self.usage.cache_hits += len(prompts) - len(missing)
        # Prompts of like length meet in one batch; the longest come first, so that memory peaks early.
        missing.sort(key=lambda key: (-len(prompts[key].user), key))
        tokens, started = 0, time.monotonic()
        with track(label, len(missing), "texts") as advance:
            for start in range(0, len(missing), engine.shard_size):
                shard = missing[start : start + engine.shard_size]
                completions = self._complete(engine, [prompts[key] for key in shard])
                self._store.append(dict(zip(shard, completions, strict=True)))
                tokens += sum(c.completion_tokens for c in completions)
                self.usage.generated += len(shard)
                self.usage.prompt_tokens += sum(c.prompt_tokens for c in completions)
                advance(len(shard), f"{tokens / (time.monotonic() - started):.0f} tokens/s")
        self.usage.completion_tokens += tokens
        self.usage.seconds += time.monotonic() - started

    def _complete(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Completion]:
        completions = engine.generate(prompts, max_tokens=self.settings.max_tokens)
        if len(completions) != len(prompts):
            raise EngineError(
                f"the engine of {engine.model_id} returned {len(completions)} completions for {len(prompts)} prompts: "
                "an engine must return one per prompt, in order"
            )
        return completions

    def _fall_back(self, key: str, prompt: Prompt, page: Page | None) -> Description:
        """An extract of the page where there is one, else a template: never an unusable answer."""
        self.usage.unfit += 1
        limit = self.settings.max_tokens
        parts = [key, prompt_hash(self._template, self.domain, prompt, limit)]
        if page is not None and page.lead.strip() and isinstance(prompt.facts, ItemFacts):
            combined = hashlib.sha256("\0".join([*parts, page.lead]).encode()).hexdigest()
            return Description(extract(prompt.facts, page, limit), "extract", combined, "extract")
        combined = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        text = self._template.generate([prompt], max_tokens=limit)[0].text
        return Description(text, "template", combined, self._template.model_id)


def extract(facts: ItemFacts, page: Page, max_tokens: int) -> str:
    """Title and year, then the page's own first sentences, within a budget of estimated tokens."""
    lead = split_sentences(page.lead)
    head = f"{facts.name}:"
    text = take_sentences([head, *lead], max_tokens)
    return text if len(text) > len(head) else cut_to_tokens(f"{head} {lead[0]}", max_tokens)
