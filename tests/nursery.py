"""Runs that can be killed: a child process each, of a parent that has imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# The parent computes nothing, so that a child of it starts at once.
_PROGRAM = """
import json, os, signal, sys, time
{train}

for line in sys.stdin:
    folder, kill_after = json.loads(line)
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder, lambda: os.write(tell, b"!"))
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    os.read(ready, 1)
    started = time.monotonic()
    os.close(ready)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # it is waited for below, so the number is still its own
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(["exit", code, time.monotonic() - started]), flush=True)
"""


class Nursery:
    """Trains in a child of its own, which can be killed.

    Args:
        train: a program that defines ``train(folder, tell)``, which calls ``tell()`` when it
            begins.
    """

    def __init__(self, train: str) -> None:
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.replace("{train}", train)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def train(self, folder: Path, kill_after: float | None = None) -> tuple[int, float]:
        """The child's exit code, and its seconds from ``tell`` on, which ``kill_after`` counts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), kill_after]), file=self._process.stdin, flush=True)
        while not (line := self._process.stdout.readline()).startswith('["exit"'):
            assert line, "the process that trains has died"
        _, code, seconds = json.loads(line)
        return code, seconds

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
