"""What a tokenizer returns: columns of token ids and masks, and where the tokens come from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xlmr_ext.tokenizer.padding import to_tensors
from xlmr_ext.tokenizer.ranges import IntArray

if TYPE_CHECKING:
    import torch

    from xlmr_ext.tokenizer.origins import Origins

__all__ = ["BatchEncoding", "CharSpan", "TokenSpan"]


class CharSpan(NamedTuple):
    """The code points ``text[start:end]``."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """The tokens from ``start`` to before ``end``."""

    start: int
    end: int


class BatchEncoding(dict[str, Any]):
    """A dict of columns whose keys are attributes too: ``batch["input_ids"] is batch.input_ids``.

    It unpacks into a model's arguments (``model(**batch)``) and moves between devices (`to`). The
    result of a tokenizer's call also knows the word and the stretch of text of every token; the
    methods that tell them raise ValueError for a batch that was made in another way. Where a method
    takes a row and a place, the row may be left out: it is 0 then.
    """

    _origins: Origins | None = None

    def __init__(
        self, data: Mapping[str, Any] | None = None, origins: Origins | None = None
    ) -> None:
        super().__init__(data or {})
        if origins is not None:
            self._origins = origins

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"BatchEncoding has no {name!r}; it holds {', '.join(self) or 'nothing'}"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self._origins)

    def __copy__(self) -> BatchEncoding:
        return type(self)(self, self._origins)

    def copy(self) -> BatchEncoding:
        return copy.copy(self)

    @property
    def data(self) -> dict[str, Any]:
        """The columns, as a plain dict."""
        return dict(self)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every torch tensor to ``device``, in place; returns itself.

        Raises ValueError where there are columns but no tensor among them.
        """
        tensors = [key for key, value in self.items() if hasattr(value, "to")]
        if self and not tensors:
            raise ValueError(
                f"to({device!r}): the columns {', '.join(self)} are not torch tensors; "
                'ask the tokenizer for return_tensors="pt"'
            )
        for key in tensors:
            self[key] = self[key].to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchEncoding:
        """Make every column an array ("np") or a torch tensor ("pt"), in place; returns itself."""
        if tensor_type is not None:
            for key, value in self.items():
                if not hasattr(value, "dtype"):
                    self[key] = to_tensors(key, value, tensor_type)
        return self

    # -- where tokens come from ------------------------------------------------------------------

    @property
    def is_fast(self) -> bool:
        """Whether it knows words and stretches (transformers' name for it)."""
        return self._origins is not None

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs, None where it is not known."""
        return None if self._origins is None else self._origins.sequences

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row; what the vocabulary lacks appears as it is written."""
        return self._source("tokens").tokens(batch_index)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 (the first text) or 1; None for special tokens and padding."""
        return _with_none(self._source("sequence_ids").sequence(batch_index))

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word of each token of a row, counted in its text; None for special tokens.

        Words are those given with ``is_split_into_words=True``, else what spaces divide.
        """
        return _with_none(self._source("word_ids").word(batch_index))

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """0 where the token is of the first text, 1 of the second; None: of neither."""
        row, token = _place(batch_or_token_index, token_index)
        return _or_none(self._source("token_to_sequence").sequence(row)[token])

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """The word of a token, None for special tokens."""
        row, token = _place(batch_or_token_index, token_index)
        return _or_none(self._source("token_to_word").word(row)[token])

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> CharSpan | None:
        """The code points that a token stands for, None for special tokens."""
        row, token = _place(batch_or_token_index, token_index)
        source = self._source("token_to_chars")
        if source.sequence(row)[token] < 0:
            return None
        return CharSpan(*source.spans(row)[token].tolist())

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token that stands for a code point; None for a space and what was cut off."""
        row, char = _place(batch_or_char_index, char_index)
        source = self._source("char_to_token")
        spans = source.spans(row)
        held = (spans[:, 0] <= char) & (char < spans[:, 1])
        found = np.flatnonzero(held & (source.sequence(row) == sequence_index))
        return int(found[0]) if len(found) else None

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a code point is in, None for a space."""
        row, char = _place(batch_or_char_index, char_index)
        token = self.char_to_token(row, char, sequence_index)
        return None if token is None else self.token_to_word(row, token)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word, None where the row has none of it."""
        row, word = _place(batch_or_word_index, word_index)
        source = self._source("word_to_tokens")
        held = (source.word(row) == word) & (source.sequence(row) == sequence_index)
        found = np.flatnonzero(held)
        return TokenSpan(int(found[0]), int(found[-1]) + 1) if len(found) else None

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The code points of a word, None where the row has none of its tokens."""
        row, word = _place(batch_or_word_index, word_index)
        tokens = self.word_to_tokens(row, word, sequence_index)
        if tokens is None:
            return None
        spans = self._source("word_to_chars").spans(row)
        return CharSpan(int(spans[tokens.start, 0]), int(spans[tokens.end - 1, 1]))

    def _source(self, asked: str) -> Origins:
        if self._origins is None:
            raise ValueError(
                f"{asked}: only the result of a tokenizer's call knows where tokens come from; "
                "this batch was padded, converted or made by hand"
            )
        return self._origins


def _place(first: int, second: int | None) -> tuple[int, int]:
    return (0, first) if second is None else (first, second)


def _or_none(value: Any) -> int | None:
    return None if value < 0 else int(value)


def _with_none(values: IntArray) -> list[int | None]:
    return [None if value < 0 else value for value in values.tolist()]
