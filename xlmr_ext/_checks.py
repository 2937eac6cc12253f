"""What the kernels take: each check names the op, the tensor, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_HEAD_SIZE = 128
ACTIVATIONS = {"none": 0, "tanh": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
LINEAR_ACTIVATIONS = ("none", "tanh")
FEED_FORWARD_ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
_DTYPES = {torch.float32: 0, torch.float64: 1}


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def dtype_code(op: str, name: str, t: Tensor) -> int:
    """Number of the type in ``csrc/types.h``."""
    code = _DTYPES.get(t.dtype)
    if code is None:
        hint = (
            "; call .float() on the model, or wrap the call in torch.autocast"
            if t.dtype in (torch.float16, torch.bfloat16)
            else ""
        )
        raise TypeError(
            f"{op}: {name} is {t.dtype}; the CPU kernels compute in float32 and float64{hint}"
        )
    return code


def check_tensor(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One tensor against the op's first one: same device, this dtype, this shape."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")
    if t.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {t.device}; expected the CPU, like the others")
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} is {t.dtype}; expected {dtype}")
    if tuple(t.shape) != shape:
        expected = "[" + ", ".join(str(s) for s in shape) + "]"
        raise ValueError(f"{op}: {name} has shape {_shape(t)}; expected {expected}")


def check_rank2(op: str, name: str, t: Tensor) -> tuple[int, int]:
    """Sizes of a two-dimensional tensor on the CPU."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")
    if t.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {_shape(t)}; expected two dimensions")
    if t.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {t.device}; expected the CPU")
    return t.shape[0], t.shape[1]


def check_activation(op: str, activation: str, allowed: Sequence[str]) -> int:
    """Number of the activation in ``csrc/ops.h``."""
    if activation not in allowed:
        raise ValueError(
            f"{op}: activation is {activation!r}; expected one of {', '.join(allowed)}"
        )
    return ACTIVATIONS[activation]


def check_positive(op: str, **sizes: int) -> None:
    """Every size at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{op}: {name} is {size}; expected at least 1")


def as_rows(t: Tensor) -> Tensor:
    """As the kernels read rows: neighbouring columns side by side."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def check_indices(op: str, name: str, t: Tensor, rows: int, size: int) -> Tensor:
    """int64 [rows] with every value in [0, size)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected an int64 tensor")
    if t.dtype != torch.int64:
        raise TypeError(f"{op}: {name} is {t.dtype}; expected torch.int64")
    check_tensor(op, name, t, (rows,), torch.int64)
    if rows > 0:
        low, high = (int(x) for x in torch.aminmax(t))
        if low < 0 or high >= size:
            raise ValueError(
                f"{op}: {name} holds {low if low < 0 else high}; expected 0 to {size - 1}"
            )
    return t.contiguous()


def check_dropout(
    op: str, p: float, site: int, seed: Tensor | None
) -> tuple[float, int, Tensor | None]:
    """-> p, site, and the seed's tensor, None where nothing is dropped."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p is {p}; expected 0 <= p < 1")
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site is {site}; expected 0 to 2**32 - 1")
    if p == 0.0:
        return 0.0, site, None
    if seed is None:
        raise ValueError(f"{op}: dropout_p is {p} and seed is None; expected an int64 tensor")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device.type != "cpu":
        raise ValueError(
            f"{op}: seed is {seed.dtype} {_shape(seed)} on {seed.device}; expected one int64 on "
            f"the CPU"
        )
    return p, site, seed


def check_cu_seqlens(op: str, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> Tensor:
    """int32 [batch + 1], ascending from 0 to ``rows``, no sequence longer than ``max_seqlen``."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens is {came}; expected torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"{op}: cu_seqlens has shape {_shape(cu_seqlens)} on {cu_seqlens.device}; expected "
            f"[batch + 1] on the CPU"
        )
    cu_seqlens = cu_seqlens.contiguous()
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != rows:
        raise ValueError(
            f"{op}: cu_seqlens runs from {first} to {last}; expected 0 to {rows}, the rows given"
        )
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}; expected at least 0")
    if cu_seqlens.numel() > 1:
        low, high = (int(x) for x in torch.aminmax(cu_seqlens.long().diff()))
        if low < 0:
            raise ValueError(f"{op}: cu_seqlens descends; expected ascending offsets")
        if high > max_seqlen:
            raise ValueError(f"{op}: a sequence has {high} rows; expected at most {max_seqlen}")
    return cu_seqlens
