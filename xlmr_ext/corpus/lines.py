"""Lines of a text file from any place on, in constant memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from xlmr_ext.corpus.files import TextFile, opened_text
from xlmr_ext.data import DataError

# A longer line comes in pieces.
MOST_BYTES = 1 << 16


class Place(NamedTuple):
    """Where reading goes on: bytes of the text, and whole lines, that lie before it."""

    offset: int = 0
    line: int = 0


class LineReader:
    """The lines of a file, one after another; :attr:`place` is behind the latest.

    Reading from a place on costs a seek; in a gzip, unpacking of what is before it.

    Raises:
        DataError: bytes are not UTF-8.
        OSError: the file cannot be read.
    """

    def __init__(self, file: TextFile, place: Place) -> None:
        self.place = place
        self._path = file.path
        self._rest = b""
        self._open = ExitStack()
        self._stream = self._open.enter_context(opened_text(file.path, file.is_gzip))
        self._stream.seek(place.offset)

    def next(self) -> str | None:
        """A line without its end, or a piece of a long one, cut at a space; None at the end."""
        raw = self._rest + self._stream.readline(MOST_BYTES - len(self._rest))
        self._rest = b""
        if not raw:
            return None
        ends = raw.endswith(b"\n")
        if not ends and len(raw) == MOST_BYTES:
            cut = raw.rfind(b" ") + 1 or _last_character(raw)
            raw, self._rest = raw[:cut], raw[cut:]
        offset, line = self.place
        self.place = Place(offset + len(raw), line + ends)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path}:{line + 1}: not UTF-8 (byte 0x{raw[error.start]:02x}), and it was "
                "when the run began"
            ) from None
        text = text.removesuffix("\n").removesuffix("\r")
        return text.removeprefix("\ufeff") if offset == 0 else text

    def close(self) -> None:
        self._open.close()


def _last_character(raw: bytes) -> int:
    """Where the last character, which may be cut, begins; the end where there is no such place."""
    start = len(raw) - 1
    while start > 0 and raw[start] & 0xC0 == 0x80:
        start -= 1
    return start or len(raw)
