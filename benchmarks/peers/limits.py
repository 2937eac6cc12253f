"""Holds a process to an instruction set, through what the libraries read from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read once, when a library is loaded. OpenVINO and torch each hold a oneDNN and read its variable.
_VARIABLES = (
    "XLMR_EXT_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "CT2_FORCE_CPU_ISA",
)
_VALUES = {
    "avx2": ("avx2", "avx2", "AVX2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE", "AVX512", "AVX512"),
    "avx512_vnni": ("avx512_vnni", "avx512", "AVX512_CORE_VNNI", "AVX512_E1", "AVX512"),
}
BEST = "best"
ISAS = (*_VALUES, BEST)


def limits(isa: str) -> dict[str, str]:
    """The environment that holds libraries to an instruction set; none for ``BEST``."""
    return {} if isa == BEST else dict(zip(_VARIABLES, _VALUES[isa], strict=True))


def is_best(isa: str) -> bool:
    """Whether the processor has nothing beyond an instruction set."""
    return isa == BEST or (isa == "avx2" and not processor_has("avx512f"))


def processor_has(flag: str) -> bool:
    """Whether Linux lists a feature such as "avx512f"."""
    path = Path("/proc/cpuinfo")
    return path.exists() and flag in path.read_text().split()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """The environment of a process started within; limits that the caller's has do not count."""
    before = dict(os.environ)
    for name in _VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
