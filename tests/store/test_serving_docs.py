"""The Python of docs/serving.md, block after block, in a folder with a run and a repository."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

DOC = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)

pytestmark = pytest.mark.feast


def test_every_block_runs(tmp_path: Path, make_run: Any, make_repo: Any, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_repo(tmp_path / "feature_repo")
    run = make_run(tmp_path / "runs" / "nightly", "v1")
    now = datetime.now(UTC)
    names: dict[str, Any] = {"events": pa.table({"item_id": [50, 7, 99], "event_timestamp": [now, now, now]})}
    assert len(BLOCKS) == 3
    rollout, reader, join = BLOCKS
    exec(rollout, names)
    assert capsys.readouterr().out == "v7\n"
    exec(reader, names)
    assert names["items"].found.tolist() == [True, False, False, False]
    assert names["items"].version == "v7"
    exec(join, names)
    joined = names["joined"]
    assert joined.found.tolist() == [True, True, False]
    np.testing.assert_array_equal(joined.values[joined.index][:2], np.stack([run.vectors()[i] for i in (50, 7)]))
