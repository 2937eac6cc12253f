"""The door to native code; addresses are taken and calls made through ``_native.py``.

Every function checks its tensors (``_checks.py``), copies what is laid out unlike what the kernels
read, allocates outputs, and calls the native module of their device. Past this file nothing is
checked again, so nothing that passes it may make a kernel read out of bounds.
"""

from __future__ import annotations

import mmap
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xlmr_ext import _C, cuda_support
from xlmr_ext._checks import (
    ACTIVATIONS,
    CPU,
    AttentionInputs,
    EmbeddingInputs,
    as_rows,
    check_bf16_products,
    check_dropout,
    check_feed_forward,
    check_feed_forward_backward,
    check_layer_norm,
    check_layer_norm_backward,
    check_linear,
    check_linear_backward,
    dtype_code,
    set_table,
    statistics_dtype,
)
from xlmr_ext._native import call, call_threads, ptr

# --- Calling -------------------------------------------------------------------------------------

_LAZY_BYTES = 16 << 20


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _dropout(op: str, p: float, site: int, seed: Tensor | None) -> tuple[float, int, int]:
    p, site, seed = check_dropout(op, p, site, seed)
    return p, site, ptr(seed)


def _statistics(like: Tensor, shape: int | tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=statistics_dtype(like.dtype))


def _lazy_zeros(like: Tensor) -> Tensor:
    """Zeros of the shape and type of ``like``, whose pages exist once they are written.

    A batch touches a few of the 250,002 rows of the word table's gradient; filling all of them
    with zeros costs more than the rest of the embedding's backward together.
    """
    size = like.numel() * like.element_size()
    if size < _LAZY_BYTES or like.device != CPU:
        return like.new_zeros(like.shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


def _same_stride(tensors: Sequence[Tensor]) -> list[Tensor]:
    rows = [as_rows(t) for t in tensors]
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
    bf16_products: bool = False,
) -> Tensor:
    op = "linear"
    code = dtype_code(op, "x", x)
    check_bf16_products(op, x, bf16_products)
    rows, in_features, out_features = check_linear(op, x, weights, biases, addend, activation)
    act = ACTIVATIONS[activation]
    parts = len(weights)
    addend = None if addend is None else as_rows(addend)
    x = as_rows(x)
    weights = [w.contiguous() for w in weights]
    biases = [b.contiguous() for b in biases]
    y = x.new_empty((rows, parts * out_features))
    step = out_features * y.element_size()
    call(
        x.device, "linear_bf16_forward" if bf16_products else "linear_forward",
        code, act, rows, in_features, out_features, ptr(x), _stride(x),
        [ptr(w) for w in weights], [ptr(b) for b in biases], ptr(addend), _stride(addend),
        [ptr(y) + p * step for p in range(parts)], parts * out_features,
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
    bf16_products: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "linear backward"
    parts = len(grad_ys)
    sizes = check_linear_backward(op, grad_ys, x, weights, y, activation, need_x, need_weight)
    rows, in_features, out_features = sizes
    first, act = grad_ys[0], ACTIVATIONS[activation]
    code = dtype_code(op, "grad_y", first)
    check_bf16_products(op, first, bf16_products)
    x = None if x is None else as_rows(x)
    weights = [w.contiguous() for w in weights]
    grads = _same_stride(grad_ys)
    empty = first.new_empty(0)
    y = y.contiguous() if activation == "tanh" and y is not None else None
    dz = empty if y is None else first.new_empty((rows, out_features))
    dx = first.new_empty((rows, in_features)) if need_x else empty
    dweight = first.new_empty((parts, out_features, in_features)) if need_weight else empty
    dbias = first.new_empty((parts, out_features)) if need_bias else empty
    call(
        first.device, "linear_bf16_backward" if bf16_products else "linear_backward",
        code, act, rows, in_features, out_features,
        [ptr(g) for g in grads], _stride(grads[0]), ptr(x), _stride(x),
        [ptr(w) for w in weights], ptr(y),
        ptr(dx) if need_x else 0,
        [ptr(w) for w in dweight] if need_weight else [],
        [ptr(b) for b in dbias] if need_bias else [],
        0 if y is None else ptr(dz),
    )  # fmt: skip
    return dx, dweight, dbias, dz


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
    bf16_products: bool = False,
) -> tuple[Tensor, Tensor]:
    op = "feed_forward"
    code = dtype_code(op, "x", x)
    check_bf16_products(op, x, bf16_products)
    rows, hidden, inner = check_feed_forward(
        op, x, up_weight, up_bias, down_weight, down_bias, hidden_addend, addend, activation
    )
    act = ACTIVATIONS[activation]
    up_bias = None if up_bias is None else up_bias.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    hidden_addend = None if hidden_addend is None else as_rows(hidden_addend)
    addend = None if addend is None else as_rows(addend)
    x = as_rows(x)
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    y = x.new_empty((rows, hidden))
    pre = x.new_empty((rows, inner) if save else 0)
    call(
        x.device, "feed_forward_bf16_forward" if bf16_products else "feed_forward_forward",
        code, act, rows, hidden, inner, ptr(x), _stride(x),
        ptr(up_weight), ptr(up_bias), ptr(down_weight), ptr(down_bias),
        ptr(hidden_addend), _stride(hidden_addend), ptr(addend), _stride(addend),
        ptr(y), ptr(pre) if save else 0,
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
    bf16_products: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "feed_forward backward"
    code = dtype_code(op, "x", x)
    check_bf16_products(op, x, bf16_products)
    rows, hidden, inner = check_feed_forward_backward(
        op, grad_y, x, up_weight, down_weight, pre, activation
    )
    act = ACTIVATIONS[activation]
    grad_y, x, pre = as_rows(grad_y), as_rows(x), pre.contiguous()
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    dx = x.new_empty((rows, hidden) if need_x else 0)
    dup_weight = x.new_empty((inner, hidden) if need_up_weight else 0)
    dup_bias = x.new_empty(inner if need_up_bias else 0)
    ddown_weight = x.new_empty((hidden, inner) if need_down_weight else 0)
    ddown_bias = x.new_empty(hidden if need_down_bias else 0)
    dpre = x.new_empty((rows, inner) if need_hidden_addend else 0)
    call(
        x.device, "feed_forward_bf16_backward" if bf16_products else "feed_forward_backward",
        code, act, rows, hidden, inner, ptr(grad_y), _stride(grad_y),
        ptr(x), _stride(x), ptr(up_weight), ptr(down_weight), ptr(pre),
        ptr(dx) if need_x else 0,
        ptr(dup_weight) if need_up_weight else 0,
        ptr(dup_bias) if need_up_bias else 0,
        ptr(ddown_weight) if need_down_weight else 0,
        ptr(ddown_bias) if need_down_bias else 0,
        ptr(dpre) if need_hidden_addend else 0,
    )  # fmt: skip
    return dx, dup_weight, dup_bias, ddown_weight, ddown_bias, dpre


class _AttentionInputs(AttentionInputs):
    """The inputs as the native ops take them."""

    def __init__(
        self,
        op: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        scale: float,
        dropout: tuple[float, int, Tensor | None],
        first_only: bool,
    ) -> None:
        self.code = dtype_code(op, "query", query)
        super().__init__(op, query, key, value, cu_seqlens, max_seqlen, num_heads, first_only)
        self.dropout = _dropout(op, *dropout)
        self.scale = scale
        self.query, self.key, self.value = as_rows(query), as_rows(key), as_rows(value)

    def native(self) -> tuple[Any, ...]:
        return (
            self.code, self.batch, self.key_rows, self.num_heads, self.head_size,
            self.max_seqlen, ptr(self.cu_seqlens), self.scale, *self.dropout,
        )  # fmt: skip

    def native_tensors(self) -> tuple[int, ...]:
        return (
            ptr(self.query), _stride(self.query), ptr(self.key), _stride(self.key),
            ptr(self.value), _stride(self.value),
        )  # fmt: skip


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
    first_only: bool = False,
    save: bool = True,
) -> tuple[Tensor, Tensor]:
    inputs = _AttentionInputs(
        "attention", query, key, value, cu_seqlens, max_seqlen, num_heads, scale,
        (dropout_p, site, seed), first_only,
    )  # fmt: skip
    out = query.new_empty((inputs.query_rows, inputs.width))
    lse = _statistics(query, (num_heads, inputs.query_rows) if save else 0)
    call(
        query.device, "attention_forward",
        *inputs.native(), first_only, *inputs.native_tensors(), ptr(out),
        _stride(out), ptr(lse) if save else 0,
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
    first_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "attention backward"
    inputs = _AttentionInputs(
        op, query, key, value, cu_seqlens, max_seqlen, num_heads, scale, (dropout_p, site, seed),
        first_only,
    )  # fmt: skip
    rows, width = inputs.query_rows, inputs.width
    inputs.check_backward(grad_out, out, lse)
    grad_out, out, lse = as_rows(grad_out), as_rows(out), lse.contiguous()
    dquery = query.new_empty((rows, width))
    dkey, dvalue = (query.new_empty((inputs.key_rows, width)) for _ in range(2))
    call(
        query.device, "attention_backward",
        *inputs.native(), first_only, ptr(grad_out), _stride(grad_out),
        *inputs.native_tensors(), ptr(out), _stride(out), ptr(lse), ptr(dquery),
        _stride(dquery), ptr(dkey), ptr(dvalue), _stride(dkey),
    )  # fmt: skip
    return dquery, dkey, dvalue


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
    code = dtype_code(op, "x", x)
    rows, hidden = check_layer_norm(op, x, residual, weight, bias)
    dropout = _dropout(op, dropout_p, site, seed)
    residual = None if residual is None else as_rows(residual)
    x = as_rows(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    keep_sum = save and (residual is not None or dropout_p > 0.0)
    y = x.new_empty((rows, hidden))
    total = x.new_empty((rows, hidden) if keep_sum else 0)
    mean, rstd = (_statistics(x, rows if save else 0) for _ in range(2))
    call(
        x.device, "layer_norm_forward",
        code, rows, hidden, eps, *dropout, ptr(x), _stride(x),
        ptr(residual), _stride(residual), ptr(weight), ptr(bias), ptr(y),
        ptr(total) if keep_sum else 0, ptr(mean) if save else 0, ptr(rstd) if save else 0,
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
    code = dtype_code(op, "grad_y", grad_y)
    rows, hidden = check_layer_norm_backward(op, grad_y, total, mean, rstd, weight)
    dropout = _dropout(op, dropout_p, site, seed)
    grad_y, total = as_rows(grad_y), as_rows(total)
    mean, rstd, weight = mean.contiguous(), rstd.contiguous(), weight.contiguous()
    dsum = grad_y.new_empty((rows, hidden))
    dx = grad_y.new_empty((rows, hidden) if dropout_p > 0.0 else 0)
    dweight = grad_y.new_empty(hidden if need_params else 0)
    dbias = grad_y.new_empty(hidden if need_params else 0)
    call(
        grad_y.device, "layer_norm_backward",
        code, rows, hidden, *dropout, ptr(grad_y), _stride(grad_y),
        ptr(total), _stride(total), ptr(mean), ptr(rstd), ptr(weight), ptr(dsum),
        ptr(dx) if dropout_p > 0.0 else 0,
        ptr(dweight) if need_params else 0, ptr(dbias) if need_params else 0,
    )  # fmt: skip
    return dsum, dx, dweight, dbias


class _EmbeddingInputs(EmbeddingInputs):
    """The inputs as the native ops take them."""

    def native(self, dropout: tuple[float, int, int]) -> tuple[Any, ...]:
        code = dtype_code(self.op, "position", self.position)
        return (
            code, self.rows, self.hidden, *dropout, ptr(self.input_ids),
            ptr(self.inputs_embeds), _stride(self.inputs_embeds), ptr(self.position_ids),
            ptr(self.token_type_ids), 0 if self.word is None else self.word.shape[0],
            ptr(self.word), self.position.shape[0], ptr(self.position),
            self.token_type.shape[0], ptr(self.token_type), ptr(self.weight),
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
    inputs.check("bias", bias, (inputs.hidden,))
    dropout = _dropout(op, dropout_p, site, seed)
    bias = bias.contiguous()
    y = position.new_empty((inputs.rows, inputs.hidden))
    mean, rstd = (_statistics(position, inputs.rows) for _ in range(2))
    call(
        inputs.device, "embedding_forward",
        *inputs.native(dropout), ptr(bias), eps, ptr(y), ptr(mean),
        ptr(rstd),
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
    inputs.check_backward(grad_y, mean, rstd)
    dropout = _dropout(op, dropout_p, site, seed)
    grad_y, mean, rstd = as_rows(grad_y), mean.contiguous(), rstd.contiguous()
    # With inputs_embeds no word row was read, so none has a gradient.
    write_word = need_word and inputs.input_ids is not None
    dsum = position.new_empty((rows, hidden))
    dword = _lazy_zeros(word) if need_word and word is not None else position.new_empty(0)
    dposition = position.new_zeros(position.shape if need_position else 0)
    dtoken_type = position.new_zeros(token_type.shape if need_token_type else 0)
    dweight = position.new_empty(hidden if need_params else 0)
    dbias = position.new_empty(hidden if need_params else 0)
    call(
        inputs.device, "embedding_backward",
        *inputs.native(dropout), padding_idx, ptr(grad_y),
        _stride(grad_y), ptr(mean), ptr(rstd), ptr(dsum),
        ptr(dword) if write_word else 0,
        ptr(dposition) if need_position else 0,
        ptr(dtoken_type) if need_token_type else 0,
        ptr(dweight) if need_params else 0, ptr(dbias) if need_params else 0,
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
    set_table(name)


set_table(_C.table_name())


def build_info() -> dict[str, Any]:
    """What this build is and what it runs on.

    Keys: ``version``, ``python``, ``torch``, ``compiler``, ``openmp`` (the standard, a date),
    ``tables_built``, ``tables_usable``, ``table`` and ``table_reason`` (the kernel table in use and
    why), ``bf16_units`` (whether it has products in bfloat16), ``threads`` and ``threads_by`` (what
    the next call may use, and what decides it), ``cuda`` (whether CUDA kernels were built),
    ``cuda_kernels`` (what they were built for, and which GPUs of this machine they run on; empty
    where there are none).
    """
    from xlmr_ext import __version__

    threads = torch.get_num_threads()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_C.describe(),
        "bf16_units": _C.has_bf16_units(),
        "threads": call_threads(threads),
        "threads_by": call_threads.reason(threads),
        "cuda": cuda_support.is_built(),
        "cuda_kernels": cuda_support.describe(),
    }
