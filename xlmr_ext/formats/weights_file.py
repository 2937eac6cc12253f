"""Entries of weights wherever they lie: one safetensors file, a torch file, several, or a dict.

A reader knows names, shapes and types, and gives a tensor when asked for it; nothing here knows
a model.
"""

from __future__ import annotations

import bisect
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xlmr_ext.formats.torch_file import read_torch_file

__all__ = [
    "FILE_DTYPES",
    "SafetensorsFile",
    "TensorDict",
    "WeightsFile",
    "open_safetensors",
    "open_torch_weights",
    "refuse_duplicates",
]

FILE_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAPPED_DTYPES = {**FILE_DTYPES, "I8": torch.int8, "U8": torch.uint8}
_DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}
# 200 bytes a tensor are usual, 800 tensors are many.
_MAX_HEADER_BYTES = 2**24
# A mapping holds an open file of its own, so there are about _PIECES at most, whatever the size.
_PIECE_BYTES, _PIECES = 2**25, 64


class WeightsFile(Protocol):
    """Named tensors that are read one by one."""

    @property
    def path(self) -> Path:
        """The file that stands for all entries, in messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every entry."""
        ...

    def file_of(self, key: str) -> Path:
        """The file that holds an entry."""
        ...

    def dtype(self, key: str) -> str:
        """Type of an entry, as safetensors calls it (see FILE_DTYPES) where that has a name."""
        ...

    def read(self, key: str) -> Tensor:
        """The tensor on the CPU, contiguous; its memory is no other entry's, and may be mapped."""
        ...


class SafetensorsFile:
    """One safetensors file, mapped into memory piece by piece.

    A piece leaves the memory with the last of its tensors: whoever packs the weights one by one
    and gives them up does not hold both forms.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a usable safetensors file; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle, start, header = _opened(path)
        slices = {key: self._handle.get_slice(key) for key in self._handle.keys()}  # noqa: SIM118
        self.shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        self._dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
        self.metadata: Mapping[str, str] = self._handle.metadata() or {}
        self.data_bytes = path.stat().st_size - start
        places = {key: tuple(header[key]["data_offsets"]) for key in self.shapes}
        with path.open("rb") as file:
            self._pieces = _mapped_pieces(file.fileno(), start, places)

    def file_of(self, key: str) -> Path:
        return self.path

    def dtype(self, key: str) -> str:
        return self._dtypes[key]

    def read(self, key: str) -> Tensor:
        shape, dtype = self.shapes[key], _MAPPED_DTYPES.get(self._dtypes[key])
        if key not in self._pieces or dtype is None:
            tensor: Tensor = self._handle.get_tensor(key)
            return tensor
        piece, offset = self._pieces[key]
        count = math.prod(shape)
        return torch.frombuffer(piece, dtype=dtype, count=count, offset=offset).reshape(shape)


def _mapped_pieces(
    file: int, start: int, places: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[mmap.mmap, int]]:
    """The mapping that holds each entry, and where in it; entries without data are left out.

    Args:
        file: descriptor of the open file.
        start: where its data begin.
        places: where each entry begins and ends in the data.
    """
    entries = sorted((begin, end, key) for key, (begin, end) in places.items() if end > begin)
    least = max(_PIECE_BYTES, sum(end - begin for begin, end, _ in entries) // _PIECES)
    pieces: dict[str, tuple[mmap.mmap, int]] = {}
    waiting: list[tuple[int, str]] = []
    for begin, end, key in entries:
        waiting.append((start + begin, key))
        page = waiting[0][0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size = start + end - page
        if size >= least or key == entries[-1][2]:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            piece = mmap.mmap(file, size, mmap.MAP_PRIVATE, protection, offset=page)
            pieces |= {name: (piece, place - page) for place, name in waiting}
            waiting.clear()
    return pieces


class TensorDict:
    """Tensors of one dict, such as a torch file holds or ``model.state_dict()`` gives.

    Args:
        entries: the dict.
        path: where it is from, for messages.
        copy: never hand out the dict's own memory.

    Raises:
        TypeError, ValueError: an entry is not a plain tensor with a name; the message names it.
    """

    def __init__(self, entries: object, path: Path, *, copy: bool = False) -> None:
        if not isinstance(entries, Mapping):
            raise ValueError(f"{path}: expected names and tensors, found {type(entries).__name__}")
        for key, entry in entries.items():
            if not isinstance(key, str):
                raise ValueError(f"{path}: an entry's name is {type(key).__name__}, not a string")
            if not isinstance(entry, Tensor):
                raise ValueError(
                    f"{path}: {key} is {type(entry).__name__}; expected nothing but tensors"
                )
            if entry.layout is not torch.strided or entry.is_quantized or entry.is_meta:
                raise ValueError(f"{path}: {key} is not a dense tensor with data")
        self.path = path
        self.shapes = {key: tuple(entry.shape) for key, entry in entries.items()}
        self._entries: Mapping[str, Tensor] = entries
        self._copy = copy
        self._taken: list[tuple[int, int]] = []  # addresses that were handed out, in order

    def file_of(self, key: str) -> Path:
        return self.path

    def dtype(self, key: str) -> str:
        dtype = self._entries[key].dtype
        return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def read(self, key: str) -> Tensor:
        entry = self._entries[key].detach().cpu()
        tensor = entry.contiguous()
        if self._copy or not self._take(tensor):
            return tensor.clone()
        return tensor

    def _take(self, tensor: Tensor) -> bool:
        """Whether no part of the memory was handed out before; it is from now on."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        place = bisect.bisect(self._taken, (start, end))
        before = self._taken[place - 1][1] if place else 0
        after = self._taken[place][0] if place < len(self._taken) else end
        if before > start or after < end:
            return False
        self._taken.insert(place, (start, end))
        return True


def open_torch_weights(path: Path) -> TensorDict:
    """The entries of a ``pytorch_model.bin``, mapped into memory where its format allows.

    Raises:
        OSError: the file cannot be read.
        ValueError: it asks for code, is damaged or of another layout; the message names it.
    """
    entries = read_torch_file(path)
    if isinstance(entries, Mapping) and any(isinstance(v, Mapping) for v in entries.values()):
        listed = ", ".join(map(str, list(entries)[:6]))
        raise ValueError(
            f"{path}: expected names and tensors, found a checkpoint with the parts {listed} "
            "(of fairseq: see xlmr-ext convert)"
        )
    return TensorDict(entries, path)


def open_safetensors(path: Path) -> Any:
    """``safetensors.safe_open``; whatever is wrong with the header ends here as a ValueError."""
    return _opened(path)[0]


def _opened(path: Path) -> tuple[Any, int, dict[str, Any]]:
    """What :func:`open_safetensors` opens, where its data begin, and its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise ValueError(f"{path}: not a safetensors file: it has {size} bytes")
        if head == b"version ":
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself (git lfs pull)")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: not a whole safetensors file: it announces a header of {length} bytes "
                f"and has {size} bytes in all"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
        return safe_open(path, framework="pt"), 8 + length, header
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: not a usable safetensors file: {error}") from None


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of json: a name that comes twice has no single meaning."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"it names {twice[:80]!r} twice")
    return result
