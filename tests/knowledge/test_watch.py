"""What a killed process leaves behind is killed after it."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from kellm_features.knowledge.engines import watch

PARENT = """
import subprocess, sys, time
import psutil
sleeper, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) for _ in range(2))
named = [f"{sleeper.pid}:{psutil.Process(sleeper.pid).create_time()}", f"{other.pid}:1.0", "4194300:2.0"]
watcher = subprocess.Popen([sys.executable, sys.argv[1], *named], stdin=subprocess.PIPE)
print(sleeper.pid, other.pid, watcher.pid, flush=True)
if sys.argv[2] == "close":
    sleeper.kill()
    sleeper.wait()
    watcher.communicate()
    sys.exit(watcher.returncode)
time.sleep(120)
"""


def gone(pid: int) -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("end", ["kill", "close"])
def test_children_end_with_their_parent(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, watch.__file__, end], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        sleeper, other, watcher = map(int, parent.stdout.readline().split())
        try:
            if end == "kill":
                time.sleep(0.2)
                assert psutil.pid_exists(sleeper)
                parent.kill()
            else:
                assert parent.wait(30) == 0
            assert gone(watcher)
            assert gone(sleeper)
            assert psutil.Process(other).is_running()  # its number was another process's, by the time of birth
        finally:
            psutil.Process(other).kill()
