"""Builds the package with CUDA kernels for the GPU at hand, into a folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu import limited

ROOT = Path(__file__).resolve().parents[2]


def build(site: Path, scratch: Path, capability: str, seconds: float) -> dict[str, Any]:
    """pip's installation into ``site``; what is found is {"seconds", "architectures", "nvcc"}.

    Raises:
        RuntimeError: it failed; the text has the end of what was printed.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc on PATH, in $CUDACXX or under /usr/local/cuda")
    architecture = f"{capability.replace('.', '')}-real"
    began = time.monotonic()
    log, variables = scratch / "build.log", {**os.environ, "CUDACXX": compiler}
    try:
        code = limited.run(command(site, scratch, architecture), log, seconds, variables, scratch)
    except limited.OverdueError as error:
        raise RuntimeError(f"{error}:\n{limited.end_of(log, 5)}") from None
    if code:
        raise RuntimeError(f"pip ended with exit status {code}:\n{limited.end_of(log, 30)}")
    if not list((site / "xlmr_ext").glob("_cuda*.so")):
        raise RuntimeError("the build made no module _cuda")
    return {
        "seconds": time.monotonic() - began,
        "architectures": architecture,
        "nvcc": nvcc_version(compiler),
    }


def command(site: Path, scratch: Path, architecture: str) -> list[str]:
    options = {
        "cmake.define.XLMR_EXT_CUDA": "ON",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES": architecture,
        "build-dir": str(scratch / "build"),
    }
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site)]
    # What the build needs may be there already, on a machine that reaches no index.
    if all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pybind11")):
        pip.append("--no-build-isolation")
    pip += [f"--config-settings={name}={value}" for name, value in options.items()]
    return [*pip, str(ROOT)]


def nvcc() -> str | None:
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).exists()), None)


def nvcc_version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    found = re.search(r"release ([\d.]+)", done.stdout)
    return found[1] if found else "unknown"
