"""What `kellm serve` tells Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = CONTENT_TYPE_LATEST
ENDPOINT, VIEW = "kellm.endpoint", "kellm.view"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counters of one server.

    Args:
        shared: the folder through which the workers of one server add up their numbers (prometheus_client's
            multi-process mode; the environment variable PROMETHEUS_MULTIPROC_DIR must name it before
            prometheus_client is imported). None: this process is the only worker.
    """

    def __init__(self, shared: Path | None = None) -> None:
        own = CollectorRegistry()
        self.requests = Counter(
            "kellm_serve_requests", "Answered requests.", ("endpoint", "view", "status"), registry=own
        )
        self.seconds = Histogram(
            "kellm_serve_request_seconds",
            "From the request's head to the answer's last byte handed to the socket.",
            ("endpoint", "view"),
            buckets=_SECONDS,
            registry=own,
        )
        self.ids = Counter("kellm_serve_ids", "Ids asked for, in answered requests.", ("view",), registry=own)
        self.missing = Counter("kellm_serve_missing_ids", "Ids of those that were not found.", ("view",), registry=own)
        self.bytes = Counter("kellm_serve_response_bytes", "Bytes of bodies.", ("endpoint", "view"), registry=own)
        if shared is None:
            ProcessCollector(registry=own)
            self.registry = own
        else:  # of several processes, CPU and memory of the one that happens to answer would mislead
            self.registry = CollectorRegistry()
            MultiProcessCollector(self.registry, path=str(shared))

    def text(self, versions: Mapping[str, str | None]) -> bytes:
        """The exposition; `versions` names what each view serves at this moment, None where it cannot be told."""
        up = GaugeMetricFamily("kellm_serve_view_up", "1 where the store answers and has a version.", labels=["view"])
        info = GaugeMetricFamily("kellm_serve_version_info", "The version served now.", labels=["view", "version"])
        for view, version in versions.items():
            up.add_metric([view], float(version is not None))
            if version is not None:
                info.add_metric([view, version], 1)
        # Of the store and not of a worker: made at the scrape, it is right in all of them and goes with the version.
        now = CollectorRegistry()
        now.register(_Families([up, info]))
        return generate_latest(self.registry) + generate_latest(now)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Meter:
    """ASGI middleware that counts requests.

    The endpoints write their name to `scope[ENDPOINT]`, and the view, once it is known to exist, to `scope[VIEW]`: a
    label never holds what a caller made up.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, size = 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            labels = (scope.get(ENDPOINT, "other"), scope.get(VIEW, ""))
            self._metrics.requests.labels(*labels, str(status)).inc()
            self._metrics.seconds.labels(*labels).observe(time.perf_counter() - began)
            self._metrics.bytes.labels(*labels).inc(size)
