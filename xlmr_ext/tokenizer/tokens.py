"""Token ids of texts and, when they are asked for, the stretches of text that tokens stand for.

sentencepiece tells for each code point of the normalized text which code point of the text it comes
from. A token's span begins where its first code point comes from, not counting the space in front
of a word, and ends where the stretch of its last code point ends: all of "ﬁ" for either half of
"fi", the letter and its combining accent for "é".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from xlmr_ext.tokenizer.parts import SPACE, Parts, unit_ends, windows
from xlmr_ext.tokenizer.ranges import IntArray, bounds

if TYPE_CHECKING:
    from xlmr_ext.tokenizer.pieces import Pieces

__all__ = ["Alignment", "Tokens"]


@dataclass
class Alignment:
    """Where tokens come from. All arrays are [tokens].

    Attributes:
        starts, ends: code points of the text (of the word, where texts came as words).
        words: the index of the word in its text: words given, else those that spaces divide.
        unknown: how tokens that the vocabulary lacks are written, by token.
    """

    starts: IntArray
    ends: IntArray
    words: IntArray
    unknown: dict[int, str]


class Tokens:
    """The tokens of texts, one text after another, without special tokens around them.

    Attributes:
        ids: [tokens].
        ends: [texts + 1]; text t has the tokens from ``ends[t]`` to ``ends[t + 1]``.
    """

    def __init__(
        self, pieces: Pieces, parts: Parts, piece_ids: npt.NDArray[np.int32], counts: IntArray
    ) -> None:
        self._pieces, self._parts = pieces, parts
        self._piece_ids, self._counts = piece_ids, counts
        plain = parts.added < 0
        self._of_part = np.ones(len(plain), np.int64)  # tokens of each part
        self._of_part[plain] = counts
        self.ids = pieces.to_ids(piece_ids)
        if not plain.all():
            both = np.empty(int(self._of_part.sum()), np.int64)
            self._plain = np.repeat(plain, self._of_part)
            both[self._plain] = self.ids
            both[~self._plain] = parts.added[~plain]
            self.ids = both
        else:
            self._plain = np.ones(0, np.bool_)
        of_text = np.bincount(parts.sample, self._of_part, parts.samples)
        self.ends = bounds(of_text.astype(np.int64))

    @property
    def lengths(self) -> IntArray:
        """[texts]"""
        return np.diff(self.ends)

    def strings(self) -> list[str]:
        """Every token; what the vocabulary lacks appears as it is written."""
        tokens = list(map(self._pieces.name, self.ids.tolist()))
        for index, text in self.alignment.unknown.items():
            tokens[index] = text
        return tokens

    @cached_property
    def alignment(self) -> Alignment:
        """Computed on first use, from the texts."""
        parts = self._parts
        starts, ends, begins_word, unknown = self._plain_spans()
        part = np.repeat(np.arange(len(parts.added)), self._of_part)
        if len(self._plain):
            starts, ends = (self._merge(values, 0) for values in (starts, ends))
            begins_word = self._merge(begins_word, 1)
            ends[~self._plain] = parts.width[parts.added >= 0]
            place = np.flatnonzero(self._plain)
            unknown = {int(place[index]): text for index, text in unknown.items()}
        starts += parts.base[part]
        ends += parts.base[part]
        if parts.word is not None:
            return Alignment(starts, ends, parts.word[part], unknown)
        begins_word[bounds(self._of_part)[:-1][self._of_part > 0]] = 1
        count = np.cumsum(begins_word)
        first = self.ends[:-1][self.lengths > 0]
        before = np.repeat(count[first] - 1, self.lengths[self.lengths > 0])
        return Alignment(starts, ends, count - 1 - before, unknown)

    def _merge(self, plain: IntArray, added: int) -> IntArray:
        """Values of sentencepiece's tokens, and ``added`` for the added ones."""
        merged = np.full(len(self._plain), added, np.int64)
        merged[self._plain] = plain
        return merged

    def _plain_spans(self) -> tuple[IntArray, IntArray, IntArray, dict[int, str]]:
        """Of sentencepiece's tokens: starts, ends, 1 where a space is in front; unknown ones."""
        token = string = 0
        results = []
        unknown: dict[int, str] = {}
        for window in windows(self._parts.strings):
            counts = self._counts[string : string + len(window)]
            ids = self._piece_ids[token : token + int(counts.sum())]
            begin, end, space, written = _align(self._pieces, window, ids, counts)
            where = bounds(counts)
            for index in range(string, string + len(window)) if self._parts.spans else ():
                if index in self._parts.spans:
                    a, b = self._parts.spans[index]
                    rows = slice(*where[index - string : index - string + 2])
                    begin[rows], end[rows] = a[begin[rows]], b[end[rows] - 1]
            results.append((begin, end, space))
            unknown.update((token + index, text) for index, text in written.items())
            token, string = token + len(ids), string + len(window)
        if not results:
            return (*(np.zeros(0, np.int64) for _ in range(3)), unknown)  # type: ignore[return-value]
        begin, end, space = (np.concatenate(column) for column in zip(*results, strict=True))
        return begin, end, space, unknown


def _align(
    pieces: Pieces, strings: list[str], ids: npt.NDArray[np.int32], counts: IntArray
) -> tuple[IntArray, IntArray, IntArray, dict[int, str]]:
    """Starts, ends, and 1 where a space is in front, of the tokens of strings; unknown ones."""
    normalized = pieces.model.normalize(strings, with_offsets=True)
    sizes = np.fromiter((len(o) for _, o in normalized), np.int64, len(strings))  # code points + 1
    flat = itertools.chain.from_iterable(o for _, o in normalized)
    origins = np.fromiter(flat, np.int64, int(sizes.sum()))
    # As if the strings lay one after another, apart by one, in one text.
    shift = bounds(np.fromiter(map(len, strings), np.int64, len(strings)) + 1)[:-1]
    origins += np.repeat(shift, sizes)
    stretch_ends = unit_ends(np.append(origins, np.iinfo(np.int64).max))

    lengths, space, unknown = _shapes(pieces, strings, ids, counts)
    holder = np.repeat(np.arange(len(strings)), counts)
    total = bounds(lengths)
    where = bounds(sizes)
    first = total[:-1] + (where[:-1] - total[bounds(counts)[:-1]])[holder]
    last = first + lengths - 1
    # The space in front is no part of the span, but for a token that is nothing else: tokenizers
    # gives it the span of the character that it was put before.
    first += space & (first + 2 < where[1:][holder])
    last = np.maximum(last, first)
    starts, ends = origins[first] - shift[holder], stretch_ends[last] - shift[holder]
    _leave_out(pieces.deletable, strings, holder, starts, ends)
    return starts, ends, space.astype(np.int64), unknown


def _shapes(
    pieces: Pieces, strings: list[str], ids: npt.NDArray[np.int32], counts: IntArray
) -> tuple[IntArray, npt.NDArray[np.bool_], dict[int, str]]:
    """Lengths in the normalized text, whether a space is in front; how unknown ones are written."""
    all_lengths, all_spaces = pieces.shapes
    lengths, space = all_lengths[ids], all_spaces[ids]
    unknown: dict[int, str] = {}
    if (ids != 0).all():
        return lengths, space, unknown
    where = bounds(counts)
    # A run of unknown characters is one token, whose length only sentencepiece can tell.
    for index in np.unique(np.searchsorted(where, np.flatnonzero(ids == 0), side="right") - 1):
        pieces_of_it = pieces.model.encode(strings[index], out_type="offset_mapping")["pieces"]
        for token, piece in enumerate(pieces_of_it, int(where[index])):
            lengths[token] = len(piece)
            space[token] = piece[:1] == SPACE
            if ids[token] == 0:
                unknown[token] = piece
    return lengths, space, unknown


def _leave_out(
    deletable: str, strings: list[str], holder: IntArray, starts: IntArray, ends: IntArray
) -> None:
    """Take characters that normalization drops off the ends of spans."""
    text = "\n".join(strings)
    present = {character for character in deletable if character in text}
    if not present:
        return
    for token in range(len(ends)):
        string = strings[holder[token]]
        while ends[token] - 1 > starts[token] and string[ends[token] - 1] in present:
            ends[token] -= 1
