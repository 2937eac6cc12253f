"""The raw ops ``torch.ops.xlmr_ext.*``: schema, implementations by device, and fake of each.

N is the number of packed rows (tokens of all sequences, back to back). A result that was not asked
for, or that does not exist, is returned with ``numel() == 0``. ``seed`` is a one-element int64 CPU
tensor, or None where ``dropout_p`` is 0. The other tensors of a call lie on one device. None of the
ops is differentiable by itself: see ``autograd.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xlmr_ext import _launch, cuda_support, fallback
from xlmr_ext._checks import statistics_dtype

_library = torch.library.Library("xlmr_ext", "DEF")


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    """Defines an op; its implementations have its name."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, getattr(_launch, name), "CPU")
    _library.impl(name, _on_cuda(name), "CUDA")
    torch.library.register_fake(f"xlmr_ext::{name}", fake, lib=_library)
    return getattr(torch.ops.xlmr_ext, name).default


def _on_cuda(name: str) -> Callable[..., Any]:
    """An op for CUDA tensors: by our kernels where they can, by torch's operators elsewhere."""
    native, by_torch = getattr(_launch, name), fallback.on_cuda(getattr(fallback, name))
    is_product = name.startswith(("linear", "feed_forward"))

    def run(*args: Any) -> Any:
        first = _first_of_numbers(args)
        if first is None or first.device.type != "cuda":
            return by_torch(*args)  # tensors on two devices: its checks name them
        refused = cuda_support.refusal(first.device.index, first.dtype)
        if refused is not None:
            fallback.say_once(refused)
        elif cuda_support.gemm == "native" or not is_product:
            return native(*args)
        return by_torch(*args)

    return run


def _first_of_numbers(args: Sequence[Any]) -> Tensor | None:
    """The tensor whose type and device an op takes for its own: the first that holds no indices."""
    for arg in args:
        for t in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(t, Tensor) and t.is_floating_point():
                return t
    return None


def _statistics(like: Tensor, shape: int | tuple[int, ...]) -> Tensor:
    """A log-sum-exp, a mean or a deviation: in half precision they are float32."""
    return like.new_empty(shape, dtype=statistics_dtype(like.dtype))


def _linear_forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    addend: Tensor | None,
    activation: str,
    bf16_products: bool = False,
) -> Tensor:
    return x.new_empty((x.shape[0], len(weights) * weights[0].shape[0]))


# x [N, in], weights P times [out, in] (P = 1 to 3), biases none or P times [out], addend [N, out]
# (P = 1 only, added before the activation), activation "none" or "tanh" -> [N, P * out]. With
# bf16_products, here and below, float32 operands on the CPU are rounded to bfloat16 where the
# processor has units for that; sums and results are float32.
linear_forward = _define(
    "linear_forward(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? addend, str activation,"
    " bool bf16_products=False) -> Tensor",
    _linear_forward_fake,
)


def _linear_backward_fake(
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
    first, parts = grad_ys[0], len(grad_ys)
    rows, out_features = first.shape
    in_features = x.shape[1] if x is not None else weights[0].shape[1]
    return (
        first.new_empty((rows, in_features) if need_x else 0),
        first.new_empty((parts, out_features, in_features) if need_weight else 0),
        first.new_empty((parts, out_features) if need_bias else 0),
        first.new_empty((rows, out_features) if activation == "tanh" else 0),
    )


# -> dx [N, in], dweight [P, out, in], dbias [P, out], dz [N, out] (tanh only: the addend's).
linear_backward = _define(
    "linear_backward(Tensor[] grad_ys, Tensor? x, Tensor[] weights, Tensor? y, str activation,"
    " bool need_x, bool need_weight, bool need_bias, bool bf16_products=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_backward_fake,
)


def _feed_forward_forward_fake(
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
    return x.new_empty(x.shape), x.new_empty((x.shape[0], up_weight.shape[0]) if save else 0)


# x [N, hidden], up_weight [inner, hidden], down_weight [hidden, inner], hidden_addend [N, inner],
# addend [N, hidden], activation "gelu", "gelu_tanh" or "relu" -> y [N, hidden], pre [N, inner].
feed_forward_forward = _define(
    "feed_forward_forward(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight,"
    " Tensor? down_bias, Tensor? hidden_addend, Tensor? addend, str activation, bool save,"
    " bool bf16_products=False) -> (Tensor, Tensor)",
    _feed_forward_forward_fake,
)


def _feed_forward_backward_fake(
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
    inner, hidden = up_weight.shape
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty((inner, hidden) if need_up_weight else 0),
        x.new_empty(inner if need_up_bias else 0),
        x.new_empty((hidden, inner) if need_down_weight else 0),
        x.new_empty(hidden if need_down_bias else 0),
        x.new_empty(pre.shape if need_hidden_addend else 0),
    )


# -> dx, dup_weight, dup_bias, ddown_weight, ddown_bias, dpre (the hidden addend's).
feed_forward_backward = _define(
    "feed_forward_backward(Tensor grad_y, Tensor x, Tensor up_weight, Tensor down_weight,"
    " Tensor pre, str activation, bool need_x, bool need_up_weight, bool need_up_bias,"
    " bool need_down_weight, bool need_down_bias, bool need_hidden_addend,"
    " bool bf16_products=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _feed_forward_backward_fake,
)


def _attention_forward_fake(
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
    lse = _statistics(query, (num_heads, query.shape[0]) if save else 0)
    return query.new_empty(query.shape), lse


# query, key, value [N, heads * head_size], cu_seqlens int32 [B + 1], max_seqlen at least the
# longest sequence -> out [N, heads * head_size], lse [heads, N]. With first_only the first token of
# each sequence asks alone: query and out [B, heads * head_size], lse [heads, B]; 0 where it is
# empty. Without save there is no lse.
attention_forward = _define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens,"
    " SymInt max_seqlen, int num_heads, float scale, float dropout_p, int site, Tensor? seed,"
    " bool first_only=False, bool save=True) -> (Tensor, Tensor)",
    _attention_forward_fake,
)


def _attention_backward_fake(
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
    return query.new_empty(query.shape), query.new_empty(key.shape), query.new_empty(key.shape)


# -> dquery, dkey, dvalue, of the shapes of query, key and value.
attention_backward = _define(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, int num_heads, float scale,"
    " float dropout_p, int site, Tensor? seed, bool first_only=False)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_backward_fake,
)


def _layer_norm_forward_fake(
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
    keep_sum = save and (residual is not None or dropout_p > 0.0)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if keep_sum else 0),
        _statistics(x, x.shape[0] if save else 0),
        _statistics(x, x.shape[0] if save else 0),
    )


# y = LayerNorm(dropout(x) + residual): x, residual [N, hidden] -> y, sum [N, hidden], mean [N],
# rstd [N]; sum is left out where it would equal x.
layer_norm_forward = _define(
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps,"
    " float dropout_p, int site, Tensor? seed, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_forward_fake,
)


def _layer_norm_backward_fake(
    grad_y: Tensor,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout_p: float,
    site: int,
    seed: Tensor | None,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = weight.shape[0]
    return (
        grad_y.new_empty(grad_y.shape),
        grad_y.new_empty(grad_y.shape if dropout_p > 0.0 else 0),
        grad_y.new_empty(hidden if need_params else 0),
        grad_y.new_empty(hidden if need_params else 0),
    )


# -> dsum [N, hidden] (the residual's), dx [N, hidden] (left out where p = 0: it is dsum), dweight,
# dbias [hidden].
layer_norm_backward = _define(
    "layer_norm_backward(Tensor grad_y, Tensor sum, Tensor mean, Tensor rstd, Tensor weight,"
    " float dropout_p, int site, Tensor? seed, bool need_params)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_backward_fake,
)


def _embedding_forward_fake(
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
    rows = position_ids.shape[0]
    return (
        position.new_empty((rows, position.shape[1])),
        _statistics(position, rows),
        _statistics(position, rows),
    )


# input_ids [N] into word [V, hidden], or inputs_embeds [N, hidden]; position_ids [N];
# token_type_ids [N] or None (type 0) -> y [N, hidden], mean [N], rstd [N].
embedding_forward = _define(
    "embedding_forward(Tensor? input_ids, Tensor? inputs_embeds, Tensor position_ids,"
    " Tensor? token_type_ids, Tensor? word, Tensor position, Tensor token_type, Tensor weight,"
    " Tensor bias, float eps, float dropout_p, int site, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor)",
    _embedding_forward_fake,
)


def _embedding_backward_fake(
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
    hidden = position.shape[1]
    return (
        grad_y.new_empty(grad_y.shape),
        grad_y.new_empty(word.shape if need_word and word is not None else 0),
        grad_y.new_empty(position.shape if need_position else 0),
        grad_y.new_empty(token_type.shape if need_token_type else 0),
        grad_y.new_empty(hidden if need_params else 0),
        grad_y.new_empty(hidden if need_params else 0),
    )


# -> dsum [N, hidden] (inputs_embeds'), dword, dposition, dtoken_type, dweight, dbias.
embedding_backward = _define(
    "embedding_backward(Tensor grad_y, Tensor? input_ids, Tensor? inputs_embeds,"
    " Tensor position_ids, Tensor? token_type_ids, Tensor? word, Tensor position,"
    " Tensor token_type, Tensor weight, Tensor mean, Tensor rstd, int padding_idx,"
    " float dropout_p, int site, Tensor? seed, bool need_word, bool need_position,"
    " bool need_token_type, bool need_params)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embedding_backward_fake,
)
