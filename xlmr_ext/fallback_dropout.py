"""Dropout's masks of the fallback: torch's own numbers, the same in a forward and its backward.

They follow from the seed, the site, the device, the type and the shape. They are not the kernels'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlmr_ext._checks import check_dropout, statistics_dtype

_WORD = 2**64 - 1


def generator(device: torch.device, site: int, seed: Tensor) -> torch.Generator:
    """Of one place of the model: the seed and the site, mixed as splitmix64 does (Steele et al.
    2014, "Fast splittable pseudorandom number generators"), as some generators use 32 bits."""
    bits = (int(seed) + (site + 1) * 0x9E3779B97F4A7C15) & _WORD
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _WORD
    made = torch.Generator(device)
    made.manual_seed(bits ^ (bits >> 31))
    return made


def mask(like: Tensor, p: float, numbers: torch.Generator) -> Tensor:
    """Of inverted dropout, 0 or 1 / (1 - p), in the type of sums."""
    # Contiguous whatever ``like`` is: numbers are drawn in the order of memory.
    drawn = torch.empty(like.shape, dtype=statistics_dtype(like.dtype), device=like.device)
    return drawn.bernoulli_(1.0 - p, generator=numbers).div_(1.0 - p)


def row_mask(op: str, rows: Tensor, p: float, site: int, seed: Tensor | None) -> Tensor | None:
    """The mask of [N, hidden] rows in the type of sums; None where nothing is dropped."""
    p, site, seed = check_dropout(op, p, site, seed)
    if seed is None:
        return None
    return mask(rows, p, generator(rows.device, site, seed))
