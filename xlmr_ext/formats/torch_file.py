"""Files of ``torch.save``, opened with suspicion: data only, and no more of it than the file has.

A pickle is a program. ``torch.load(weights_only=True)`` runs it on a machine that knows tensors,
containers and the classes named to it, and nothing else. What it does not check is sizes: a file
of a kilobyte may ask for a bytearray of a terabyte, or announce a tensor of one, as a storage, or
as a stride of 0. So a file is read three times: for the names in its pickle and the sizes of its
storages, for its outline (shapes and no data), and for its content.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlmr_ext.formats.pickle_scan import NotDataError, scan_pickle

__all__ = ["read_torch_file"]

# Before torch 1.6: a magic number, the version, the system, the content, the storages' keys.
_LEGACY_PICKLES = 5


def read_torch_file(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What ``torch.save`` wrote to a file: containers, numbers, strings and tensors on the CPU.

    A file of today's format (a zip archive) is mapped into memory, so that a tensor costs memory
    when it is used; torch before 1.6 wrote one that is read whole.

    Args:
        allowed: classes that the file may hold instances of. They must take any attributes
            without running code, as ``argparse.Namespace`` does.

    Raises:
        OSError: the file cannot be read.
        ValueError: not such a file, damaged, asking for anything but data, or with a tensor larger
            than the file or its part of it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    if head == b"version ":
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself (git lfs pull)")
    zipped = head.startswith(b"PK\x03\x04")
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in allowed]
    try:
        if zipped:
            _refuse_compressed(path)
            _scan_archive(path, names)
        else:
            with path.open("rb") as file:
                for _ in range(_LEGACY_PICKLES):
                    scan_pickle(file, names)
        with torch.serialization.safe_globals(list(allowed)):
            with torch.serialization.skip_data():
                outline = torch.load(path, map_location="meta", weights_only=True)
            for name, tensor in _tensors(outline):
                _check(name, tensor, size)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except NotDataError as error:
        raise ValueError(
            f"{path}: asks for {error}, which is not data; nothing of it was run (only "
            "tensors, numbers, strings and containers are read)"
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a usable torch file: its pickle is damaged or more than data"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: not a usable torch file: {_short(error)}") from None
    except Exception as error:
        # The reader meets every kind of damage with an error of its own kind.
        raise ValueError(f"{path}: not a usable torch file: {_short(error)}") from None


def _refuse_compressed(path: Path) -> None:
    """``torch.save`` stores; what is compressed could grow without bound, and is never mapped."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its part {entry.filename} is compressed")


def _scan_archive(path: Path, allowed: Sequence[str]) -> None:
    """Every storage is as long as its own part of the archive, and the pickle names data alone.

    The parts are those that torch's reader finds: other readers may see others in a forged file.
    """
    reader = torch._C.PyTorchFileReader(str(path))

    def check(key: str, announced: int) -> None:
        there = reader.get_record_size(f"data/{key}") if announced else 0
        if there != announced:
            raise ValueError(
                f"its part data/{key[:80]} has {there} bytes; its pickle announces {announced}"
            )

    scan_pickle(reader.get_record("data.pkl"), allowed, check)


def _tensors(outline: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with its place."""
    waiting: list[tuple[str, Any]] = [("", outline)]
    seen: set[int] = set()
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            yield place, value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            waiting += [(f"{place}[{str(key)[:80]}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        if hasattr(value, "__dict__") and not isinstance(value, type):
            waiting += [(f"{place}.{key}", item) for key, item in vars(value).items()]


def _check(name: str, tensor: Tensor, size: int) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name or 'the file'} is a {type(tensor).__name__} with layout "
            f"{tensor.layout}; expected a plain tensor"
        )
    if tensor.numel() == 0:
        return
    stored = tensor.untyped_storage().nbytes()
    last = tensor.storage_offset() + sum(
        (extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed = max(tensor.numel(), last + 1) * tensor.element_size()
    if needed > stored or stored > size:
        raise ValueError(
            f"{name or 'the file'} announces {list(tensor.shape)} {tensor.dtype} "
            f"({max(needed, stored)} bytes), the file has {size}"
        )


def _short(error: Exception) -> str:
    # Torch goes on with the advice to load the file as code.
    text = str(error).strip().partition("\n")[0].partition(" In PyTorch 2.6")[0][:200]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__} {text}"
