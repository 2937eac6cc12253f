"""Where a command writes: a file that is replaced when it is complete, or a stream."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    from xlmr_ext.cli.inputs import Rows

T = TypeVar("T")

# Formats by suffix, where the suffix is not the format's name.
_SUFFIXES = {"ndjson": "jsonl", "conll": "iob2", "json": "squad"}
_SPACES = str.maketrans("\t\r\n", "   ")


def add_output(group: Any) -> None:
    """--output of a command that streams."""
    group.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="instead of standard output; an old file is replaced when the first answer is there",
    )


class ReaderGone(BaseException):
    """Nobody reads standard output any more (``| head``), and the command does nothing else."""


class PatientOutput:
    """Standard output as text. Where it is closed what comes is dropped, and the work goes on.

    Args:
        stream: ``sys.stdout``; None where it was closed from the start.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = _Nowhere() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            drop_output()


class _Nowhere:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


class _Pipe:
    """Standard output as bytes; ReaderGone where it is closed meanwhile."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, content: bytes) -> None:
        with self._telling():
            self._stream.write(content)

    def flush(self) -> None:
        with self._telling():
            self._stream.flush()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise ReaderGone from None


def drop_output() -> None:
    """Sends standard output nowhere; the interpreter must not flush into the closed pipe."""
    with suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


@contextmanager
def opened_output(output: Path | None) -> Iterator[Any]:
    """A file to write as the answers come, or standard output; has ``write`` of bytes, ``flush``.

    Raises:
        OSError: standard output is closed, or the file cannot be opened.
        ReaderGone: while writing, the reader of standard output has left.
    """
    if output is None:
        stream = getattr(sys.stdout, "buffer", None)
        if stream is None:
            raise OSError("standard output is closed")
        yield _Pipe(stream)
        return
    with output.open("wb") as file:
        yield file


def write_stream(
    output: Path | None,
    rows: Rows[Any],
    items: Iterable[str],
    *,
    header: str = "",
    flush: Callable[[], bool],
) -> int:
    """Writes an item, of any number of lines, for each row, as they come; how many there were.

    The file is opened when the first item is there, so that a failure before leaves the old one.

    Args:
        rows: what the items are answers to.
        flush: asked after every item whether it should be on its way.

    Raises:
        KeyboardInterrupt: with the number of the rows that are written.
        ValueError: the rows ended early.
    """
    source = iter(items)
    written = 0
    try:
        first = next(source, None)
        if first is None:
            rows.finish(0)
        with opened_output(output) as file:
            file.write(to_bytes(header))
            item = first
            while item is not None:
                file.write(to_bytes(item))
                written += 1
                if flush():
                    file.flush()
                item = next(source, None)
            file.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {written} rows were written") from None
    rows.finish(written)
    return written


def format_of(output: Path | None, formats: Iterable[str]) -> str | None:
    """The one of ``formats`` that the suffix of --output names; None where it names none."""
    suffix = "" if output is None else output.suffix.lower().removeprefix(".")
    found = _SUFFIXES.get(suffix, suffix)
    return found if found in formats else None


def check_output(output: Path) -> None:
    """OSError where no such file can be written."""
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a directory")
    with os.scandir(output.parent):
        pass


def one_line(text: str) -> str:
    """A text as a cell of a tsv line: tabs and line breaks become spaces."""
    return text.translate(_SPACES)


def to_bytes(line: str) -> bytes:
    """UTF-8; the escape of a lone surrogate is also JSON's."""
    return line.encode("utf-8", "backslashreplace")


def is_device(path: Path) -> bool:
    """Whether the path is a pipe or the like, which cannot be replaced by a file."""
    return path.exists() and not (stat.S_ISREG(path.stat().st_mode) or path.is_dir())


def replace_output(output: Path, write: Callable[[BinaryIO], T]) -> T:
    """Has the file written beside the old one, which it then replaces; what ``write`` returned."""
    from xlmr_ext.files import replace_files

    results = []

    def fill(path: Path) -> None:
        with path.open("wb") as file:
            results.append(write(file))

    replace_files(output.parent, {output.name: fill})
    return results[0]
