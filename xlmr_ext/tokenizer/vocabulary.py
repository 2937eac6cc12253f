"""Write the XLM-R vocabulary of a ``tokenizer.json`` as a sentencepiece model file.

A sentencepiece model is a protocol buffer with few fields. Four wire primitives write them all, so
no protobuf library is needed. Field numbers are those of ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import base64
import binascii
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmr_ext.json_files import read_json
from xlmr_ext.label_tables import short

__all__ = ["MadeModel", "make_sentencepiece_model", "read_vocabulary", "write_sentencepiece_model"]

_LEADING = ("<s>", "<pad>", "</s>", "<unk>")  # the four ids that XLM-R places before the pieces
_MASK = "<mask>"

# enum SentencePiece.Type
_UNKNOWN = 2
_CONTROL = 3

_MAX_SCORE = 3e38  # what a 32-bit float holds

_WIRE_VARINT = 0
_WIRE_BYTES = 2
_WIRE_FIXED32 = 5


def _varint(value: int) -> bytes:
    if value < 0:  # a negative int32 is written as its 64-bit two's complement
        value += 1 << 64
    out = bytearray()
    while value > 0x7F:
        out.append(0x80 | (value & 0x7F))
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | _WIRE_VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _WIRE_BYTES) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | _WIRE_FIXED32) + struct.pack("<f", value)


def _piece(text: str, score: float, kind: int | None = None) -> bytes:
    """One entry of ``ModelProto.pieces``: piece = 1, score = 2, type = 3 (default NORMAL)."""
    body = _bytes(1, text.encode("utf-8")) + _float(2, score)
    if kind is not None:
        body += _integer(3, kind)
    return _bytes(1, body)


def _trainer_spec(vocab_size: int) -> bytes:
    """``ModelProto.trainer_spec``: what the run time reads of it, the type of model and the ids."""
    body = (
        _integer(3, 1)  # model_type: unigram
        + _integer(4, vocab_size)
        + _integer(40, 0)  # unk_id
        + _integer(41, 1)  # bos_id
        + _integer(42, 2)  # eos_id
        + _integer(43, -1)  # pad_id: none
    )
    return _bytes(2, body)


def _normalizer_spec(charsmap: bytes) -> bytes:
    """``ModelProto.normalizer_spec`` of XLM-R: NFKC by the compiled map, one leading space."""
    body = (
        _bytes(1, b"nmt_nfkc" if charsmap else b"identity")
        + _bytes(2, charsmap)
        + _integer(3, 1)  # add_dummy_prefix
        + _integer(4, 1)  # remove_extra_whitespaces
        + _integer(5, 1)  # escape_whitespaces
    )
    return _bytes(3, body)


def _charsmap(normalizer: Any) -> bytes | None:
    """The compiled map of a ``Precompiled`` normalizer, alone or in a ``Sequence``, or None.

    Empty where there is no normalizer at all.
    """
    if normalizer is None:
        return b""
    if not isinstance(normalizer, dict):
        return None
    if normalizer.get("type") == "Precompiled":
        encoded = normalizer.get("precompiled_charsmap")
        if not isinstance(encoded, str):
            return None
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error:
            return None
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else ():
        found = _charsmap(part)
        if found is not None:
            return found
    return None


def read_vocabulary(tokenizer_json: Path) -> tuple[list[tuple[str, float]], bytes]:
    """Read (piece, score) in the order of XLM-R's ids, and the map that normalizes text.

    Row i is id i: ``<s>``, ``<pad>``, ``</s>``, ``<unk>``, the pieces, ``<mask>``.
    Raises ValueError where the file is not JSON or not an XLM-R vocabulary.
    """
    data = read_json(tokenizer_json, dict)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        raise ValueError(f"{tokenizer_json}: expected a tokenizer.json with a Unigram model")
    rows = model.get("vocab")
    if not isinstance(rows, list):
        raise ValueError(f"{tokenizer_json}: model.vocab is missing")
    vocabulary: list[tuple[str, float]] = []
    for index, row in enumerate(rows):
        if not (
            isinstance(row, list)
            and len(row) == 2
            and isinstance(row[0], str)
            and isinstance(row[1], (int, float))
            and abs(row[1]) < _MAX_SCORE
        ):
            raise ValueError(
                f"{tokenizer_json}: vocab row {index} is {short(row)}, not [piece, score]"
            )
        if any("\ud800" <= character <= "\udfff" for character in row[0]):
            raise ValueError(f"{tokenizer_json}: vocab row {index} is {row[0]!r}, half a character")
        vocabulary.append((row[0], float(row[1])))
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        # Some files have <mask> behind the vocabulary, at the id where others have it inside.
        if isinstance(token, dict) and (token.get("content"), token.get("id")) == (
            _MASK,
            len(vocabulary),
        ):
            vocabulary.append((_MASK, 0.0))
    leading = tuple(piece for piece, _ in vocabulary[:4])
    if leading != _LEADING or model.get("unk_id") != 3 or vocabulary[-1][0] != _MASK:
        raise ValueError(
            f"{tokenizer_json}: not in the order of XLM-R's ids: it begins with {leading} and ends "
            f"with {vocabulary[-1:]}, unk_id {model.get('unk_id')}; expected {_LEADING}, {_MASK!r} "
            "and 3"
        )
    charsmap = _charsmap(data.get("normalizer"))
    if charsmap is None:
        raise ValueError(f"{tokenizer_json}: no Precompiled normalizer with a readable map")
    return vocabulary, charsmap


def _encode(pieces: Sequence[tuple[str, float]], charsmap: bytes) -> bytes:
    parts = [
        _piece("<unk>", 0.0, _UNKNOWN),
        _piece("<s>", 0.0, _CONTROL),
        _piece("</s>", 0.0, _CONTROL),
    ]
    parts.extend(_piece(text, score) for text, score in pieces)
    return b"".join([*parts, _trainer_spec(len(parts)), _normalizer_spec(charsmap)])


@dataclass(frozen=True)
class MadeModel(os.PathLike[str]):
    """A ``sentencepiece.bpe.model`` that is no file, by the path of what it was made from."""

    path: Path
    data: bytes

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def make_sentencepiece_model(tokenizer_json: Path) -> MadeModel:
    """The ``sentencepiece.bpe.model`` of an XLM-R ``tokenizer.json``.

    It holds ``<unk>``, ``<s>``, ``</s>`` and every piece with its score, so sentencepiece id i is
    XLM-R id i + 1. Raises ValueError as `read_vocabulary`.
    """
    vocabulary, charsmap = read_vocabulary(tokenizer_json)
    return MadeModel(tokenizer_json, _encode(vocabulary[4:-1], charsmap))


def write_sentencepiece_model(tokenizer_json: Path, target: Path) -> None:
    """Write ``target``, a ``sentencepiece.bpe.model``, from an XLM-R ``tokenizer.json``.

    It appears whole or not at all. Raises ValueError as `read_vocabulary`.
    """
    data = make_sentencepiece_model(tokenizer_json).data
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)  # mkstemp's 0600 is for secrets
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
