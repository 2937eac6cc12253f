"""What computes xlmr_ext's ops: its kernels, with its own products or torch's, or torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NATIVE, TORCH, FALLBACK = "native", "torch", "fallback"
# As XLMR_EXT_CUDA_GEMM names the first two.
WAYS = (NATIVE, TORCH, FALLBACK)


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute here; None where they can."""
    from xlmr_ext import cuda_support

    return None if device == "cpu" else cuda_support.refusal(0, dtype)


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """Within, CUDA tensors are computed in this way. Ways of other libraries change nothing."""
    from xlmr_ext import cuda_support, fallback

    before: Any = cuda_support.gemm, cuda_support.refusal, fallback.say_once
    if way == FALLBACK:
        cuda_support.refusal = lambda *_: "it is the fallback's turn"  # type: ignore[assignment]
        fallback.say_once = lambda reason: None  # type: ignore[assignment]
    elif way in WAYS:
        cuda_support.gemm = way
    try:
        yield
    finally:
        cuda_support.gemm, cuda_support.refusal, fallback.say_once = before
