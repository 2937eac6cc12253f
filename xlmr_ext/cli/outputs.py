"""Where a command writes: a file that is replaced when it is complete, or a stream."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


@contextmanager
def opened_output(output: Path | None) -> Iterator[BinaryIO]:
    """A file to write as the answers come, or standard output."""
    if output is None:
        yield sys.stdout.buffer
        return
    with output.open("wb") as file:
        yield file


def is_device(path: Path) -> bool:
    """Whether the path is a pipe or the like, which cannot be replaced by a file."""
    return path.exists() and not (stat.S_ISREG(path.stat().st_mode) or path.is_dir())


def replace_output(output: Path, write: Callable[[BinaryIO], T]) -> T:
    """Has the file written beside the old one, which it then replaces; what ``write`` returned."""
    from xlmr_ext.files import replace_files

    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a directory")
    results = []

    def fill(path: Path) -> None:
        with path.open("wb") as file:
            results.append(write(file))

    replace_files(output.parent, {output.name: fill})
    return results[0]
