from pathlib import Path

import pytest

from kellm_features.cli.doctor import _java
from kellm_features.java import find_java


def fake_java(home: Path, line: str) -> None:
    (home / "bin").mkdir(parents=True, exist_ok=True)
    java = home / "bin" / "java"
    java.write_text(f"#!/bin/sh\necho '{line}' >&2\n")
    java.chmod(0o755)


@pytest.mark.parametrize(
    ("line", "version", "starts", "doctor"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17, True, "ok"),
        ('openjdk version "21" 2023-09-19', 21, True, "ok"),
        ('openjdk version "24.0.1" 2025-04-15', 24, True, "missing"),
        ('java version "1.8.0_402"', 8, False, "missing"),
        ("something else", None, True, "missing"),
    ],
)
def test_one_rule_for_session_and_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: int | None, starts: bool, doctor: str
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    fake_java(tmp_path, line)
    java = find_java()
    assert java.version == version
    assert (java.remedy is None) == starts
    assert _java().state == doctor


def test_no_java_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    java = find_java()
    assert "has no bin/java" in java.seen
    assert "openjdk-17-jre-headless" in (java.remedy or "")
