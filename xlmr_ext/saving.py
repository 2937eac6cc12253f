"""The folder that a training run leaves: a checkpoint of several files, replaced as one."""

from __future__ import annotations

import filecmp
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlmr_ext.configuration import CONFIG_NAME
from xlmr_ext.files import staging
from xlmr_ext.formats.shards import is_shard

LOG_NAME = "xlmr_ext_training.json"

# Of another checkpoint, these and shards would be taken for parts of the new one, or come first.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


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
    with staging(directory) as written:
        write(written)
        names = {path.name for path in written.iterdir()}
        changed = sorted(n for n in names if not _same(written / n, directory / n))
        stale = sorted(
            path.name
            for path in directory.iterdir()
            if path.name not in names and (path.name in _WEIGHTS or is_shard(path.name))
        )
        # The log only tells of the run: it makes no other model of the files beside it.
        parts = [name for name in changed if name not in (LOG_NAME, CONFIG_NAME)]
        is_one_step = not stale and len({*changed} - {LOG_NAME}) <= 1
        with staging(
            directory,
            # The old weights go while no config.json is there: they could come before the new ones.
            order=[*parts, *stale, LOG_NAME, CONFIG_NAME],
            withdraw=None if is_one_step else CONFIG_NAME,
        ) as fresh:
            for name in {*parts, LOG_NAME, CONFIG_NAME} & names:
                (written / name).replace(fresh / name)
            for path in written.iterdir():  # what is there already
                path.unlink()


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
