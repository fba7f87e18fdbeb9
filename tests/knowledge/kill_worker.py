"""A script that runs the stage `generate` in processes of their own, forked from one that has everything imported.

Each line of stdin is a job: the run's folder, the settings' overrides and the catalogue's size; it answers with the
process id. A process that ends well leaves the file `done` beside the run, or `error` with what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from world import World, stages_of

from kellm_features import pipeline, stages
from kellm_features.settings import load_settings


def many_films(count: int, changed: frozenset[int] = frozenset()) -> World:
    """A catalogue of so many films, each with a page of its own; those in `changed` have another lead."""
    world = World(Path())
    world.films = [(n, f"Film {n:04}", 1950 + n % 50, ["Drama"]) for n in range(1, count + 1)]
    made = {True: "remade", False: "made"}
    world.leads = {
        n: f"Film {n:04} is a {year} drama film directed by Ada Nr{n}. It was {made[n in changed]} in town {n}."
        for n, _, year, _ in world.films
    }
    return world


def main() -> None:
    """Fork one process a line of stdin; answer its id."""
    for name in ("openai", "tenacity", "kellm_features.data.history", "kellm_features.knowledge.generate"):
        import_module(name)  # before the forks, so that a job starts at once
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
    """Run the stages up to `generate`."""
    run = Path(job["run"])
    made = stages_of(many_films(job["films"], frozenset(job.get("changed", ()))))
    for module in (pipeline, stages):
        module.STAGES = made
        module.STAGE_NAMES = tuple(stage.name for stage in made)
    try:
        pipeline.run_stages(load_settings(None, job["overrides"]), run, first=job.get("first"))
    except BaseException as error:
        (run.parent / "error").write_text(repr(error), encoding="utf-8")
        raise
    (run.parent / "done").touch()


if __name__ == "__main__":
    main()
