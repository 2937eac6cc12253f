"""Memory that is a mapped file: giving its pages back, without losing what was written to them.

A page of a mapped file that was read counts as the process's own until the kernel wants it back,
which on a machine with memory to spare is never. A checkpoint's word embeddings are most of it, and
a program often looks at them once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xlmr_ext._native import ptr

__all__ = [
    "PIECE_BYTES",
    "Peak",
    "give_back",
    "peak_memory",
    "resident_bytes",
    "resident_memory",
    "row_pieces",
]

# What is looked at, or written, at once.
PIECE_BYTES = 1 << 24
# /proc/self/pagemap, Documentation/admin-guide/mm/pagemap.rst in Linux: a page is in memory, is in
# swap, is a file's or shared.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def give_back(tensor: Tensor) -> None:
    """Lets go of the pages of a tensor that are as in the file that is mapped there.

    They come back from the file when they are read again. Pages that were written to, and memory
    that is no file's, stay. Nobody may write to the tensor meanwhile.
    """
    first, entries = _pages(tensor)
    if not len(entries):
        return
    page = mmap.PAGESIZE
    there = (entries & _PRESENT) != 0
    own = (there & ((entries & _OF_FILE) == 0)) | ((entries & _SWAPPED) != 0)
    # Runs of pages none of which is our own.
    edges = np.flatnonzero(np.diff(np.concatenate(([True], own, [True]))))
    for begin, end in edges.reshape(-1, 2).tolist():
        if there[begin:end].any():
            address, size = (first + begin) * page, (end - begin) * page
            _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def resident_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that are in memory, by whole pages."""
    entries = _pages(tensor)[1]
    return int(((entries & _PRESENT) != 0).sum()) * mmap.PAGESIZE


def resident_memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@dataclass
class Peak:
    """The most that was in memory, in bytes; known at the end."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures the peak of this process's resident memory within the block.

    Where the kernel does not let its mark be set back, it is the peak since the process began.
    """
    peak = Peak()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        status = Path("/proc/self/status").read_text()
        peak.bytes = 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _pages(tensor: Tensor) -> tuple[int, NDArray[np.uint64]]:
    """The number of the first page that lies within a tensor, and pagemap's entries from there;
    none where it is not to be had."""
    none = np.empty(0, np.uint64)
    if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
        return 0, none
    page, start = mmap.PAGESIZE, ptr(tensor)
    first = -(-start // page)
    count = (start + tensor.numel() * tensor.element_size()) // page - first
    if count <= 0:
        return first, none
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = np.frombuffer(pagemap.read(8 * count), np.uint64)
    except OSError:
        return first, none  # a system that hides it
    return first, entries if len(entries) == count else none


def row_pieces(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """The rows of a table in parts of about ``PIECE_BYTES``: where each begins and ends."""
    each = max(1, PIECE_BYTES // max(1, row_bytes))
    return [(first, min(rows, first + each)) for first in range(0, rows, each)]


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)
