"""Embeddings over HTTP: the application that `kellm serve` runs.

One request is answered from one version, which the answer names. docs/serving-http.md tells the formats and how the
server is operated.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar, cast

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kellm_features import __version__
from kellm_features.errors import ConfigError, StoreError, first_line
from kellm_features.store.http_formats import (
    ARROW,
    JSON,
    RAW,
    Ids,
    Limits,
    RequestError,
    answer_format,
    ids_of_query,
    read_ids,
    write_embeddings,
)
from kellm_features.store.http_metrics import CONTENT_TYPE, ENDPOINT, VIEW, Meter, Metrics
from kellm_features.store.http_openapi import ANSWERS, ID_BODIES, without_unused

if TYPE_CHECKING:
    from kellm_features.store.layout import IdType
    from kellm_features.store.reader import Embeddings

__all__ = ["Limits", "Reader", "create_app"]

T = TypeVar("T")
log = logging.getLogger(__name__)
_BEARER = HTTPBearer(auto_error=False, description="The token in the server's KELLM_SERVE_TOKEN.")


class Reader(Protocol):
    """What the server asks of a reader; `EmbeddingReader` is one."""

    @property
    def view(self) -> str: ...

    @property
    def id_type(self) -> IdType: ...

    async def get_async(
        self, ids: Sequence[int | str], *, on_missing: Literal["flag", "raise"] = "flag"
    ) -> Embeddings: ...

    def active(self) -> str: ...

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


def create_app(
    readers: Mapping[str, Reader],
    *,
    token: str | None,
    limits: Limits | None = None,
    metrics_folder: Path | None = None,
) -> FastAPI:
    """The application that serves these views.

    Args:
        readers: by the name of their view; closed when the server stops.
        token: asked of every caller as `Authorization: Bearer TOKEN`, but at /health, /ready and /docs; None asks
            nothing, which is for loopback alone.
        limits: what one request may ask; None: the defaults.
        metrics_folder: where several workers add up their metrics (see `Metrics`); None: this is the only worker.

    Raises:
        ConfigError: no view, or an empty token.
    """
    if not readers:
        raise ConfigError("no view is named to serve: name at least one")
    if token is not None and not token.strip():
        raise ConfigError("the token is empty: set KELLM_SERVE_TOKEN to a long random string, or leave it unset")
    service = _Service(readers, limits or Limits(), Metrics(metrics_folder))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for reader in readers.values():
            await reader.aclose()
            reader.close()

    app = FastAPI(
        title="kellm serve",
        description="Knowledge embeddings by id; every answer is of one published version, which it names.",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
    )
    guarded = APIRouter(dependencies=[Depends(_guard(token))] if token is not None else [])
    path = "/v1/views/{view}/embeddings"
    guarded.add_api_route("/v1/views", service.views, methods=["GET"], summary="Views, versions and dimensions")
    guarded.add_api_route(
        path,
        service.post,
        methods=["POST"],
        summary="Embeddings of the ids in the body",
        responses=ANSWERS,
        openapi_extra={"requestBody": ID_BODIES},
    )
    guarded.add_api_route(
        path, service.get, methods=["GET"], summary="Embeddings of a few ids, for a look by hand", responses=ANSWERS
    )
    guarded.add_api_route("/metrics", service.metrics, methods=["GET"], summary="Metrics for Prometheus")
    app.include_router(guarded)
    app.add_api_route("/health", service.health, methods=["GET"], summary="The process answers")
    app.add_api_route("/ready", service.ready, methods=["GET"], summary="Every view has a version to serve")
    app.add_middleware(Meter, metrics=service.counters)
    _tell_errors(app)
    app.openapi_schema = without_unused(app.openapi())
    return app


class _Service:
    """The endpoints."""

    def __init__(self, readers: Mapping[str, Reader], limits: Limits, counters: Metrics) -> None:
        self._readers = readers
        self._limits = limits
        self.counters = counters
        self._in_flight = 0
        self._reached: set[str] = set()

    async def post(self, request: Request, view: str) -> Response:
        """Ids as JSON, as an Arrow stream with one column `id`, or as raw little-endian int64."""
        reader, form = self._begin(request, view)
        with self._room():
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise RequestError(415, "no Content-Encoding is read here: send the body as it is")
            body = await _body(request, self._limits)
            ids = read_ids(media, body, await self._id_type(reader), self._limits)
            return await self._answer(reader, form, ids)

    async def get(
        self, request: Request, view: str, ids: Annotated[list[str] | None, Query(alias="id")] = None
    ) -> Response:
        """The same by `?id=1&id=2`."""
        reader, form = self._begin(request, view)
        with self._room():
            asked = ids_of_query(ids or [], await self._id_type(reader), self._limits)
            return await self._answer(reader, form, asked)

    def _begin(self, request: Request, view: str) -> tuple[Reader, str]:
        request.scope[ENDPOINT] = "embeddings"
        reader = self._readers.get(view)
        if reader is None:
            raise RequestError(404, f"there is no such view here; served: {', '.join(self._readers)}")
        request.scope[VIEW] = view
        return reader, answer_format(request.headers.get("accept"))

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Bounds the memory of bodies and answers: each request may hold some megabytes."""
        if self._in_flight >= self._limits.max_in_flight:
            raise RequestError(503, f"{self._in_flight} requests are being answered already: come back in a second")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def _id_type(self, reader: Reader) -> IdType:
        """Type of the view's ids; before the first answer it has to be asked of the store, which may hang."""
        if reader.view not in self._reached:
            await self._waited(reader, lambda: reader.id_type)
            self._reached.add(reader.view)
        return reader.id_type

    async def _waited(self, reader: Reader, ask: Callable[[], T]) -> T:
        """What a call that blocks returns, within the store's time."""
        try:
            async with asyncio.timeout(self._limits.store_timeout_s):
                return await to_thread.run_sync(ask, abandon_on_cancel=True)
        except TimeoutError as error:
            raise self._late(reader) from error

    def _late(self, reader: Reader) -> StoreError:
        return StoreError(f"{reader.view}: the store did not answer within {self._limits.store_timeout_s:g} s")

    async def _answer(self, reader: Reader, form: str, ids: Ids) -> Response:
        if form == JSON and len(ids) > self._limits.max_json_ids:
            raise RequestError(
                413, f"{len(ids)} ids are too many for JSON ({self._limits.max_json_ids}): accept {ARROW} or {RAW}"
            )
        answer = await self._fetch(reader, ids)
        found = int(answer.found.sum())
        self.counters.ids.labels(reader.view).inc(len(ids))
        self.counters.missing.labels(reader.view).inc(len(ids) - found)
        headers = {
            "Kellm-Version": answer.version,
            "Kellm-Dim": str(answer.values.shape[1]),
            "Kellm-Count": str(len(ids)),
            "Kellm-Found": str(found),
            "Cache-Control": "no-store",
            "Vary": "Accept",
        }
        return Response(write_embeddings(form, ids, answer), media_type=form, headers=headers)

    async def _fetch(self, reader: Reader, ids: Ids) -> Embeddings:
        try:
            async with asyncio.timeout(self._limits.store_timeout_s):
                return await reader.get_async(cast("Sequence[int | str]", ids))  # an array of int64 is one to it
        except TimeoutError as error:
            raise self._late(reader) from error

    async def views(self, request: Request) -> Response:
        """Each view with the version and dimension that it serves now, or why it serves none."""
        request.scope[ENDPOINT] = "views"
        told = []
        for name, reader in self._readers.items():
            entry: dict[str, Any] = {"name": name, "id_type": None, "version": None, "dim": None}
            try:
                entry["id_type"] = await self._id_type(reader)
                answer = await self._fetch(reader, [])  # version and dimension of one moment
                entry |= {"version": answer.version, "dim": answer.values.shape[1]}
            except StoreError as error:
                entry["error"] = first_line(error)
            told.append(entry)
        return _json(200, {"views": told})

    async def health(self, request: Request) -> Response:
        """200 while the process answers; asks no store."""
        request.scope[ENDPOINT] = "health"
        return _json(200, {"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """200 where every view's store answers and has a promoted version, else 503 with the reasons."""
        request.scope[ENDPOINT] = "ready"
        states = await self._states()
        versions = {name: version for name, (version, _) in states.items()}
        if failed := [error for _, error in states.values() if error]:
            return _json(503, {"error": "; ".join(dict.fromkeys(failed)), "versions": versions})
        return _json(200, {"status": "ready", "versions": versions})

    async def _states(self) -> dict[str, tuple[str | None, str | None]]:
        """Per view the version served now, or why there is none."""
        states = await asyncio.gather(*(self._state(reader) for reader in self._readers.values()))
        return dict(zip(self._readers, states, strict=True))

    async def _state(self, reader: Reader) -> tuple[str | None, str | None]:
        try:
            return await self._waited(reader, reader.active), None
        except StoreError as error:
            return None, first_line(error)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        request.scope[ENDPOINT] = "metrics"
        versions = {name: version for name, (version, _) in (await self._states()).items()}
        text = await to_thread.run_sync(self.counters.text, versions)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body, counted as it comes: a Content-Length is only what the caller says."""
    refusal = RequestError(413, f"the body has more than {limits.max_body_bytes} bytes: send the ids in parts")
    if int(request.headers.get("content-length", "0")) > limits.max_body_bytes:
        raise refusal
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise refusal
    except TimeoutError as error:
        raise RequestError(408, f"the body did not arrive within {limits.body_timeout_s:g} s") from error
    except ClientDisconnect as error:  # answered to nobody; counted under the status that nginx uses for it
        raise RequestError(499, "the caller went away") from error
    return bytes(body)


def _guard(token: str) -> Callable[..., Awaitable[None]]:
    expected = token.encode()

    async def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        # Header bytes arrive decoded as Latin-1. compare_digest takes as long for a near miss as for a far one.
        given = credentials.credentials.encode("latin-1") if credentials else b""
        if not secrets.compare_digest(given, expected):
            raise RequestError(401, "a bearer token is needed: send the header  Authorization: Bearer TOKEN")

    return check


def _tell_errors(app: FastAPI) -> None:
    """Every error is `{"error": "..."}`, without a trace."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)  # narrows the type
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
        return _json(error.status, {"error": str(error)}, headers)

    async def store_down(_: Request, error: Exception) -> Response:
        log.warning("%s", error)
        return _json(503, {"error": first_line(error)}, {"Retry-After": "1"})

    async def by_framework(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # narrows the type
        return _json(error.status_code, {"error": str(error.detail)}, error.headers)

    async def invalid(_: Request, error: Exception) -> Response:
        return _json(400, {"error": "the request's path or query is malformed"})

    async def unforeseen(_: Request, error: Exception) -> Response:
        return _json(500, {"error": "the server failed on this request; its log says why"})

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(StoreError, store_down)
    app.add_exception_handler(HTTPException, by_framework)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unforeseen)


def _json(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, {"Cache-Control": "no-store", **(headers or {})}, JSON)
