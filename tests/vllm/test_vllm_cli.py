"""`kellm generate --engine vllm`: found by its entry point, started by its first request and by no dry run."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kellm_features import pipeline, stages
from kellm_features.cli.app import app
from kellm_features.knowledge.domain import load_domain
from kellm_features.schemas import ITEM_DESCRIPTIONS, read_table
from tests.knowledge.world import World, stages_of

OPTIONS = """
[generate.vllm]
dtype = "bfloat16"
max_model_len = 2048
enforce_eager = true
engine_args = { block_size = 32 }
"""


def test_factors_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("generate", "run"):  # each registers itself with the application
        import_module(f"kellm_features.cli.{command}")
    world = World(tmp_path)
    made = stages_of(world)
    for module in (pipeline, stages):
        monkeypatch.setattr(module, "STAGES", made)
        monkeypatch.setattr(module, "STAGE_NAMES", tuple(stage.name for stage in made))
    (tmp_path / "kellm.toml").write_text(OPTIONS)
    monkeypatch.chdir(tmp_path)

    def kellm(*words: str) -> str:
        result = CliRunner(env={"COLUMNS": "140"}).invoke(app, list(words))
        assert result.exit_code == 0, result.output or result.exception
        return result.output

    def processes() -> list[str]:
        return [child.name() for child in psutil.Process().children(recursive=True) if "VLLM" in child.name()]

    kellm("run", "--out", "run", "--until", "link")
    words = ["generate", "--out", "run", "--side", "item", "--engine", "vllm", "--limit", "3", "--max-tokens", "160"]
    told = kellm(*words, "--factors", "--dry-run")
    assert ["item", "vllm", "3", "3"] in [line.split()[:4] for line in told.splitlines()]
    assert processes() == []
    kellm(*words, "--factors", "--set", "generate.min_grounding=0")
    table = read_table(tmp_path / "run" / "generate" / "item_descriptions.parquet", ITEM_DESCRIPTIONS)
    rows = {row["item_id"]: row for row in table.to_pylist()}
    by_model = [rows[key] for key in (1, 2, 3) if rows[key]["description_source"] == "llm"]
    assert by_model
    for row in by_model:
        assert {name for name, _ in row["factors"]} <= set(load_domain("movies").item.factors)
        assert row["completion_tokens"] > 0
    until = time.monotonic() + 30
    while processes() and time.monotonic() < until:  # the last of them ends a moment after its parent
        time.sleep(0.1)
    assert processes() == []  # the next stage has the memory to itself
    # Nothing is asked for twice, and nothing is started for it.
    told = kellm(*words, "--factors", "--set", "generate.min_grounding=0", "--dry-run")
    assert ["item", "vllm", "3", "0"] in [line.split()[:4] for line in told.splitlines()]
