"""The README's Python blocks run as they stand (the first one in test_path.py, where something is published)."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNELS = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block(word: str) -> str:
    found = [text for text in BLOCKS if word in text]
    assert len(found) == 1
    return found[0]


def test_the_trainer_s_block_runs() -> None:
    names: dict[str, Any] = {}
    exec(block("AdapterInfoNCE"), names)
    assert float(names["loss"].detach()) > 0
    assert names["adapter"].hidden.weight.grad is not None


def test_the_own_backbone_in_the_docs_is_the_example() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    source = (ROOT / "examples" / "own_backbone.py").read_text(encoding="utf-8")
    shown = next(b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "class Ranker" in b)
    assert all(part.strip() in source for part in shown.split("\n\n\n"))


def test_the_kernels_first_block_runs() -> None:
    names: dict[str, Any] = {}
    exec(KERNELS.split("```python\n")[1].split("```")[0], names)
    assert float(names["loss"]) == pytest.approx(float(names["same"]), rel=1e-5)
    assert names["z_pos"].shape == (512, 64)


@pytest.mark.feast
def test_an_existing_repository_takes_our_views(tmp_path: Path) -> None:
    """A repository with a view of its own applies with the README's lines beside it."""
    (tmp_path / "feature_store.yaml").write_text(
        "project: shop\nprovider: local\nregistry: registry.db\noffline_store:\n  type: duckdb\n"
        "online_store:\n  type: sqlite\n  path: online.db\nentity_key_serialization_version: 3\n"
    )
    (tmp_path / "knowledge.py").write_text(block("knowledge_objects"))
    (tmp_path / "prices.py").write_text(
        "from datetime import timedelta\n"
        "from feast import Entity, FeatureView, Field, FileSource, ValueType\n"
        "from feast.types import Float32, Int64\n"
        "shop = Entity(name='shop', join_keys=['shop_id'], value_type=ValueType.INT64)\n"
        "source = FileSource(name='prices', path='prices.parquet', timestamp_field='event_timestamp')\n"
        "fields = [Field(name='shop_id', dtype=Int64), Field(name='price', dtype=Float32)]\n"
        "prices = FeatureView(name='prices', entities=[shop], ttl=timedelta(1), schema=fields, source=source)\n"
    )
    feast = [sys.executable, "-m", "feast.cli.cli"]
    subprocess.run([*feast, "apply"], cwd=tmp_path, check=True, capture_output=True)
    listed = subprocess.run([*feast, "feature-views", "list"], cwd=tmp_path, check=True, capture_output=True, text=True)
    names = {line.split()[0] for line in listed.stdout.splitlines()[1:] if line.strip()}
    assert {"prices", "item_knowledge_embedding", "user_knowledge_embedding", "item_swing_neighbors"} <= names
