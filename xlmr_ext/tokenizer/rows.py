"""Rows of tokens: truncation, windows that overlap, and special tokens around.

A row is ``<s> A </s>`` or ``<s> A </s></s> B </s>``, where A and B are stretches of the tokens of a
text each. What is known of every token (its id, its span, its word) is moved into rows alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xlmr_ext.tokenizer.ranges import IntArray, bounds, ranges

__all__ = ["Rows", "truncate", "truncated_lengths"]


@dataclass
class Rows:
    """Which tokens stand in which row.

    Attributes:
        sample: [rows] index of the text, or pair of texts.
        first: [rows, 2] where the first text's tokens begin and end among those of all first texts.
        second: the same of the second texts; None where there are no pairs.
        specials: whether ``<s>`` and ``</s>`` stand around.
    """

    sample: IntArray
    first: IntArray
    second: IntArray | None
    specials: bool

    @property
    def lengths(self) -> IntArray:
        """[rows], special tokens included."""
        lengths = self.first[:, 1] - self.first[:, 0]
        if self.second is not None:
            lengths = lengths + self.second[:, 1] - self.second[:, 0]
        return lengths + (0 if not self.specials else 2 if self.second is None else 4)

    def fill(
        self, first: IntArray | int, second: IntArray | int | None, start: int, end: int
    ) -> IntArray:
        """The rows, one after another: [tokens of all rows].

        Args:
            first, second: a value for every token of the first and second texts, or one for all.
            start, end: the values of ``<s>`` and of every ``</s>``.
        """
        begin = bounds(self.lengths)
        out = np.full(int(begin[-1]), end, np.int64)
        before = begin[:-1] + (1 if self.specials else 0)
        _place(out, before, self.first, first)
        if self.second is not None and second is not None:
            before = before + self.first[:, 1] - self.first[:, 0] + (2 if self.specials else 0)
            _place(out, before, self.second, second)
        if self.specials:
            out[begin[:-1]] = start
        return out


def _place(out: IntArray, where: IntArray, stretches: IntArray, values: IntArray | int) -> None:
    """Write the values of ``stretches`` into ``out``, each from its place on."""
    counts = stretches[:, 1] - stretches[:, 0]
    if isinstance(values, np.ndarray) and not (
        int(counts.sum()) == len(values) and (stretches[1:, 0] == stretches[:-1, 1]).all()
    ):  # else they are all of the values, in order
        values = values[ranges(stretches[:, 0], counts)]
    out[ranges(where, counts)] = values


def truncate(
    first: IntArray,
    second: IntArray | None,
    *,
    specials: bool,
    how: str,
    limit: int,
    side: str,
    stride: int,
    overflow: bool,
) -> Rows:
    """Rows of at most ``limit`` tokens, one a text, or with ``overflow`` as many as it takes.

    Args:
        first, second: [texts + 1] bounds of the texts' tokens (`Tokens.ends`).
        how: "do_not_truncate", "longest_first", "only_first" or "only_second".
        side: what is cut off: "right" or "left".
        stride: tokens that a window shares with the one before.
        overflow: rows for what is cut off. Where both texts of a pair are cut, every window of
            the one meets every window of the other, in transformers' order.

    Raises:
        ValueError: a text cannot be cut as asked, or the windows would never end.
    """
    count = len(first) - 1
    whole_first = np.stack((first[:-1], first[1:]), 1)
    whole_second = None if second is None else np.stack((second[:-1], second[1:]), 1)
    rows = Rows(np.arange(count), whole_first, whole_second, specials)
    if how == "do_not_truncate":
        return rows
    extra = 0 if not specials else 2 if second is None else 4
    if how == "only_second" and second is None:
        raise ValueError('truncation="only_second": there is no second text')
    if limit < extra:
        raise ValueError(f"max_length: {limit} has no room for {extra} special tokens")
    room = limit - extra
    long = np.flatnonzero(rows.lengths > limit)
    if not len(long):
        return rows
    if stride and stride >= room:
        raise ValueError(
            f"stride: {stride} tokens, but max_length leaves room for {room}; expected fewer"
        )
    keep = _keep(whole_first, whole_second, room, how, long)
    if overflow:
        return _windows(rows, keep, side, stride)
    for stretches, kept in zip((whole_first, whole_second), keep, strict=True):
        if stretches is not None:
            if side == "right":
                stretches[:, 1] = stretches[:, 0] + kept
            else:
                stretches[:, 0] = stretches[:, 1] - kept
    return rows


def _keep(
    first: IntArray, second: IntArray | None, room: int, how: str, long: IntArray
) -> tuple[IntArray, IntArray]:
    """How many tokens every first and every second text keeps."""
    n = first[:, 1] - first[:, 0]
    if second is None:
        return np.minimum(n, room), n
    m = second[:, 1] - second[:, 0]
    for row in long.tolist():
        n[row], m[row] = truncated_lengths(int(n[row]), int(m[row]), room, how)
    return n, m


def truncated_lengths(first: int, second: int, limit: int, how: str) -> tuple[int, int]:
    """How many tokens to keep of the texts of a pair so that both together are ``limit``.

    "longest_first" takes from the longer until both are as long and then halves the limit between
    them; an odd token goes to the text that was longer, and to the second where neither was. Raises
    ValueError where "only_first" or "only_second" cannot make room.
    """
    excess = first + second - limit
    if excess <= 0:
        return first, second
    if how == "longest_first":
        short, long = min(first, second), max(first, second)
        long = max(short, limit - short)
        if short + long > limit:
            short, long = limit // 2, limit - limit // 2
        return (long, short) if first > second else (short, long)
    size = first if how == "only_first" else second
    if size < excess:
        raise ValueError(
            f'truncation="{how}": that text has {size} tokens, and {excess} must go to leave '
            f"{limit} in all; raise max_length or use truncation=True"
        )
    return (first - excess, second) if how == "only_first" else (first, second - excess)


def _windows(rows: Rows, keep: tuple[IntArray, IntArray], side: str, stride: int) -> Rows:
    """A row for every window of a text, or for every pair of windows."""
    sample: list[int] = []
    first: list[tuple[int, int]] = []
    second: list[tuple[int, int]] = []
    for text in rows.sample.tolist():
        a = list(_stretches("text", rows.first[text], int(keep[0][text]), side, stride))
        b = [(0, 0)]
        if rows.second is not None:
            kept = int(keep[1][text])
            b = list(_stretches("text_pair", rows.second[text], kept, side, stride))
        pairs = [(a[0], b[0]), *((x, y) for x in a[1:] for y in b), *((a[0], y) for y in b[1:])]
        sample.extend([text] * len(pairs))
        first.extend(x for x, _ in pairs)
        second.extend(y for _, y in pairs)

    def table(stretches: list[tuple[int, int]]) -> IntArray:
        return np.array(stretches, np.int64).reshape(-1, 2)

    pairs_too = None if rows.second is None else table(second)
    return Rows(np.array(sample, np.int64), table(first), pairs_too, rows.specials)


def _stretches(
    name: str, whole: IntArray, size: int, side: str, stride: int
) -> Iterator[tuple[int, int]]:
    """The windows of one text, from the side that is kept."""
    begin, end = int(whole[0]), int(whole[1])
    if size >= end - begin:
        yield begin, end
        return
    if size <= stride:
        raise ValueError(
            f"max_length: it leaves {size} of {name}'s {end - begin} tokens to a window, "
            f"expected more than the stride of {stride}"
        )
    step = size - stride
    if side == "right":
        for start in range(begin, end, step):
            yield start, min(start + size, end)
            if start + size >= end:
                return
    else:
        for stop in range(end, begin, -step):
            yield max(stop - size, begin), stop
            if stop - size <= begin:
                return
