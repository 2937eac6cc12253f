"""The differentiable functions that the model is made of.

Each is a ``torch.autograd.Function`` over two raw ops of ``ops.py`` and saves as little as its
backward can do with. They are differentiable once: asking for a second derivative raises
RuntimeError. Under ``torch.autocast`` the CPU returns float32 and computes in it, but for the
operands of the products, which are rounded to bfloat16 where that is autocast's type and the
processor has units for it; on CUDA, as torch has it, products and attention are in autocast's type,
LayerNorm and embeddings in float32. N is the number of packed rows; sizes and errors are those of
the ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlmr_ext import ops
from xlmr_ext._checks import HALF


def _promote(*tensors: Tensor | None, product: bool) -> tuple[Tensor | None, ...]:
    """The tensors in the type that autocast chooses; without autocast they are as they came.

    Args:
        product: whether they go into matrix products, which autocast has in half precision where
            that is faster.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    half = product and device == "cuda"
    dtype = torch.get_autocast_dtype(device) if half else torch.float32
    kinds = (*HALF, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in kinds else t for t in tensors)


def bf16_products(x: Tensor) -> bool:
    """Whether autocast has the products of x, as `_promote` made it, in bfloat16 on the CPU."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _saves(*tensors: Tensor | None) -> bool:
    """Whether a backward may come. A Function cannot tell: inside, grad mode is always off, and
    ``needs_input_grad`` speaks of the inputs alone."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _or_none(wanted: bool, gradient: Tensor) -> Tensor | None:
    return gradient if wanted else None


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        # All in one: a compiled call without gradients counts the named parameters, and mistakes
        # one more argument than those for a missing ctx.
        x, addend, activation, bf16, parts, *params = args
        weights, biases = params[:parts], params[parts:]
        y: Tensor = ops.linear_forward(x, weights, biases, addend, activation, bf16)
        needs = ctx.needs_input_grad
        ctx.need_x, ctx.need_addend = needs[0], needs[1]
        ctx.need_weights, ctx.need_biases = needs[5 : 5 + parts], needs[5 + parts :]
        ctx.activation, ctx.bf16, ctx.parts = activation, bf16, parts
        ctx.save_for_backward(
            x if any(ctx.need_weights) else None,
            y if activation == "tanh" else None,
            # Only their shape is needed for the bias alone, but they are parameters: alive anyway.
            *weights,
        )
        if parts == 1:
            return y
        return y.view(y.shape[0], parts, weights[0].shape[0]).unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> Any:
        x, y, *weights = ctx.saved_tensors
        dx, dweight, dbias, dz = ops.linear_backward(
            grad_ys, x, weights, y, ctx.activation, ctx.need_x, any(ctx.need_weights),
            any(ctx.need_biases), ctx.bf16,
        )  # fmt: skip
        return (
            _or_none(ctx.need_x, dx),
            _or_none(ctx.need_addend, dz if ctx.activation == "tanh" else grad_ys[0]),
            None,
            None,
            None,
            *(dweight[p] if need else None for p, need in enumerate(ctx.need_weights)),
            *(dbias[p] if need else None for p, need in enumerate(ctx.need_biases)),
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """act(x W^T + b + addend).

    Args:
        x: [N, in].
        weight: [out, in].
        bias: [out] or None.
        addend: [N, out], added before the activation, or None.
        activation: ``"none"`` or ``"tanh"``.

    Returns:
        [N, out].
    """
    x, addend, weight, bias = _promote(x, addend, weight, bias, product=True)  # type: ignore[assignment]
    params = (weight,) if bias is None else (weight, bias)
    y: Tensor = _apply(_Linear, x, addend, activation, bf16_products(x), 1, *params)
    return y


def qkv_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """Two or three linear maps of the same x in one pass.

    Args:
        x: [N, in].
        weights: 2 or 3 tensors [out, in].
        biases: as many tensors [out], or None.

    Returns:
        As many tensors [N, out], views of one buffer.
    """
    x, *params = _promote(x, *weights, *(biases or ()), product=True)  # type: ignore[assignment]
    ys: tuple[Tensor, ...] = _apply(
        _Linear, x, None, "none", bf16_products(x), len(weights), *params
    )
    return ys


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        hidden_addend: Tensor | None,
        addend: Tensor | None,
        activation: str,
        save: bool,
        bf16: bool,
    ) -> Tensor:
        y, pre = ops.feed_forward_forward(
            x, up_weight, up_bias, down_weight, down_bias, hidden_addend, addend, activation, save,
            bf16,
        )  # fmt: skip
        ctx.activation, ctx.bf16 = activation, bf16
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, up_weight, down_weight, pre)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        need = ctx.needs_input_grad
        x, up_weight, down_weight, pre = ctx.saved_tensors
        # Up's weight alone asks for x itself; the rest of its shape, which is grad_y's.
        grads = ops.feed_forward_backward(
            grad_y, grad_y if x is None else x, up_weight, down_weight, pre, ctx.activation,
            need[0], need[1], need[2], need[3], need[4], need[5], ctx.bf16,
        )  # fmt: skip
        return (
            *(_or_none(n, g) for n, g in zip(need[:6], grads, strict=True)),
            _or_none(need[6], grad_y),
            None,
            None,
            None,
        )


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
    hidden_addend: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """W2 act(W1 x + b1 + hidden_addend) + b2 + addend (Vaswani et al. 2017, eq. 2).

    The pre-activation is kept for the backward; the activation is computed again.

    Args:
        x: [N, hidden].
        up_weight, up_bias: W1 [inner, hidden] and b1 [inner] or None.
        down_weight, down_bias: W2 [hidden, inner] and b2 [hidden] or None.
        activation: ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"relu"``.
        hidden_addend: [N, inner] or None.
        addend: [N, hidden] or None.

    Returns:
        [N, hidden].
    """
    tensors = _promote(
        x, up_weight, up_bias, down_weight, down_bias, hidden_addend, addend, product=True
    )
    bf16 = bf16_products(tensors[0])  # type: ignore[arg-type]
    y: Tensor = _apply(_FeedForward, *tensors, activation, _saves(*tensors), bf16)
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        first_only: bool,
        save: bool,
    ) -> Tensor:
        out, lse = ops.attention_forward(
            query, key, value, cu_seqlens, max_seqlen, num_heads, scale, dropout_p, site, seed,
            first_only, save,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, lse, cu_seqlens, seed)
        ctx.settings = (max_seqlen, num_heads, scale, dropout_p, site)
        ctx.first_only = first_only
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, out, lse, cu_seqlens, seed = ctx.saved_tensors
        max_seqlen, num_heads, scale, dropout_p, site = ctx.settings
        grads = ops.attention_backward(
            grad_out, query, key, value, out, lse, cu_seqlens, max_seqlen, num_heads, scale,
            dropout_p, site, seed, ctx.first_only,
        )  # fmt: skip
        need = ctx.needs_input_grad[:3]
        wanted = (_or_none(n, g) for n, g in zip(need, grads, strict=True))
        return (*wanted, *(None,) * 9)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    site: int = 0,
    seed: Tensor | None = None,
    first_only: bool = False,
) -> Tensor:
    """dropout(softmax(scale Q K^T)) V within each packed sequence (Vaswani et al. 2017, eq. 1).

    No scores are kept: the forward saves the log-sum-exp of each row, the backward computes the
    probabilities again (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4).

    Args:
        query, key, value: [N, num_heads * head_size], head_size at most 128.
        cu_seqlens: int32 [B + 1], ascending from 0 to N: where each sequence starts.
        max_seqlen: length of the longest sequence, or more.
        scale: default 1 / sqrt(head_size).
        dropout_p, site, seed: dropout on the probabilities; the mask is a function of these and of
            the place (docs/ARCHITECTURE.md).
        first_only: only the first token of every sequence asks: query is
            [B, num_heads * head_size], and so is the result, 0 where a sequence is empty. Dropout's
            mask is that of the packed row where the sequence starts.

    Returns:
        [N, num_heads * head_size].
    """
    query, key, value = _promote(query, key, value, product=True)  # type: ignore[assignment]
    if scale is None and not 1 <= num_heads <= query.shape[-1]:
        raise ValueError(f"attention: num_heads is {num_heads} for {query.shape[-1]} features")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] // num_heads)
    out: Tensor = _apply(
        _Attention,
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        num_heads,
        scale,
        dropout_p,
        site,
        seed,
        first_only,
        _saves(query, key, value),
    )
    return out


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout_p: float,
        site: int,
        seed: Tensor | None,
        save: bool,
    ) -> Tensor:
        y, total, mean, rstd = ops.layer_norm_forward(
            x, residual, weight, bias, eps, dropout_p, site, seed, save
        )
        sum_is_x = residual is None and dropout_p == 0.0
        ctx.save_for_backward(x if sum_is_x else total, mean, rstd, weight, seed)
        ctx.settings = (dropout_p, site)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        total, mean, rstd, weight, seed = ctx.saved_tensors
        need = ctx.needs_input_grad
        dropout_p, site = ctx.settings
        dsum, dx, dweight, dbias = ops.layer_norm_backward(
            grad_y, total, mean, rstd, weight, dropout_p, site, seed, need[2] or need[3]
        )
        return (
            _or_none(need[0], dx if dropout_p > 0.0 else dsum),
            _or_none(need[1], dsum),
            _or_none(need[2], dweight),
            _or_none(need[3], dbias),
            None,
            None,
            None,
            None,
            None,
        )


def residual_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    site: int = 0,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x) + residual) over the last dimension (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: [N, hidden].
        residual: [N, hidden] or None.
        weight, bias: [hidden].
        eps: added to the (biased) variance.
        dropout_p, site, seed: dropout on x.

    Returns:
        [N, hidden].
    """
    tensors = _promote(x, residual, weight, bias, product=False)
    y: Tensor = _apply(_ResidualLayerNorm, *tensors, eps, dropout_p, site, seed, _saves(*tensors))
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        padding_idx: int,
        dropout_p: float,
        site: int,
        seed: Tensor | None,
    ) -> Tensor:
        y, mean, rstd = ops.embedding_forward(
            input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
            weight, bias, eps, dropout_p, site, seed,
        )  # fmt: skip
        ctx.save_for_backward(
            input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
            weight, mean, rstd, seed,
        )  # fmt: skip
        ctx.settings = (padding_idx, dropout_p, site)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        *inputs, seed = ctx.saved_tensors
        need = ctx.needs_input_grad
        dsum, dword, dposition, dtoken_type, dweight, dbias = ops.embedding_backward(
            grad_y, *inputs, *ctx.settings, seed, need[4], need[5], need[6], need[7] or need[8]
        )
        return (
            None,
            _or_none(need[1], dsum),
            None,
            None,
            _or_none(need[4], dword),
            _or_none(need[5], dposition),
            _or_none(need[6], dtoken_type),
            _or_none(need[7], dweight),
            _or_none(need[8], dbias),
            None,
            None,
            None,
            None,
            None,
        )


def embedding(
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    padding_idx: int = -1,
    dropout_p: float = 0.0,
    site: int = 0,
    seed: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[id] + position[position_id] + token_type[type_id])).

    Args:
        input_ids: int64 [N], or None where ``inputs_embeds`` is given.
        position_ids: int64 [N].
        token_type_ids: int64 [N], or None: type 0 everywhere.
        word, position, token_type: tables [V, hidden], [P, hidden], [T, hidden].
        weight, bias: LayerNorm's, [hidden].
        padding_idx: row of ``word`` and ``position`` that gets no gradient; -1: none.
        inputs_embeds: [N, hidden], taken instead of word rows.
        eps, dropout_p, site, seed: as in :func:`residual_layer_norm`; dropout follows LayerNorm.

    Returns:
        [N, hidden].
    """
    inputs_embeds, word, position, token_type, weight, bias = _promote(  # type: ignore[assignment]
        inputs_embeds, word, position, token_type, weight, bias, product=False
    )
    y: Tensor = _apply(
        _Embedding, input_ids, inputs_embeds, position_ids, token_type_ids, word, position,
        token_type, weight, bias, eps, padding_idx, dropout_p, site, seed,
    )  # fmt: skip
    return y
