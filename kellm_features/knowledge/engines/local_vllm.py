"""A causal language model in local files, run by vLLM: continuous batching, prefix caching, structured output.

vLLM computes in processes of its own and is asked through its asynchronous engine, the one below its server: answers
come one by one, and the death of a process is told. (Of `vllm.LLM`, 0.32 waits for ever where the core's process was
killed, as the kernel does where memory runs out.) The event loop runs in a thread.

The processes are spawned: a script that loads this engine does so under `if __name__ == "__main__"`.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import psutil

from kellm_features.errors import ConfigError, EngineError, first_line
from kellm_features.knowledge.engines import watch
from kellm_features.knowledge.engines.base import Answer, Completion, Failure, Prompt
from kellm_features.knowledge.engines.deferred import Deferred
from kellm_features.knowledge.localmodel import ChatForm, LocalModel, beyond_window, local_model, require
from kellm_features.settings import GenerateSettings, VllmSettings, prepare_vllm

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream

logger = logging.getLogger(__name__)

SHARD_SIZE = 4096
"""Prompts handed to vLLM at a time. Its scheduler decides how many are computed together (256 by default, 1024 on
large GPUs): a few times that many keep it busy to the end, and their token ids take megabytes."""
SHUTDOWN_S = 10.0
"""For vLLM's processes to end by themselves: 3 s on a busy CPU. Then they are killed."""


def load(settings: GenerateSettings) -> Deferred:
    """The engine with the model that the settings name, its options from `generate.vllm`, started by its first request.

    `generate.model` is the embedded model's name, a folder in Hugging Face layout, a .gguf file, or a hub id.

    Raises:
        ConfigError: `generate.vllm.engine_args` sets what has a setting of its own.
        EngineError: no such model.
        MissingExtraError: vLLM is not installed.
    """
    prepare_vllm(settings.vllm.cpu_kvcache_gib)
    require("vllm", "vllm", "The engine 'vllm'")
    model = local_model(settings)
    _arguments(model, settings.vllm)  # what it refuses is told before anything is asked for
    return Deferred(model, _decoding(settings.vllm), functools.partial(VllmEngine, model, settings.vllm))


class VllmEngine:
    """Greedy decoding by vLLM, in processes that end with this one or with `close`."""

    source: Literal["llm", "template"] = "llm"
    shard_size = SHARD_SIZE

    def __init__(self, model: LocalModel, options: VllmSettings) -> None:
        """Start vLLM with a model; this takes from half a minute to several, most of it compiling.

        Args:
            model: its folder and name.
            options: vLLM's own.
        """
        import vllm
        from vllm.usage.usage_lib import UsageContext

        self.model_id = model.model_id
        self.revision = model.revision
        self._form = ChatForm(model.folder)
        arguments = _arguments(model, options)
        before = set(psutil.Process().children(recursive=True))
        try:
            # As the class for offline work: the server's defaults favour latency over throughput.
            llm = vllm.AsyncLLMEngine.from_engine_args(
                vllm.AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS
            )
        except Exception as error:  # options, memory and drivers each fail in their own way
            raise EngineError(
                f"vLLM {vllm.__version__} cannot start with the model in {model.folder}: {first_line(error)}; "
                "its log above says more, and generate.vllm holds its options"
            ) from error
        self._vllm = _Running(llm, before)
        # Refers to no engine, so that one that nobody holds any more ends too.
        self._finalizer = weakref.finalize(self, self._vllm.stop)
        self._numbers = itertools.count()
        self._window: int = llm.model_config.max_model_len
        self.sampling = _decoding(options)
        logger.info("vLLM %s: %s, %s, window %d", vllm.__version__, self.model_id, self.sampling, self._window)

    def close(self) -> None:
        """End vLLM's processes and give back their memory; the engine is of no use afterwards."""
        self._finalizer()

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Greedy completions, each as soon as it is finished. A caller that stops early ends the rest.

        A request is a `Failure`, and the others go on, where it has no room in the model's window or a schema that
        vLLM cannot decode under.

        Raises:
            EngineError: vLLM died, or was closed.
        """
        if not self._finalizer.alive:
            raise EngineError("this vLLM is closed: load the engine 'vllm' again")
        portal = self._vllm.portal
        running = ExitStack()
        answers = running.enter_context(portal.wrap_async_context_manager(self._answering(requests, max_tokens)))
        try:
            for _ in requests:
                place, answer = portal.call(answers.receive)
                if isinstance(answer, EngineError):
                    raise answer
                yield place, answer
        finally:
            if self._finalizer.alive:  # else the event loop has ended, and with it what ran there
                running.close()

    def metrics(self) -> dict[str, float]:
        """vLLM's counters and gauges in this process, as in `vllm:prefix_cache_hits` (tokens)."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        found: dict[str, float] = {}
        for metric in get_metrics_snapshot():
            if isinstance(value := getattr(metric, "value", None), int | float):
                found[metric.name] = found.get(metric.name, 0.0) + value
        return found

    @asynccontextmanager
    async def _answering(
        self, requests: Sequence[Prompt], max_tokens: int
    ) -> AsyncIterator[MemoryObjectReceiveStream[tuple[int, Answer | EngineError]]]:
        """All requests with vLLM at once, until the block is left; the stream has their answers as they come."""
        import anyio

        # Without a bound: vLLM computes on while the caller stores an answer.
        send, receive = anyio.create_memory_object_stream[tuple[int, Answer | EngineError]](math.inf)

        async def ask(place: int, request: Prompt) -> None:
            send.send_nowait((place, await self._ask(request, max_tokens)))

        async with send, receive, anyio.create_task_group() as tasks:
            for place, request in enumerate(requests):
                tasks.start_soon(ask, place, request)
            yield receive
            tasks.cancel_scope.cancel()

    async def _ask(self, request: Prompt, max_tokens: int) -> Answer | EngineError:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineGenerateError

        tokens = self._form.encode(request)
        if failure := beyond_window(len(tokens), max_tokens, self._window):
            return failure
        try:
            sampling = _sampling(request, max_tokens)
            (output,) = [
                output
                async for output in self._vllm.llm.generate(
                    tokens_input(tokens), sampling, f"kellm-{next(self._numbers)}"
                )
            ]
        except VLLMClientError as error:
            return Failure(f"vLLM refused the request: {first_line(error)}")
        except EngineGenerateError as error:  # "recoverable": of this request
            return Failure(f"vLLM failed on the request: {first_line(error.__cause__ or error)}")
        except Exception as error:  # its EngineDeadError; with anything else no further request would do better
            return EngineError(
                f"vLLM died while it computed with {self.model_id}: {first_line(error)} "
                "What was finished is kept: see its log, lower what takes memory under generate.vllm, and run again"
            )
        return _answer(output)


class _Running:
    """vLLM's asynchronous engine, its processes, and the thread whose event loop it is asked from."""

    def __init__(self, llm: Any, before: set[psutil.Process]) -> None:
        """Have what came since `before` watched: a kill -9 of this process would leave it, and its memory."""
        from anyio.from_thread import start_blocking_portal

        self.llm = llm
        self._thread = ExitStack()
        # Python's resource tracker is not vLLM's: it serves this process's other children too, and ends by itself.
        own = [
            child
            for child in psutil.Process().children(recursive=True)
            if child not in before and not any("resource_tracker" in word for word in child.cmdline())
        ]
        named = [f"{process.pid}:{process.create_time()}" for process in own]
        self._watch = subprocess.Popen([sys.executable, watch.__file__, *named], stdin=subprocess.PIPE)
        self.portal = self._thread.enter_context(start_blocking_portal(name="kellm-vllm"))

    def stop(self) -> None:
        """End processes and thread, also below a generator that is still open when the interpreter ends."""
        if (reading := self.llm.output_handler) is not None:
            self.portal.call(reading.cancel)  # else it logs the end of the processes as an error, with a trace
        self.llm.shutdown(timeout=SHUTDOWN_S)
        self.portal.call(self.portal.stop, True)
        self._thread.close()
        self._watch.communicate()  # closes the pipe: it looks after what is left, and ends
        # vLLM's __del__ does it once more, and fails where the interpreter's end has emptied its module before.
        self.llm.shutdown = lambda timeout=None: None


def _decoding(options: VllmSettings) -> str:
    """Decoding, dtype, quantization and further arguments: what is known before vLLM starts.

    Neither its version nor the device: they change words here and there, and do not make texts stale.
    """
    words = ["greedy", options.dtype, options.quantization, "vllm", json.dumps(options.engine_args, sort_keys=True)]
    return " ".join(word for word in words if word is not None and word != "{}")


def _arguments(model: LocalModel, options: VllmSettings) -> dict[str, Any]:
    """Of vLLM's engine."""
    own = {
        "model": str(model.folder),
        "enable_lora": False,
        "disable_log_stats": False,  # `metrics` reads them
        **options.model_dump(exclude={"engine_args", "cpu_kvcache_gib"}),
    }
    if taken := sorted(own.keys() & options.engine_args.keys()):
        raise ConfigError(
            f"'generate.vllm.engine_args' sets {', '.join(taken)}: accepted are vLLM's other engine arguments; "
            "what has a setting of its own is set there, and the model is generate.model"
        )
    return own | options.engine_args


def _sampling(request: Prompt, max_tokens: int) -> Any:
    """The vllm.SamplingParams of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = None if request.schema is None else StructuredOutputsParams(json=dict(request.schema))
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        structured_outputs=schema,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _answer(output: Any) -> Answer:
    """Of a finished vllm.RequestOutput."""
    (only,) = output.outputs
    spent = len(only.token_ids)
    if only.finish_reason not in ("stop", "length"):
        return Failure(f"vLLM ended the request with {only.finish_reason!r} after {spent} tokens")
    return Completion(only.text, len(output.prompt_token_ids), spent, only.finish_reason)
