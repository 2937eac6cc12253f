"""The native modules: loading them, and calling an op of the one that a device has.

Integers go in, among them the addresses of tensors that ``_launch.py`` and ``_launch_encoder.py``
have checked and allocated.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not sys.platform.startswith("linux"):
    raise ImportError(f"xlmr_ext runs on Linux (x86-64, aarch64) only; this is {platform.system()}")

# torch first: its libgomp is then the one that the kernels share (docs/ARCHITECTURE.md, Threads).
try:
    from xlmr_ext import _C
except ImportError as error:
    folder = Path(__file__).parent
    if any(folder.glob("_C.*.so")) or not (folder.parent / "CMakeLists.txt").exists():
        raise
    raise ImportError(
        f"xlmr_ext was imported from the source tree at {folder.parent}, where no kernels are "
        f"built: run from another directory to use the installed package, or build in place "
        f"(CONTRIBUTING.md)"
    ) from error
from xlmr_ext import cuda_support
from xlmr_ext.threads import CallThreads

# A larger workspace is given back after the call: beside the work it serves, its page faults cost
# nothing, and one long batch should not hold memory for ever.
_KEPT_BYTES = 64 << 20


class _Workspace(threading.local):
    """One buffer a thread: fresh memory would cost page faults on every call."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


_workspace = _Workspace()

call_threads = CallThreads(torch.get_num_threads())
_C.set_cpu_capacity(call_threads.available)


def ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def call(device: torch.device, name: str, *args: Any) -> None:
    """Runs an op of the module of ``device``, where its tensors are."""
    if device.type == "cpu":
        call_on_cpu(getattr(_C, name), *args)
    else:
        _call_on_cuda(device, getattr(cuda_support.module(), name), *args)


def call_on_cpu(function: Callable[..., int], *args: Any) -> None:
    buffer = _workspace.buffer
    # torch is asked on every call: the number belongs to the calling thread.
    threads = call_threads(torch.get_num_threads())
    needed = function(*args, threads, buffer.data_ptr(), buffer.numel())
    if needed:
        buffer = torch.empty(needed, dtype=torch.uint8)
        if needed <= _KEPT_BYTES:
            _workspace.buffer = buffer
        function(*args, threads, buffer.data_ptr(), buffer.numel())


def _call_on_cuda(device: torch.device, function: Callable[..., int], *args: Any) -> None:
    # The stream belongs to the calling thread, the backward's being the forward's: asked for on
    # every call. What torch allocates while it is the current one is in order with it, so the
    # workspace may go as soon as the kernels are queued.
    where = (device.index, torch.cuda.current_stream(device).cuda_stream)
    needed = function(*args, *where, 0, 0)
    if needed:
        buffer = torch.empty(needed, dtype=torch.uint8, device=device)
        function(*args, *where, buffer.data_ptr(), needed)
