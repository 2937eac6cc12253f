"""The text files of a corpus: which they are, whose language, and that they are text.

A file has a text or a document a line, in UTF-8, plain or gzipped.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from xlmr_ext.data import DataError, guess_format, text_lines

__all__ = ["Corpus", "Given", "TextFile", "are_rows", "opened_text", "scan_corpus", "text_files"]

# A file, a folder or a pattern, or several; or such by the name of their language.
Given = (
    str
    | Path
    | Sequence[str | Path]
    | Mapping[str, str | Path]
    | Mapping[str, Sequence[str | Path]]
)

_GZIP = b"\x1f\x8b"
_SUFFIXES = (".txt", ".txt.gz")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """A file as it was when it was read through.

    Args:
        size, changed: bytes on the disk, and the time of the last change in nanoseconds.
        text_bytes, lines: of the text, unpacked.
        checksum: CRC-32 of the text.
    """

    language: str
    path: str
    is_gzip: bool
    size: int
    changed: int
    text_bytes: int
    lines: int
    checksum: int


@dataclass(frozen=True)
class Corpus:
    """Files by language and path, in order."""

    files: tuple[TextFile, ...]

    @property
    def languages(self) -> list[str]:
        """Sorted."""
        return list(dict.fromkeys(file.language for file in self.files))

    def of(self, language: str) -> list[int]:
        """The numbers of a language's files."""
        return [n for n, file in enumerate(self.files) if file.language == language]

    def where(self, file: int) -> str:
        """What messages call a file."""
        return self.files[file].path

    def digests(self) -> NDArray[np.int64]:
        """One a file, of its language and its text; where it lies is no part of it."""
        found = [
            blake2b(
                f"{file.language}\0{file.text_bytes}\0{file.checksum}".encode(), digest_size=8
            ).digest()
            for file in self.files
        ]
        return np.frombuffer(b"".join(found), dtype="<i8").astype(np.int64)

    def rows(self) -> list[dict[str, Any]]:
        """The files for JSON."""
        return [asdict(file) for file in self.files]


def text_files(given: Given, name: str) -> dict[str, list[Path]]:
    """The files of each language.

    Args:
        given: a file, a folder (every ``.txt`` and ``.txt.gz`` below it) or a pattern of
            :mod:`glob`, or several of them; or a mapping from languages to such. Without a mapping
            a file is a language, named as it is without ``.txt`` and ``.gz``.
        name: what messages call the argument.

    Raises:
        ValueError: nothing is given, a folder or a pattern has no text, or a file has two languages
            or a format that is no plain text.
        FileNotFoundError: there is no such file.
    """
    pairs = [*given.items()] if isinstance(given, Mapping) else [(None, given)]
    found: dict[Path, str] = {}
    for language, places in pairs:
        if language is not None and (not isinstance(language, str) or not language):
            raise ValueError(f"{name} has a language called {language!r}; expected a name")
        for place in [places] if isinstance(places, str | Path) else list(places):
            for path in _paths(place, name):
                its = _named(path) if language is None else language
                before = found.setdefault(path.resolve(), its)
                if before != its:
                    raise ValueError(f"{name} has {path} as {before} and as {its}")
    if not found:
        raise ValueError(f"{name} has no files")
    return {
        language: sorted(path for path, its in found.items() if its == language)
        for language in sorted(set(found.values()))
    }


def scan_corpus(
    files: Mapping[str, Sequence[Path]],
    known: Sequence[Mapping[str, Any]] = (),
) -> Corpus:
    """Reads every file through once, in constant memory, so that a bad one is found now.

    Args:
        known: :meth:`Corpus.rows` of before: a file whose size and time of change are those of
            then is taken for the same and not read.

    Raises:
        DataError: a file is not UTF-8 (which names the line), has no text, or is no whole gzip.
        OSError: a file cannot be read.
    """
    before = {row["path"]: TextFile(**row) for row in known}
    found = []
    for language, paths in files.items():
        for path in paths:
            state, old = path.stat(), before.get(str(path))
            if old is not None and (old.size, old.changed, old.language) == (
                state.st_size,
                state.st_mtime_ns,
                language,
            ):
                found.append(old)
                continue
            found.append(_scanned(language, path, state))
    return Corpus(tuple(found))


def are_rows(value: Any) -> bool:
    """Whether a value from JSON is what :meth:`Corpus.rows` gives."""
    names = {field.name for field in fields(TextFile)}
    return isinstance(value, list) and all(
        isinstance(row, dict) and row.keys() == names for row in value
    )


@contextmanager
def opened_text(path: str | Path, is_gzip: bool) -> Iterator[BinaryIO]:
    """The text's bytes; DataError where a gzip is damaged."""
    try:
        with cast(BinaryIO, gzip.open(path)) if is_gzip else Path(path).open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip: {error}") from error


def _paths(place: str | Path, name: str) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
        if not inside:
            raise ValueError(f"{name}: {path} has no file that ends in {' or '.join(_SUFFIXES)}")
        return inside
    if not path.exists() and glob.has_magic(str(path)):
        inside = sorted(Path(p) for p in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not inside:
            raise ValueError(f"{name}: no file is like {path}")
        return [p for p in inside if not p.is_dir()]
    path.stat()  # says where there is none
    return [path]


def _named(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".txt")


def _scanned(language: str, path: Path, state: os.stat_result) -> TextFile:
    _refuse_tables(path)
    if not stat.S_ISREG(state.st_mode):
        raise DataError(f"{path}: expected a file, which is read more than once, not a pipe")
    with path.open("rb") as stream:
        is_gzip = stream.read(2) == _GZIP
    if path.suffix == ".gz" and not is_gzip and state.st_size:
        raise DataError(f"{path}: not a gzip, as its name says")
    size = lines = checksum = 0
    has_text = False
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened_text(path, is_gzip) as stream:
        last = b"\n"
        try:
            while chunk := stream.read(_CHUNK):
                decoder.decode(chunk)
                size += len(chunk)
                lines += chunk.count(b"\n")
                checksum = zlib.crc32(chunk, checksum)
                has_text = has_text or bool(chunk.strip())
                last = chunk[-1:]
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            stream.seek(0)
            for _ in text_lines(stream, str(path)):  # says where
                pass
            raise
    if not has_text:
        raise DataError(f"{path}: has no text")
    lines += last != b"\n"
    return TextFile(
        language, str(path), is_gzip, state.st_size, state.st_mtime_ns, size, lines, checksum
    )


def _refuse_tables(path: Path) -> None:
    try:
        form = guess_format(path)
    except ValueError:
        return
    if form != "txt":
        raise DataError(f"{path}: expected plain text, a text a line, and this is {form}")
