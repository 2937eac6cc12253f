"""``frozen.safetensors``: the encoder as the kernels read it, to be mapped rather than read.

An ordinary safetensors file, whose every tensor begins on a multiple of 64 bytes. Its metadata say
the version, the layout and type of the packed weights, the model's class and three checksums: of
the header, of everything that runs for every text, and of the word embeddings, which are read by
row and so are checked on demand alone. A checksum finds damage, not forgery.

Entries: ``encoder.layer.N.FIELD`` with the fields of :class:`PackedLayer`; the model's other
parameters under their own names; in int8 ``….word_embeddings.codes`` and ``….scale``; ``filler.N``
without a meaning, which bring the next tensor to its place.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xlmr_ext._launch_encoder import (
    ANY_TABLE,
    PackedEncoder,
    PackedLayer,
    PackedWeight,
    pack_weight,
)
from xlmr_ext.formats.weights_file import SafetensorsFile

if TYPE_CHECKING:
    from xlmr_ext.configuration import XLMRobertaConfig

__all__ = ["FROZEN_NAME", "FrozenFile", "packed_entries", "write_frozen_file"]

FROZEN_NAME = "frozen.safetensors"

_FORMAT, _VERSION = "xlmr_ext_frozen", "1"
_ALIGN = 64
_ENCODER, _FILLER, _WORDS = "encoder.layer.", "filler.", "word_embeddings."
# Layouts that all tables read, and the type of their weights.
_LAYOUTS = {"int8": ("int8-16x4", torch.int8), "bfloat16": ("bf16-32x2", torch.bfloat16)}
_PANELS = re.compile(r"panels-([1-9]\d{0,3})")
_DTYPES = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}
_SUMMED = 4096  # bytes


class FrozenFile:
    """A frozen model's file; a ``WeightsFile`` of the entries beside the packed encoder.

    Opening it checks the header; the data are mapped, and read when they are asked for.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, of another kind, version or layout; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        facts = dict(self._file.metadata)
        if facts.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: not the file of a frozen model: its format is {facts.get('format')!r}"
            )
        if facts.get("version") != _VERSION:
            raise ValueError(
                f"{path}: has version {facts.get('version')!r} of the format; this release reads "
                f"{_VERSION}: write it again from the checkpoint that it was made from"
            )
        header = facts.pop("checksum_header", "")
        entries = {key: (self._file.dtype(key), shape) for key, shape in self._file.shapes.items()}
        if header != _header_checksum(facts, entries):
            raise _damaged(path, "its header")
        self._facts = facts
        dtype, found = facts.get("dtype", ""), facts.get("layout", "")
        self.is_int8 = dtype == "int8"
        panels = _PANELS.fullmatch(found)
        known = _LAYOUTS.get(dtype)
        if (found != known[0]) if known else (dtype != "float32" or panels is None):
            raise ValueError(
                f"{path}: its weights are {facts.get('dtype')!r} in the layout {found!r}, which "
                "this release does not know"
            )
        self._shared = None if known is None else known[1]
        self._columns = 0 if panels is None else int(panels[1])
        self._encoder = [key for key in entries if key.startswith(_ENCODER)]
        self.shapes = {
            key: shape
            for key, shape in self._file.shapes.items()
            if not key.startswith((_ENCODER, _FILLER))
        }
        words = sorted(key.rpartition(_WORDS)[2] for key in self.shapes if _WORDS in key)
        wanted = ["codes", "scale"] if self.is_int8 else ["weight"]
        if words != wanted:
            raise ValueError(f"{path}: of the word embeddings it holds {words}; expected {wanted}")
        for key in self.shapes:
            expected = "I8" if key.endswith(f"{_WORDS}codes") else "F32"
            if self.dtype(key) != expected:
                raise ValueError(f"{path}: {key} has type {self.dtype(key)}; expected {expected}")

    def file_of(self, key: str) -> Path:
        return self.path

    def dtype(self, key: str) -> str:
        return self._file.dtype(key)

    def read(self, key: str) -> Tensor:
        tensor = self._file.read(key)
        if tensor.data_ptr() % _ALIGN:
            raise ValueError(f"{self.path}: {key} does not begin on a multiple of {_ALIGN} bytes")
        return tensor

    def check(self, *, words: bool) -> None:
        """Reads what runs for every text, with ``words`` the word embeddings too, and compares it
        with the checksums; ValueError where it differs."""
        keys = sorted([*self._encoder, *self.shapes])
        self._compare("checksum", [key for key in keys if _WORDS not in key], "its data")
        if words:
            table = [key for key in keys if _WORDS in key]
            self._compare("checksum_words", table, "its word embeddings")

    def _compare(self, name: str, keys: Iterable[str], what: str) -> None:
        if _checksum((key, self.read(key)) for key in keys) != self._facts.get(name):
            raise _damaged(self.path, what)

    def packed_encoder(self, config: XLMRobertaConfig, activation: str) -> PackedEncoder:
        """The layers, mapped, or packed anew where another table's layout is in the file.

        Raises:
            ValueError: they are not those of the configuration; the message names the file.
        """
        hidden, inner = config.hidden_size, config.intermediate_size
        sizes = {
            "query_key_value": (3 * hidden, hidden),
            "query": (hidden, hidden),
            "key_value": (2 * hidden, hidden),
            "attention_output": (hidden, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        own = _own_layout()
        left = set(self._encoder)
        layers = []
        for number in range(config.num_hidden_layers):
            values: dict[str, Any] = {}
            for field in fields(PackedLayer):
                key = f"{_ENCODER}{number}.{field.name}"
                value: Any = self.read(key) if key in left else None
                left.discard(key)
                if value is not None and field.name in sizes:
                    value = self._packed(key, value, sizes[field.name], own)
                values[field.name] = value
            layers.append(PackedLayer(**values))
        if left:
            raise ValueError(
                f"{self.path}: {sorted(left)[0]} is no part of an encoder of "
                f"{config.num_hidden_layers} layers"
            )
        try:
            return PackedEncoder(layers, hidden, inner, config.num_attention_heads, activation)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _packed(
        self, key: str, data: Tensor, size: tuple[int, int], own: tuple[str, int]
    ) -> PackedWeight:
        out_features, in_features = size
        if self._shared is not None:
            return PackedWeight(data, *size, self._shared, ANY_TABLE)
        columns = self._columns
        panels = -(-out_features // columns)
        if data.dtype != torch.uint8 or data.numel() != panels * columns * in_features * 4:
            raise ValueError(
                f"{self.path}: {key} has {data.numel()} elements of {data.dtype}; expected a "
                f"weight {list(size)} in panels of {columns}"
            )
        table, own_columns = own
        if columns == own_columns:
            return PackedWeight(data, *size, torch.float32, table)
        rows = data.view(torch.float32).reshape(panels, in_features, columns).transpose(1, 2)
        return pack_weight(rows.reshape(-1, in_features)[:out_features])


def _own_layout() -> tuple[str, int]:
    """Name of the layout that the table in use packs, and the columns of its panels."""
    one = pack_weight(torch.zeros(1, 1))
    return one.table, one.data.numel() // one.dtype.itemsize


def packed_entries(encoder: PackedEncoder) -> dict[str, Tensor]:
    """The entries of the layers."""
    entries: dict[str, Tensor] = {}
    for number, layer in enumerate(encoder.layers):
        for field in fields(layer):
            value = getattr(layer, field.name)
            if value is not None:
                data = value.data if isinstance(value, PackedWeight) else value
                entries[f"{_ENCODER}{number}.{field.name}"] = data
    return entries


def write_frozen_file(
    path: Path, encoder: PackedEncoder, others: Mapping[str, Tensor], model: str
) -> None:
    """Writes the file.

    Args:
        encoder: packed in float32, bfloat16 or int8.
        others: the other entries, by name.
        model: the class.
    """
    entries = packed_entries(encoder) | {n: t.detach().contiguous() for n, t in others.items()}
    words = {name: tensor for name, tensor in entries.items() if _WORDS in name}
    runs = {name: tensor for name, tensor in entries.items() if name not in words}
    dtype = str(encoder.weight_dtype).removeprefix("torch.")
    shared = _LAYOUTS.get(dtype)
    facts = {
        "format": _FORMAT,
        "version": _VERSION,
        "dtype": dtype,
        "layout": shared[0] if shared else f"panels-{_own_layout()[1]}",
        "model": model,
        "checksum": _checksum(sorted(runs.items())),
        "checksum_words": _checksum(sorted(words.items())),
    }
    ordered = _filled({**runs, **words})
    types = {n: (_DTYPES[t.dtype], tuple(t.shape)) for n, t in ordered.items()}
    facts["checksum_header"] = _header_checksum(facts, types)
    header: dict[str, Any] = {"__metadata__": facts}
    place = 0
    for name, tensor in ordered.items():
        dtype, shape = types[name]
        end = place + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (place, end)}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(_bytes(tensor).data)


def _filled(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries, each of whose places is aligned by a filler before it where need be."""
    ordered: dict[str, Tensor] = {}
    numbers = itertools.count()
    for name, tensor in entries.items():
        ordered[name] = tensor
        room = -tensor.nbytes % _ALIGN
        if room:
            ordered[f"{_FILLER}{next(numbers)}"] = torch.zeros(room, dtype=torch.uint8)
    return ordered


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _checksum(entries: Iterable[tuple[str, Tensor]]) -> str:
    """CRC-32 of every name and, for every 4096 bytes, the sum of its 64-bit words.

    It runs at the speed of the memory, several times that of a CRC of all bytes, and finds every
    error within one word, missing and displaced blocks, and 1 - 2^-32 of all else.
    """
    crc = 0
    for name, tensor in entries:
        data = _bytes(tensor)
        whole = data.size - data.size % _SUMMED
        sums = data[:whole].view(np.uint64).reshape(-1, _SUMMED // 8).sum(axis=1)
        for part in (name.encode(), sums.tobytes(), data[whole:].tobytes()):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _header_checksum(
    facts: Mapping[str, str], entries: Mapping[str, tuple[str, tuple[int, ...]]]
) -> str:
    said = [sorted(facts.items()), sorted((n, t, list(s)) for n, (t, s) in entries.items())]
    return f"{zlib.crc32(json.dumps(said).encode()):08x}"


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged: {what} and their checksum differ")
