"""Entries of weights matched with a model by name and shape, read, and written.

Nothing here knows a model's class; entries are names, shapes and tensors.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xlmr_ext.formats.weights_file import FILE_DTYPES, WeightsFile
from xlmr_ext.formats.weights_file import open_safetensors as open_weights
from xlmr_ext.mapped_memory import give_back, row_pieces

__all__ = [
    "Pieces",
    "Plan",
    "bytes_of",
    "check_dtypes",
    "match_entries",
    "open_weights",
    "pieces_of",
    "read_tensors",
    "tensors_to_save",
    "write_weights",
]

logger = logging.getLogger(__name__)

# Entries that files carry and that say nothing about the model asked for.
_HARMLESS = re.compile(
    r"^lm_head\.|^(roberta\.)?pooler\.|(^|\.)embeddings\.(position|token_type)_ids$"
)
# As safetensors calls them.
_FILE_NAMES = {
    **{dtype: name for name, dtype in FILE_DTYPES.items()},
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass
class Plan:
    """Which entry of the file fills which entry of the model, and what stays open on both sides."""

    source: dict[str, str] = field(default_factory=dict)  # name in the model -> key in the file
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def report(self, model: str, path: Path) -> None:
        """Logs, as warnings, what was initialised anew and what was left out."""
        new = self.missing + [
            f"{name} (shape in the file {list(there)}, in the model {list(here)})"
            for name, there, here in self.mismatched
        ]
        if new:
            logger.warning(
                "%s: %d weights of %s are not in the file and are newly initialised; train the "
                "model before you use it: %s",
                path,
                len(new),
                model,
                ", ".join(new),
            )
        if self.unexpected:
            logger.warning(
                "%s: %d entries are not part of %s and are left out: %s",
                path,
                len(self.unexpected),
                model,
                ", ".join(self.unexpected),
            )


def match_entries(
    expected: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    path: Path,
    model: str,
    prefix: str,
    is_base: bool,
    ignore_mismatched_sizes: bool = False,
) -> Plan:
    """Pairs the entries of the file with those of the model, by name and shape.

    Args:
        expected: the model's entries by name (meta tensors do).
        shapes: the file's entries.
        path, model: the file and the model's name, for messages.
        prefix: what a model with a head puts before the names of its base model, dot included.
        is_base: whether the model is the base model itself.
        ignore_mismatched_sizes: leave out what has another shape in the file.

    Raises:
        ValueError: a shape differs, two entries are the same one, or the file holds less of the
            model than is missing.
    """
    plan = Plan()
    for key in shapes:
        name = key
        for old, new in _OLD_NAMES.items():
            if name.endswith(old):
                name = name[: -len(old)] + new
        if name not in expected:
            if is_base:
                name = name.removeprefix(prefix)
            elif prefix + name in expected:
                name = prefix + name
        if name in plan.source:
            raise ValueError(f"{path}: {plan.source[name]} and {key} are both {name} of the model")
        if name in expected:
            plan.source[name] = key
        elif not _HARMLESS.search(name):
            plan.unexpected.append(key)

    # A parameter with two names needs one entry.
    entry = {id(expected[name]): key for name, key in plan.source.items()}
    lacking: set[int] = set()
    for name, tensor in expected.items():
        if name not in plan.source:
            if id(tensor) in entry:
                plan.source[name] = entry[id(tensor)]
            elif id(tensor) not in lacking:
                lacking.add(id(tensor))
                plan.missing.append(name)
        if name in plan.source:
            there, here = shapes[plan.source[name]], tuple(tensor.shape)
            if there != here:
                plan.mismatched.append((name, there, here))
                if ignore_mismatched_sizes:
                    del plan.source[name]
    if plan.mismatched and not ignore_mismatched_sizes:
        listed = "; ".join(
            f"{name}: {list(there)} in the file, {list(here)} in the model"
            for name, there, here in plan.mismatched[:8]
        )
        raise ValueError(
            f"{path}: {len(plan.mismatched)} entries have another shape than the configuration "
            f"asks for: {listed} (ignore_mismatched_sizes=True initialises them anew)"
        )
    # More to make up than to read: the file is of another model, or the configuration is not its
    # own. It also bounds what a hostile configuration can have allocated.
    made_up = sum(expected[name].numel() for name in plan.missing)
    read = sum(expected[name].numel() for name in plan.source)
    if made_up > read and not plan.mismatched:
        raise ValueError(
            f"{path}: not the weights of this {model}: {len(plan.missing)} of its "
            f"{len(expected)} entries are missing ({', '.join(plan.missing[:4])}, ...), and "
            f"{len(plan.unexpected)} entries of the file are not part of it"
            f"{': ' + ', '.join(plan.unexpected[:4]) if plan.unexpected else ''}"
        )
    made_up += sum(math.prod(here) for _, _, here in plan.mismatched)
    stored = sum(map(math.prod, shapes.values()))
    if made_up > stored:
        raise ValueError(
            f"{path}: its entries have {stored} elements, and {made_up} would have to be "
            f"initialised anew for this {model}: the configuration is not of this file"
        )
    return plan


def check_dtypes(
    expected: Mapping[str, Tensor], plan: Plan, weights: WeightsFile
) -> list[torch.dtype]:
    """The floating types that the entries have; refuses what cannot be a weight."""
    found = []
    for name, key in plan.source.items():
        dtype = weights.dtype(key)
        if not expected[name].is_floating_point():
            continue
        if dtype not in FILE_DTYPES:
            raise ValueError(
                f"{weights.file_of(key)}: {key} has type {dtype}; weights have "
                f"{', '.join(FILE_DTYPES)} (quantised checkpoints are not read)"
            )
        found.append(FILE_DTYPES[dtype])
    return found


def read_tensors(
    expected: Mapping[str, Tensor], plan: Plan, weights: WeightsFile, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The entries under the model's names; a parameter with two names is one object.

    Raises:
        ValueError: the file has two entries for it, and they differ.
    """
    read: dict[int, Tensor] = {}
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, key in plan.source.items():
        target = expected[name]
        other = first.setdefault(id(target), key)
        if other != key and not _same(weights.read(key), weights.read(other)):
            raise ValueError(
                f"{weights.file_of(key)}: {other} and {key} differ, and are one parameter of the "
                "model (tie_word_embeddings=False makes them two)"
            )
        if id(target) not in read:
            tensor = weights.read(key).to(dtype if target.is_floating_point() else target.dtype)
            # Headers of any length exist; the kernels need elements on their own boundary.
            if tensor.data_ptr() % tensor.element_size():
                tensor = tensor.clone()
            if isinstance(target, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=target.requires_grad)
            read[id(target)] = tensor
        tensors[name] = read[id(target)]
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.dtype))


@dataclass(frozen=True)
class Pieces:
    """A table that is made while it is written, some rows at a time, and is never there whole.

    Args:
        shape: rows first.
        make: gives the rows from one number up to another.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[int, int], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def __iter__(self) -> Iterator[Tensor]:
        """The parts, in order."""
        row_bytes = math.prod(self.shape[1:]) * self.element_size()
        for first, last in row_pieces(self.shape[0], row_bytes):
            yield self.make(first, last)


def tensors_to_save(entries: Mapping[str, Tensor | Pieces]) -> dict[str, Tensor | Pieces]:
    """The model's entries, contiguous and without shared memory, a shared parameter once."""
    written: set[int] = set()
    storages: set[tuple[torch.device, int]] = set()
    tensors: dict[str, Tensor | Pieces] = {}
    for name, entry in entries.items():
        if isinstance(entry, Pieces):
            tensors[name] = entry
            continue
        if entry.is_meta:
            raise ValueError(f"{name} has no data: the model is on the meta device")
        if id(entry) in written:
            continue
        written.add(id(entry))
        tensor = entry.detach().contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if storage in storages:
            tensor = tensor.clone()
        storages.add(storage)
        tensors[name] = tensor.cpu()
    return tensors


def write_weights(tensors: Mapping[str, Tensor | Pieces], path: Path) -> None:
    """Writes a safetensors file that transformers takes for its own; OSError where it fails.

    Piece by piece: what is mapped from another file does not come to lie in memory.
    """
    # The largest elements first, so that each is on its own boundary.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        entry = tensors[name]
        size = entry.numel() * entry.element_size()
        header[name] = {
            "dtype": _FILE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                for part in pieces_of(tensors[name]):
                    file.write(memoryview(bytes_of(part)))  # type: ignore[arg-type, unused-ignore]
                    give_back(part)
    except OSError as error:
        error.filename = str(path)  # a write names no file
        raise


def pieces_of(entry: Tensor | Pieces) -> Iterator[Tensor]:
    """An entry's elements in order, some megabytes at a time."""
    if isinstance(entry, Pieces):
        yield from entry
        return
    flat = entry.detach().reshape(-1)
    for first, last in row_pieces(flat.numel(), flat.element_size()):
        yield flat[first:last]


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, without a copy where it is contiguous on the CPU."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    found: NDArray[np.uint8] = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return found
