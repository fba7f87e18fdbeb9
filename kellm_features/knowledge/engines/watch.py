"""A script that outlives its parent by a moment: it kills what the parent could not when it was killed itself.

Its arguments are processes as `PID:CREATED`; its standard input is a pipe whose other end the parent holds and never
writes to. The pipe ends with the parent, however that ends. It imports nothing of ours, so that it starts at once.
"""

import contextlib
import sys

import psutil


def main() -> None:
    """Wait for the parent's end, then kill the processes that are still those that were named."""
    sys.stdin.read()
    for word in sys.argv[1:]:
        pid, created = word.split(":")
        with contextlib.suppress(psutil.Error):  # it has ended by itself
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # else the number is another's by now
                process.kill()


if __name__ == "__main__":
    main()
