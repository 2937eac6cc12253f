"""A program with a time limit, which ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class OverdueError(Exception):
    """The time was over; the program and what it started have been killed."""


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str],
    folder: Path, sign: Path | None = None, silence: float = 0.0,
) -> int:  # fmt: skip
    """Its exit status; what it prints is in ``log``.

    Args:
        sign: a file that the program writes again and again, at least every ``silence`` seconds.

    Raises:
        OverdueError: it took longer, or gave no sign.
    """
    end = time.monotonic() + seconds
    last, seen = time.monotonic(), 0
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(0.5, max(end - time.monotonic(), 0.0)))
                now = time.monotonic()
                if now >= end:
                    raise OverdueError(f"no end after {seconds:.0f} s")
                if sign is None:
                    continue
                written = sign.stat().st_mtime_ns if sign.exists() else 0
                if written != seen:
                    last, seen = now, written
                elif now - last > silence:
                    raise OverdueError(f"no sign of life for {silence:.0f} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def end_of(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
