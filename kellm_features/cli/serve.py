"""`kellm serve`: embeddings over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import logging.config
import signal
import socket
import ssl
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.errors import ConfigError, MissingExtraError
from kellm_features.settings import serve_token, share_metrics_folder

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kellm_features.store.http_formats import Limits
    from kellm_features.store.reader import EmbeddingReader

log = logging.getLogger(__name__)
MIB = 1024 * 1024
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"uvicorn": {"level": "INFO"}, "kellm_features": {"level": "INFO"}},
}
"""One line per event on stderr, for whatever collects a server's logs."""


@app.command("serve")
def serve(
    repo: Annotated[Path, typer.Option(help="Feast repository whose online store is read.")] = Path("feature_repo"),
    view: Annotated[
        list[str] | None, typer.Option(help="Embedding view to serve; may be given again. Default: all of them.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one, which is told.")] = 8080,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that share the port.")] = 1,
    max_ids: Annotated[int, typer.Option(min=1, help="Ids of one request.")] = 10_000,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Body of one request.")] = 4.0,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests that a worker answers at once.")] = 256,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM): serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    grace_s: Annotated[int, typer.Option(min=0, help="Time for requests in flight to finish after SIGTERM.")] = 30,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without a token (KELLM_SERVE_TOKEN).")
    ] = False,
) -> None:
    """Serve embeddings over HTTP, as JSON, Arrow or raw float32, with health checks and Prometheus metrics."""
    logging.config.dictConfig(LOGGING)
    token = serve_token()
    _check_exposure(host, token, tls=tls_cert is not None, insecure=insecure)
    _check_tls(tls_cert, tls_key)
    try:
        import uvicorn
        from uvicorn.supervisors import Multiprocess

        import_module("kellm_features.store.http")  # the workers' part: what it lacks is told here, before they start
        from kellm_features.store.http_formats import Limits
    except ModuleNotFoundError as error:
        raise MissingExtraError("serve", error.name or "fastapi", "kellm serve") from error

    limits = Limits(max_ids=max_ids, max_body_bytes=int(max_body_mib * MIB), max_in_flight=max_in_flight)
    plan = ServePlan(repo.absolute(), tuple(dict.fromkeys(view)) if view else _embedding_views(), limits)
    for reader in plan.readers().values():  # a wrong --repo or --view is told here, in one line
        reader.close()
    with ExitStack() as stack:
        if workers > 1:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kellm-serve-"))
            plan = replace(plan, metrics_folder=Path(folder))
            share_metrics_folder(folder)
        listener = stack.enter_context(_listen(host, port))
        config = uvicorn.Config(
            plan,
            factory=True,
            workers=workers,
            ws="none",
            lifespan="on",
            log_config=LOGGING,
            access_log=access_log,
            server_header=False,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
            timeout_graceful_shutdown=grace_s,
        )
        address, bound = listener.getsockname()[:2]
        place = f"[{address}]:{bound}" if ":" in address else f"{address}:{bound}"
        scheme = "https" if tls_cert else "http"
        stdout.print(f"serving {', '.join(plan.views)} at {scheme}://{place}", soft_wrap=True)
        if workers > 1:
            Multiprocess(config, sockets=[listener]).run()
        else:
            # The server stops in good order on SIGTERM and then raises it once more, for whoever was there before.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])


@dataclass(frozen=True)
class ServePlan:
    """What a worker serves; calling it makes the application. It travels to the workers and holds no secret."""

    repo: Path
    views: tuple[str, ...]
    limits: Limits
    metrics_folder: Path | None = None

    def readers(self) -> dict[str, EmbeddingReader]:
        """One reader per view."""
        from kellm_features.store.reader import EmbeddingReader

        return {view: EmbeddingReader.from_repo(self.repo, view=view) for view in self.views}

    def __call__(self) -> FastAPI:
        from prometheus_client import disable_created_metrics

        from kellm_features.store.http import create_app

        # When a series began: twice the series for what the server's start tells.
        disable_created_metrics()
        return create_app(self.readers(), token=serve_token(), limits=self.limits, metrics_folder=self.metrics_folder)


def _embedding_views() -> tuple[str, ...]:
    from kellm_features.store.reader import EMBEDDING_VIEWS

    return tuple(EMBEDDING_VIEWS)


def _check_exposure(host: str, token: str | None, *, tls: bool, insecure: bool) -> None:
    if _is_loopback(host):
        return
    if token is None and not insecure:
        raise ConfigError(
            f"--host {host} can be reached from other machines and KELLM_SERVE_TOKEN is not set: set it to a long "
            "random string, listen on 127.0.0.1, or say --insecure"
        )
    if token is not None and not tls:
        log.warning("the token and the vectors travel in the clear: end TLS in a proxy before it, or give --tls-cert")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _check_tls(cert: Path | None, key: Path | None) -> None:
    if key is not None and cert is None:
        raise ConfigError("--tls-key is given without --tls-cert: give the certificate chain too")
    if cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"--tls-cert {cert} with --tls-key {key or cert} cannot be used ({error}): both are PEM files, the key "
            "belongs to the certificate and has no password"
        ) from error


def _no_password() -> str:
    raise ValueError("the key asks for a password")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:  # also a name that is not known
        why = (error.strerror or str(error)).partition(" (")[0]  # Python repeats the address after it
        raise ConfigError(f"cannot listen on {host} port {port} ({why}): choose another --host or --port") from error
    listener.set_inheritable(True)
    return listener
