"""Fixtures of the tests on descriptions, profiles and encodings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest

from kellm_features.errors import EngineError
from kellm_features.knowledge.engines import Answer, Completion, Failure, Prompt
from kellm_features.knowledge.facts import ItemFacts

from .world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.write()
    return made


class FakeEngine:
    """Stands for a language model: counts what it is asked, answers from the prompt, fails where a test wants it."""

    source: Literal["llm", "template"] = "llm"
    sampling = "greedy"

    def __init__(self) -> None:
        self.model_id = "fake-1"
        self.revision = "a"
        self.shard_size = 2
        self.asked: list[Prompt] = []
        self.answers: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.cost = (50, 10)
        self.transient = True
        self.fail_after: int | None = None

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        for place, request in reversed(list(enumerate(requests))):  # in an order of its own
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise EngineError("the machine was switched off")
            self.asked.append(request)
            refused = next((reason for key, reason in self.refused.items() if key in request.user), None)
            if refused is not None:
                yield place, Failure(refused, transient=self.transient)
            else:
                yield place, Completion(self._answer(request), *self.cost)

    def _answer(self, request: Prompt) -> str:
        for key, answer in self.answers.items():
            if key in request.user:
                return answer
        facts = request.facts
        name = facts.name if isinstance(facts, ItemFacts) else "Their taste"
        words = [w.lower() for w in request.user.split() if w.isalpha()][10:16]
        return f"{name} was put into words by a model about {' '.join(words)}."


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Registers the fake engine under the name `fake`, beside the real ones."""
    from kellm_features.knowledge import writer

    engine = FakeEngine()
    real = writer.load_engine
    monkeypatch.setattr(writer, "load_engine", lambda name, s: engine if name == "fake" else real(name, s))
    return engine
