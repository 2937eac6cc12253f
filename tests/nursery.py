"""Runs that can be killed: a child process each, of a parent that has imported everything."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from xlmr_ext.training.log import STEPS_NAME
from xlmr_ext.training.state import STATE_NAME

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

    def kill_at_random(
        self, folder: Path, kills: int, seed: int, same_end: Callable[[Path, Path], None]
    ) -> int:
        """SIGKILL, again and again, to runs that are continued each time; the last is left alone.

        The moments are spread over the time that a whole run takes. Every run that ends is compared
        with one that was never stopped.

        Args:
            folder: of the runs.
            same_end: asserts that two runs gave the same bits.

        Returns:
            How many kills came after a state was saved.
        """
        source = random.Random(seed)
        whole = folder / "whole"
        assert self.train(folder / "warm-up")[0] == 0
        code, seconds = self.train(whole)
        assert code == 0
        killed = finished = after_a_state = 0
        while killed < kills:
            run = folder / f"run-{finished}"
            code, _ = self.train(run, kill_after=source.uniform(0, seconds))
            if code == 0:
                # It ended before its turn came; what it gave is compared, and another begins.
                same_end(run, whole)
                finished += 1
                continue
            assert code == -signal.SIGKILL
            killed += 1
            after_a_state += (run / STATE_NAME).exists()
            path = run / STEPS_NAME
            steps = path.read_text().count('"event": "step"') if path.exists() else 0
            print(f"kill {killed}: after {steps} steps")
        run = folder / f"run-{finished}"
        assert self.train(run)[0] == 0
        same_end(run, whole)
        print(
            f"{killed} kills in {finished + 1} runs of {seconds:.2f} s each, all to the same bits"
        )
        return after_a_state

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
