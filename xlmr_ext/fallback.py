"""The raw ops over torch's own operators: for CUDA tensors that no CUDA kernel takes.

Arguments and results are those of the ops (``ops.py``), on any device that torch has. In half
precision, sums, softmax and statistics are float32; so are ``lse``, ``mean`` and ``rstd``. Nothing
here reads a value from the device.

Dropout's masks are torch's own, see ``fallback_dropout.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlmr_ext._checks import (
    EmbeddingInputs,
    check_bf16_products,
    check_feed_forward,
    check_feed_forward_backward,
    check_floating,
    check_layer_norm,
    check_layer_norm_backward,
    check_linear,
    check_linear_backward,
    wide,
)
from xlmr_ext.fallback_attention import attention_backward, attention_forward
from xlmr_ext.fallback_dropout import row_mask

__all__ = [
    "attention_backward",
    "attention_forward",
    "embedding_backward",
    "embedding_forward",
    "feed_forward_backward",
    "feed_forward_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_backward",
    "linear_forward",
    "on_cuda",
    "say_once",
]

aten = torch.ops.aten


@cache
def say_once(reason: str) -> None:
    """A notice for each reason, once a process."""
    warnings.warn(
        f"{reason}: CUDA tensors are computed by torch's own operators, with other dropout masks "
        f"than the CPU's (docs/gpu.md)",
        stacklevel=2,
    )


def on_cuda(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """One of the ops below as it is registered."""

    @wraps(implementation)
    def run(*args: Any) -> Any:
        # Autocast would turn the operators within to half precision, after autograd.py has chosen.
        if torch.is_autocast_enabled("cuda"):
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                return implementation(*args)
        with torch.no_grad():
            return implementation(*args)

    return run


# --- The ops, in the order of ops.py -------------------------------------------------------------


def linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    addend: Tensor | None,
    activation: str,
    bf16_products: bool = False,
) -> Tensor:
    op = "linear"
    check_bf16_products(op, x, bf16_products)
    check_floating(op, "x", x)
    check_linear(op, x, weights, biases, addend, activation)
    y = F.linear(x, _joined(weights), _joined(biases) if biases else None)
    if addend is not None:
        y = y.add_(addend)
    return y.tanh_() if activation == "tanh" else y


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


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
    check_bf16_products(op, grad_ys[0], bf16_products)
    sizes = check_linear_backward(op, grad_ys, x, weights, y, activation, need_x, need_weight)
    check_floating(op, "grad_y", grad_ys[0])
    parts, out_features = len(grad_ys), sizes.out_features
    grad = _joined(grad_ys, 1)
    empty = grad.new_empty(0)
    dz = empty
    if activation == "tanh" and y is not None:
        grad = dz = aten.tanh_backward(grad, y)
    dx = dweight = dbias = empty
    if need_x:
        dx = grad @ _joined(weights)
    if need_weight and x is not None:
        dweight = (grad.t() @ x).view(parts, out_features, sizes.in_features)
    if need_bias:
        dbias = grad.sum(0).view(parts, out_features)
    return dx, dweight, dbias, dz


def activate(x: Tensor, activation: str) -> Tensor:
    """The feed-forward's activation."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    result: Tensor
    if activation == "relu":
        result = aten.threshold_backward(grad, x, 0)
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        result = aten.gelu_backward(grad, x, approximate=how)
    return result


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
    check_bf16_products(op, x, bf16_products)
    check_floating(op, "x", x)
    check_feed_forward(
        op, x, up_weight, up_bias, down_weight, down_bias, hidden_addend, addend, activation
    )
    pre = F.linear(x, up_weight, up_bias)
    if hidden_addend is not None:
        pre.add_(hidden_addend)
    y = F.linear(activate(pre, activation), down_weight, down_bias)
    if addend is not None:
        y.add_(addend)
    return y, pre if save else x.new_empty(0)


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
    check_bf16_products(op, x, bf16_products)
    check_floating(op, "x", x)
    check_feed_forward_backward(op, grad_y, x, up_weight, down_weight, pre, activation)
    empty = x.new_empty(0)
    ddown_weight = grad_y.t() @ activate(pre, activation) if need_down_weight else empty
    ddown_bias = grad_y.sum(0) if need_down_bias else empty
    dpre = empty
    if need_x or need_up_weight or need_up_bias or need_hidden_addend:
        dpre = _activate_backward(grad_y @ down_weight, pre, activation)
    return (
        dpre @ up_weight if need_x else empty,
        dpre.t() @ x if need_up_weight else empty,
        dpre.sum(0) if need_up_bias else empty,
        ddown_weight,
        ddown_bias,
        dpre if need_hidden_addend else empty,
    )


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
    check_floating(op, "x", x)
    check_layer_norm(op, x, residual, weight, bias)
    mask = row_mask(op, x, dropout_p, site, seed)
    total = x
    if mask is not None or residual is not None:
        dropped = wide(x) if mask is None else mask.mul_(x)
        total = (dropped if residual is None else dropped + residual).to(x.dtype)
    y, mean, rstd = _normalise(wide(total), weight, bias, eps)
    empty = x.new_empty(0)
    return (
        y.to(x.dtype),
        total if save and total is not x else empty,
        mean if save else mean.new_empty(0),
        rstd if save else rstd.new_empty(0),
    )


def _normalise(
    total: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of [N, hidden] in the type of sums; its mean and rstd [N]."""
    y, mean, rstd = torch.native_layer_norm(total, [total.shape[1]], wide(weight), wide(bias), eps)
    return y, mean.view(-1), rstd.view(-1)


def _normalise_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, need_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dtotal, dweight, dbias, in the types of ``weight``."""
    # Contiguous: the operator takes the strides of its statistics for granted.
    grad, total, mean, rstd, scale = (
        t.contiguous() for t in (grad, total, mean[:, None], rstd[:, None], wide(weight))
    )
    dtotal, dweight, dbias = aten.native_layer_norm_backward(
        grad, total, [total.shape[1]], mean, rstd, scale, scale, [True, need_params, need_params]
    )
    if not need_params:
        dweight = dbias = weight.new_empty(0)
    return dtotal, dweight.to(weight.dtype), dbias.to(weight.dtype)


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
    check_floating(op, "grad_y", grad_y)
    check_layer_norm_backward(op, grad_y, total, mean, rstd, weight)
    mask = row_mask(op, total, dropout_p, site, seed)
    dsum, dweight, dbias = _normalise_backward(
        wide(grad_y), wide(total), mean, rstd, weight, need_params
    )
    dx = grad_y.new_empty(0) if mask is None else mask.mul_(dsum).to(grad_y.dtype)
    return dsum.to(grad_y.dtype), dx, dweight, dbias


def _embedding_sum(inputs: EmbeddingInputs) -> Tensor:
    """[N, hidden] in the type of sums."""
    if inputs.inputs_embeds is not None:
        words = inputs.inputs_embeds
    else:
        assert inputs.input_ids is not None
        assert inputs.word is not None
        words = F.embedding(inputs.input_ids, inputs.word)
    types = (
        inputs.token_type[:1]
        if inputs.token_type_ids is None
        else F.embedding(inputs.token_type_ids, inputs.token_type)
    )
    positions = F.embedding(inputs.position_ids, inputs.position)
    return wide(words) + wide(positions) + wide(types)


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
    check_floating(op, "position", position)
    inputs = EmbeddingInputs(
        op, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
        weight,
    )  # fmt: skip
    inputs.check("bias", bias, (inputs.hidden,))
    y, mean, rstd = _normalise(_embedding_sum(inputs), weight, bias, eps)
    mask = row_mask(op, y, dropout_p, site, seed)
    if mask is not None:
        y = y.mul_(mask)
    return y.to(position.dtype), mean, rstd


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
    check_floating(op, "position", position)
    inputs = EmbeddingInputs(
        op, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
        weight,
    )  # fmt: skip
    inputs.check_backward(grad_y, mean, rstd)
    mask = row_mask(op, grad_y, dropout_p, site, seed)
    dtotal, dweight, dbias = _normalise_backward(
        wide(grad_y) if mask is None else mask.mul_(grad_y), _embedding_sum(inputs), mean, rstd,
        weight, need_params,
    )  # fmt: skip
    dsum = dtotal.to(grad_y.dtype)

    def table_gradient(needed: bool, table: Tensor | None, ids: Tensor | None, pad: int) -> Tensor:
        if not needed or table is None:
            return dsum.new_empty(0)
        if ids is None:
            return torch.zeros_like(table)
        gradient: Tensor = aten.embedding_dense_backward(dsum, ids, table.shape[0], pad, False)
        return gradient

    types = inputs.token_type_ids
    if types is None:
        types = torch.zeros_like(inputs.position_ids)
    return (
        dsum,
        table_gradient(need_word, word, inputs.input_ids, padding_idx),
        table_gradient(need_position, position, inputs.position_ids, padding_idx),
        table_gradient(need_token_type, token_type, types, -1),
        dweight,
        dbias,
    )
