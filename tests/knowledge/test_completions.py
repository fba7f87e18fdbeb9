from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from kellm_features.knowledge import completions
from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.engines import Completion


def fill(folder: Path, *keys: str, purpose: str = "") -> None:
    with CompletionStore(folder) as store:
        for key in keys:
            store.add(key, Completion(f"Text {key}"), purpose)


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    with CompletionStore(tmp_path / "store") as store:
        store.add("a", Completion("A line\u2028break\x85\nand another", 3, 2, "length"))
        store.add("b", Completion("Bé"))
        assert store["a"].finish_reason == "length"
    again = CompletionStore(tmp_path / "store")
    assert len(again) == 2
    assert again["a"] == Completion("A line\u2028break\x85\nand another", 3, 2, "length")
    assert again["b"].text == "Bé"
    assert again.mean_answer_tokens() == 1.0
    assert "c" not in again


def test_opening_writes_nothing(tmp_path: Path) -> None:
    assert CompletionStore(tmp_path / "store").mean_answer_tokens() is None
    assert not (tmp_path / "store").exists()


def test_a_kill_loses_the_line_in_the_making_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "a", "b", "c")
    (log,) = tmp_path.glob("*.jsonl")
    whole = log.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        log.write_bytes(whole[:cut])
        assert len(CompletionStore(tmp_path)) == 2
    assert not caplog.records
    # What is added afterwards goes into a log of its own, not behind the torn line.
    fill(tmp_path, "d")
    again = CompletionStore(tmp_path)
    assert "c" not in again
    assert again["d"].text == "Text d"


def test_a_line_that_is_no_completion_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "a")
    lines = ["not json", "[1]", json.dumps({"hash": "x", "words": 3}), json.dumps({"text": "no hash"}), "\x00\x00"]
    (tmp_path / "other.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with caplog.at_level(logging.WARNING):
        store = CompletionStore(tmp_path)
    assert len(store) == 1
    assert len(caplog.records) == len(lines)
    assert "other.jsonl" in caplog.text


def test_the_newest_answer_serves_a_purpose(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b", purpose="p")
    store = CompletionStore(tmp_path)
    assert store.reusable("p") == "b"
    assert store.reusable("q") is None


def test_many_logs_become_one_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MOST_LOGS", 4)
    for number in range(6):
        fill(tmp_path, f"k{number}", purpose=f"p{number}")
    (tmp_path / ".half.tmp").write_text('{"hash": "z"')
    assert len(list(tmp_path.glob("*.jsonl"))) <= 5
    store = CompletionStore(tmp_path)
    assert [store[f"k{n}"].text for n in range(6)] == [f"Text k{n}" for n in range(6)]
    assert [store.reusable(f"p{n}") for n in range(6)] == [f"k{n}" for n in range(6)]
    fill(tmp_path, "more")
    assert not list(tmp_path.glob(".*.tmp"))


def test_scores_are_kept_with_the_answers_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CompletionStore(tmp_path) as store:
        store.add("a", Completion("A"), "p")
        store.keep_score("a", 0.75)
        store.keep_score("b", None)
    monkeypatch.setattr(completions, "MOST_LOGS", 0)
    fill(tmp_path, "c")  # merges
    again = CompletionStore(tmp_path)
    assert (again.is_scored("a"), again.score("a"), again.score("b"), again.is_scored("c")) == (True, 0.75, None, False)
    assert len(again) == 2
    again.keep_score("c", 0.5)  # a run that asks for nothing writes nothing
    assert not CompletionStore(tmp_path).is_scored("c")


def test_forgetting_waits_for_the_first_new_text(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    store = CompletionStore(tmp_path, forget=True)
    assert len(store) == 0
    assert len(CompletionStore(tmp_path)) == 1
    store.add("b", Completion("B"))
    store.close()
    again = CompletionStore(tmp_path)
    assert ("a" in again, "b" in again) == (False, True)
