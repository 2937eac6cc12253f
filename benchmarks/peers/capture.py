"""What native code writes to the standard streams."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Captured:
    text: str = ""


@contextmanager
def captured() -> Iterator[Captured]:
    """Standard output and error go into the result's ``text``, which is there at the end."""
    result = Captured()
    saved = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield result
        finally:
            sys.stdout.flush()
            ctypes.CDLL(None).fflush(None)
            for descriptor, before in zip((1, 2), saved, strict=True):
                os.dup2(before, descriptor)
                os.close(before)
            file.seek(0)
            result.text = file.read().decode(errors="replace")
