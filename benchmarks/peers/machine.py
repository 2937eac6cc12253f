"""The machine's name, and how busy it is."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor's name and what this process may use of it."""
    path, name = Path("/proc/cpuinfo"), platform.processor()
    if path.exists():
        lines = (line.partition(":") for line in path.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        # Virtual machines hide the name behind the brand; family and model tell the generation.
        name = fields.get("model name", name)
        name += "".join(f", {k} {fields[k]}" for k in ("cpu family", "model") if k in fields)
    return {
        "processor": name,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def busy_seconds() -> float:
    """Of all processors since the system started."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return time.process_time()
    user, nice, system, _, _, irq, soft_irq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
