"""A server on loopback that speaks OpenAI's chat completions, remembers each request, and misbehaves as told.

In a test:

    with LlmServer(["429,first=1,retry_after=0.01", "hang,contains=Alien"]) as server:
        ...  # server.base_url, server.requests

As a process:

    python tests/knowledge/llm_server.py --port-file F --log F --delay-s 0.05 --fail 500,every=7

The port file holds the port, written once the server listens. The log gets one JSON object a line as each answer has
been sent: `status`, `prompt` (SHA-256 of system and user text) and `begins` (the user text's first characters).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "test-model"
CUT_OFF = ("hang", "drip", "close")
CHANGED = ("garbage", "no-choices", "null", "empty", "spent", "refusal", "filter", "length", "no-usage")
KINDS = (*CUT_OFF, *CHANGED)
"""What may go wrong besides an HTTP status: see `Handler._misbehave`."""


@dataclass(frozen=True)
class Fault:
    """One misbehaviour and the requests it meets: those that fit every condition given."""

    kind: str
    every: int = 1
    """Every n-th request that the server gets."""
    contains: str = ""
    """Requests with this in system or user text."""
    first: int = sys.maxsize
    """The first k attempts of each prompt."""
    limit: int = sys.maxsize
    """The first n requests that the server gets."""
    retry_after: str = ""
    """Header of that name, as it stands."""
    message: str = ""
    """Of an error's body; where there is none, the body repeats the request's Authorization header."""
    code: str = ""
    """Of an error's body."""

    @staticmethod
    def parse(text: str) -> Fault:
        """Read `kind[,condition=value…]`, as in `429,every=3,retry_after=0.05`."""
        kind, *pairs = text.split(",")
        values: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
        for name in {"every", "first", "limit"} & values.keys():
            values[name] = int(values[name])
        if kind not in KINDS and not kind.isdecimal():
            raise ValueError(f"unknown misbehaviour {kind!r}: a status, or one of {', '.join(KINDS)}")
        return Fault(kind, **values)

    def meets(self, number: int, attempt: int, text: str) -> bool:
        """Whether it strikes the server's `number`-th request, the `attempt`-th of its prompt, both from 1."""
        return number % self.every == 0 and self.contains in text and attempt <= self.first and number <= self.limit


@dataclass(frozen=True)
class Request:
    """What one request to /v1/chat/completions carried."""

    body: dict[str, Any]
    authorization: str | None
    attempt: int

    @property
    def system(self) -> str:
        return self._said_by("system")

    @property
    def user(self) -> str:
        return self._said_by("user")

    @property
    def prompt(self) -> str:
        """SHA-256 of system and user text."""
        return hashlib.sha256(f"{self.system}\0{self.user}".encode()).hexdigest()

    def _said_by(self, role: str) -> str:
        return "\n".join(m["content"] for m in self.body["messages"] if m["role"] == role)


@dataclass
class LlmServer:
    """Listens from `with` on, on a free port of 127.0.0.1."""

    faults: Sequence[str | Fault] = ()
    """A text as `Fault.parse` reads it; the first that meets a request decides."""
    delay_s: float = 0.0
    """Before each answer."""
    key: str | None = None
    """Other keys get 401; None: any goes."""
    models: Sequence[str] = (MODEL,)
    """What it lists. A request for another gets 404."""
    log: Path | None = None
    port: int = 0
    together: int = 0
    """Answers are held back until so many requests wait, which proves that so many are in flight; 0: at once."""
    requests: list[Request] = field(default_factory=list)
    """In the order of arrival."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Answers that were sent whole, by status."""
    most_in_flight: int = 0

    def __enter__(self) -> LlmServer:
        self._faults = [Fault.parse(fault) if isinstance(fault, str) else fault for fault in self.faults]
        self._lock = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self._in_flight = 0
        self.arrived = threading.Event()
        """Set once any chat request has come."""
        self.stopping = threading.Event()
        self._barrier = threading.Barrier(self.together) if self.together else None
        self._http = _Http(("127.0.0.1", self.port), Handler)
        self._http.llm = self
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        if self._barrier:
            self._barrier.abort()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> Counter[str]:
        """User texts, by how often each was asked."""
        return Counter(request.user for request in self.requests)

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self._in_flight

    def begin(self, body: dict[str, Any], authorization: str | None) -> tuple[Request, Fault | None]:
        """Note a request; what is to go wrong with it."""
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            prompt = Request(body, authorization, 0).prompt
            self._attempts[prompt] += 1
            request = Request(body, authorization, self._attempts[prompt])
            self.requests.append(request)
            number, text = len(self.requests), f"{request.system}\n{request.user}"
        self.arrived.set()
        met = (fault for fault in self._faults if fault.meets(number, request.attempt, text))
        return request, next(met, None)

    def wait(self) -> None:
        """Let the delay pass, and the requests that answers wait for arrive."""
        if self._barrier:
            self._barrier.wait(timeout=30)
        self.stopping.wait(self.delay_s)

    def end(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def note(self, request: Request, status: int) -> None:
        """An answer has been sent whole."""
        with self._lock:
            self.statuses[status] += 1
            if self.log:
                line = {"status": status, "prompt": request.prompt, "begins": request.user[:120]}
                with self.log.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    llm: LlmServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave whenever it likes
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET /v1/models and POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        llm = self.server.llm
        if not self._welcome():
            self._error(401, "Incorrect API key provided")
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in llm.models]})
        else:
            self._error(404, "Not Found")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self._error(404, "Not Found")
            return
        llm = self.server.llm
        request, fault = llm.begin(json.loads(body), self.headers["Authorization"])
        try:
            status = self._answer(request, fault)
            if status:
                llm.note(request, status)
        finally:
            llm.end()

    def _answer(self, request: Request, fault: Fault | None) -> int:
        """Answer, and return the status; 0 where no whole answer was sent."""
        model = request.body["model"]
        if not self._welcome():
            return self._error(401, f"Incorrect API key provided: {self.headers['Authorization']}")
        if model not in self.server.llm.models:
            return self._error(404, f"The model `{model}` does not exist.")
        self.server.llm.wait()
        if fault is None:
            return self._send(200, completion(request))
        return self._misbehave(request, fault)

    def _misbehave(self, request: Request, fault: Fault) -> int:
        good = completion(request)
        choice = good["choices"][0]
        match fault.kind:
            case "hang":
                self.server.llm.stopping.wait()
                self.close_connection = True
                return 0
            case "drip":  # a byte now and then, never the whole
                self._write(200, {"Content-Length": "1000000"}, " ")
                while not self.server.llm.stopping.wait(0.02):
                    self.wfile.write(b" ")
                self.close_connection = True
                return 0
            case "close":  # in the middle of the body
                text = json.dumps(good)
                self._write(200, {"Content-Length": str(len(text))}, text[: len(text) // 2])
                self.close_connection = True
                return 0
            case "garbage":
                return self._write(200, {"Content-Length": "17"}, '{"choices": [{"me')
            case "no-choices":
                good["choices"] = []
            case "null":
                choice["message"]["content"] = None
            case "empty":
                choice["message"]["content"] = ""
            case "spent":  # as by a reasoning model whose thoughts took all tokens
                choice["message"]["content"] = None
                choice["finish_reason"] = "length"
            case "refusal":
                choice["message"] |= {"content": None, "refusal": "I cannot help with that."}
            case "filter":
                choice["finish_reason"] = "content_filter"
            case "length":
                choice["finish_reason"] = "length"
            case "no-usage":
                del good["usage"]
            case status:
                message = fault.message or f"Told to fail (Authorization: {self.headers['Authorization']})"
                return self._error(int(status), message, fault.retry_after, fault.code)
        return self._send(200, good)

    def _welcome(self) -> bool:
        key = self.server.llm.key
        return key is None or self.headers["Authorization"] == f"Bearer {key}"

    def _error(self, status: int, message: str, retry_after: str = "", code: str = "") -> int:
        error = {"message": message, "type": "test", "param": None, "code": code or status}
        return self._send(status, {"error": error}, {"Retry-After": retry_after} if retry_after else {})

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> int:
        text = json.dumps(body)
        return self._write(status, {"Content-Length": str(len(text)), **(headers or {})}, text)

    def _write(self, status: int, headers: dict[str, str], text: str) -> int:
        """Status line, headers and body in one segment, so that no client waits for a delayed acknowledgement."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self._headers_buffer.append(b"\r\n" + text.encode())
        self.flush_headers()
        return status


def completion(request: Request) -> dict[str, Any]:
    """A chat completion that depends on the prompt alone."""
    text = answer(request.user, request.body.get("response_format"))
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 0,
        "model": request.body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": len(f"{request.system} {request.user}".split()),
            "completion_tokens": len(text.split()),
        },
    }


def answer(user: str, response_format: dict[str, Any] | None = None) -> str:
    """What the source of a prompt says first: two sentences of the page, or of what stands in another tag.

    Under a JSON schema, an object with one such text per property.
    """
    quoted = re.search(r"<(page|history|descriptions)>\n?(.*?)</\1>", user, re.DOTALL)
    source = " ".join((quoted[2] if quoted else user).split())
    said = " ".join(re.split(r"(?<=[.!?]) ", source)[:2])
    title = re.search(r"^The title is: (.+)$", user, re.MULTILINE)
    text = f"{title[1]}: {said}" if title and title[1].split(" (")[0] not in said else said
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    if response_format and response_format["type"] == "json_schema":
        return json.dumps(dict.fromkeys(response_format["json_schema"]["schema"]["properties"], text))
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server for tests.")
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--key")
    parser.add_argument("--model", action="append", help="may be given again")
    parser.add_argument("--fail", action="append", default=[], help="as in 429,every=3,retry_after=0.05; may repeat")
    args = parser.parse_args(argv)
    models = args.model or [MODEL]
    with LlmServer(args.fail, args.delay_s, args.key, models, args.log, args.port) as server:
        temporary = args.port_file.with_suffix(".tmp")
        temporary.write_text(str(server.port), encoding="utf-8")
        temporary.replace(args.port_file)
        threading.Event().wait()


if __name__ == "__main__":
    main()
