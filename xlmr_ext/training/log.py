"""The log of a training run as it goes: a JSON object a line."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

STEPS_NAME = "xlmr_ext_training.jsonl"


class StepLog:
    """Lines that are in the file as soon as they are written.

    A log that can no longer be written (a full disk) ends with a warning: it is not worth the run.

    Args:
        path: None writes nothing.
        keep: bytes of what is there that stay; the rest is of steps that will be done again.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                mode: Any = "r+b" if keep and path.exists() else "wb"
                self._file = path.open(mode, buffering=0)
                self._file.truncate(min(keep, path.stat().st_size))
                self._file.seek(0, os.SEEK_END)
            except OSError as error:
                self._give_up(error)

    def write(self, event: str, **fields: Any) -> None:
        """One line; numbers that are not finite become null, which JSON has."""
        if self._file is None:
            return
        values = {name: _finite(value) for name, value in fields.items()}
        line = json.dumps({"event": event, **values}, ensure_ascii=True) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            self._give_up(error)

    def flush(self) -> int:
        """Brings it to the disk; its bytes."""
        if self._file is None:
            return 0
        try:
            os.fsync(self._file.fileno())
            return self._file.tell()
        except OSError as error:
            self._give_up(error)
            return 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
        warnings.warn(
            f"the log {self._path} ends here: {error.strerror}", RuntimeWarning, stacklevel=3
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
