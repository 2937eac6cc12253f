"""Many short ranges at once: the index arrays by which rows of different lengths are moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["IntArray", "bounds", "ranges", "spread"]

IntArray = npt.NDArray[np.int64]


def bounds(lengths: IntArray) -> IntArray:
    """Where rows that lie one after another begin and end: [rows + 1], from 0."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=ends[1:])
    return ends


def ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """``starts[0], starts[0] + 1, ...`` (``lengths[0]`` of them), then from ``starts[1]`` on."""
    ends = bounds(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)


def spread(
    values: npt.NDArray[Any], lengths: IntArray, widths: IntArray, fill: int, side: str
) -> npt.NDArray[Any]:
    """Rows of ``lengths`` as rows of ``widths``, filled up on ``side`` ("right" or "left").

    ``values`` is [sum(lengths), ...]; returns [sum(widths), ...].
    """
    if np.array_equal(lengths, widths):
        return values
    starts = bounds(widths)[:-1]
    if side == "left":
        starts = starts + widths - lengths
    padded = np.full((int(widths.sum()), *values.shape[1:]), fill, values.dtype)
    padded[ranges(starts, lengths)] = values
    return padded
