"""The folder that a training run leaves: a checkpoint of several files, replaced as one."""

from __future__ import annotations

import filecmp
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlmr_ext.configuration import CONFIG_NAME
from xlmr_ext.files import staging

LOG_NAME = "xlmr_ext_training.json"

# Of another checkpoint, these would be taken for parts of the new one, or come before them.
_WEIGHTS = re.compile(r"model((-\d+)+-of-\d+)?\.safetensors(\.index\.json)?")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the one that was there before is untouched."""


def prepare_folder(directory: Path) -> Path:
    """Makes the folder and writes to it once, so that a bad one is found before training."""
    try:
        with staging(directory):
            pass
    except OSError as error:
        raise SaveError(
            f"cannot write to the output directory {directory}: {error.strerror}"
        ) from error
    return directory


def replace_checkpoint(directory: Path, write: Callable[[Path], object]) -> None:
    """Puts the files that ``write`` makes in the folder it is given in the place of the old ones.

    All are on the disk before the first of the old ones goes: a failure until then, such as a full
    disk, costs none of those. Where one file of the model differs (the weights, from a run's second
    epoch on), one renaming replaces it. Where several differ, ``config.json`` goes first and comes
    last: a process killed in between leaves a folder without it, which loading says, and never new
    weights beside the labels of old ones.

    Args:
        write: writes files that are on the disk when it returns, ``config.json`` among them.
    """
    with staging(directory, order=[LOG_NAME, CONFIG_NAME]) as fresh:
        write(fresh)
        written = {path.name for path in fresh.iterdir()}
        same = {name for name in written if _same(fresh / name, directory / name)}
        others = {path for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name)}
        stale = [path for path in others if path.name not in written]
        # The log only tells of the run: it makes no other model of the files beside it.
        if stale or len(written - same - {LOG_NAME}) > 1:
            (directory / CONFIG_NAME).unlink(missing_ok=True)
            for path in stale:
                path.unlink()
        for name in same - {LOG_NAME, CONFIG_NAME}:
            (fresh / name).unlink()


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and filecmp.cmp(new, old, shallow=False)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C within the block is heard at its end; a second one at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    heard: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> None:
        heard.append(arguments)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        before(*heard[0])
