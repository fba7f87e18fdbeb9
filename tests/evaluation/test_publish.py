"""What is kept of an earlier call, what goes, and that a kill never leaves rows of two settings in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from kellm_features.artifacts import Manifest, digest, hash_outputs, write_manifest
from kellm_features.evaluation import publish as publishing
from kellm_features.evaluation.arms import ID_30, ITEM_MEAN, Arm
from kellm_features.evaluation.experiment import Cell, Outcome
from kellm_features.evaluation.protocol import Fold
from kellm_features.evaluation.publish import publish
from kellm_features.evaluation.results import ResultRow, read_results
from kellm_features.evaluation.suite import Study
from kellm_features.evaluation.world import World
from kellm_features.schemas import INTERACTIONS, write_table
from kellm_features.settings import Settings

from .world import interactions, prepared

KILLED = KeyboardInterrupt("killed here")


def row(suite: str = "ctr", backbone: str = "din", arm: str = "id-30", **changes: Any) -> ResultRow:
    told = {"suite": suite, "split": "B", "backbone": backbone, "arm": arm, "label": arm, "metric": "auc"}
    return ResultRow.model_validate(told | {"value": 0.7, "folds": 1, "seeds": 1} | changes)


def with_epochs(world: World, epochs: int) -> World:
    tree = world.settings.model_dump()
    return replace(world, settings=Settings.model_validate(tree | {"evaluate": tree["evaluate"] | {"epochs": epochs}}))


def kept(world: World) -> list[tuple[str, str, float | None]]:
    return [(row.suite, row.backbone, row.value) for row in read_results(world.root / "results.csv")]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Of six users and four items, whose run says that it is finished."""
    parts = ["train"] * 4 + ["valid", "test"]
    table = interactions([(user + 1, item, int(item < 3), parts[user]) for user in range(6) for item in (1, 2, 3, 4)])
    fold = Fold("B0", table, "user", "valid", frozenset(), frozenset())
    world = prepared(tmp_path, Settings(), [fold], items=4, users=6)
    ingest = world.run_dir / "ingest"
    write_table(table, ingest / "interactions.parquet", INTERACTIONS)
    outputs = hash_outputs(ingest)
    made: dict[str, Any] = {"run_id": "1", "version": "1", "created": datetime.now(UTC), "config_hash": ""}
    write_manifest(ingest, Manifest(stage="ingest", output_hash=digest(outputs), outputs=outputs, **made))
    return world


def test_rows_of_other_suites_and_backbones_stay(world: World) -> None:
    publish(world, [], [row(), row(backbone="dien"), row("retrieval", ""), row("cold")], [])
    publish(world, [], [row(value=0.8, folds=3), row("retrieval", "", value=0.8)], [])
    assert kept(world) == [("ctr", "dien", 0.7), ("ctr", "din", 0.8), ("cold", "din", 0.7), ("retrieval", "", 0.8)]


def test_rows_of_another_basis_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(world, [], [row(), row("cold")], [])
    publish(with_epochs(world, 7), [], [row(value=0.8)], [])
    assert kept(world) == [("ctr", "din", 0.8)]
    publish(with_epochs(world, 7), [], [row("cold", value=0.9)], [])
    assert kept(world) == [("ctr", "din", 0.8), ("cold", "din", 0.9)]
    monkeypatch.setattr(publishing, "__version__", "99.0")  # other code, other figures
    publish(with_epochs(world, 7), [], [row(value=0.6)], [])
    assert kept(world) == [("ctr", "din", 0.6)]


@pytest.mark.parametrize("step", ["write_atomic", "write_results", "write_tables", "write_page"])
def test_a_kill_between_basis_and_rows_mixes_nothing(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    publish(world, [], [row(), row("cold")], [])

    def die(*_: object) -> None:
        raise KILLED

    with monkeypatch.context() as patch:
        patch.setattr(publishing, step, die)
        with pytest.raises(KeyboardInterrupt):
            publish(with_epochs(world, 7), [], [row(value=0.8)], [])
    publish(with_epochs(world, 7), [], [row("cold", value=0.9)], [])
    own = [("cold", "din", 0.9)]
    assert kept(world) in (own, [("ctr", "din", 0.8), *own])  # the second, once the rows were written


def test_the_page_counts_folds_by_rows_and_models_by_folders(world: World) -> None:
    """Two arms that are one model are one training; a closed form is none."""
    twin = Arm("none", "no contrastive term")
    cells = [(ID_30, "a"), (twin, "a"), (ID_30, "b"), (ITEM_MEAN, "c")]
    outcomes = [
        Outcome(Cell("B0", "din", arm, 0, 1e-3), Path(folder), 0.5, {"seconds": 60.0, "history": []})
        for arm, folder in cells
    ]
    studies: Sequence[Study] = [Study("ctr", "B", ("din",), (ID_30,), ("B0",), {})]
    publish(world, [], [row(backbone="dien", folds=3), row("cold", arm="shuffled", split="cold")], [])
    publish(world, studies, [row()], outcomes)
    page = (world.root / "evaluation.html").read_text(encoding="utf-8")
    assert '<dt>Folds</dt><dd class="value">4</dd><dd class="detail">by split: B 3, cold 1; 1 seed each</dd>' in page
    assert '<dt>Models trained</dt><dd class="value">2</dd>' in page
    assert '<dt>Time</dt><dd class="value">2 min</dd>' in page
    assert "<td>null: rows shuffled</td><td><code>shuffled</code></td>" in page  # told by a row of the first call
    assert "on split A the test takes the place of the validation part" in page
