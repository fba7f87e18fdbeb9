"""Any server that speaks OpenAI's chat completions: vLLM's own, a gateway before many of them, or a provider's.

Requests run side by side, `generate.server.concurrency` of them, on an event loop in a thread of its own: it goes on
while the caller stores an answer, and works below a notebook's loop too. A slot is free again once its answer has been
taken, so a kill loses at most that many answers.

A request is tried again where a later attempt may do better: the server cannot be reached, is busy or broken, takes
longer than `generate.server.timeout_s`, or sends what is no answer. Waits grow from a second to a minute and are drawn
at random, so that many clients do not come back together; what Retry-After asks for comes on top.
"""

from __future__ import annotations

import atexit
import difflib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, HttpUrl, SecretStr, TypeAdapter, ValidationError

from kellm_features.errors import ConfigError, EngineError, MissingExtraError, first_line
from kellm_features.knowledge.engines.base import Answer, Completion, Failure, Prompt
from kellm_features.settings import GenerateSettings, llm_api_key

if TYPE_CHECKING:
    import openai
    from anyio.abc import TaskStatus
    from anyio.from_thread import BlockingPortal
    from anyio.streams.memory import MemoryObjectReceiveStream
    from tenacity import RetryCallState

    _Answers = MemoryObjectReceiveStream[tuple[int, Answer | Exception]]

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 120.0
"""A Retry-After beyond it fails the request: no run waits for a quota of the day. The limit of openai's own retries."""
_CONNECT_S = 10.0
_NO_KEY = "none"
"""What is sent where there is no key: the client refuses to start without one, servers without keys ignore it."""
_OURS = frozenset({"model", "messages", "max_tokens", "n", "stream", "stream_options"})
_PASSING = frozenset({408, 409, 425, 429})
_KEY_LIKE = re.compile(r"\b(?:sk|pk|rk|hf|gsk|xai|nvapi)[-_][\w*.-]{6,}|\bBearer\s+[^\s\"',)]+", re.IGNORECASE)
"""Providers' keys, whole or masked in the middle (sk-proj-ab***yz), and the value of an Authorization header."""
_REASON_CHARS = 300
_ECHO_CHARS = 24
"""As many characters in a row that stand in the prompt are taken for a quotation of it."""


def load(settings: GenerateSettings) -> OpenAIEngine:
    """The engine for the server of `generate.server` and the model of `generate.model`. Nothing is asked of it yet.

    Raises:
        ConfigError: `generate.server.request` sets a field that the engine sets, or `base_url` is no address.
        EngineError: the key in the environment cannot be sent.
        MissingExtraError: openai is not installed.
    """
    for module in ("openai", "tenacity"):
        try:
            import_module(module)
        except ImportError as error:
            raise MissingExtraError("openai", module, "generate.engine = 'openai'") from error
    return OpenAIEngine(settings, llm_api_key())


class OpenAIEngine:
    """Chat completions over HTTP, greedy unless the settings say otherwise."""

    source: Literal["llm", "template"] = "llm"

    def __init__(
        self, settings: GenerateSettings, key: str | None, wait: Callable[[RetryCallState], float] | None = None
    ) -> None:
        """Prepare requests; the server is first asked by `generate`.

        Args:
            settings: model, revision and server.
            key: sent as a bearer token; None for a server without keys.
            wait: seconds before the next attempt, by what tenacity tells of the last; None: full jitter, at most 1 s
                at first, doubling up to 60 s.

        Raises:
            ConfigError: `generate.server.request` sets a field that the engine sets, or `base_url` is no address.
            EngineError: the key cannot be sent.
        """
        server = settings.server
        if taken := sorted(_OURS & server.request.keys()):
            raise ConfigError(
                f"'generate.server.request' sets {', '.join(taken)}: accepted are all other fields of a request; "
                "model and token limit are generate.model and generate.max_tokens"
            )
        try:
            TypeAdapter(HttpUrl).validate_python(server.base_url)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"].removeprefix("Input should be a valid URL, ")
            raise ConfigError(
                f"'generate.server.base_url' is {server.base_url!r}, {wrong}: accepted is http(s)://HOST:PORT/v1"
            ) from error
        key = (key or _NO_KEY).strip()
        if not (key.isascii() and key.isprintable()):
            raise EngineError("$OPENAI_API_KEY holds characters that no HTTP header can: copy the key again")
        self.model_id = settings.model
        self.revision = settings.revision or "unversioned"
        self.shard_size = 64 * server.concurrency
        """So long that the last answers of a shard, when slots fall idle, weigh little."""
        self._server = server
        self._url = server.base_url
        self._fields: Mapping[str, Any] = {"temperature": 0, **server.request}
        self._key = SecretStr(key)
        self._wait = wait or _full_jitter()

    @property
    def sampling(self) -> str:
        """The request's fields besides messages, model, token limit and schema."""
        return f"chat {json.dumps(self._fields, sort_keys=True)}"

    def generate(self, requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Answers in the order in which the server finishes them, each with the place of its request.

        A caller that stops early closes the generator: what is in flight is cancelled and its connections are closed.

        Args:
            requests: any number; `concurrency` of them are with the server at a time.
            max_tokens: of one answer.

        Raises:
            EngineError: the server refuses the key, has no such model, or the account's quota is spent.
        """
        with _event_loop() as portal:
            _, answers = portal.start_task(self._run, requests, max_tokens)
            for _ in requests:
                place, answer = portal.call(answers.receive)
                if isinstance(answer, Exception):
                    raise answer
                yield place, answer

    async def _run(self, requests: Sequence[Prompt], max_tokens: int, *, task_status: TaskStatus[_Answers]) -> None:
        """Answer all requests; the stream that it starts with hands the answers over one by one."""
        import anyio
        import httpx2
        import openai

        slots = anyio.CapacityLimiter(self._server.concurrency)
        send, receive = anyio.create_memory_object_stream[tuple[int, Answer | Exception]](0)

        async def ask(place: int, prompt: Prompt) -> None:
            async with slots:
                answer: Answer | Exception
                try:
                    answer = await self._ask(client, prompt, max_tokens)
                except Exception as error:  # for the caller's thread; here it would only end the loop
                    answer = error
                await send.send((place, answer))
                if isinstance(answer, Exception):  # before the slot is free: nothing more is to be asked
                    tasks.cancel_scope.cancel()

        timeout = httpx2.Timeout(self._server.timeout_s, connect=min(self._server.timeout_s, _CONNECT_S))
        limits = httpx2.Limits(
            max_connections=self._server.concurrency, max_keepalive_connections=self._server.concurrency
        )
        async with (
            send,
            receive,
            openai.AsyncOpenAI(
                base_url=self._server.base_url,
                api_key=self._key.get_secret_value(),
                max_retries=0,  # one policy, tenacity's: the client's would multiply its attempts
                http_client=openai.DefaultAsyncHttpxClient(timeout=timeout, limits=limits),
            ) as client,
            anyio.create_task_group() as tasks,
        ):
            task_status.started(receive)
            for place, prompt in enumerate(requests):
                tasks.start_soon(ask, place, prompt)

    async def _ask(self, client: openai.AsyncOpenAI, prompt: Prompt, max_tokens: int) -> Answer | EngineError:
        """The answer to one prompt, after as many attempts as it needs and may have."""
        import anyio
        import tenacity

        def give_up(state: RetryCallState) -> Failure:
            attempts = f" ({state.attempt_number} attempts)" if state.attempt_number > 1 else ""
            return Failure(_passing(state).reason + attempts, transient=True)

        def pause(state: RetryCallState) -> float:
            return _passing(state).retry_after_s + self._wait(state)

        def tell(state: RetryCallState) -> None:
            reason, pause_s = _passing(state).reason, state.upcoming_sleep
            logger.info("attempt %d: %s; again in %.1f s", state.attempt_number, reason, pause_s)

        retrying = tenacity.AsyncRetrying(
            sleep=anyio.sleep,
            stop=tenacity.stop_after_attempt(self._server.max_attempts),
            wait=pause,
            retry=tenacity.retry_if_result(lambda outcome: isinstance(outcome, _Passing)),
            retry_error_callback=give_up,
            before_sleep=tell,
        )
        body = self._body(prompt, max_tokens)
        answer: Answer | EngineError = await retrying(self._attempt, client, prompt, body)
        return answer

    def _body(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        body = {"model": self.model_id, "messages": messages, **self._fields}
        if "max_completion_tokens" not in body:
            body["max_tokens"] = max_tokens
        if prompt.schema is not None and "response_format" not in body:
            schema = {"name": "answer", "strict": True, "schema": _without_lengths(prompt.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _attempt(
        self, client: openai.AsyncOpenAI, prompt: Prompt, body: Mapping[str, Any]
    ) -> Answer | _Passing | EngineError:
        """One request. Errors come back as values: raised, they would carry the client's, which may hold the key."""
        import anyio
        import httpx2
        import openai

        timeout_s = self._server.timeout_s
        try:
            with anyio.fail_after(timeout_s):  # the client's limits are per read: a server may drip for ever
                response = await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        except openai.APIStatusError as error:
            return await self._refusal(client, error, prompt)
        except (openai.APITimeoutError, TimeoutError):
            return _Passing(f"{self._url} sent no answer within {timeout_s:g} s")
        except openai.APIConnectionError as error:
            cause = self._told(first_line(error.__cause__ or error), prompt)
            return _Passing(f"no connection to {self._url}: {cause}")
        return _read(response.content)

    async def _refusal(
        self, client: openai.AsyncOpenAI, error: openai.APIStatusError, prompt: Prompt
    ) -> Failure | _Passing | EngineError:
        url, status = self._url, error.status_code
        said = self._told(error.message.partition(" - ")[2], prompt)
        told = f"{status}: {said}" if said else str(status)
        if status == 401:
            keyless = self._key.get_secret_value() == _NO_KEY
            remedy = "no key was sent, set $OPENAI_API_KEY" if keyless else "correct the key in $OPENAI_API_KEY"
            return EngineError(f"{url} answered {told}: {remedy}")
        if status == 402 or error.code == "insufficient_quota":
            return EngineError(f"{url} answered {told}: the account's quota is spent, raise it and run again")
        if status == 404:
            return await self._not_found(client, told)
        if status == 403:  # a key without rights, of which many in a row tell; or a gateway's filter, of this prompt
            return Failure(f"{url} answered {told}", transient=True)
        if status not in _PASSING and status < 500:
            return Failure(f"{url} answered {told}")
        wait_s = retry_after_s(error.response.headers)
        if wait_s > LONGEST_WAIT_S:
            asked = f"it asks to wait {wait_s:.0f} s, {LONGEST_WAIT_S:.0f} are accepted"
            return Failure(f"{url} answered {told}; {asked}", transient=True)
        return _Passing(f"{url} answered {told}", wait_s)

    async def _not_found(self, client: openai.AsyncOpenAI, told: str) -> EngineError:
        """A wrong model name, or a wrong address: what the server lists tells them apart."""
        import openai

        url, model = self._url, self.model_id
        try:
            names = [listed.id async for listed in client.models.list()]
        except (openai.OpenAIError, ValueError, AttributeError):  # what is no server of models sends anything
            names = []
        if names and model not in names:
            near = ", ".join(difflib.get_close_matches(model, names, n=8, cutoff=0.0))
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            return EngineError(f"{url} has no model {model!r}, it lists {near}{more}: correct generate.model")
        return EngineError(
            f"{url} answered {told}: generate.server.base_url is to end before /chat/completions, mostly in /v1, "
            f"and generate.model ({model!r}) to be a model that the server has"
        )

    def _told(self, text: str, prompt: Prompt) -> str:
        """What a server or library says, in one line: without keys, without the prompt, and not too long."""
        text = " ".join(text.split())
        if (key := self._key.get_secret_value()) != _NO_KEY:
            text = text.replace(key, "[key]")
        text = _KEY_LIKE.sub("[key]", text)[:_REASON_CHARS]
        for start in range(len(text) - _ECHO_CHARS + 1):
            quoted = text[start : start + _ECHO_CHARS]
            if quoted in prompt.user or quoted in prompt.system:
                return f"{text[:start].rstrip()} [the rest quotes the prompt]".lstrip()
        return text


def _without_lengths(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without limits of length, which strict modes refuse; the answer is cut to them when it is read."""
    properties = {
        name: {key: value for key, value in one.items() if key != "maxLength"}
        for name, one in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties}


@contextmanager
def _event_loop() -> Iterator[BlockingPortal]:
    """An event loop in a thread of its own. Left early, as by Ctrl-C, the block cancels what still runs in it."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal(name="kellm-openai") as portal:
        # A generator that is still open when the process ends is closed after its thread is gone, and would wait for
        # it for ever: end the loop while there is one.
        stop = partial(portal.call, portal.stop, True)
        atexit.register(stop)
        try:
            yield portal
        finally:
            atexit.unregister(stop)


@dataclass(frozen=True)
class _Passing:
    """What a later attempt may do better."""

    reason: str
    retry_after_s: float = 0.0


def _passing(state: RetryCallState) -> _Passing:
    outcome = state.outcome.result() if state.outcome else None
    assert isinstance(outcome, _Passing)
    return outcome


def _full_jitter() -> Callable[[RetryCallState], float]:
    from tenacity import wait_random_exponential

    return wait_random_exponential(multiplier=1, max=60)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, by `retry-after-ms` or `Retry-After` (seconds or a date); else 0."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            pass
    return 0.0


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Reply(BaseModel):
    """The part of a chat completion that is read; servers add fields of their own."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


def _read(content: bytes) -> Answer | _Passing:
    """The completion in a response's body."""
    try:
        reply = _Reply.model_validate_json(content)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        return _Passing(f"the server sent no chat completion: {f'{where}: ' if where else ''}{wrong['msg']}")
    choice = reply.choices[0]
    text = choice.message.content or ""
    if choice.finish_reason == "content_filter":
        return Failure("the server's content filter withheld the answer")
    if choice.message.refusal:
        return Failure("the model refused to answer")
    cut_off = choice.finish_reason == "length"
    if not text.strip():
        if cut_off:  # a reasoning model spent them all before its answer; so would the next attempt
            return Failure("the token limit was reached before any text: raise generate.max_tokens")
        return _Passing("the server sent an empty answer")
    usage = reply.usage or _Usage()
    return Completion(
        text, usage.prompt_tokens or 0, usage.completion_tokens or 0, finish_reason="length" if cut_off else "stop"
    )
