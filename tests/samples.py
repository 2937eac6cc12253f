"""Inputs for the tests of the raw ops: random values, layouts in memory, one call of every op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

import xlmr_ext.ops  # noqa: F401  registers torch.ops.xlmr_ext

OPS = torch.ops.xlmr_ext
OP_NAMES = [
    f"{name}_{direction}"
    for name in ("linear", "feed_forward", "attention", "layer_norm", "embedding")
    for direction in ("forward", "backward")
]


def randn(*shape: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    """Normal numbers that float32 represents, whatever the dtype: one oracle for both dtypes."""
    return (torch.randn(shape) * scale).to(device=device, dtype=dtype)


def cumulative(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """cu_seqlens of these sequence lengths."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def results(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The results of an op as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


class OpCall(NamedTuple):
    """One call of a raw op."""

    name: str
    op: str
    args: tuple[Any, ...]

    def run(self) -> list[Tensor]:
        return results(getattr(OPS, self.op)(*self.args))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> OpCall:
        """The same call with ``function`` applied to every tensor of it."""

        def apply(arg: Any) -> Any:
            if isinstance(arg, Tensor):
                return function(arg)
            return [function(x) for x in arg] if isinstance(arg, list) else arg

        return self._replace(args=tuple(apply(arg) for arg in self.args))


def op_calls(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    lengths: Sequence[int] = (3, 0, 1, 6),
    heads: int = 2,
    head_size: int = 5,
    inner: int = 13,
    p: float = 0.3,
) -> Iterator[OpCall]:
    """Calls of all ten ops on consistent random inputs, with and without the optional ones."""
    rows, hidden = sum(lengths), heads * head_size

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, scale=scale)

    def ids(bound: int) -> Tensor:
        return torch.randint(bound, (rows,), device=device)

    seed = torch.tensor([0x5DEECE66D])
    x, grad = make(rows, hidden), make(rows, hidden)
    weights = [make(hidden, hidden, scale=hidden**-0.5) for _ in range(3)]
    biases = [make(hidden) for _ in range(3)]
    one, bias = weights[:1], biases[:1]
    yield OpCall("linear", "linear_forward", (x, one, bias, None, "none"))
    yield OpCall("qkv", "linear_forward", (x, weights, biases, None, "none"))
    tanh = (x, one, [], make(rows, hidden), "tanh")
    yield OpCall("linear tanh", "linear_forward", tanh)
    y = OPS.linear_forward(*tanh)
    ask = (True, True, True)
    yield OpCall("linear", "linear_backward", ([grad], x, one, None, "none", *ask))
    grads = [grad, make(rows, hidden), make(rows, hidden)]
    yield OpCall("qkv", "linear_backward", (grads, x, weights, None, "none", *ask))
    yield OpCall("linear tanh", "linear_backward", ([grad], x, one, y, "tanh", *ask))

    up, down = make(inner, hidden, scale=hidden**-0.5), make(hidden, inner, scale=inner**-0.5)
    up_bias, down_bias = make(inner), make(hidden)
    addends = (make(rows, inner), make(rows, hidden))
    for activation in ("gelu", "gelu_tanh", "relu"):
        plain = (x, up, up_bias, down, down_bias, None, None, activation, True)
        yield OpCall(activation, "feed_forward_forward", plain)
        pre = OPS.feed_forward_forward(*plain)[1]
        back = (grad, x, up, down, pre, activation, *(True,) * 6)
        yield OpCall(activation, "feed_forward_backward", back)
    added = (x, up, None, down, None, *addends, "gelu", False)
    yield OpCall("gelu addends", "feed_forward_forward", added)

    cu_seqlens = cumulative(lengths, device)
    longest = max(lengths, default=0)
    query, key, value = make(rows, 3, hidden).unbind(1)
    for name, how in (("plain", (0.0, 0, None)), ("dropout", (p, 3, seed))):
        shape = (cu_seqlens, longest, heads, head_size**-0.5, *how)
        yield OpCall(name, "attention_forward", (query, key, value, *shape))
        out, lse = OPS.attention_forward(query, key, value, *shape)
        back = (grad, query, key, value, out, lse, *shape)
        yield OpCall(name, "attention_backward", back)
        first = make(len(lengths), hidden)
        asked = (first, key, value, *shape, True)
        yield OpCall(f"{name}, first_only", "attention_forward", asked)
        out, lse = OPS.attention_forward(*asked)
        back = (make(len(lengths), hidden), *asked[:3], out, lse, *shape, True)
        yield OpCall(f"{name}, first_only", "attention_backward", back)

        residual, weight, shift = make(rows, hidden), make(hidden), make(hidden)
        norm = (x, residual, weight, shift, 1e-5, *how, True)
        yield OpCall(name, "layer_norm_forward", norm)
        _, total, mean, rstd = OPS.layer_norm_forward(*norm)
        back = (grad, total, mean, rstd, weight, *how, True)
        yield OpCall(name, "layer_norm_backward", back)

        tables = (make(11, hidden), make(7, hidden), make(2, hidden), weight)
        places = (ids(11), None, ids(7), ids(2))
        embed = (*places, *tables, shift, 1e-5, *how)
        yield OpCall(name, "embedding_forward", embed)
        _, mean, rstd = OPS.embedding_forward(*embed)
        back = (grad, *places, *tables, mean, rstd, 1, *how, *(True,) * 4)
        yield OpCall(name, "embedding_backward", back)
    bare = (x, None, weight, shift, 1e-5, 0.0, 0, None, False)
    yield OpCall("no residual", "layer_norm_forward", bare)
    given = (None, x, ids(7), None, None, *tables[1:], shift, 1e-5, 0.0, 0, None)
    yield OpCall("inputs_embeds", "embedding_forward", given)
    _, mean, rstd = OPS.embedding_forward(*given)
    back = (grad, *given[:8], mean, rstd, -1, 0.0, 0, None, False, True, True, True)
    yield OpCall("inputs_embeds", "embedding_backward", back)


# How a tensor of the same values may lie in memory.


def transposed(x: Tensor) -> Tensor:
    """The last dimension is not the contiguous one."""
    if x.dim() < 2:
        return torch.stack([x, x], -1)[..., 0]
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(x: Tensor) -> Tensor:
    """Every row is the first one, by a stride of 0. Offsets and seeds stay as they are."""
    return x if x.dtype == torch.int32 or x.shape[0] < 2 else x[:1].expand_as(x)


def offset(x: Tensor) -> Tensor:
    """Aligned to its element and to nothing more."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def wide(x: Tensor) -> Tensor:
    """Rows apart: columns of a wider buffer."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


LAYOUTS = [transposed, expanded, offset, wide]
