"""The engine for OpenAI-compatible servers, against a real server on loopback that misbehaves as told."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from kellm_features.errors import ConfigError, EngineError, MissingExtraError
from kellm_features.knowledge.engines.base import Answer, Completion, Failure, Prompt
from kellm_features.knowledge.engines.openai_server import OpenAIEngine, load, retry_after_s
from kellm_features.knowledge.facts import ItemFacts
from kellm_features.settings import GenerateSettings, Settings

from .llm_server import MODEL, Fault, LlmServer, answer

KEY = "sk-proj-Zx81mQ_7-Lw"
TITLES = ["Heat", "Alien", "Fargo", "Scream", "Brazil", "Ran", "Jaws", "Big"]
ENGINE_LOG = "kellm_features.knowledge.engines.openai_server"


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is asked without the proxy that a machine may prescribe, and without the user's own key."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def prompt(title: str, schema: dict[str, Any] | None = None) -> Prompt:
    user = (
        f"The title is: {title}\n<page>\n{title} is a film of some fame. It was made long ago. More follows.\n</page>"
    )
    return Prompt("You describe films.", user, ItemFacts("film", title, None, ()), schema)


def settings(base_url: str, model: str = MODEL, revision: str | None = None, **server: Any) -> GenerateSettings:
    server = {"base_url": base_url, "concurrency": 4, "timeout_s": 20, "max_attempts": 3, **server}
    return GenerateSettings(engine="openai", model=model, revision=revision, server=server)


def engine_for(server: LlmServer, key: str | None = None, **more: Any) -> OpenAIEngine:
    """An engine that never waits of its own accord."""
    return OpenAIEngine(settings(server.base_url, **more), key, wait=lambda _: 0.0)


def ask(engine: OpenAIEngine, *titles: str) -> dict[str, Answer]:
    """Answers by title; each place must come once."""
    pairs = list(engine.generate([prompt(title) for title in titles], max_tokens=64))
    assert sorted(place for place, _ in pairs) == list(range(len(titles)))
    return {titles[place]: answered for place, answered in pairs}


def text_of(answered: Answer) -> str:
    assert isinstance(answered, Completion), answered
    return answered.text


def reason_of(answered: Answer) -> str:
    assert isinstance(answered, Failure), answered
    return answered.reason


# What is asked, and what is read


def test_a_request_on_the_wire() -> None:
    with LlmServer(key=KEY) as server:
        ask(engine_for(server, KEY), "Heat")
    (request,) = server.requests
    assert request.body == {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You describe films."},
            {"role": "user", "content": prompt("Heat").user},
        ],
        "temperature": 0,
        "max_tokens": 64,
    }


def test_a_server_without_keys_is_asked_without_one() -> None:
    with LlmServer() as server:
        ask(engine_for(server), "Heat")
    assert server.requests[0].authorization == "Bearer none"


def test_further_fields_go_along_and_count_as_sampling() -> None:
    more = {"temperature": 0.2, "seed": 7, "chat_template_kwargs": {"enable_thinking": False}}
    with LlmServer() as server:
        engine = engine_for(server, request=more)
        ask(engine, "Heat")
    assert more.items() <= server.requests[0].body.items()
    assert json.loads(engine.sampling.removeprefix("chat ")) == more


def test_a_model_that_counts_its_thoughts_gets_their_limit_instead() -> None:
    with LlmServer() as server:
        ask(engine_for(server, request={"max_completion_tokens": 500}), "Heat")
    body = server.requests[0].body
    assert body["max_completion_tokens"] == 500
    assert "max_tokens" not in body


def test_a_schema_is_asked_for_and_answered() -> None:
    schema = {"type": "object", "properties": {"genre": {"type": "string"}, "mood/tone": {"type": "string"}}}
    with LlmServer() as server:
        ((_, answered),) = engine_for(server).generate([prompt("Heat", schema)], max_tokens=64)
        asked = server.requests[0].body["response_format"]
        own = {"type": "json_object"}
        list(engine_for(server, request={"response_format": own}).generate([prompt("Heat", schema)], max_tokens=64))
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["strict"] is True
    assert asked["json_schema"]["schema"] == schema
    assert list(json.loads(text_of(answered))) == ["genre", "mood/tone"]
    assert server.requests[1].body["response_format"] == own


def test_answers_tell_text_tokens_and_how_they_ended() -> None:
    with LlmServer(["length,contains=Alien", "no-usage,contains=Fargo"]) as server:
        found = ask(engine_for(server), *TITLES)
    asked, said = "You describe films. " + prompt("Heat").user, answer(prompt("Heat").user)
    assert found["Heat"] == Completion(said, len(asked.split()), len(said.split()), "stop")
    assert [text_of(found[title]) for title in TITLES] == [answer(prompt(title).user) for title in TITLES]
    ended = {title: found[title].finish_reason for title in TITLES if isinstance(found[title], Completion)}
    assert ended == {title: "length" if title == "Alien" else "stop" for title in TITLES}
    assert found["Fargo"] == Completion(answer(prompt("Fargo").user), 0, 0)


def test_what_tells_two_engines_apart() -> None:
    def engine(revision: str | None = None, **request: Any) -> OpenAIEngine:
        return OpenAIEngine(settings("http://127.0.0.1:9/v1", revision=revision, request=request), KEY)

    assert engine(seed=1, top_p=0.9).sampling == engine(top_p=0.9, seed=1).sampling
    assert engine().sampling != engine(temperature=0.5).sampling
    assert engine().revision == "unversioned"
    assert engine("2025-01").revision == "2025-01"
    assert engine().model_id == MODEL


@pytest.mark.parametrize("field", ["model", "messages", "max_tokens", "n", "stream"])
def test_fields_of_the_engine_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"'generate.server.request' sets {field}"):
        OpenAIEngine(settings("http://127.0.0.1:9/v1", request={field: 1}), None)


@pytest.mark.parametrize("base_url", ["http://host:port/v1", "http://127.0.0.1:99999/v1", "https://[::1/v1"])
def test_an_address_that_is_none_is_refused(base_url: str) -> None:
    with pytest.raises(ConfigError, match=r"'generate.server.base_url' is '"):
        OpenAIEngine(settings(base_url), None)


# What goes wrong


@pytest.mark.parametrize(
    "fault", ["408", "409", "425", "429", "500", "502", "503", "504", "close", "garbage", "no-choices", "null", "empty"]
)
def test_what_passes_is_tried_again(fault: str) -> None:
    with LlmServer([f"{fault},first=2,contains=Alien"]) as server:
        found = ask(engine_for(server), "Heat", "Alien", "Fargo")
    assert text_of(found["Alien"]) == answer(prompt("Alien").user)
    assert server.asked == {prompt("Heat").user: 1, prompt("Alien").user: 3, prompt("Fargo").user: 1}


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_an_answer_that_takes_too_long_is_given_up(fault: str) -> None:
    with LlmServer([f"{fault},contains=Alien"]) as server:
        found = ask(engine_for(server, timeout_s=0.3, max_attempts=2), "Alien", "Heat")
    assert reason_of(found["Alien"]) == f"{server.base_url} sent no answer within 0.3 s (2 attempts)"
    assert text_of(found["Heat"])
    assert server.asked[prompt("Alien").user] == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "answered 500"),
        ("close", "no connection to"),
        ("garbage", "no chat completion: Invalid JSON"),
        ("no-choices", "no chat completion: choices"),
        ("null", "an empty answer"),
    ],
)
def test_what_never_passes_fails_alone(fault: str, said: str) -> None:
    with LlmServer([f"{fault},contains=Alien"]) as server:
        found = ask(engine_for(server), "Alien", "Heat")
    assert said in reason_of(found["Alien"])
    assert reason_of(found["Alien"]).endswith("(3 attempts)")
    assert text_of(found["Heat"])
    assert server.asked == {prompt("Alien").user: 3, prompt("Heat").user: 1}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("400", "answered 400: Told to fail"),
        ("413", "answered 413"),
        ("422", "answered 422"),
        ("refusal", "the model refused"),
        ("filter", "content filter"),
        ("spent", "raise generate.max_tokens"),
    ],
)
def test_what_cannot_pass_is_asked_once(fault: str, said: str) -> None:
    with LlmServer([f"{fault},contains=Alien"]) as server:
        found = ask(engine_for(server), "Alien", "Heat")
    assert said in reason_of(found["Alien"])
    assert text_of(found["Heat"])
    assert set(server.asked.values()) == {1}


def test_a_server_that_is_away_and_comes_back() -> None:
    with LlmServer() as before:
        base_url, port = before.base_url, before.port
    back = LlmServer(port=port)

    def while_waiting(state: Any) -> float:
        if state.attempt_number == 2:
            back.__enter__()
        return 0.0

    engine = OpenAIEngine(settings(base_url), None, wait=while_waiting)
    assert f"no connection to {base_url}" in reason_of(ask(engine_for(before), "Heat")["Heat"])
    try:
        assert text_of(ask(engine, "Heat")["Heat"])
    finally:
        back.__exit__()


def test_the_server_says_how_long_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, ENGINE_LOG)
    with LlmServer(["429,first=1,retry_after=0.04"]) as server:
        engine = OpenAIEngine(settings(server.base_url), None, wait=lambda _: 0.01)
        assert text_of(ask(engine, "Heat")["Heat"])
    (record,) = (r for r in caplog.records if r.name == ENGINE_LOG)
    assert isinstance(record.args, tuple)
    assert record.args[-1] == pytest.approx(0.05)


def test_a_wait_of_hours_is_not_waited_for() -> None:
    with LlmServer(["429,retry_after=7200"]) as server:
        assert "asks to wait 7200 s" in reason_of(ask(engine_for(server), "Heat")["Heat"])
    assert len(server.requests) == 1


def test_forms_of_retry_after() -> None:
    assert retry_after_s({}) == 0
    assert retry_after_s({"retry-after": "1.5"}) == 1.5
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_s({"retry-after": "soon"}) == 0
    assert retry_after_s({"retry-after": "-3"}) == 0
    assert retry_after_s({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert 3000 < retry_after_s({"retry-after": formatdate(time.time() + 3600, usegmt=True)}) <= 3600


def test_own_waits_grow_and_differ() -> None:
    from tenacity import AsyncRetrying, RetryCallState

    wait = OpenAIEngine(settings("http://127.0.0.1:9/v1"), None)._wait
    drawn: dict[int, list[float]] = {}
    for attempt in (1, 4, 40):
        state = RetryCallState(AsyncRetrying(), None, (), {})
        state.attempt_number = attempt
        drawn[attempt] = [wait(state) for _ in range(200)]
    for attempt, longest in ((1, 1), (4, 8), (40, 60)):
        assert 0 <= min(drawn[attempt]) < 0.1 * longest
        assert 0.9 * longest < max(drawn[attempt]) <= longest


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("401"), r"answered 401.*: no key was sent, set \$OPENAI_API_KEY"),
        (Fault("402", message="Pay."), "answered 402: Pay.: the account's quota is spent"),
        (Fault("429", code="insufficient_quota"), "the account's quota is spent"),
        (Fault("404"), "generate.server.base_url is to end before /chat/completions"),
    ],
)
def test_what_ends_the_run_at_once(fault: Fault, said: str) -> None:
    with LlmServer([fault]) as server, pytest.raises(EngineError, match=said):
        ask(engine_for(server, concurrency=1), *TITLES)
    assert len(server.requests) == 1


def test_an_unknown_model_names_those_that_there_are() -> None:
    with LlmServer(models=("llama-3-8b", "qwen-7b")) as server:
        with pytest.raises(EngineError, match=r"no model 'llama-3', it lists llama-3-8b, qwen-7b: correct"):
            ask(engine_for(server, model="llama-3"), "Heat")
        server.models = [f"m{n}" for n in range(20)]
        with pytest.raises(EngineError, match=r"it lists m13, .* and 12 more"):
            ask(engine_for(server, model="m0123"), "Heat")


def test_an_address_that_is_none_of_the_server() -> None:
    with LlmServer() as server:
        engine = OpenAIEngine(settings(server.base_url.removesuffix("/v1")), None)
        with pytest.raises(EngineError, match="mostly in /v1"):
            ask(engine, "Heat")


def test_a_fault_of_our_own_is_raised_and_not_swallowed() -> None:
    with LlmServer() as server, pytest.raises(TypeError, match="JSON serializable"):
        list(engine_for(server).generate([prompt("Heat", {"no JSON": object()})], max_tokens=64))


# Many at once, and stopping


def test_as_many_are_in_flight_as_allowed() -> None:
    """Answers are held back until four requests wait: fewer would never be answered."""
    with LlmServer(together=4) as server:
        ask(engine_for(server, concurrency=4), *TITLES)
    assert server.most_in_flight == 4


def test_an_answer_is_there_while_others_are_awaited() -> None:
    with LlmServer(["hang,contains=Alien"]) as server:
        answers = engine_for(server, timeout_s=600).generate([prompt(t) for t in TITLES], max_tokens=64)
        places = {next(answers)[0] for _ in TITLES[1:]}
        assert places == set(range(len(TITLES))) - {TITLES.index("Alien")}
        answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kellm-openai"]


def test_a_slow_caller_is_not_overrun() -> None:
    """Else a kill would lose answers that were paid for and not yet stored."""
    with LlmServer() as server:
        answers = engine_for(server, concurrency=2).generate([prompt(t) for t in TITLES], max_tokens=64)
        next(answers)
        time.sleep(0.3)  # without a limit the server would answer all of them meanwhile
        assert len(server.requests) <= 1 + 2
        assert len(list(answers)) == len(TITLES) - 1
    assert set(server.asked.values()) == {1}


def test_nothing_asked_is_nothing_answered() -> None:
    with LlmServer() as server:
        assert list(engine_for(server).generate([], max_tokens=64)) == []
    assert not server.requests


def test_below_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> dict[str, Answer]:
        return ask(engine_for(server), "Heat", "Alien")

    with LlmServer() as server:
        assert len(asyncio.run(cell())) == 2


SCRIPT = """
import sys
from kellm_features.knowledge.engines.base import Prompt
from kellm_features.knowledge.engines.openai_server import load
from kellm_features.settings import GenerateSettings
server = {"base_url": sys.argv[1], "timeout_s": 600, "concurrency": 2}
prompts = [Prompt("You describe films.", title, None) for title in ("Heat", "Alien", "Alien 2")]
answers = load(GenerateSettings(model="test-model", server=server)).generate(prompts, max_tokens=64)
next(answers)
"""


@pytest.mark.parametrize(("then", "code"), [("next(answers)", -signal.SIGINT), ("sys.exit(3)", 3), ("answers[0]", 1)])
def test_a_process_ends_while_requests_hang(then: str, code: int) -> None:
    """By Ctrl-C, of its own accord, or by an error, with requests in flight that would take ten minutes."""
    with LlmServer(["hang,contains=Alien"]) as server:
        command = [sys.executable, "-c", SCRIPT + then, server.base_url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                if code == -signal.SIGINT:
                    while process.poll() is None and server.asked["Alien 2"] == 0:
                        time.sleep(0.02)
                    process.send_signal(signal.SIGINT)
                said = process.communicate(timeout=60)[1]
            finally:
                process.kill()
    assert process.returncode == code, said
    assert "Exception ignored" not in said


# Secrets


@pytest.mark.parametrize("key", [KEY, "plain-words-8271", "a'b\"c\\d"])
@pytest.mark.parametrize("fault", ["401", "500", "400"])
def test_the_key_is_told_to_nobody(key: str, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """The server repeats the Authorization header in its error; every library logs all it can."""
    caplog.set_level(logging.DEBUG)
    with LlmServer([fault]) as server:
        engine = engine_for(server, key)
        try:
            told = repr(ask(engine, "Heat"))
        except EngineError as error:
            told = "".join(traceback.format_exception(error))
    assert server.requests[0].authorization == f"Bearer {key}"
    assert "Told to fail (Authorization: [key])" in told
    told += caplog.text + repr(vars(engine)) + engine.sampling
    assert key not in told
    assert repr(key)[1:-1] not in told
    assert "chat/completions" in caplog.text  # the logs are those of the client


@pytest.mark.parametrize("shown", ["sk-ab***wxyz", "sk-proj-****1234", "SK-0123456789", "hf_AbCdEfGhIj"])
def test_keys_of_others_are_not_told_either(shown: str) -> None:
    with LlmServer([Fault("400", message=f"Incorrect API key provided: {shown}. See the manual.")]) as server:
        reason = reason_of(ask(engine_for(server, KEY), "Heat")["Heat"])
    assert shown not in reason
    assert "Incorrect API key provided: [key]" in reason


def test_a_key_that_cannot_be_sent_is_refused_and_a_line_end_is_not() -> None:
    with pytest.raises(EngineError, match="holds characters") as caught:
        OpenAIEngine(settings("http://127.0.0.1:9/v1"), "top\nsecret")
    assert "secret" not in str(caught.value)
    with LlmServer(key=KEY) as server:
        assert text_of(ask(engine_for(server, f"{KEY}\n"), "Heat")["Heat"])


def test_page_text_is_not_told_in_a_reason() -> None:
    message = f"Input is too long. Got:\n{prompt('Heat').user}"
    with LlmServer([Fault("400", message=message)]) as server:
        reason = reason_of(ask(engine_for(server), "Heat")["Heat"])
    assert "Input is too long. Got:" in reason
    assert "[the rest quotes the prompt]" in reason
    assert "some fame" not in reason
    assert "\n" not in reason


# Loading


def test_loading_takes_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LlmServer(key=KEY) as server:
        assert text_of(ask(load(settings(server.base_url)), "Heat")["Heat"])


def test_loading_needs_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"kellm-features\[openai\]"):
        load(settings("http://127.0.0.1:9/v1"))


def test_the_settings_in_the_docs_make_an_engine() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    section = docs.split("## Any OpenAI-compatible server")[1]
    shown = Settings.model_validate(tomllib.loads(section.split("```toml\n")[1].split("```")[0]))
    engine = load(shown.generate)
    assert shown.generate.engine == "openai"
    assert engine.model_id in section.split("```toml")[0]  # the name under which the server above it serves
    assert '"enable_thinking": false' in engine.sampling


def test_the_module_is_light() -> None:
    heavy = ("openai", "anyio", "tenacity", "httpx2")
    code = f"import sys, {ENGINE_LOG}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"
