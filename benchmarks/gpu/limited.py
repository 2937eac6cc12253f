"""A program with a time limit, which ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class OverdueError(Exception):
    """The time was over; the program and what it started have been killed."""


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str],
    folder: Path,
) -> int:  # fmt: skip
    """Its exit status; what it prints is in ``log``.

    Raises:
        OverdueError: it took longer.
    """
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OverdueError(f"no end after {seconds:.0f} s") from None
            raise


def end_of(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
