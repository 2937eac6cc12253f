"""Measurements in a process of their own.

A kernel that has never met a device may crash the process, hang, or leave the device in error. The
process notes which way it is in; where it ends before its time, another starts without that way.

    python -m gpu.process PLAN.json RESULT.json         # what gpu_check.py starts
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from gpu import limited

# What a process may take beyond its time, to start and to end the case that it is in; and for one
# turn, the first of a kind included.
GRACE, SILENCE = 60.0, 45.0


class Progress:
    """The findings of a process, and on disk what they are so far.

    Attributes:
        found: what a section adds to; ``write`` keeps it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def write(self) -> None:
        _write(self.path, self.found)

    def running(self, way: str, what: str) -> None:
        _write(self.path.with_suffix(".now"), {"way": way, "what": what})

    def within(
        self, what: str, ways: Mapping[str, str] | None = None
    ) -> Callable[[str], AbstractContextManager[None]]:
        """Of a library's name: notes it and computes by the way that it stands for."""
        from gpu.ways import computed_by

        @contextmanager
        def entered(name: str) -> Iterator[None]:
            self.running(name, what)
            with computed_by((ways or {}).get(name, name)):
                yield

        return entered


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def measured(
    plan: dict[str, Any], folder: Path, environment: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """A plan's findings. ``died`` in them: by way, how the process ended and in what; ``failed``
    where it did so outside of any."""
    until = time.monotonic() + seconds
    ways, died = list(plan["ways"]), {}
    while True:
        left = max(until - time.monotonic(), 0.0)
        found = _once({**plan, "ways": ways, "seconds": left}, folder, environment)
        ended, now = found.pop("ended"), found.pop("now")
        if ended is None:
            break
        way = now.get("way")
        if way not in ways:
            found.setdefault("failed", {})["process"] = ended
            break
        died[way] = f"{ended} in {now['what']}"
        ways.remove(way)
        if not ways or time.monotonic() > until:
            break
    return {**found, "died": died}


def _once(plan: dict[str, Any], folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    files = {name: folder / f"{name}.json" for name in ("plan", "result")}
    files["now"] = folder / "result.now"
    for file in files.values():
        file.unlink(missing_ok=True)
    files["plan"].write_text(json.dumps(plan))
    command = [sys.executable, "-m", "gpu.process", str(files["plan"]), str(files["result"])]
    ended, log = None, folder / "result.log"
    try:
        limit = plan["seconds"] + GRACE
        code = limited.run(command, log, limit, environment, folder, files["now"], SILENCE)
        if code:
            ended = f"exit status {code} ({limited.end_of(log, 1) or 'no message'})"
    except limited.OverdueError as error:
        ended = str(error)
    read = {
        name: json.loads(file.read_text()) if file.exists() else {} for name, file in files.items()
    }
    return {**read["result"], "now": read["now"], "ended": ended}


def main() -> None:
    from gpu.clock import clock_of

    plan = json.loads(Path(sys.argv[1]).read_text())
    progress = Progress(Path(sys.argv[2]))
    importlib.import_module(plan["section"]).run(plan, clock_of(plan["device"]), progress)
    progress.write()


if __name__ == "__main__":
    main()
