"""One file of a model on the Hugging Face hub, from its cache or the network.

The download, the cache and its layout are huggingface_hub's. Added here: content that is not what
the hub announced is thrown away, and every failure is an OSError with a sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

__all__ = ["AbsentFileError", "OutOfReachError", "download", "is_commit", "is_offline"]


_DIGITS = frozenset("0123456789abcdef")


class AbsentFileError(FileNotFoundError):
    """The hub model is there and has no such file."""


class OutOfReachError(FileNotFoundError):
    """The file is not in the cache, and the hub could not be asked or may not be."""


def download(
    name: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The path of a file of the hub model ``name`` in the cache; fetched where it is not there.

    The arguments are those of ``huggingface_hub.hf_hub_download``.

    Raises:
        AbsentFileError: the model has no such file.
        OutOfReachError: it is not in the cache and could not be asked for.
        OSError: there is no such model or revision, access is refused, the connection broke, or
            what came is not what was announced.
        ValueError: ``name`` cannot be a hub name.
    """
    if force_download and local_files_only:
        raise ValueError("force_download and local_files_only contradict each other")
    # Imported late: whoever works on directories does not pay for it.
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    head = f"{name!r} is no directory here"
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    absent = f"the hub model {name!r} has no file {filename}"
    if revision is not None and is_commit(revision) and not force_download:
        # What a commit lacks it will never have.
        known = try_to_load_from_cache(name, filename, cache_dir=cache, revision=revision)
        if known is _CACHED_NO_EXIST:
            raise AbsentFileError(absent)
    try:
        before = _blobs(name, cache)
        path = Path(
            str(
                hf_hub_download(
                    repo_id=name,
                    filename=filename,
                    cache_dir=cache,
                    revision=revision,
                    token=token,
                    local_files_only=local_files_only,
                    force_download=force_download,
                )
            )
        )
    except LocalEntryNotFoundError as error:
        raise OutOfReachError(
            f"{head}, and {filename} of a hub model of that name is not in the cache and could "
            f"not be fetched: {_reason(error)}"
        ) from error
    except EntryNotFoundError as error:
        raise AbsentFileError(absent) from error
    except GatedRepoError as error:
        raise OSError(
            f"{head}, and access to the hub model of that name is restricted: ask for it on the "
            f"model's page, then pass token= or set HF_TOKEN ({_reason(error)})"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the hub model {name!r} has no revision {revision!r} ({_reason(error)})"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{head}, and there is no hub model of that name, or it is private and the token does "
            f"not open it ({_reason(error)})"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a directory nor a hub name: {error}") from error
    except Exception as error:
        # The hub client's other errors are of its HTTP library's kinds, which differ by release.
        raise OSError(
            f"{head}, and {filename} of a hub model of that name could not be fetched: "
            f"{_reason(error)}"
        ) from error
    if path.is_symlink():
        blob = path.parent / path.readlink()
        if force_download or blob.name not in before:
            _verify(path, blob)
    return path


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit's hash, whose files never change."""
    return len(revision) == 40 and set(revision) <= _DIGITS


def is_offline() -> bool:
    """Whether the environment (``HF_HUB_OFFLINE=1``) keeps the hub's client to its cache."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _blobs(name: str, cache: Path | None) -> frozenset[str]:
    """Names of the contents that the cache holds of a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = (
        (cache or Path(constants.HF_HUB_CACHE))
        / repo_folder_name(repo_id=name, repo_type="model")
        / "blobs"
    )
    return frozenset(path.name for path in blobs.iterdir()) if blobs.is_dir() else frozenset()


def _verify(path: Path, blob: Path) -> None:
    """Checks content that just came against the hub's name for it, which is its hash: SHA-256 of a
    large file, git's of a small one. Other servers of that protocol name it otherwise."""
    announced = blob.name
    if set(announced) - _DIGITS:
        return
    if len(announced) == 64:
        hashes = [hashlib.sha256()]
    elif len(announced) == 40:
        # Mirrors give the plain hash of the content in the place of git's.
        hashes = [hashlib.sha1(b"blob %d\0" % blob.stat().st_size), hashlib.sha1()]
    else:
        return
    with blob.open("rb") as file:
        while chunk := file.read(2**20):
            for one in hashes:
                one.update(chunk)
    if announced in [one.hexdigest() for one in hashes]:
        return
    for wrong in (path, blob):
        with contextlib.suppress(OSError):
            wrong.unlink()
    raise OSError(
        f"what came for {path.name} is not what the hub announced (its hash is "
        f"{hashes[0].hexdigest()[:12]}..., expected {announced[:12]}...); it was removed from the "
        "cache, try again"
    )


def _reason(error: BaseException) -> str:
    """The innermost of an error's causes that says something, on one line."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and str(cause):
        text += f" ({type(cause).__name__}: {' '.join(str(cause).split())})"
    return text[:600] + ("..." if len(text) > 600 else "")
