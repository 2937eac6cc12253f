"""The model's shape and the batches that every library is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PADDING = 1

# 32 rows of 5 to 55 tokens, 785 in all; 1760 when padded.
_RAGGED = [5 + round(50 * (row / 31) ** 1.588) for row in range(32)]
# 10 to 500 tokens; as many tokens, and as many pairs of them, as in 6x340.
_MIXED = [10, 107, 205, 240, 249, 316, 413, 500]
# 128 rows of 5 to 128 tokens, 6,737 in all; 16,384 when padded.
_RAGGED_128 = [5 + round(123 * (row / 127) ** 1.588) for row in range(128)]

NAMED = {"ragged": _RAGGED, "mixed": _MIXED, "ragged128": _RAGGED_128}
DEFAULT = ("1x16", "1x128", "1x512", "8x128", "32x32", "ragged", "mixed")


@dataclass(frozen=True)
class Shape:
    """An XLM-R model's sizes; the defaults are the base model's."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int = 3072
    vocabulary: int = 250002
    labels: int = 3

    def flops(self, lengths: list[int]) -> int:
        """Of the encoder's products in one forward pass over sequences of these lengths."""
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.inner
        attention = sum(4 * n * n * self.hidden for n in lengths)
        return self.layers * (2 * weights * sum(lengths) + attention)


@dataclass(frozen=True)
class Batch:
    """A padded batch: input_ids and attention_mask int64 [B, S], lengths int32 [B]."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    lengths: NDArray[np.int32]


def lengths_of(case: str) -> list[int]:
    """Lengths of a case: "8x128" is 8 rows of 128 tokens; names are in ``NAMED``.

    Raises:
        ValueError: no such case.
    """
    if case in NAMED:
        return list(NAMED[case])
    rows, _, length = case.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and 2 <= int(length) <= 512):
        raise ValueError(f"case {case!r}: expected ROWSxTOKENS (8x128) or one of {list(NAMED)}")
    return [int(length)] * int(rows)


def batch_of(case: str, vocabulary: int) -> Batch:
    """Random ids behind an <s> each, the same in every run."""
    lengths = np.asarray(lengths_of(case), dtype=np.int32)
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.random.default_rng(0).integers(4, vocabulary, mask.shape)
    ids[:, 0] = 0
    return Batch(np.where(mask, ids, PADDING), mask.astype(np.int64), lengths)
