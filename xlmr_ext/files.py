"""Where a model's files are (a directory, or the Hugging Face hub) and how they are replaced."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from xlmr_ext.hub import AbsentFileError, OutOfReachError, download, is_commit, is_offline

__all__ = [
    "fairseq_hint",
    "first_file",
    "leads_out",
    "list_files",
    "pinned",
    "replace_files",
    "resolve_files",
    "staging",
]

_STAGING = ".writing-"
_STALE_SECONDS = 60.0


def resolve_files(
    name_or_path: str | os.PathLike[str],
    filenames: Iterable[str],
    *,
    optional: Iterable[str] = (),
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    subfolder: str = "",
) -> dict[str, Path]:
    """Finds files of a model; the network is used only for a hub name, and only where allowed.

    Args:
        name_or_path: a directory, or a hub name (``"name"`` or ``"owner/name"``). A directory of
            that name comes first.
        filenames: files that must be there.
        optional: files that may be absent; those are left out of the result, and so are those of a
            hub model that are not in the cache where only the cache may be used.
        local_files_only: take hub files from the cache only (as ``HF_HUB_OFFLINE=1`` does).
        cache_dir, revision, token, force_download: as in ``huggingface_hub.hf_hub_download``. All
            files are of the commit that the first one came from.
        subfolder: the folder within the model that the files lie in.

    Returns:
        The path of each file found, by its name.

    Raises:
        OSError: the directory, the hub model or a required file cannot be found or read
            (``FileNotFoundError`` where it is known to be absent), or the hub cannot be asked for
            an optional one.
        ValueError: ``name_or_path`` can be neither a directory nor a hub name, or ``subfolder``
            leads out of it.
    """
    wanted = [*((name, True) for name in filenames), *((name, False) for name in optional)]
    name, directory = _locate(name_or_path, subfolder)
    hub: dict[str, Any] = {
        "local_files_only": local_files_only,
        "cache_dir": cache_dir,
        "revision": revision,
        "token": token,
        "force_download": force_download,
    }
    found: dict[str, Path] = {}
    for filename, required in wanted:
        if directory is not None:
            if (directory / filename).is_file():
                found[filename] = directory / filename
            elif required:
                raise FileNotFoundError(
                    f"{directory} has no file {filename}; found: {_listing(directory)}"
                )
            continue
        try:
            found[filename] = download(name, _within(subfolder, filename), **hub)
        except AbsentFileError:
            if required:
                raise
        except OutOfReachError:
            # A model whose settings could not be asked for is not one that has none.
            if required or not (local_files_only or is_offline()):
                raise
        else:
            hub = pinned(hub, found[filename])
    return found


def first_file(
    name_or_path: str | os.PathLike[str], candidates: Sequence[str], **hub: Any
) -> Path | None:
    """The first of several files that a model has; None where it is known to have none.

    While the hub is out of reach the first one in the cache is taken.

    Args:
        candidates: file names, the preferred one first.
        **hub: keyword arguments of :func:`resolve_files`.

    Raises:
        OSError: the hub is out of reach, and none of the files is in the cache.
        ValueError: as :func:`resolve_files`.
    """
    name, directory = _locate(name_or_path, hub.get("subfolder", ""))
    if directory is not None:
        return next((directory / c for c in candidates if (directory / c).is_file()), None)
    options = dict(hub)
    subfolder = options.pop("subfolder", "")
    failure: OutOfReachError | None = None
    for candidate in candidates:
        try:
            return download(name, _within(subfolder, candidate), **options)
        except AbsentFileError:
            continue
        except OutOfReachError as error:
            failure = failure or error
            options.update(local_files_only=True, force_download=False)
    if failure is not None:
        raise failure
    return None


def pinned(hub: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The hub arguments with the commit that ``path`` came from as revision, so that what is
    fetched next belongs to it; unchanged for a path that is not from the hub."""
    parts = path.parts
    for above, below in itertools.pairwise(parts):
        if above == "snapshots" and is_commit(below):
            return {**hub, "revision": below}
    return dict(hub)


def list_files(name_or_path: str | os.PathLike[str], **hub: Any) -> list[str]:
    """Names of the files of a model, as far as they can be told: for error messages.

    ``hub`` are keyword arguments of :func:`resolve_files`.
    """
    subfolder = hub.get("subfolder", "")
    name, directory = _locate(name_or_path, subfolder)
    if directory is not None:
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if hub.get("local_files_only"):
        return []
    # Only there to make a message better: no failure of it may hide that message.
    with contextlib.suppress(Exception):
        import huggingface_hub

        names = huggingface_hub.list_repo_files(
            name, revision=hub.get("revision"), token=hub.get("token")
        )
        paths = map(PurePosixPath, names)
        return sorted(path.name for path in paths if path.parent == PurePosixPath(subfolder))
    return []


def fairseq_hint(listing: Iterable[str]) -> str:
    """The end of a message that a file is missing, where the model is one of fairseq's."""
    if "model.pt" not in listing:
        return ""
    return "; its model.pt is of fairseq: xlmr-ext convert makes a folder of it that can be loaded"


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of ``folder`` is a link to somewhere else.

    A snapshot in the hub's cache holds links to the blobs beside it, which may in turn be links
    to blobs that several models share; both are part of it.
    """
    root, target = folder.resolve(), path.resolve()
    allowed = [root]
    for above in (root, *root.parents):
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            allowed += [above.parent / "blobs", above.parent.parent / "blobs"]
    return not any(target.is_relative_to(place) for place in allowed)


def replace_files(
    directory: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]]
) -> None:
    """Writes files into a directory (made where absent) so that each is the old one or the new.

    They are replaced in the order of ``writers``. A file that is mapped into memory may be
    replaced: the mapping keeps the old.

    Args:
        directory: where the files go.
        writers: by file name, a function that writes the whole content to the path it is given.

    Raises:
        OSError: writing failed; the old files are as they were.
    """
    with staging(directory, order=list(writers)) as fresh:
        for name, write in writers.items():
            write(fresh / name)


@contextlib.contextmanager
def staging(
    directory: str | os.PathLike[str],
    *,
    order: Sequence[str] = (),
    withdraw: str | None = None,
    stale: Iterable[str] = (),
) -> Iterator[Path]:
    """A folder to write a set of files in; they replace those of ``directory`` when all is there.

    The folder is hidden in ``directory``, so on the same file system. At the end of the block
    everything in it is flushed to the disk and then renamed, file by file: first what ``order``
    does not name, then ``order``'s, each of them on the disk before the next. A failure before the
    renaming (a full disk, an interrupt) leaves the old files as they were and nothing else; what a
    killed process left is removed by the next one.

    Args:
        directory: where the files go; made where absent.
        order: names whose order matters. One that the folder does not hold is removed from
            ``directory`` at its turn.
        withdraw: a file of ``directory`` without which the set is of no use. It is taken away
            before the first of ``order`` and comes back with its turn, so that a process killed in
            between leaves a set that nobody takes for whole.
        stale: files to remove from ``directory`` after all else.

    Raises:
        OSError: writing failed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    fresh = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
    # The lock tells others that this process lives; it ends with it.
    lock = os.open(fresh, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mode = _default_mode(fresh)
        yield fresh
        names = sorted(path.name for path in fresh.iterdir())
        for name in names:
            # Some writers give their files narrower rights than others of this user's have.
            (fresh / name).chmod(mode)
            _flush(fresh / name)
        for name in names:
            if name not in order:
                (fresh / name).replace(directory / name)
        _flush_names(directory)
        old, aside = directory / (withdraw or ""), fresh / ".withdrawn"
        if old.is_file():
            old.replace(aside)
        begun = False
        try:
            for name in order:
                _flush_names(directory)
                if name in names:
                    (fresh / name).replace(directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)
                begun = True
        except BaseException:
            if not begun and aside.exists():
                aside.replace(old)
            raise
        _flush_names(directory)
        for name in stale:
            (directory / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def _default_mode(folder: Path) -> int:
    probe = folder / "mode"
    with probe.open("xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


def _remove_leftovers(directory: Path) -> None:
    for path in directory.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            # A young one may be about to be locked.
            if time.time() - path.stat().st_mtime < _STALE_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_names(directory: Path) -> None:
    # The renaming itself: some file systems cannot flush a directory.
    with contextlib.suppress(OSError):
        _flush(directory)


def _listing(directory: Path) -> str:
    return ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"


def _locate(name_or_path: str | os.PathLike[str], subfolder: str = "") -> tuple[str, Path | None]:
    """The name, and the directory that it stands for (None: a hub name)."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(
            f"name_or_path must be a directory or a hub name, got {type(name_or_path).__name__}"
        )
    if not isinstance(subfolder, str):
        raise TypeError(f"subfolder must be a str, got {type(subfolder).__name__}")
    if PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts:
        raise ValueError(f"subfolder must name a folder within the model, got {subfolder!r}")
    name = os.fspath(name_or_path)
    if not name:
        raise ValueError("name_or_path is empty; expected a directory or a hub name")
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path / subfolder
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} has no folder {subfolder}; found: {_listing(path)}")
        return name, folder
    if path.exists():
        raise NotADirectoryError(f"{name!r} is a file; expected a model's directory or a hub name")
    # A hub name is "name" or "owner/name" and looks like neither of these.
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(f"there is no directory {name!r}")
    return name, None


def _within(subfolder: str, filename: str) -> str:
    return str(PurePosixPath(subfolder) / filename)
