"""A load generator: closed-loop connections over loopback, in a process of its own; prints one JSON line.

python benchmarks/load_http.py PORT SPEC.json

The specification holds connections, seconds, rate (requests per second over all connections; 0: as fast as they are
answered) and requests (path, headers, and base64 bodies that are sent in turn). With a rate, a request's latency
counts from the moment that it was due, so that a stall counts for every request that it delayed. Of raw answers, every
row is read: component 0 is the number of its version (`vN`), components 1 and 2 are its id.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ID_BASE = 1024
"""Ids are written in this base: float16 keeps integers up to 2,048."""


@dataclass
class Seen:
    """What one run saw."""

    latencies_s: list[float] = field(default_factory=list)
    errors: int = 0
    mixed: int = 0
    """Answers with a row of another version than the answer states."""
    wrong: int = 0
    """Answers with a row of another id than was asked for."""
    answer_bytes: int = 0
    versions: set[str] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)


async def connection(port: int, spec: dict[str, Any], number: int, end: float, seen: Seen) -> None:
    """One connection's requests, one after the other, until the end."""
    bodies = [base64.b64decode(body) for body in spec["bodies"]]
    lines = [f"POST {spec['path']} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in spec["headers"].items())]
    step = spec["connections"] / spec["rate"] if spec["rate"] else 0.0
    due = time.perf_counter() + step * number / spec["connections"]
    place = number * 7919
    streams = None
    while (now := time.perf_counter()) < end:
        if step:
            await asyncio.sleep(max(0.0, due - now))
        else:
            due = now
        body = bodies[place % len(bodies)]
        try:
            if streams is None:
                streams = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
            reader, writer = streams
            writer.write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status, *rest = head.splitlines()
            headers = dict(line.lower().split(": ", 1) for line in rest if line)
            answer = await reader.readexactly(int(headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.errors += 1
            seen.reasons.add(type(error).__name__)
            streams = None
            await asyncio.sleep(0.01)
        else:
            seen.latencies_s.append(time.perf_counter() - due)
            seen.answer_bytes += len(answer)
            if status.split()[1] != "200":
                seen.errors += 1
                seen.reasons.add(status)
            elif spec["check"]:
                check(headers, body, answer, seen)
        place += 1
        due += step
    if streams is not None:
        streams[1].close()


def check(headers: dict[str, str], body: bytes, answer: bytes, seen: Seen) -> None:
    """Each row against the version that the answer states, and against the id asked for."""
    rows = np.frombuffer(answer, "<f4").reshape(-1, int(headers["kellm-dim"]))
    ids = np.frombuffer(body, "<i8")
    version = headers["kellm-version"]
    seen.versions.add(version)
    seen.mixed += bool((rows[:, 0] != int(version.removeprefix("v"))).any())
    seen.wrong += len(rows) != len(ids) or bool((rows[:, 1] + ID_BASE * rows[:, 2] != ids).any())


async def run(port: int, spec: dict[str, Any]) -> dict[str, Any]:
    """All connections; the summary."""
    seen = Seen()
    began, cpu = time.perf_counter(), time.process_time()
    end = began + spec["seconds"]
    await asyncio.gather(*(connection(port, spec, number, end, seen) for number in range(spec["connections"])))
    wall = time.perf_counter() - began
    count = len(seen.latencies_s)
    p50, p99, p999, worst = np.percentile(seen.latencies_s, [50, 99, 99.9, 100]) * 1000 if count else [np.nan] * 4
    return {
        "requests": count,
        "requests_s": round(count / wall, 1),
        "errors": seen.errors,
        "reasons": " ".join(sorted(seen.reasons)),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "p999_ms": round(p999, 2),
        "max_ms": round(worst, 2),
        "client_cpu_ms": round((time.process_time() - cpu) * 1000 / max(count, 1), 3),
        "answer_bytes": round(seen.answer_bytes / max(count, 1)),
        "versions": len(seen.versions),
        "mixed": seen.mixed,
        "wrong": seen.wrong,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())))))
