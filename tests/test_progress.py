import io
import logging
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from kellm_features import progress


def test_rate_and_eta_hold_where_steps_take_minutes() -> None:
    now = 0.0
    with Progress(console=Console(file=io.StringIO()), get_time=lambda: now, auto_refresh=False) as bar:
        bar.add_task("describe", total=100, unit="texts", note="")
        task = bar.tasks[0]
        column = progress._RateAndEta()
        assert str(column.render(task)) == ""
        now = 45.0
        bar.update(task.id, completed=30)
        assert str(column.render(task)) == "0.7 texts/s, 0:01:45 left"  # 70 left at 30 in 45 s


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([0.0, 5.0, 20.0, 21.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with caplog.at_level(logging.INFO, "kellm_features"), progress.track("encode", 40, "texts") as advance:
        advance(5)
        advance(5, "note")
        advance(5)
    assert [record.getMessage() for record in caplog.records] == ["encode: 10 of 40 texts, 0.5/s, ETA 60 s, note"]
