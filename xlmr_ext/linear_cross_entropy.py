"""Cross entropy of a linear map onto a large vocabulary, without its matrix of logits.

-log softmax(x W^T + b)[label] takes the log-sum-exp of each row and one logit, and its gradient
takes the probabilities, which the log-sum-exp gives again from the logits. So both passes go
through the vocabulary in parts, and a part of the logits is all that there ever is (Wijmans et al.
2024, "Cut your losses in large-vocabulary language models", arXiv 2411.09009; unlike there, no
gradient is left out as too small). The products are those of the op ``linear``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlmr_ext import ops
from xlmr_ext._checks import statistics_dtype
from xlmr_ext.autograd import _promote, bf16_products

__all__ = ["linear_cross_entropy"]

# A part of the logits, 4 MiB in float32. Its size is fixed, so that a row's bits depend neither on
# the number of rows nor on that of threads.
_ROWS = 1024
_WORDS = 1024
# Torch adds up as many numbers in one thread.
_SUMMED = 1 << 14


def _parts(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    """[rows, words] of a part, in the type of sums. Rows of a weight are a view: nothing is copied
    unless their type is not that of x."""
    biases = [] if bias is None else [bias.to(x.dtype)]
    logits: Tensor = ops.linear_forward(x, [weight.to(x.dtype)], biases, None, "none", bf16)
    return logits.to(statistics_dtype(x.dtype))


def _part(tensor: Tensor | None, words: slice) -> Tensor | None:
    return None if tensor is None else tensor[words]


@torch.library.custom_op("xlmr_ext::linear_cross_entropy_forward", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """x [N, in], weight [V, in], bias [V], labels int64 [N] -> losses [N], log-sum-exp
    float64 [N]."""
    dtype = statistics_dtype(x.dtype)
    # A running sum of many parts: in float64 their number adds no error.
    total = x.new_full((x.shape[0],), -torch.inf, dtype=torch.float64)
    at_label = x.new_full((x.shape[0],), torch.nan, dtype=dtype)  # stays for a label out of range
    for rows in _parts(x.shape[0], _ROWS):
        for words in _parts(weight.shape[0], _WORDS):
            logits = _logits(x[rows], weight[words], _part(bias, words), bf16)
            place, inside = _place(labels[rows], words)
            at_label[rows] = torch.where(inside, logits.gather(1, place)[:, 0], at_label[rows])
            peak = logits.amax(1)
            peak = torch.where(peak.isfinite(), peak, 0.0)  # inf - inf is no number
            part = logits.sub_(peak[:, None]).exp_().sum(1).log_()
            total[rows] = torch.logaddexp(total[rows], part.double() + peak)
            del logits  # or it would be there beside the next part
    return (total - at_label).to(dtype), total


def _place(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """-> the column [N, 1] of each label within a part, and whether it is in it [N]."""
    column = labels - words.start
    inside = (column >= 0) & (labels < words.stop)
    return column.clamp(0, words.stop - words.start - 1)[:, None], inside


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype))
    return losses, torch.empty_like(losses, dtype=torch.float64)


@torch.library.custom_op("xlmr_ext::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N] of the losses -> dx [N, in], dweight [V, in], dbias [V]; what is not needed has no
    elements."""
    wide = statistics_dtype(x.dtype)
    dx = x.new_zeros(x.shape if need_x else 0, dtype=wide)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    dbias = weight.new_empty(weight.shape[0] if need_bias else 0)
    if x.shape[0] == 0:
        return dx.to(x.dtype), dweight.zero_(), dbias.zero_()
    # exp(z - lse) with what lse loses when it is rounded: that grows with the logits.
    peak = lse.to(wide)
    scale = (lse - peak).exp_().to(wide)
    by_row = (grad / scale)[:, None]
    for words in _parts(weight.shape[0], _WORDS):
        part = weight[words]
        for rows in _parts(x.shape[0], _ROWS):
            # (softmax - one at the label) grad
            dz = _logits(x[rows], part, _part(bias, words), bf16).sub_(peak[rows, None]).exp_()
            place, inside = _place(labels[rows], words)
            ones = torch.where(inside, scale[rows], 0.0)[:, None]
            dz.scatter_add_(1, place, ones.neg_()).mul_(by_row[rows])
            dx_part, dweight_part, dbias_part, _ = ops.linear_backward(
                [dz.to(x.dtype)], x[rows], [part.to(x.dtype)], None, "none", need_x, need_weight,
                need_bias, bf16,
            )  # fmt: skip
            if need_x:
                dx[rows] += dx_part
            for whole, piece in ((dweight, dweight_part), (dbias, dbias_part)):
                if piece.numel():
                    to = whole[words]
                    _ = to.copy_(piece[0]) if rows.start == 0 else to.add_(piece[0])
            del dz, dx_part, dweight_part, dbias_part, piece
    return dx.to(x.dtype), dweight, dbias


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, bf16: bool
    ) -> Tensor:
        losses, lse = _forward(x, weight, bias, labels, bf16)
        ctx.bf16 = bf16
        ctx.save_for_backward(x, weight, bias, labels, lse)
        result: Tensor = losses
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        need = ctx.needs_input_grad
        grads = _backward(grad.contiguous(), *ctx.saved_tensors, *need[:3], ctx.bf16)
        return (*(g if n else None for n, g in zip(need, grads, strict=False)), None, None)


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The sum over the rows of -log softmax(x W^T + b)[label].

    Beyond the gradients, memory is that of x twice and of parts of [1024, 1024] logits. Under
    autocast the products are in the type of the other products, and the weight's gradient is in the
    weight's own. Differentiable once.

    Args:
        x: [N, in].
        weight: [V, in].
        bias: [V] or None.
        labels: int64 [N], from 0 to V - 1; one beyond makes the loss NaN.

    Returns:
        A scalar, 0 for N = 0; float32 for half precision.
    """
    (x,) = _promote(x, product=True)  # type: ignore[assignment]
    losses: Tensor = _LinearCrossEntropy.apply(x, weight, bias, labels, bf16_products(x))  # type: ignore[no-untyped-call]
    if losses.shape[0] <= _SUMMED:
        return losses.sum()
    return torch.stack([part.sum() for part in losses.split(_SUMMED)]).sum()
