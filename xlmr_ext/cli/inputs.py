"""Texts that a command reads, from files or standard input."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar

from xlmr_ext.cli.console import input_format
from xlmr_ext.cli.outputs import check_output

if TYPE_CHECKING:
    from xlmr_ext.data import Format, Row

Source = tuple[str, "Format"]
T = TypeVar("T")


def add_input(group: Any) -> None:
    """--input."""
    group.add_argument(
        "--input",
        metavar="FILE",
        nargs="+",
        default=["-"],
        help="files, read one after the other; - is standard input (default: standard input)",
    )


def sources(arguments: argparse.Namespace, paths: list[str]) -> list[Source]:
    """The inputs with their formats; a bad one is found now, not after those before it were read.

    Bad usage (exit code 2) where a format cannot be told or an input is also ``--output``.
    """
    found = [(path, input_format(arguments, path)) for path in paths]
    check_paths(arguments, paths)
    return found


def check_paths(arguments: argparse.Namespace, paths: list[str]) -> None:
    """OSError for a file that cannot be opened, or an ``--output`` that cannot be written; bad
    usage where it is also an input."""
    for path in paths:
        if path != "-":
            _check(arguments, path)
    if arguments.output is not None:
        check_output(arguments.output)


@contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """A file, or standard input for -, and what messages call it."""
    if path == "-":
        yield standard_input(), "standard input"
        return
    with Path(path).open("rb") as stream:
        yield stream, path


def standard_input() -> BinaryIO:
    """Its bytes; OSError where it is closed."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer


def interactive(paths: list[str]) -> bool:
    """Whether a person types the texts, who waits for an answer to every line."""
    return "-" in paths and sys.stdin is not None and sys.stdin.isatty()


def read_sources(arguments: argparse.Namespace, inputs: list[Source]) -> Iterator[Row]:
    """The rows of all inputs, one at a time."""
    from xlmr_ext.data import read_rows

    for path, format in inputs:
        yield from read_rows(
            standard_input() if path == "-" else path,
            format=format,
            text_column=arguments.text_column,
            pair_column=arguments.pair_column,
            label_column=arguments.label_column,
            name="standard input" if path == "-" else path,
            errors=arguments.encoding_errors,
        )


class Rows(Generic[T]):
    """The rows of all inputs. One that cannot be read ends them; `finish` then says so, when those
    before it have been answered."""

    def __init__(self, rows: Iterable[T]) -> None:
        self._rows = rows
        self._error: ValueError | None = None

    def __iter__(self) -> Iterator[T]:
        from xlmr_ext.data import DataError

        try:
            yield from self._rows
        except DataError as error:
            self._error = error

    def finish(self, written: int) -> None:
        """ValueError where the rows ended early, after ``written`` answers were given out."""
        if self._error is not None:
            rows = f"the {written} rows before it were" if written else "nothing was"
            raise ValueError(f"{self._error}; {rows} written")


class Texts(Rows[str]):
    """The texts of all inputs."""

    def __init__(self, arguments: argparse.Namespace, inputs: list[Source]) -> None:
        super().__init__(row.text for row in read_sources(arguments, inputs))


def _check(arguments: argparse.Namespace, path: str) -> None:
    kind = Path(path).stat()
    # A pipe can be opened once only.
    if stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode):
        with Path(path).open("rb"):
            pass
    output = arguments.output
    if output is not None and output.exists() and os.path.samestat(kind, output.stat()):
        arguments.parser.error(f"--output {output} is an input, which would be lost")
