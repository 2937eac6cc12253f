"""Where a model's files are (a directory, or the Hugging Face hub) and how they are replaced."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

__all__ = ["list_files", "replace_files", "resolve_files"]


def resolve_files(
    name_or_path: str | os.PathLike[str],
    filenames: Iterable[str],
    *,
    optional: Iterable[str] = (),
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Path]:
    """Finds files of a model; the network is used only for a hub name, and only where allowed.

    Args:
        name_or_path: a directory, or a hub name (``"name"`` or ``"owner/name"``). A directory of
            that name comes first.
        filenames: files that must be there.
        optional: files that may be absent; those are left out of the result, and so are those of a
            hub model that are not in the cache while the hub is out of reach.
        local_files_only: take hub files from the cache only (as ``HF_HUB_OFFLINE=1`` does).
        cache_dir, revision, token: as in ``huggingface_hub.hf_hub_download``.

    Returns:
        The path of each file found, by its name.

    Raises:
        OSError: the directory, the hub model or a required file cannot be found or read
            (``FileNotFoundError`` where it is known to be absent).
        ValueError: ``name_or_path`` can be neither a directory nor a hub name.
    """
    wanted = [*((name, True) for name in filenames), *((name, False) for name in optional)]
    name, directory = _locate(name_or_path)
    found: dict[str, Path] = {}
    for filename, required in wanted:
        path: Path | None
        if directory is not None:
            path = directory / filename
            if not path.is_file():
                path = None
        else:
            path = _download(
                name,
                filename,
                required=required,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                revision=revision,
                token=token,
            )
        if path is not None:
            found[filename] = path
        elif required:
            if directory is None:
                raise FileNotFoundError(f"the hub model {name!r} has no file {filename}")
            there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{directory} has no file {filename}; found: {there}")
    return found


def list_files(
    name_or_path: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[str]:
    """Names of the files of a model, as far as they can be told: for error messages."""
    name, directory = _locate(name_or_path)
    if directory is not None:
        return sorted(path.name for path in directory.iterdir())
    if local_files_only:
        return []
    import huggingface_hub

    # Only there to make a message better: no failure of it may hide that message.
    with contextlib.suppress(Exception):
        return sorted(huggingface_hub.list_repo_files(name, revision=revision, token=token))
    return []


def replace_files(
    directory: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]]
) -> None:
    """Writes files into a directory (made where absent) so that each is the old one or the new.

    All files are written beside their targets and flushed to the disk first, then renamed. A
    failure before the renaming (a full disk, an interrupt) leaves the old files as they were and
    no temporary ones. A file that is mapped into memory may be replaced: the mapping keeps the old.

    Args:
        directory: where the files go.
        writers: by file name, a function that writes the whole content to the path it is given.

    Raises:
        OSError: writing failed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            path = directory / f".{name}.{secrets.token_hex(6)}.tmp"
            temporary[name] = path
            with path.open("xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            write(path)
            # A writer may put a file of its own in this place, with narrower rights.
            path.chmod(mode)
            _flush(path)
        for name, path in temporary.items():
            path.replace(directory / name)
        # The renaming itself: some file systems cannot flush a directory.
        with contextlib.suppress(OSError):
            _flush(directory)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locate(name_or_path: str | os.PathLike[str]) -> tuple[str, Path | None]:
    """The name, and the directory that it stands for (None: a hub name)."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(
            f"name_or_path must be a directory or a hub name, got {type(name_or_path).__name__}"
        )
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return name, path
    if path.exists():
        raise NotADirectoryError(f"{name!r} is a file; expected a model's directory or a hub name")
    # A hub name is "name" or "owner/name" and looks like neither of these.
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(f"there is no directory {name!r}")
    return name, None


def _download(
    name: str,
    filename: str,
    *,
    required: bool,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
) -> Path | None:
    """One file of a hub model, from the cache or the network; None where the model has no such."""
    # Imported late: whoever works on directories does not pay for it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            str(
                hf_hub_download(
                    repo_id=name,
                    filename=filename,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    revision=revision,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        )
    except LocalEntryNotFoundError as error:
        if not required:
            return None
        raise FileNotFoundError(
            f"{name!r} is no directory here, and {filename} of a hub model of that name is not in "
            f"the cache and could not be fetched: {error}"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a directory nor a hub name: {error}") from error
    except Exception as error:
        # The hub client's other errors are of its HTTP library's kinds, which differ by release.
        raise OSError(
            f"{name!r} is no directory here, and {filename} of a hub model of that name could not "
            f"be fetched: {error}"
        ) from error
