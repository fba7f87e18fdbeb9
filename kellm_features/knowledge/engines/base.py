"""What generates text: the interface that every engine keeps, built in or a user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from kellm_features.knowledge.facts import ItemFacts, UserFacts


@dataclass(frozen=True)
class Prompt:
    """One request, in the two forms that engines read.

    `system` is the same for every item (or user) of a run and stands first, so that a prefix cache hits. Text from
    outside stands in `user` alone, between delimiters. `facts` is the same knowledge in structured form.
    """

    system: str
    user: str
    facts: ItemFacts | UserFacts
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer where one text per factor is asked for. An engine that can, decodes under it; one that
    cannot, ignores it: the answer is validated in any case."""


@dataclass(frozen=True)
class Completion:
    """An engine's answer. `finish_reason` is `length` where the token limit cut it off."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"


@dataclass(frozen=True)
class Failure:
    """A request that failed for good, after the engine's own retries. It lands among the dead letters."""

    reason: str
    """One line: what was seen. Never a key, never page text."""
    transient: bool = False
    """Whether the service was at fault, and not the request: many of these in a row end the run."""


Answer = Completion | Failure


@runtime_checkable
class Closable(Protocol):
    """What an engine keeps besides, where it holds processes or memory that the next stage wants."""

    def close(self) -> None:
        """Give them back. It is called once, after the last request."""


class Engine(Protocol):
    """Text for prompts. Registered under the entry point group `kellm_features.engines` as a factory.

    The factory takes the `generate` section of the settings and returns an engine; it may load a model.
    """

    @property
    def model_id(self) -> str:
        """The model's name, as it stands in the descriptions."""

    @property
    def revision(self) -> str:
        """What tells two versions of the model apart: a commit, or a hash of the weights."""

    @property
    def sampling(self) -> str:
        """Everything besides prompt, model and token limit that shapes the text: decoding method, dtype, seed."""

    @property
    def source(self) -> Literal["llm", "template"]:
        """What it reads, and what the descriptions say of their source.

        `llm`: system and user text; it is slow, and its completions are kept. `template`: `facts`; it is fast.
        """

    @property
    def shard_size(self) -> int:
        """Requests that suit one call: enough to keep the engine busy."""

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Answers as they are finished, in any order, each with the place of its request: one per request.

        Each is on disk before the next is asked for, so a kill loses what the engine was working on and no more.

        Args:
            requests: any number up to `shard_size`.
            max_tokens: of one answer.

        Raises:
            EngineError: the engine itself failed for good; nothing more can be asked of it.
        """
