"""Where every token of a batch comes from: text, word, stretch. Computed when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xlmr_ext.tokenizer.ranges import IntArray, bounds, spread
from xlmr_ext.tokenizer.rows import Rows
from xlmr_ext.tokenizer.tokens import Tokens

__all__ = ["Origins"]


class Origins:
    """The origin of the tokens in rows; special tokens and padding have none, written -1.

    Args:
        rows: how the rows were made from ``first`` and ``second`` texts.
        widths: [rows] tokens of each row, padding included; ``side`` is where it was put.
        ids: [tokens of all rows] with the padding.
        name: gives the token of an id.
    """

    def __init__(
        self,
        rows: Rows,
        first: Tokens,
        second: Tokens | None,
        widths: IntArray,
        side: str,
        ids: IntArray,
        name: Callable[[int], str],
    ) -> None:
        self._made_from: tuple[Rows, Tokens, Tokens | None] | None = (rows, first, second)
        self._lengths, self._widths, self._side = rows.lengths, widths, side
        self._ids, self._name = ids, name
        self._bounds = bounds(widths)
        self.sequences = 1 if second is None else 2
        self._columns: dict[str, IntArray] = {}
        self._tokens: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As arrays, without the texts and the tokenizer."""
        self._compute()
        self._all_tokens()
        return {**self.__dict__, "_made_from": None, "_name": None}

    def __len__(self) -> int:
        return len(self._widths)

    def sequence(self, row: int) -> IntArray:
        """0 for a token of the first text, 1 for one of the second."""
        return self._of("sequence", row)

    def word(self, row: int) -> IntArray:
        return self._of("word", row)

    def spans(self, row: int) -> IntArray:
        """[tokens, 2]; (0, 0) for what comes from no text."""
        return np.stack((self._of("start", row), self._of("end", row)), 1)

    def all_spans(self) -> IntArray:
        """[tokens of all rows, 2]"""
        self._compute()
        return np.stack((self._columns["start"], self._columns["end"]), 1)

    def tokens(self, row: int) -> list[str]:
        """The tokens; what the vocabulary lacks appears as it is written."""
        return self._all_tokens()[self._slice(row)]

    def _slice(self, row: int) -> slice:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row}: the batch has {len(self)} rows")
        row %= len(self)
        return slice(int(self._bounds[row]), int(self._bounds[row + 1]))

    def _of(self, column: str, row: int) -> IntArray:
        where = self._slice(row)
        self._compute()
        return self._columns[column][where]

    def _compute(self) -> None:
        if self._columns or self._made_from is None:
            return
        rows, first, second = self._made_from
        a, b = first.alignment, None if second is None else second.alignment

        def column(one: IntArray | int, two: IntArray | int | None, special: int) -> IntArray:
            return spread(
                rows.fill(one, two, special, special),
                self._lengths, self._widths, special, self._side,
            )  # fmt: skip

        self._columns = {
            "sequence": column(0, 1, -1),
            "word": column(a.words, None if b is None else b.words, -1),
            "start": column(a.starts, None if b is None else b.starts, 0),
            "end": column(a.ends, None if b is None else b.ends, 0),
        }

    def _all_tokens(self) -> list[str]:
        if self._tokens is None and self._made_from is not None:
            rows, first, second = self._made_from
            self._tokens = list(map(self._name, self._ids.tolist()))
            # Which token of its text each one is: only to find those that the vocabulary lacks.
            unknown = first.alignment.unknown, {} if second is None else second.alignment.unknown
            if any(unknown):
                whole = [np.arange(len(t.ids)) for t in (first, second) if t is not None]
                whole.append(np.zeros(0, np.int64))
                place = spread(
                    rows.fill(whole[0], whole[1] + len(whole[0]), -1, -1),
                    self._lengths, self._widths, -1, self._side,
                )  # fmt: skip
                texts = {**unknown[0], **{len(whole[0]) + k: v for k, v in unknown[1].items()}}
                for index, key in enumerate(place.tolist()):
                    if key in texts:
                        self._tokens[index] = texts[key]
        return self._tokens or []
