"""What the native module shows to, and takes from, the other libraries of the process."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None,
    reason="nm and readelf (binutils) are not installed",
)


@pytest.fixture(scope="module")
def module_path() -> Path:
    spec = importlib.util.find_spec("xlmr_ext._C")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def output(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_binutils
def test_only_the_module_entry_is_exported(module_path: Path) -> None:
    lines = output("nm", "--dynamic", "--defined-only", module_path).splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__C"]


@needs_binutils
def test_libgomp_is_found_by_its_soname_alone(module_path: Path) -> None:
    dynamic = output("readelf", "--dynamic", "--wide", module_path)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert [name for name in needed if "omp" in name] == ["libgomp.so.1"]
    # A path would prefer one file over the libgomp that torch has loaded.
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    # Torch is met through Python only: no version of it is built in.
    assert not [name for name in needed if "torch" in name or "c10" in name]


@needs_binutils
def test_libgomp_versions_are_ones_that_torch_has(module_path: Path) -> None:
    # Torch brings a libgomp of gcc 8.5, which ends at GOMP_5.0 and OMP_5.0.
    found = re.findall(
        r"Name: (?:GOMP|OMP)_(\d+)\.(\d+)", output("readelf", "-V", "--wide", module_path)
    )
    assert found, "no symbol of libgomp is used: were the kernels built without OpenMP?"
    assert max((int(major), int(minor)) for major, minor in found) <= (4, 5)


MAPPED_LIBGOMP = """
import {first}
import {second}
import torch, xlmr_ext
x = torch.randn(256, 256)
(x @ x).sum()
torch.ops.xlmr_ext  # importing the ops is what loads the native module
import xlmr_ext.ops
y = torch.ops.xlmr_ext.linear_forward(x, [x], [], None, "none")
assert torch.allclose(y, x @ x.T, atol=1e-3)
with open("/proc/self/maps") as maps:
    paths = {{line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}}
print(*sorted(paths), sep="\\n")
"""


@pytest.mark.parametrize(("first", "second"), [("torch", "xlmr_ext._C"), ("xlmr_ext._C", "torch")])
def test_one_openmp_runtime_whoever_comes_first(first: str, second: str, tmp_path: Path) -> None:
    program = MAPPED_LIBGOMP.format(first=first, second=second)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1, result.stdout
