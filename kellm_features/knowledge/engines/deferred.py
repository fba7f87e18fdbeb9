"""An engine that starts with its first request: a run that finds all its texts finished loads no model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from kellm_features.knowledge.engines.base import Answer, Closable, Engine, Prompt
from kellm_features.knowledge.localmodel import LocalModel


class Deferred:
    """Stands for an engine that takes long to start; what tells its texts from others is known before."""

    source: Literal["llm", "template"] = "llm"

    def __init__(self, model: LocalModel, sampling: str, start: Callable[[], Engine]) -> None:
        """Start nothing yet.

        Args:
            model: name and revision.
            sampling: as the started engine has it.
            start: called once, when something is asked for.
        """
        self.model_id = model.model_id
        self.revision = model.revision
        self.sampling = sampling
        self._start = start

    @functools.cached_property
    def started(self) -> Engine:
        """The engine itself.

        Raises:
            EngineError: it cannot start.
        """
        return self._start()

    def close(self) -> None:
        """End the engine, if it was started and has anything to give back."""
        started = self.__dict__.pop("started", None)
        if isinstance(started, Closable):
            started.close()

    @property
    def shard_size(self) -> int:
        return self.started.shard_size

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """The started engine's answers."""
        return self.started.generate(requests, max_tokens=max_tokens)
