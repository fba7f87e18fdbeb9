"""A script that runs publishers in processes of their own, forked from one that has everything imported.

Started by the fixture `spawn`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kellm_features.errors import KellmError, StoreError
from kellm_features.store import rollout
from kellm_features.store.backends import open_backend, update
from kellm_features.store.catalog import Catalog, utc_now
from kellm_features.store.repo import read_online_config

STORE = str(Path(rollout.__file__).parent)


def main() -> None:
    """Fork one process a line of stdin; answer its id."""
    import gc

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead do not stay as zombies, which look alive
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            work(json.loads(line))
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def work(job: dict[str, Any]) -> None:
    """One call.

    `watch` lists the places that it comes by. `at` is a place and the time at which to `then`: "kill" (itself),
    "pause", or the id of a process to kill. `fsize` is the largest file that it may write.
    """
    out = Path(job["out"])
    places: dict[str, int] = {}
    at, times = job.get("at", ("", 0))

    def act() -> None:
        then = job["then"]
        if then == "pause":
            out.with_suffix(".paused").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid() if then == "kill" else then, signal.SIGKILL)

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event in ("call", "c_call") and code.co_filename.startswith(STORE):
            place = f"{code.co_filename[len(STORE) :]}:{frame.f_lineno} {event}"
            places[place] = places.get(place, 0) + 1
            if place == at and places[place] == times:
                act()

    if "fsize" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"], job["fsize"]))
    call: Callable[[], Any] = {
        "publish": lambda: rollout.publish(job["repo"], {k: Path(v) for k, v in job["inputs"].items()}).name,
        "prune": lambda: rollout.prune(job["repo"], 1, grace_s=0),
        "race": lambda: race(job),
    }[job["call"]]
    if at or job.get("watch"):
        sys.setprofile(profile)
    try:
        answer = {"done": call()}
    except KellmError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    finally:
        sys.setprofile(None)
    if job.get("watch"):
        answer["places"] = places
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(answer))
    partial.rename(out)


def race(job: dict[str, Any]) -> list[tuple[int, str | None, str | None]]:
    """Promote and roll back at random; the changes made: revision, what was promoted (None: a rollback), active."""
    rng = random.Random(job["luck"])
    made = []
    backend = open_backend(read_online_config(job["repo"]))
    for _ in range(job["times"]):
        name = rng.choice([*job["names"], None])
        revision = 0

        def change(catalog: Catalog, name: str | None = name) -> Catalog:
            nonlocal revision
            revision = catalog.revision
            return catalog.rollback(utc_now()) if name is None else catalog.promote(name, utc_now())

        try:
            after = update(backend, change)
        except StoreError:  # nothing left to roll back to
            continue
        if after.revision > revision:
            made.append((after.revision, name, after.active))
    backend.close()
    return made


if __name__ == "__main__":
    main()
