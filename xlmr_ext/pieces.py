"""XLM-R's pieces: a sentencepiece model under fairseq's numbering, with special tokens.

``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3; every other piece has its sentencepiece id plus 1;
``<mask>`` comes last.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from xlmr_ext.batch_encoding import IntArray
from xlmr_ext.text_inputs import utf8
from xlmr_ext.threads import available_cpus
from xlmr_ext.tokenizer_files import SPECIAL_TOKENS

__all__ = ["Pieces", "SpecialToken", "SpecialTokenId"]

_MASK = "<mask>"
_UNKNOWN = 3
_BYTES_PER_THREAD = 16_384  # below this a thread costs more than it saves


class SpecialTokenId:
    """The id of a special token, read-only: ``pad_token_id`` follows from ``pad_token``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._token = name.removesuffix("_id")

    def __get__(self, instance: Any, owner: type | None = None) -> int:
        return int(instance._pieces.special_ids[getattr(instance, self._token)])

    def __set__(self, instance: Any, value: object) -> None:
        raise AttributeError("special tokens are fixed when the tokenizer is made")


class SpecialToken:
    """A special token, read-only after construction."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> str:
        return str(instance._special_tokens[self._name])

    def __set__(self, instance: Any, value: object) -> None:
        raise AttributeError("special tokens are fixed when the tokenizer is made")


class Pieces:
    """The vocabulary: texts to ids, tokens to ids, and the token of every id.

    Raises OSError where the file cannot be read, ValueError where it is not a sentencepiece model
    in XLM-R's layout.
    """

    def __init__(self, path: Path) -> None:
        self._model = _load_model(path)
        self.size = len(self._model) + 2
        # Sentencepiece's <unk>, <s>, </s> come first; the others move up by one.
        self._to_id: IntArray = np.arange(1, self.size - 1, dtype=np.int64)
        self._to_id[:3] = _UNKNOWN, 0, 2
        self._fixed = dict(zip(SPECIAL_TOKENS, (0, 1, 2, _UNKNOWN, self.size - 1), strict=True))
        self._names: list[str] | None = None
        self.set_specials(())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": None}  # 250,000 strings that come back on demand

    def set_specials(self, tokens: Iterable[str]) -> None:
        """Take ``tokens`` as special, beside the five that always are."""
        self.special_ids = {**self._fixed, **{token: self.to_id(token) for token in tokens}}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def __contains__(self, token: str) -> bool:
        return token == "<unk>" or self.to_id(token) != _UNKNOWN

    def serialized(self) -> bytes:
        """The bytes of the sentencepiece model file."""
        return bytes(self._model.serialized_model_proto())

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text; what the vocabulary lacks appears as it is written."""
        tokens: list[str] = []
        for part, special in self._split(text):
            # As str: older releases of sentencepiece answer bytes with bytes.
            plain = utf8(part).decode()
            tokens.extend([part] if special else self._model.encode(plain, out_type=str))
        return tokens

    def encode(self, texts: Sequence[str], num_threads: int | None = None) -> list[IntArray]:
        """Ids of each text without the outer specials: one call of sentencepiece for all."""
        segments: list[bytes] = []
        # A text is one segment, by index; or, with specials in it, segments and -1 - special id.
        plans: list[int | list[int]] = []
        for text in texts:
            if self._pattern.search(text) is None:
                plans.append(len(segments))
                segments.append(utf8(text))
                continue
            plan: list[int] = []
            for part, special in self._split(text):
                plan.append(-1 - self.special_ids[part] if special else len(segments))
                if not special:
                    segments.append(utf8(part))
            plans.append(plan)
        threads = num_threads or _default_threads(sum(map(len, segments)))
        encoded = self._model.encode(segments, out_type=int, num_threads=threads)
        ends = list(itertools.accumulate(map(len, encoded), initial=0))
        flat = self._to_id[
            np.fromiter(itertools.chain.from_iterable(encoded), np.int64, count=ends[-1])
        ]

        def part_ids(item: int) -> IntArray:
            return np.array([-1 - item]) if item < 0 else flat[ends[item] : ends[item + 1]]

        return [
            part_ids(plan) if isinstance(plan, int) else np.concatenate(list(map(part_ids, plan)))
            for plan in plans
        ]

    def _split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The parts of a text, and whether each is a special token."""
        parts = self._pattern.split(text)
        for index, part in enumerate(parts):
            special = index % 2 == 1
            if not special and index + 1 < len(parts) and parts[index + 1] == _MASK:
                part = part.rstrip()
            if part:
                yield part, special

    def to_id(self, token: str) -> int:
        """The id of a token, ``<unk>``'s where the vocabulary lacks it."""
        if token in self._fixed:
            return self._fixed[token]
        return int(self._to_id[self._model.piece_to_id(utf8(token).decode())])

    def names(self) -> list[str]:
        """The token of every id, made on first use."""
        if self._names is None:
            tail = self._model.id_to_piece(list(range(3, len(self._model))))
            self._names = [*SPECIAL_TOKENS[:4], *tail, SPECIAL_TOKENS[4]]
        return self._names


def _load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    data = path.read_bytes()
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a sentencepiece model ({error})") from error
    leading = [model.id_to_piece(index) for index in range(min(3, len(model)))]
    if leading != ["<unk>", "<s>", "</s>"]:
        raise ValueError(
            f"{path}: not XLM-R's layout: its pieces begin with {leading}; "
            "expected <unk>, <s>, </s>"
        )
    return model


def _default_threads(size: int) -> int:
    """Threads for ``size`` bytes: what torch uses, where it is loaded; else the processors."""
    if size < 2 * _BYTES_PER_THREAD:
        return 1
    torch_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    limit = torch_threads() if torch_threads else available_cpus()
    return max(1, min(limit, size // _BYTES_PER_THREAD))
