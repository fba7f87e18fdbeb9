"""The Java that Spark would start: found and judged by one rule, for the session and for `kellm doctor`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIN_JAVA = 17
"""The oldest Java that Spark 4 starts on."""
SUPPORTED_JAVA = (17, 21)
"""The ones that Spark 4 is tested on by its makers."""


@dataclass(frozen=True)
class Java:
    """What was found. `remedy` is None where Spark can start on it, else what to do."""

    seen: str
    remedy: str | None
    version: int | None = None
    """The feature release, 17; None where it is not told."""


def find_java() -> Java:
    """JAVA_HOME's java, else the PATH's."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home) / "bin") if home else None)
    remedy = f"install Java {MIN_JAVA} or newer (Debian: apt install openjdk-17-jre-headless) or set JAVA_HOME"
    if java is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "no 'java' is on the PATH and JAVA_HOME is not set"
        return Java(where, remedy)
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        return Java(f"{java} does not run ({error})", remedy)
    version = re.search(r'version "(?:1\.)?(\d+)', told)
    if version is None:
        return Java(f"{java}, which does not tell its version", None)
    number = int(version[1])
    return Java(f"Java {number} at {java}", remedy if number < MIN_JAVA else None, number)
