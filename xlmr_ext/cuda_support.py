"""Whether the CUDA kernels can compute: a build may have none, and a GPU may be none of theirs.

What they cannot do, torch's operators do (``fallback.py``); a refusal here is one sentence, the
beginning of the notice that says so.
"""

from __future__ import annotations

import os
import re
from functools import cache
from types import ModuleType
from typing import Any

import torch

_cuda: ModuleType | None
try:
    # Its runtime is linked statically and looks for a driver when it is first asked something.
    from xlmr_ext import _cuda

    _not_loaded = ""
except ModuleNotFoundError:
    _cuda, _not_loaded = None, "this build of xlmr_ext has no CUDA kernels"
except ImportError as error:  # built, but not for this system; the CPU needs nothing of it
    _cuda, _not_loaded = None, f"the CUDA kernels of this build do not load ({error})"


def chosen_gemm(value: str | None) -> str:
    """``native`` or ``torch``, as ``XLMR_EXT_CUDA_GEMM`` asks: whose products linear maps and the
    feed-forward network take. ``auto`` is torch's, until ours were measured on a GPU.

    Raises:
        ValueError: it is none of ``auto``, ``native``, ``torch``.
    """
    if value not in (None, "", "auto", "native", "torch"):
        raise ValueError(f"XLMR_EXT_CUDA_GEMM={value}: expected auto, native or torch")
    return "native" if value == "native" else "torch"


gemm = chosen_gemm(os.environ.get("XLMR_EXT_CUDA_GEMM"))


def is_built() -> bool:
    return _cuda is not None


def module() -> ModuleType:
    """The native module; :func:`refusal` has been asked before."""
    if _cuda is None:
        raise RuntimeError("this build of xlmr_ext has no CUDA kernels")
    return _cuda


@cache
def dtype_codes() -> dict[torch.dtype, int]:
    """The types that every kernel computes in, by their numbers in ``csrc/types.h``."""
    names: dict[str, int] = {} if _cuda is None else _cuda.dtypes
    return {getattr(torch, name): code for name, code in names.items()}


def type_names() -> str:
    return ", ".join(_name(dtype) for dtype in dtype_codes())


@cache
def refusal(device: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in this type on GPU number ``device``; None where they can."""
    if _cuda is None:
        return _not_loaded
    refused = machine_refusal(_cuda.machine(), _cuda.runtime)
    if refused is None:
        refused = device_refusal(device, _cuda.machine()["capabilities"], _cuda.architectures)
    if refused is None and dtype not in dtype_codes():
        refused = f"the CUDA kernels compute in {type_names()}, not in {_name(dtype)}"
    return refused


def machine_refusal(machine: dict[str, Any], runtime: int) -> str | None:
    """Of a machine as ``_cuda.machine`` finds it, by a runtime of this version."""
    error, driver = machine["error"], machine["driver"]
    if not error:
        return None
    if driver == 0:
        return "the CUDA kernels find no NVIDIA driver"
    if driver < runtime:
        return (
            f"the NVIDIA driver is too old for the CUDA kernels: it knows CUDA {_version(driver)}, "
            f"they were built with {_version(runtime)}"
        )
    return f"the CUDA kernels find no GPU ({error})"


def device_refusal(
    device: int, capabilities: list[int], architectures: tuple[str, ...]
) -> str | None:
    """Of one GPU of a machine, by kernels compiled for these architectures."""
    if device >= len(capabilities):
        return f"the CUDA kernels find {len(capabilities)} GPUs, and cuda:{device} is none of them"
    capability = capabilities[device]
    if any(runs_on(capability, architecture) for architecture in architectures):
        return None
    return (
        f"the CUDA kernels were built for {', '.join(architectures)}, and cuda:{device} has "
        f"compute capability {capability // 10}.{capability % 10}"
    )


def runs_on(capability: int, architecture: str) -> bool:
    """Whether a GPU runs what nvcc made for an architecture, as CMake writes it.

    Machine code runs on later members of its family, PTX on everything later; both of names with a
    letter (``90a``) on that very one.
    """
    match = re.fullmatch(r"(\d+)([a-z]?)(-real|-virtual)?", architecture)
    if match is None:
        return True  # "native" and the like: the launch will tell
    built = int(match[1])
    if match[2]:
        return capability == built
    same_family = capability // 10 == built // 10
    return capability >= built and (same_family or match[3] != "-real")


def describe() -> dict[str, Any]:
    """For ``build_info()``: of the kernels, and of each GPU whether they run on it."""
    if _cuda is None:
        return {}
    machine = _cuda.machine()
    refused = machine_refusal(machine, _cuda.runtime)
    found = {
        f"cuda:{device}": device_refusal(device, machine["capabilities"], _cuda.architectures)
        or "runs the CUDA kernels"
        for device in range(len(machine["capabilities"]))
    }
    return {
        "compiler": _cuda.compiler,
        "runtime": _version(_cuda.runtime),
        "architectures": list(_cuda.architectures),
        "types": [_name(dtype) for dtype in dtype_codes()],
        "gemm": gemm,
        **(found or {"devices": refused or "none"}),
    }


def _version(number: int) -> str:
    """Of CUDA, as its runtime and its driver number them: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
