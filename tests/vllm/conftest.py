"""The real vLLM on a CPU: what its tests share. They run in an environment of their own: `make test-vllm`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kellm_features.knowledge.domain import load_domain
from kellm_features.knowledge.engines import Prompt
from kellm_features.knowledge.facts import Page, item_facts
from kellm_features.knowledge.prompts import item_prompt

MOVIES = load_domain("movies")

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


FOREIGN_WARNINGS = (
    # Raised inside torch, vLLM and the packages below it, as these import each other.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # vLLM leaves a ZeroMQ context to the garbage collector, which comes to it in whichever test is running then.
    "ignore:Unclosed context:ResourceWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in FOREIGN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def pytest_report_header() -> str | None:
    return None if find_spec("vllm") else "tests/vllm: not collected, as vllm is not installed here (make test-vllm)"


def film(title: str, director: str, schema: dict[str, Any] | None = None) -> Prompt:
    page = Page(title, f"{title} is a 1995 film directed by {director}.")
    prompt = item_prompt(MOVIES, item_facts(MOVIES, title, 1995, ["Crime"], [page]), [page], 120)
    return Prompt(prompt.system, prompt.user, prompt.facts, schema)


@pytest.fixture
def films() -> list[Prompt]:
    """Eight grounded prompts that begin alike, as those of a run do."""
    names = ["Aurora", "Boxer", "Cabaret", "Dynamo", "Eclipse", "Falcon", "Granite", "Harbor"]
    return [film(name, f"{name} Smith") for name in names]


@pytest.fixture
def film_as_json() -> Prompt:
    """Asks for JSON of a form that this model would never find by itself."""
    return film("Aurora", "Aurora Smith", SCHEMA)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["dark", "light"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["mood", "stars"],
    "additionalProperties": False,
}
