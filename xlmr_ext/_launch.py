"""The door to native code, and the only user of ``data_ptr()``.

Every function checks its tensors (type, shape, strides, device, index ranges), copies what is laid
out unlike what the kernels read, allocates outputs and workspace, and calls ``_C``. Past this file
nothing is checked again, so nothing that passes it may make a kernel read out of bounds.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

if not sys.platform.startswith("linux"):
    raise ImportError(f"xlmr_ext runs on Linux (x86-64, aarch64) only; this is {platform.system()}")

# torch first: its libgomp is then the one that the kernels share (docs/ARCHITECTURE.md, Threads).
from xlmr_ext import _C

MAX_HEAD_SIZE = 128
ACTIVATIONS = {"none": 0, "tanh": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
_LINEAR_ACTIVATIONS = ("none", "tanh")
_FEED_FORWARD_ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
_DTYPES = {torch.float32: 0, torch.float64: 1}


# --- What came and what was expected -------------------------------------------------------------


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def _dtype_code(op: str, name: str, t: Tensor) -> int:
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


def _check(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
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


def _rank2(op: str, name: str, t: Tensor) -> tuple[int, int]:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")
    if t.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {_shape(t)}; expected two dimensions")
    if t.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {t.device}; expected the CPU")
    return t.shape[0], t.shape[1]


def _activation(op: str, activation: str, allowed: Sequence[str]) -> int:
    if activation not in allowed:
        raise ValueError(
            f"{op}: activation is {activation!r}; expected one of {', '.join(allowed)}"
        )
    return ACTIVATIONS[activation]


def _positive(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{op}: {name} is {size}; expected at least 1")


def _rows(t: Tensor) -> Tensor:
    """As the kernels read rows: neighbouring columns side by side."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _indices(op: str, name: str, t: Tensor, rows: int, size: int) -> Tensor:
    """int64 [rows] with every value in [0, size)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected an int64 tensor")
    if t.dtype != torch.int64:
        raise TypeError(f"{op}: {name} is {t.dtype}; expected torch.int64")
    _check(op, name, t, (rows,), torch.int64)
    if rows > 0:
        low, high = (int(x) for x in torch.aminmax(t))
        if low < 0 or high >= size:
            raise ValueError(
                f"{op}: {name} holds {low if low < 0 else high}; expected 0 to {size - 1}"
            )
    return t.contiguous()


def _dropout(op: str, p: float, site: int, seed: Tensor | None) -> tuple[float, int, int]:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p is {p}; expected 0 <= p < 1")
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site is {site}; expected 0 to 2**32 - 1")
    if p == 0.0:
        return 0.0, site, 0
    if seed is None:
        raise ValueError(f"{op}: dropout_p is {p} and seed is None; expected an int64 tensor")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device.type != "cpu":
        raise ValueError(
            f"{op}: seed is {seed.dtype} {_shape(seed)} on {seed.device}; expected one int64 on "
            f"the CPU"
        )
    return p, site, seed.data_ptr()


def _cu_seqlens(op: str, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> Tensor:
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
    if cu_seqlens.numel() > 1:
        low, high = (int(x) for x in torch.aminmax(cu_seqlens.diff()))
        if low < 0:
            raise ValueError(f"{op}: cu_seqlens descends; expected ascending offsets")
        if high > max_seqlen:
            raise ValueError(f"{op}: a sequence has {high} rows; expected at most {max_seqlen}")
    return cu_seqlens


# --- Calling -------------------------------------------------------------------------------------


# A larger workspace is given back after the call: beside the work it serves, its page faults cost
# nothing, and one long batch should not hold memory for ever.
_KEPT_BYTES = 64 << 20


class _Workspace(threading.local):
    """One buffer a thread: fresh memory would cost page faults on every call."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


_workspace = _Workspace()


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _call(function: Callable[..., int], *args: Any) -> None:
    buffer = _workspace.buffer
    # The thread count is asked for on every call: it belongs to the calling thread.
    threads = torch.get_num_threads()
    needed = function(*args, threads, buffer.data_ptr(), buffer.numel())
    if needed:
        buffer = torch.empty(needed, dtype=torch.uint8)
        if needed <= _KEPT_BYTES:
            _workspace.buffer = buffer
        function(*args, threads, buffer.data_ptr(), buffer.numel())


def _same_stride(tensors: Sequence[Tensor]) -> list[Tensor]:
    rows = [_rows(t) for t in tensors]
    if len({t.stride(0) for t in rows}) > 1:
        rows = [t.contiguous() for t in rows]
    return rows


# --- The ops, in the order of csrc/ops.h; their shapes are documented in ops.py ------------------


def linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    addend: Tensor | None,
    activation: str,
) -> Tensor:
    op = "linear"
    rows, in_features = _rank2(op, "x", x)
    code = _dtype_code(op, "x", x)
    parts = len(weights)
    if not 1 <= parts <= 3:
        raise ValueError(f"{op}: {parts} weights came; expected 1 to 3")
    if biases and len(biases) != parts:
        raise ValueError(f"{op}: {len(biases)} biases came for {parts} weights")
    act = _activation(op, activation, _LINEAR_ACTIVATIONS)
    if parts > 1 and (addend is not None or activation != "none"):
        raise ValueError(f"{op}: an addend or an activation needs one weight, {parts} came")
    out_features = _rank2(op, "weight", weights[0])[0]
    _positive(op, in_features=in_features, out_features=out_features)
    for p, weight in enumerate(weights):
        _check(op, f"weight {p}", weight, (out_features, in_features), x.dtype)
    for p, bias in enumerate(biases):
        _check(op, f"bias {p}", bias, (out_features,), x.dtype)
    if addend is not None:
        _check(op, "addend", addend, (rows, out_features), x.dtype)
        addend = _rows(addend)
    x = _rows(x)
    weights = [w.contiguous() for w in weights]
    biases = [b.contiguous() for b in biases]
    y = x.new_empty((rows, parts * out_features))
    step = out_features * y.element_size()
    _call(
        _C.linear_forward, code, act, rows, in_features, out_features, _ptr(x), _stride(x),
        [_ptr(w) for w in weights], [_ptr(b) for b in biases], _ptr(addend), _stride(addend),
        [_ptr(y) + p * step for p in range(parts)], parts * out_features,
    )  # fmt: skip
    return y


def linear_backward(
    grad_ys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor | None,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "linear backward"
    parts = len(grad_ys)
    if not 1 <= parts <= 3 or (need_x and len(weights) != parts):
        raise ValueError(f"{op}: {parts} gradients came for {len(weights)} weights")
    rows, out_features = _rank2(op, "grad_y", grad_ys[0])
    first = grad_ys[0]
    code = _dtype_code(op, "grad_y", first)
    act = _activation(op, activation, _LINEAR_ACTIVATIONS)
    if x is None and not weights:
        raise ValueError(f"{op}: neither x nor weights came")
    in_features = _rank2(op, "x", x)[1] if x is not None else _rank2(op, "weight", weights[0])[1]
    _positive(op, in_features=in_features, out_features=out_features)
    for p, grad in enumerate(grad_ys):
        _check(op, f"grad_y {p}", grad, (rows, out_features), first.dtype)
    if need_weight and x is None:
        raise ValueError(f"{op}: the weight's gradient needs x, which is None")
    if x is not None:
        _check(op, "x", x, (rows, in_features), first.dtype)
        x = _rows(x)
    for p, weight in enumerate(weights):
        _check(op, f"weight {p}", weight, (out_features, in_features), first.dtype)
    weights = [w.contiguous() for w in weights]
    grads = _same_stride(grad_ys)
    empty = first.new_empty(0)
    dz = empty
    if activation == "tanh":
        if y is None or parts != 1:
            raise ValueError(f"{op}: tanh needs one gradient and the forward's y")
        _check(op, "y", y, (rows, out_features), first.dtype)
        y = y.contiguous()
        dz = first.new_empty((rows, out_features))
    dx = first.new_empty((rows, in_features)) if need_x else empty
    dweight = first.new_empty((parts, out_features, in_features)) if need_weight else empty
    dbias = first.new_empty((parts, out_features)) if need_bias else empty
    _call(
        _C.linear_backward, code, act, rows, in_features, out_features,
        [_ptr(g) for g in grads], _stride(grads[0]), _ptr(x), _stride(x),
        [_ptr(w) for w in weights], _ptr(y) if activation == "tanh" else 0,
        _ptr(dx) if need_x else 0,
        [_ptr(w) for w in dweight] if need_weight else [],
        [_ptr(b) for b in dbias] if need_bias else [],
        _ptr(dz) if activation == "tanh" else 0,
    )  # fmt: skip
    return dx, dweight, dbias, dz


def _feed_forward_sizes(op: str, x: Tensor, up_weight: Tensor) -> tuple[int, int, int]:
    rows, hidden = _rank2(op, "x", x)
    inner = _rank2(op, "up_weight", up_weight)[0]
    _positive(op, hidden=hidden, inner=inner)
    return rows, hidden, inner


def feed_forward_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    hidden_addend: Tensor | None,
    addend: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    op = "feed_forward"
    rows, hidden, inner = _feed_forward_sizes(op, x, up_weight)
    code = _dtype_code(op, "x", x)
    act = _activation(op, activation, _FEED_FORWARD_ACTIVATIONS)
    _check(op, "up_weight", up_weight, (inner, hidden), x.dtype)
    _check(op, "down_weight", down_weight, (hidden, inner), x.dtype)
    if up_bias is not None:
        _check(op, "up_bias", up_bias, (inner,), x.dtype)
        up_bias = up_bias.contiguous()
    if down_bias is not None:
        _check(op, "down_bias", down_bias, (hidden,), x.dtype)
        down_bias = down_bias.contiguous()
    if hidden_addend is not None:
        _check(op, "hidden_addend", hidden_addend, (rows, inner), x.dtype)
        hidden_addend = _rows(hidden_addend)
    if addend is not None:
        _check(op, "addend", addend, (rows, hidden), x.dtype)
        addend = _rows(addend)
    x = _rows(x)
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    y = x.new_empty((rows, hidden))
    pre = x.new_empty((rows, inner) if save else 0)
    _call(
        _C.feed_forward_forward, code, act, rows, hidden, inner, _ptr(x), _stride(x),
        _ptr(up_weight), _ptr(up_bias), _ptr(down_weight), _ptr(down_bias),
        _ptr(hidden_addend), _stride(hidden_addend), _ptr(addend), _stride(addend),
        _ptr(y), _ptr(pre) if save else 0,
    )  # fmt: skip
    return y, pre


def feed_forward_backward(
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    pre: Tensor,
    activation: str,
    need_x: bool,
    need_up_weight: bool,
    need_up_bias: bool,
    need_down_weight: bool,
    need_down_bias: bool,
    need_hidden_addend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "feed_forward backward"
    rows, hidden, inner = _feed_forward_sizes(op, x, up_weight)
    code = _dtype_code(op, "x", x)
    act = _activation(op, activation, _FEED_FORWARD_ACTIVATIONS)
    _check(op, "grad_y", grad_y, (rows, hidden), x.dtype)
    _check(op, "up_weight", up_weight, (inner, hidden), x.dtype)
    _check(op, "down_weight", down_weight, (hidden, inner), x.dtype)
    _check(op, "pre", pre, (rows, inner), x.dtype)
    grad_y, x, pre = _rows(grad_y), _rows(x), pre.contiguous()
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    dx = x.new_empty((rows, hidden) if need_x else 0)
    dup_weight = x.new_empty((inner, hidden) if need_up_weight else 0)
    dup_bias = x.new_empty(inner if need_up_bias else 0)
    ddown_weight = x.new_empty((hidden, inner) if need_down_weight else 0)
    ddown_bias = x.new_empty(hidden if need_down_bias else 0)
    dpre = x.new_empty((rows, inner) if need_hidden_addend else 0)
    _call(
        _C.feed_forward_backward, code, act, rows, hidden, inner, _ptr(grad_y), _stride(grad_y),
        _ptr(x), _stride(x), _ptr(up_weight), _ptr(down_weight), _ptr(pre),
        _ptr(dx) if need_x else 0,
        _ptr(dup_weight) if need_up_weight else 0,
        _ptr(dup_bias) if need_up_bias else 0,
        _ptr(ddown_weight) if need_down_weight else 0,
        _ptr(ddown_bias) if need_down_bias else 0,
        _ptr(dpre) if need_hidden_addend else 0,
    )  # fmt: skip
    return dx, dup_weight, dup_bias, ddown_weight, ddown_bias, dpre


def _attention_sizes(
    op: str, query: Tensor, key: Tensor, value: Tensor, num_heads: int
) -> tuple[int, int, int]:
    rows, width = _rank2(op, "query", query)
    _positive(op, num_heads=num_heads, width=width)
    if width % num_heads:
        raise ValueError(f"{op}: query is {width} wide, not a multiple of {num_heads} heads")
    head_size = width // num_heads
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"{op}: a head has {head_size} features; expected at most {MAX_HEAD_SIZE}")
    _check(op, "key", key, (rows, width), query.dtype)
    _check(op, "value", value, (rows, width), query.dtype)
    return rows, width, head_size


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    op = "attention"
    rows, width, head_size = _attention_sizes(op, query, key, value, num_heads)
    code = _dtype_code(op, "query", query)
    cu_seqlens = _cu_seqlens(op, cu_seqlens, rows, max_seqlen)
    dropout = _dropout(op, dropout_p, site, seed)
    query, key, value = _rows(query), _rows(key), _rows(value)
    out = query.new_empty((rows, width))
    lse = query.new_empty((num_heads, rows))
    _call(
        _C.attention_forward, code, cu_seqlens.numel() - 1, rows, num_heads, head_size,
        max_seqlen, _ptr(cu_seqlens), scale, *dropout, _ptr(query), _stride(query), _ptr(key),
        _stride(key), _ptr(value), _stride(value), _ptr(out), _stride(out), _ptr(lse),
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
) -> Tensor:
    op = "attention backward"
    rows, width, head_size = _attention_sizes(op, query, key, value, num_heads)
    code = _dtype_code(op, "query", query)
    _check(op, "grad_out", grad_out, (rows, width), query.dtype)
    _check(op, "out", out, (rows, width), query.dtype)
    _check(op, "lse", lse, (num_heads, rows), query.dtype)
    cu_seqlens = _cu_seqlens(op, cu_seqlens, rows, max_seqlen)
    dropout = _dropout(op, dropout_p, site, seed)
    query, key, value, out = _rows(query), _rows(key), _rows(value), _rows(out)
    grad_out, lse = _rows(grad_out), lse.contiguous()
    dqkv = query.new_empty((rows, 3, width))
    step = width * dqkv.element_size()
    _call(
        _C.attention_backward, code, cu_seqlens.numel() - 1, rows, num_heads, head_size,
        max_seqlen, _ptr(cu_seqlens), scale, *dropout, _ptr(grad_out), _stride(grad_out),
        _ptr(query), _stride(query), _ptr(key), _stride(key), _ptr(value), _stride(value),
        _ptr(out), _stride(out), _ptr(lse),
        _ptr(dqkv), _ptr(dqkv) + step, _ptr(dqkv) + 2 * step, 3 * width,
    )  # fmt: skip
    return dqkv


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "residual_layer_norm"
    rows, hidden = _rank2(op, "x", x)
    code = _dtype_code(op, "x", x)
    _positive(op, hidden=hidden)
    _check(op, "weight", weight, (hidden,), x.dtype)
    _check(op, "bias", bias, (hidden,), x.dtype)
    dropout = _dropout(op, dropout_p, site, seed)
    if residual is not None:
        _check(op, "residual", residual, (rows, hidden), x.dtype)
        residual = _rows(residual)
    x = _rows(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    keep_sum = save and (residual is not None or dropout_p > 0.0)
    y = x.new_empty((rows, hidden))
    total = x.new_empty((rows, hidden) if keep_sum else 0)
    mean = x.new_empty(rows if save else 0)
    rstd = x.new_empty(rows if save else 0)
    _call(
        _C.layer_norm_forward, code, rows, hidden, eps, *dropout, _ptr(x), _stride(x),
        _ptr(residual), _stride(residual), _ptr(weight), _ptr(bias), _ptr(y),
        _ptr(total) if keep_sum else 0, _ptr(mean) if save else 0, _ptr(rstd) if save else 0,
    )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_backward(
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "residual_layer_norm backward"
    rows, hidden = _rank2(op, "grad_y", grad_y)
    code = _dtype_code(op, "grad_y", grad_y)
    _positive(op, hidden=hidden)
    _check(op, "sum", total, (rows, hidden), grad_y.dtype)
    _check(op, "mean", mean, (rows,), grad_y.dtype)
    _check(op, "rstd", rstd, (rows,), grad_y.dtype)
    _check(op, "weight", weight, (hidden,), grad_y.dtype)
    dropout = _dropout(op, dropout_p, site, seed)
    grad_y, total = _rows(grad_y), _rows(total)
    mean, rstd, weight = mean.contiguous(), rstd.contiguous(), weight.contiguous()
    dsum = grad_y.new_empty((rows, hidden))
    dx = grad_y.new_empty((rows, hidden) if dropout_p > 0.0 else 0)
    dweight = grad_y.new_empty(hidden if need_params else 0)
    dbias = grad_y.new_empty(hidden if need_params else 0)
    _call(
        _C.layer_norm_backward, code, rows, hidden, *dropout, _ptr(grad_y), _stride(grad_y),
        _ptr(total), _stride(total), _ptr(mean), _ptr(rstd), _ptr(weight), _ptr(dsum),
        _ptr(dx) if dropout_p > 0.0 else 0,
        _ptr(dweight) if need_params else 0, _ptr(dbias) if need_params else 0,
    )  # fmt: skip
    return dsum, dx, dweight, dbias


class _EmbeddingInputs:
    """The checked inputs that the embedding's two directions share, as `_C` takes them."""

    def __init__(
        self,
        op: str,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        word: Tensor | None,
        position: Tensor,
        token_type: Tensor,
        weight: Tensor,
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{op}: give either input_ids or inputs_embeds")
        positions, self.hidden = _rank2(op, "position", position)
        self.code = _dtype_code(op, "position", position)
        self.dtype = position.dtype
        _positive(op, hidden=self.hidden)
        types = _rank2(op, "token_type", token_type)[0]
        _check(op, "token_type", token_type, (types, self.hidden), self.dtype)
        _check(op, "weight", weight, (self.hidden,), self.dtype)
        if not isinstance(position_ids, Tensor) or position_ids.dim() != 1:
            raise ValueError(f"{op}: position_ids is not one-dimensional")
        self.rows = position_ids.shape[0]
        # Kept alive until the call is over.
        self.position_ids = _indices(op, "position_ids", position_ids, self.rows, positions)
        self.token_type_ids = None
        if token_type_ids is not None:
            self.token_type_ids = _indices(op, "token_type_ids", token_type_ids, self.rows, types)
        elif types < 1:
            raise ValueError(f"{op}: token_type has no rows")
        self.input_ids = self.inputs_embeds = self.word = None
        if word is not None:
            words = _rank2(op, "word", word)[0]
            _check(op, "word", word, (words, self.hidden), self.dtype)
            self.word = word.contiguous()
        if input_ids is not None:
            if self.word is None:
                raise ValueError(f"{op}: input_ids need word, which is None")
            self.input_ids = _indices(op, "input_ids", input_ids, self.rows, self.word.shape[0])
        if inputs_embeds is not None:
            _check(op, "inputs_embeds", inputs_embeds, (self.rows, self.hidden), self.dtype)
            self.inputs_embeds = _rows(inputs_embeds)
        self.position, self.token_type = position.contiguous(), token_type.contiguous()
        self.weight = weight.contiguous()

    def native(self, dropout: tuple[float, int, int]) -> tuple[Any, ...]:
        return (
            self.code, self.rows, self.hidden, *dropout, _ptr(self.input_ids),
            _ptr(self.inputs_embeds), _stride(self.inputs_embeds), _ptr(self.position_ids),
            _ptr(self.token_type_ids), _ptr(self.word), _ptr(self.position),
            _ptr(self.token_type), _ptr(self.weight),
        )  # fmt: skip


def embedding_forward(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "embedding"
    inputs = _EmbeddingInputs(
        op, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
        weight,
    )  # fmt: skip
    _check(op, "bias", bias, (inputs.hidden,), inputs.dtype)
    dropout = _dropout(op, dropout_p, site, seed)
    bias = bias.contiguous()
    y = position.new_empty((inputs.rows, inputs.hidden))
    mean, rstd = position.new_empty(inputs.rows), position.new_empty(inputs.rows)
    _call(
        _C.embedding_forward, *inputs.native(dropout), _ptr(bias), eps, _ptr(y), _ptr(mean),
        _ptr(rstd),
    )  # fmt: skip
    return y, mean, rstd


def embedding_backward(
    grad_y: Tensor,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
    need_word: bool,
    need_position: bool,
    need_token_type: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "embedding backward"
    inputs = _EmbeddingInputs(
        op, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
        weight,
    )  # fmt: skip
    rows, hidden = inputs.rows, inputs.hidden
    _check(op, "grad_y", grad_y, (rows, hidden), inputs.dtype)
    _check(op, "mean", mean, (rows,), inputs.dtype)
    _check(op, "rstd", rstd, (rows,), inputs.dtype)
    dropout = _dropout(op, dropout_p, site, seed)
    grad_y, mean, rstd = _rows(grad_y), mean.contiguous(), rstd.contiguous()
    # With inputs_embeds no word row was read, so none has a gradient.
    write_word = need_word and inputs.input_ids is not None
    dsum = position.new_empty((rows, hidden))
    dword = word.new_zeros(word.shape) if need_word and word is not None else position.new_empty(0)
    dposition = position.new_zeros(position.shape if need_position else 0)
    dtoken_type = position.new_zeros(token_type.shape if need_token_type else 0)
    dweight = position.new_empty(hidden if need_params else 0)
    dbias = position.new_empty(hidden if need_params else 0)
    _call(
        _C.embedding_backward, *inputs.native(dropout), padding_idx, _ptr(grad_y),
        _stride(grad_y), _ptr(mean), _ptr(rstd), _ptr(dsum),
        _ptr(dword) if write_word else 0,
        _ptr(dposition) if need_position else 0,
        _ptr(dtoken_type) if need_token_type else 0,
        _ptr(dweight) if need_params else 0, _ptr(dbias) if need_params else 0,
    )  # fmt: skip
    return dsum, dword, dposition, dtoken_type, dweight, dbias


# --- The build -----------------------------------------------------------------------------------


def isas() -> list[str]:
    """Names of the kernel tables of this build that this processor runs, the slowest first."""
    tables: list[str] = _C.describe()["tables_usable"]
    return tables


def set_isa(name: str) -> None:
    """Makes later calls use the table ``name``; for tests. Users set ``XLMR_EXT_ISA``.

    Raises:
        RuntimeError: this build has no such table, or the processor cannot run it.
    """
    _C.set_table(name)


def build_info() -> dict[str, Any]:
    """What this build is and what it runs on.

    Keys: ``version``, ``python``, ``torch``, ``compiler``, ``openmp`` (the standard, a date),
    ``tables_built``, ``tables_usable``, ``table`` and ``table_reason`` (the kernel table in use and
    why), ``threads`` (what the next call may use), ``cuda`` (whether CUDA kernels were built).
    """
    from xlmr_ext import __version__

    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_C.describe(),
        "threads": torch.get_num_threads(),
        "cuda": False,
    }
