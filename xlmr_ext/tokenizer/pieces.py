"""XLM-R's vocabulary: a sentencepiece model under fairseq's numbering, and added tokens.

``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3; every other piece has its sentencepiece id plus 1;
``<mask>`` comes after the pieces, and added tokens after ``<mask>``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from xlmr_ext.threads import available_cpus
from xlmr_ext.tokenizer.added_tokens import AddedToken, Matcher
from xlmr_ext.tokenizer.parts import SPACE, cut, windows
from xlmr_ext.tokenizer.ranges import IntArray
from xlmr_ext.tokenizer.tokenizer_files import SPECIAL_TOKENS
from xlmr_ext.tokenizer.tokens import Tokens
from xlmr_ext.tokenizer.vocabulary import MadeModel

__all__ = ["Pieces"]

_UNKNOWN = 3
_BYTES_PER_THREAD = 16_384  # below this a thread costs more than it saves
_FEW = 16  # strings for which starting the first thread costs more than calling one by one


class Pieces:
    """The vocabulary: texts to ids, tokens to ids, and the token of every id.

    Raises OSError where the file cannot be read, ValueError where it is not a sentencepiece model
    in XLM-R's layout.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.model = _load_model(file)
        self.size = len(self.model) + 2  # without the added tokens
        # Sentencepiece's <unk>, <s>, </s> come first; the others move up by one.
        self._to_id: IntArray = np.arange(1, self.size - 1, dtype=np.int64)
        self._to_id[:3] = _UNKNOWN, 0, 2
        self._fixed = dict(zip(SPECIAL_TOKENS, (0, 1, 2, _UNKNOWN, self.size - 1), strict=True))
        self._base_names: list[str] | None = None
        self._added: dict[int, AddedToken] = {}
        self._matchers: dict[bool, tuple[Matcher, Matcher]] = {}
        for token in SPECIAL_TOKENS:
            self.add(AddedToken(token, lstrip=token == "<mask>", special=True))

    def __getstate__(self) -> dict[str, Any]:
        derived = ("shapes", "deletable")  # come back on demand, as the 250,000 names do
        state = {key: value for key, value in self.__dict__.items() if key not in derived}
        return {**state, "_base_names": None, "_matchers": {}}

    # -- tokens --------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Ids in all, those of added tokens included."""
        return max(self.size, max(self._added) + 1)

    def __contains__(self, token: str) -> bool:
        return token == "<unk>" or self.to_id(token) != _UNKNOWN

    @property
    def added(self) -> dict[int, AddedToken]:
        """The tokens that are found as they are written, by id."""
        return dict(sorted(self._added.items()))

    def add(self, token: AddedToken) -> bool:
        """Find ``token`` as it is written; one that has no id gets the next. False if known."""
        if not token.content or token in self._added.values():
            return False
        index = self.to_id(token.content)
        if index == _UNKNOWN and token.content != "<unk>":
            index = len(self) if self._added else self.size
        self._added[index] = token
        self._fixed[token.content] = index
        self._matchers.clear()
        return True

    def to_id(self, token: str) -> int:
        """The id of a token, ``<unk>``'s where the vocabulary lacks it."""
        if token in self._fixed:
            return self._fixed[token]
        if not token.isascii():
            token = token.encode("utf-8", "replace").decode()
        return int(self._to_id[self.model.piece_to_id(token)])

    def names(self) -> list[str]:
        """The token of every id below ``size``, made on first use; see `name`."""
        if self._base_names is None:
            tail = self.model.id_to_piece(list(range(3, len(self.model))))
            self._base_names = [*SPECIAL_TOKENS[:4], *tail, SPECIAL_TOKENS[4]]
        return self._base_names

    def name(self, index: int) -> str:
        """The token of an id."""
        return self.names()[index] if index < self.size else self._added[index].content

    def serialized(self) -> bytes:
        """The bytes of the sentencepiece model file."""
        return bytes(self.model.serialized_model_proto())

    # -- texts ---------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[Any],
        *,
        words: bool = False,
        split_specials: bool = False,
        num_threads: int | None = None,
    ) -> Tokens:
        """The tokens of texts, or of lists of ``words``, without the outer specials.

        ``split_specials`` reads special tokens in a text as any other characters.
        """
        raw, normalized = self._matchers_for(split_specials)
        parts = cut(texts, words, raw, normalized, self._fixed, self._normalize)
        flat, counts = [], []
        for window in windows(parts.strings):
            threads = num_threads or _default_threads(sum(map(len, window)))
            if len(window) <= _FEW and threads == 1:
                rows = [self.model.encode(string, out_type="numpy") for string in window]
            else:
                rows = self.model.encode(window, out_type="numpy", num_threads=threads)
            counts.append(np.fromiter(map(len, rows), np.int64, len(rows)))
            flat.append(np.concatenate(rows))
        none = np.zeros(0, np.int64)
        piece_ids = np.concatenate(flat) if flat else none.astype(np.int32)
        return Tokens(self, parts, piece_ids, np.concatenate(counts) if counts else none)

    def to_ids(self, piece_ids: npt.NDArray[np.int32]) -> IntArray:
        """XLM-R's ids of sentencepiece's."""
        return self._to_id[piece_ids]

    @cached_property
    def shapes(self) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """By sentencepiece's id: code points of the piece, and whether it begins with a space."""
        names = self.model.id_to_piece(list(range(len(self.model))))
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        return lengths, np.fromiter((name[:1] == SPACE for name in names), np.bool_, len(names))

    @cached_property
    def deletable(self) -> str:
        """The characters that normalization drops. In XLM-R's: 31 control characters."""
        controls = map(chr, (*range(1, 32), *range(127, 160)))
        empty = self._normalize("aa")[0]
        return "".join(c for c in controls if self._normalize(f"a{c}a")[0] == empty)

    def _normalize(self, text: str) -> tuple[str, list[int]]:
        normalized: tuple[str, list[int]] = self.model.normalize(text, with_offsets=True)
        return normalized

    def _matchers_for(self, split_specials: bool) -> tuple[Matcher, Matcher]:
        """Finders of the tokens that stand in a text as it is, and in its normalized form."""
        if split_specials not in self._matchers:
            tokens = [t for t in self._added.values() if not (split_specials and t.special)]
            # White space at an end does not outlive normalization.
            late = [t for t in tokens if t.normalized and t.content == t.content.strip()]
            self._matchers[split_specials] = (
                Matcher(token for token in tokens if token not in late),
                Matcher(late, self._written_normalized, strips=False),
            )
        return self._matchers[split_specials]

    def _written_normalized(self, token: AddedToken) -> str:
        return self._normalize(token.content)[0].removeprefix(SPACE)


def _load_model(file: str | os.PathLike[str]) -> sentencepiece.SentencePieceProcessor:
    path = Path(file)
    data = file.data if isinstance(file, MadeModel) else path.read_bytes()
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
    """Threads for ``size`` code points: the processors, and not above torch's number if loaded."""
    if size < 2 * _BYTES_PER_THREAD:
        return 1
    torch_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    limit = available_cpus()
    if torch_threads:
        limit = min(limit, torch_threads())
    return max(1, min(limit, size // _BYTES_PER_THREAD))
