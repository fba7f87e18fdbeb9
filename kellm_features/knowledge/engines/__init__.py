"""Engines that turn prompts into text, found by entry point so that anyone can add one."""

from __future__ import annotations

from importlib.metadata import entry_points

from kellm_features.errors import EngineError
from kellm_features.knowledge.engines.base import Answer, Closable, Completion, Engine, Failure, Prompt
from kellm_features.settings import GenerateSettings

GROUP = "kellm_features.engines"

__all__ = ["GROUP", "Answer", "Closable", "Completion", "Engine", "Failure", "Prompt", "load_engine"]


def load_engine(name: str, settings: GenerateSettings) -> Engine:
    """The engine registered under a name.

    Args:
        name: of an entry point in the group `kellm_features.engines`.
        settings: the `generate` section; the engine's factory is called with it.

    Raises:
        EngineError: no such engine, or it cannot start.
        MissingExtraError: it needs a package that is not installed.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise EngineError(
            f"there is no engine {name!r}; installed are: {', '.join(sorted(found)) or 'none'}. "
            f"Correct generate.engine, or install the package that registers it under '{GROUP}'"
        )
    engine: Engine = found[name].load()(settings)
    return engine
