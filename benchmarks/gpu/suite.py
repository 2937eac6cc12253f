"""The tests that run on a GPU, through pytest in a process of its own."""

from __future__ import annotations

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import limited
from gpu.build import ROOT

FILES = (
    "test_ops", "test_autograd", "test_first_only", "test_model_step", "test_half_kernels",
    "test_cuda_device", "test_cuda_kernels",
)  # fmt: skip
# By their names: parameters of a device, the two files as wholes.
ON_GPU = "cuda"


def run_tests(
    files: Sequence[str], keyword: str, folder: Path, environment: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """Counts, and the failures' messages.

    Raises:
        RuntimeError: pytest itself ended before it had a result; or no test ran.
    """
    report, log = folder / "tests.xml", folder / "tests.log"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", keyword,
        "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), f"--junitxml={report}",
        *(str(ROOT / "tests" / f"{name}.py") for name in files),
    ]  # fmt: skip
    variables = dict(environment)
    variables.pop("XLMR_EXT_ISA", None)  # it would hold the tests to one table, a GPU left out
    began = time.monotonic()
    try:
        code = limited.run(command, log, seconds, variables, folder)
    except limited.OverdueError as error:
        raise RuntimeError(f"{error}:\n{limited.end_of(log, 5)}") from None
    if not report.exists() or code not in (0, 1):  # 1: a test failed
        raise RuntimeError(f"pytest ended with exit status {code}:\n{limited.end_of(log, 10)}")
    found = {"seconds": time.monotonic() - began, "exit_status": code, **counted(report)}
    if not found["passed"] and not found["failures"]:
        raise RuntimeError(f"no test ran, {found['skipped']} were skipped")
    return found


def counted(report: Path) -> dict[str, Any]:
    """Of pytest's JUnit file."""
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        broken = [child for child in case if child.tag in ("failure", "error")]
        if broken:
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "text": (broken[0].text or "")[-2000:]})
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": len(failures), "failures": failures}


def environment(site: Path | None) -> dict[str, str]:
    """For processes that import the package from ``site``, or from where it is installed, and the
    benchmarks."""
    paths = [site, ROOT / "benchmarks", os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}
