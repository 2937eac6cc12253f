"""Texts cut into what sentencepiece reads and the added tokens between, in reading order.

A long text is also cut at spaces. No piece spans a space, so the ids do not change; what changes is
that sentencepiece sums scores in float32, and over a hundred thousand characters these sums lose
the digits by which it chooses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from xlmr_ext.tokenizer.added_tokens import AddedToken, Found, Matcher, stripped
from xlmr_ext.tokenizer.ranges import IntArray, ranges

__all__ = ["SPACE", "Normalize", "Parts", "Spans", "cut", "unit_ends", "windows"]

SPACE = "\u2581"  # how sentencepiece writes a space
_LONG = 2048  # code points; then cut at the next plain space between letters or digits
_WINDOW = 1 << 20  # code points in sentencepiece's hands at once
_WINDOW_STRINGS = 8192
_CUT = re.compile(r"(?<=\w) (?=\w)")
_SURROGATE = re.compile("[\ud800-\udfff]")

# The normalized text, and for each of its code points and its end the code point it comes from.
Normalize: TypeAlias = Callable[[str], tuple[str, list[int]]]
# For each code point of a string: where what it stands for begins and ends in the caller's text.
Spans: TypeAlias = tuple[IntArray, IntArray]


@dataclass
class Parts:
    """Parts of texts: row p is a string that sentencepiece reads, or an added token.

    Attributes:
        strings: of the parts with ``added`` -1, in order; no lone surrogates.
        samples: how many texts there are.
        sample: [parts] index of the text.
        base: [parts] the code point of the text (of the word, where texts came as words) at which
            the part begins.
        added: [parts] id of an added token, else -1.
        width: [parts] code points that an added token covers, else 0.
        word: [parts] index of the caller's word; None where texts came whole.
        spans: by index into ``strings``, of those that are not as the caller wrote them.
    """

    strings: list[str]
    samples: int
    sample: IntArray
    base: IntArray
    added: IntArray
    width: IntArray
    word: IntArray | None
    spans: dict[int, Spans] = field(default_factory=dict)


def cut(
    texts: Sequence[Any],
    words: bool,
    raw: Matcher,
    normalized: Matcher,
    ids: dict[str, int],
    normalize: Normalize,
) -> Parts:
    """Cut texts into parts: str each, or with ``words`` lists of them.

    Args:
        raw: the tokens that are looked for in the text as it is.
        normalized: those that are looked for in the normalized text.
        ids: of these tokens.
    """
    strings: list[str] = list(itertools.chain.from_iterable(texts) if words else texts)
    joined = "\n".join(strings)
    if (
        normalized
        or raw.may_find(joined)
        or max(map(len, strings), default=0) > _LONG
        or (not joined.isascii() and _SURROGATE.search(joined))
    ):
        cutter = _Cutter(raw, normalized, ids, normalize)
        for index, text in enumerate(texts):
            for number, string in enumerate(text if words else [text]):
                cutter.add(string, index, number)
        return cutter.parts(len(texts), words)
    zeros = np.zeros(len(strings), np.int64)
    sample, word = np.arange(len(texts), dtype=np.int64), None
    if words:
        counts = np.fromiter(map(len, texts), np.int64, len(texts))
        sample = np.repeat(sample, counts)
        word = ranges(np.zeros(len(texts), np.int64), counts)
    return Parts(strings, len(texts), sample, zeros, zeros - 1, zeros, word)


class _Cutter:
    """Cuts texts one at a time, in Python: for texts that need more than being passed on."""

    def __init__(
        self, raw: Matcher, normalized: Matcher, ids: dict[str, int], normalize: Normalize
    ) -> None:
        self._raw, self._normalized, self._ids, self._normalize = raw, normalized, ids, normalize
        self._strings: list[str] = []
        self._spans: dict[int, Spans] = {}
        self._rows: list[tuple[int, int, int, int, int]] = []  # sample, base, added, width, word

    def add(self, text: str, sample: int, word: int) -> None:
        done = 0
        for found in self._raw.find(text):
            self._plain(text[done : found.start], sample, word, done)
            self._token(found.token, sample, word, found.start, found.end)
            done = found.end
        self._plain(text[done:], sample, word, done)

    def parts(self, samples: int, words: bool) -> Parts:
        rows = np.array(self._rows, np.int64).reshape(-1, 5)
        sample, base, added, width, word = np.ascontiguousarray(rows.T)
        return Parts(
            self._strings, samples, sample, base, added, width, word if words else None, self._spans
        )

    def _token(self, token: AddedToken, sample: int, word: int, start: int, end: int) -> None:
        self._rows.append((sample, start, self._ids[token.content], end - start, word))

    def _plain(self, string: str, sample: int, word: int, base: int) -> None:
        """A stretch without tokens that are written as they are."""
        string, spans = _without_surrogates(string)
        if self._normalized:
            text, origins = self._normalize(string)
            if self._normalized.may_find(text):
                places = np.arange(len(string), dtype=np.int64)
                starts, ends = spans or (places, places + 1)
                self._find_normalized(
                    string, text, np.array(origins), sample, word, (starts + base, ends + base)
                )
                return
        self._long(string, sample, word, base, spans)

    def _find_normalized(
        self, string: str, text: str, origins: IntArray, sample: int, word: int, spans: Spans
    ) -> None:
        """A stretch in its normalized form, ``text``, in which tokens are found.

        What lies between them is read as it is there: a token may be half of a ligature.
        """
        stops = unit_ends(origins)

        def between(start: int, end: int) -> None:
            part = spans[0][origins[start:end]], spans[1][stops[start:end] - 1]
            self._long(text[start:end].replace(SPACE, " "), sample, word, 0, part)

        done = place = 0
        for found in self._normalized.find(text):
            between(done, found.start)
            here = Found(int(origins[found.start]), int(stops[found.end - 1]), found.token)
            here = stripped(string, here, place)
            start, end = int(spans[0][here.start]), int(spans[1][here.end - 1])
            self._token(found.token, sample, word, start, end)
            done, place = found.end, here.end
        between(done, len(text))

    def _long(self, string: str, sample: int, word: int, base: int, spans: Spans | None) -> None:
        start = 0
        while len(string) - start > _LONG:
            match = _CUT.search(string, start + _LONG)
            if match is None:
                break
            self._string(string, start, match.start(), sample, word, base, spans)
            start = match.end()
        self._string(string, start, len(string), sample, word, base, spans)

    def _string(
        self,
        string: str,
        start: int,
        end: int,
        sample: int,
        word: int,
        base: int,
        spans: Spans | None,
    ) -> None:
        if start == end:
            return
        if spans is not None:
            # Spans are places in the text already, once the base is in them.
            self._spans[len(self._strings)] = spans[0][start:end] + base, spans[1][start:end] + base
        self._rows.append((sample, 0 if spans is not None else base + start, -1, 0, word))
        self._strings.append(string[start:end])


def windows(strings: Sequence[str]) -> Iterator[list[str]]:
    """Successive strings, of bounded size together (or one that is larger)."""
    start = size = 0
    for index, string in enumerate(strings):
        if index > start and (size + len(string) > _WINDOW or index - start == _WINDOW_STRINGS):
            yield list(strings[start:index])
            start, size = index, 0
        size += len(string)
    if start < len(strings):
        yield list(strings[start:])


def unit_ends(origins: IntArray) -> IntArray:
    """Where what a code point stands for ends: the next greater origin. [n + 1] to [n].

    Code points with one origin come from one stretch of the text, of which nothing tells how it is
    divided among them.
    """
    new = np.diff(origins) > 0  # another stretch begins at the next
    return origins[1:][new][np.cumsum(new) - new]


def _without_surrogates(string: str) -> tuple[str, Spans | None]:
    """Pairs as their characters, lone ones as U+FFFD; spans where that changes the length."""
    if string.isascii() or not _SURROGATE.search(string):
        return string, None
    clean = string.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if len(clean) == len(string):
        return clean, None
    widths = []
    place = 0
    for character in clean:
        pair = character > "\uffff" and string[place] != character
        widths.append(1 + pair)
        place += 1 + pair
    ends = np.cumsum(np.array(widths, np.int64))
    return clean, (ends - widths, ends)
