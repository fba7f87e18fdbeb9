"""vLLM's own server over loopback, asked through the engine `openai`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from kellm_features.errors import EngineError
from kellm_features.knowledge.engines import Completion, Prompt
from kellm_features.knowledge.engines.base import Failure
from kellm_features.knowledge.engines.openai_server import OpenAIEngine, load
from kellm_features.knowledge.localmodel import local_model
from kellm_features.settings import GenerateSettings, ServerSettings, prepare_vllm

KEY = "sk-test-of-vllm"
START_S = 300.0
"""Alone on two cores the server takes 35 s."""


@dataclass
class Server:
    """A running server."""

    url: str

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        series = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert series, f"no metric {name}"
        return sum(map(float, series))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = local_model(GenerateSettings())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    prepare_vllm(1)  # its settings reach the server through the environment
    options = "--dtype bfloat16 --max-model-len 2048 --block-size 32 --enforce-eager --enable-prefix-caching".split()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.folder)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen([*command, *options], stdout=sink, stderr=subprocess.STDOUT)
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the server did not come up:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture
def engine(server: Server, monkeypatch: pytest.MonkeyPatch) -> OpenAIEngine:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return engine_of(server)


def engine_of(server: Server, model: str = "smollm2") -> OpenAIEngine:
    options = ServerSettings(base_url=f"{server.url}/v1", concurrency=4, max_attempts=2)
    return load(GenerateSettings(engine="openai", model=model, server=options))


def test_answers_prefix_cache_and_counts(engine: OpenAIEngine, server: Server, films: list[Prompt]) -> None:
    list(engine.generate(films[:1], max_tokens=8))  # whose prefix the others share
    hits, prompts = (server.metric(f"vllm:{name}_total") for name in ("prefix_cache_hits", "prompt_tokens"))
    answers = dict(engine.generate(films[1:], max_tokens=16))
    assert sorted(answers) == list(range(len(films) - 1))
    for place, answer in answers.items():
        assert isinstance(answer, Completion), answer
        assert films[1 + place].facts.title in answer.text
        assert 0 < answer.completion_tokens <= 16
    assert server.metric("vllm:prefix_cache_hits_total") - hits >= 32 * len(answers)
    counted = sum(answer.prompt_tokens for answer in answers.values())
    assert server.metric("vllm:prompt_tokens_total") - prompts == counted


def test_json_keeps_to_the_schema(engine: OpenAIEngine, film_as_json: Prompt) -> None:
    ((_, answer),) = engine.generate([film_as_json], max_tokens=64)
    assert isinstance(answer, Completion), answer
    assert film_as_json.schema is not None
    jsonschema.validate(json.loads(answer.text), dict(film_as_json.schema))


def test_a_prompt_beyond_the_window_fails_and_the_others_go_on(engine: OpenAIEngine, films: list[Prompt]) -> None:
    answers = dict(engine.generate([Prompt("", "word " * 3000, films[0].facts), films[0]], max_tokens=8))
    assert isinstance(answers[0], Failure)
    assert isinstance(answers[1], Completion)


def test_a_wrong_key_and_a_wrong_model(
    engine: OpenAIEngine, server: Server, films: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="smollm2"):  # what the server has
        list(engine_of(server, "no-such-model").generate(films[:1], max_tokens=8))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key")
    with pytest.raises(EngineError) as caught:
        list(engine_of(server).generate(films[:1], max_tokens=8))
    assert "sk-wrong-key" not in str(caught.value)
