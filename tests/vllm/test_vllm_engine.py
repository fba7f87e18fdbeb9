"""vLLM in process: answers, prefix cache, JSON under a schema, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import psutil
import pyarrow.parquet as pq
import pytest

from kellm_features.errors import ConfigError, EngineError
from kellm_features.knowledge import generate, writer
from kellm_features.knowledge.engines import Completion, Prompt
from kellm_features.knowledge.engines.base import Failure
from kellm_features.knowledge.engines.local_vllm import VllmEngine, load
from kellm_features.knowledge.localmodel import EMBEDDED_MODEL
from kellm_features.settings import GenerateSettings, VllmSettings
from tests.knowledge.world import FILMS, World

OPTIONS = VllmSettings(
    dtype="bfloat16",
    max_model_len=2048,
    enforce_eager=True,  # compiling takes minutes on a CPU
    engine_args={"block_size": 32},  # tokens; a whole block is cached, and the CPU build's 128 are most of a prompt
)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    deferred = load(GenerateSettings(vllm=OPTIONS))
    started = deferred.started
    assert isinstance(started, VllmEngine)
    # What was known before is what came of it: a change would make finished texts look unfinished.
    assert [deferred.model_id, deferred.revision, deferred.sampling] == [
        started.model_id,
        started.revision,
        started.sampling,
    ]
    yield started
    started.close()


def completions(engine: VllmEngine, prompts: list[Prompt], max_tokens: int) -> list[Completion]:
    pairs = list(engine.generate(prompts, max_tokens=max_tokens))
    assert sorted(place for place, _ in pairs) == list(range(len(prompts)))  # each once
    answers = [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]
    assert all(isinstance(answer, Completion) for answer in answers), answers
    return answers


def test_answers_belong_to_their_prompts(engine: VllmEngine, films: list[Prompt]) -> None:
    answers = completions(engine, films, 16)
    for film, answer in zip(films, answers, strict=True):
        # Never the exact text: greedy decoding differs between batch layouts and machines.
        assert film.facts.title in answer.text
        assert "<|" not in answer.text
        assert 0 < answer.completion_tokens <= 16
        assert answer.prompt_tokens > 100
        assert answer.finish_reason == ("length" if answer.completion_tokens == 16 else "stop")


def test_all_processes_are_watched_over(engine: VllmEngine) -> None:
    """By one that kills them when this one was killed; tests/knowledge/test_watch.py shows that it does."""
    children = psutil.Process().children(recursive=True)
    (watcher,) = [child for child in children if any("watch.py" in word for word in child.cmdline())]
    watched = {int(word.partition(":")[0]) for word in watcher.cmdline()[2:]}
    own = {child.pid for child in children if "VLLM" in child.name()}
    assert len(own) >= 2
    assert own <= watched
    # Killed, it would be missed by whatever this process starts next.
    (tracker,) = [child.pid for child in children if any("resource_tracker" in word for word in child.cmdline())]
    assert tracker not in watched


def test_the_engine_says_what_shapes_its_texts(engine: VllmEngine) -> None:
    assert engine.model_id == EMBEDDED_MODEL
    assert engine.revision.startswith("b179c952")  # of the packaged weights
    assert engine.sampling == 'greedy bfloat16 vllm {"block_size": 32}'


def test_the_shared_prefix_is_computed_once(engine: VllmEngine, films: list[Prompt]) -> None:
    completions(engine, films[:1], 8)
    before = engine.metrics()
    completions(engine, films[1:], 8)
    after = engine.metrics()
    hits, asked = (after[name] - before[name] for name in ("vllm:prefix_cache_hits", "vllm:prefix_cache_queries"))
    system = len(engine._form.tokenizer(films[0].system)["input_ids"])
    assert hits >= (len(films) - 1) * (system // 32 * 32) > 0  # whole blocks of the system turn, at the least
    assert hits < asked


def test_json_keeps_to_the_schema(engine: VllmEngine, films: list[Prompt], film_as_json: Prompt) -> None:
    free, answer = completions(engine, [films[0], film_as_json], 64)
    assert film_as_json.schema is not None
    jsonschema.validate(json.loads(answer.text), dict(film_as_json.schema))
    assert answer.finish_reason == "stop"
    assert not free.text.lstrip().startswith("{")  # one request's schema binds no other


def test_one_request_fails_and_the_others_go_on(engine: VllmEngine, films: list[Prompt]) -> None:
    long = Prompt("", "word " * 3000, films[0].facts)
    unknown = Prompt("", "x", films[0].facts, {"type": "object", "properties": {"a": {"type": "no such type"}}})
    answers = dict(engine.generate([long, unknown, films[0]], max_tokens=8))
    assert isinstance(answers[0], Failure)
    assert "exceed the 2048 that the model reads: lower generate.page_tokens" in answers[0].reason
    assert isinstance(answers[1], Failure)
    assert answers[1].reason.startswith("vLLM refused the request: ")
    assert isinstance(answers[2], Completion)


def test_answers_come_before_the_last_is_finished_and_the_rest_can_be_given_up(
    engine: VllmEngine, films: list[Prompt], film_as_json: Prompt
) -> None:
    """The schema ends one answer after some 15 tokens; a barrier would hold it back until all have their 512."""
    before = engine.metrics()["vllm:generation_tokens"]
    answers = engine.generate([*films, film_as_json], max_tokens=512)
    next(answers)
    answers.close()
    assert engine._vllm.llm.get_num_unfinished_requests() == 0
    completions(engine, films[:1], 8)  # it goes on after being told to stop
    assert engine.metrics()["vllm:generation_tokens"] - before < len(films) * 512 / 2


def test_the_stage_writes_with_it_and_asks_nothing_twice(
    engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` on six films and four users; the engine is the module's, as another would take a minute to start."""
    real = writer.load_engine
    monkeypatch.setattr(writer, "load_engine", lambda name, s: engine if name == "vllm" else real(name, s))
    monkeypatch.setattr(engine, "close", lambda: None)  # the stage ends its engines
    world = World(tmp_path)
    world.write()
    options = ("generate.engine=vllm", "generate.limit=4", "generate.max_tokens=48", "generate.min_grounding=0")
    ctx = world.context("generate", *options)
    generate.run(ctx)
    rows = pq.read_table(ctx.out / "item_descriptions.parquet").to_pylist()
    assert len(rows) == len(FILMS)
    written = [row for row in rows if row["model_id"] == EMBEDDED_MODEL]
    assert written  # the model's own, but for answers that the stage found unfit
    before = engine.metrics()["vllm:prompt_tokens"]
    again = world.context("generate", *options)
    generate.run(again)
    assert pq.read_table(again.out / "item_descriptions.parquet").to_pylist() == rows
    assert engine.metrics()["vllm:prompt_tokens"] == before


def test_refusals_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"'generate.vllm.engine_args' sets dtype, model: accepted are"):
        load(GenerateSettings(vllm=VllmSettings(engine_args={"dtype": "auto", "model": "x"})))
    with pytest.raises(EngineError, match=r"vLLM 0.* cannot start with the model in .*no_such_argument"):
        list(load(GenerateSettings(vllm=VllmSettings(engine_args={"no_such_argument": 1}))).generate([], max_tokens=8))


def test_a_killed_core_is_told_and_waits_for_nothing(
    engine: VllmEngine, films: list[Prompt], film_as_json: Prompt
) -> None:
    """As by the kernel where memory runs out. The last test: it ends the module's engine."""
    answers = engine.generate([*films, film_as_json], max_tokens=512)
    next(answers)  # the others are being computed
    (core,) = [child for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name()]
    core.kill()
    with pytest.raises(EngineError, match=r"vLLM died while it computed with SmolLM2"):
        list(answers)
    with pytest.raises(EngineError, match=r"vLLM died"):
        list(engine.generate(films, max_tokens=8))
