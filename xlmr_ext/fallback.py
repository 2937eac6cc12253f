"""The raw ops over torch's own operators: for CUDA tensors, where the build has no CUDA kernels.

Arguments and results are those of the ops (``ops.py``), on any device that torch has. In half
precision, sums, softmax and statistics are float32; so are ``lse``, ``mean`` and ``rstd``. Nothing
here reads a value from the device, so the host never waits for it.

Dropout's masks are torch's, drawn from a generator that the seed and the site start. They are other
masks than the kernels', and depend on the device, on the type, and on the sizes of the whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlmr_ext._checks import (
    AttentionInputs,
    EmbeddingInputs,
    check_dropout,
    check_feed_forward,
    check_feed_forward_backward,
    check_floating,
    check_layer_norm,
    check_layer_norm_backward,
    check_linear,
    check_linear_backward,
    statistics_dtype,
)

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
]

NOTICE = (
    "this build of xlmr_ext has no CUDA kernels: CUDA tensors are computed by torch's own "
    "operators, slower than kernels would be, and with other dropout masks than the CPU's"
)

aten = torch.ops.aten


@cache
def _say_once() -> None:
    warnings.warn(NOTICE, stacklevel=2)


def on_cuda(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """One of the ops below as it is registered: it says once a process that torch computes."""

    @wraps(implementation)
    def run(*args: Any) -> Any:
        _say_once()
        # Autocast would turn the operators within to half precision, after autograd.py has chosen.
        if torch.is_autocast_enabled("cuda"):
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                return implementation(*args)
        with torch.no_grad():
            return implementation(*args)

    return run


def _wide(t: Tensor) -> Tensor:
    """In the type of sums."""
    return t.to(statistics_dtype(t.dtype))


_WORD = 2**64 - 1


def _generator(device: torch.device, site: int, seed: Tensor) -> torch.Generator:
    """Of one place of the model: the seed and the site, mixed as splitmix64 does (Steele et al.
    2014, "Fast splittable pseudorandom number generators"), as some generators use 32 bits."""
    bits = (int(seed) + (site + 1) * 0x9E3779B97F4A7C15) & _WORD
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _WORD
    generator = torch.Generator(device)
    generator.manual_seed(bits ^ (bits >> 31))
    return generator


def _mask(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Of inverted dropout, 0 or 1 / (1 - p), in the type of sums."""
    # Contiguous whatever ``like`` is: numbers are drawn in the order of memory.
    mask = torch.empty(like.shape, dtype=statistics_dtype(like.dtype), device=like.device)
    return mask.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def _row_mask(op: str, rows: Tensor, p: float, site: int, seed: Tensor | None) -> Tensor | None:
    """The mask of [N, hidden] rows in the type of sums; None where nothing is dropped."""
    p, site, seed = check_dropout(op, p, site, seed)
    if seed is None:
        return None
    return _mask(rows, p, _generator(rows.device, site, seed))


# --- The ops, in the order of ops.py -------------------------------------------------------------


def linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    addend: Tensor | None,
    activation: str,
) -> Tensor:
    op = "linear"
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "linear backward"
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


def _activate(x: Tensor, activation: str) -> Tensor:
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
) -> tuple[Tensor, Tensor]:
    op = "feed_forward"
    check_floating(op, "x", x)
    check_feed_forward(
        op, x, up_weight, up_bias, down_weight, down_bias, hidden_addend, addend, activation
    )
    pre = F.linear(x, up_weight, up_bias)
    if hidden_addend is not None:
        pre.add_(hidden_addend)
    y = F.linear(_activate(pre, activation), down_weight, down_bias)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "feed_forward backward"
    check_floating(op, "x", x)
    check_feed_forward_backward(op, grad_y, x, up_weight, down_weight, pre, activation)
    empty = x.new_empty(0)
    ddown_weight = grad_y.t() @ _activate(pre, activation) if need_down_weight else empty
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


# Scores that are held at once, in 128 MiB of float32; one query of one sequence may have more.
_SCORES = 1 << 25


class _Block:
    """Some sequences of a packed batch side by side, padded: [c, heads, tokens, features].

    It is laid out by sizes alone: the host does not know where a sequence ends.

    Args:
        inputs: the batch, of at least one row.
        first, end: the sequences.
    """

    def __init__(self, inputs: AttentionInputs, first: int, end: int) -> None:
        self._inputs, self._first, self._end = inputs, first, end
        starts = inputs.cu_seqlens[first : end + 1].long()
        token = torch.arange(inputs.max_seqlen, device=starts.device)
        lengths = starts.diff()[:, None]
        self._is_empty = lengths == 0
        self._is_full = _is_full(inputs)
        self._there = token < lengths
        # Where there is no token, the row behind the last one.
        self._rows = torch.where(self._there, starts[:-1, None] + token, inputs.key_rows)

    def parts(self) -> Iterator[slice]:
        """The tokens that ask, in parts that have few enough scores."""
        asking = 1 if self._inputs.first_only else self._inputs.max_seqlen
        each = (self._end - self._first) * self._inputs.num_heads * self._inputs.max_seqlen
        step = max(1, _SCORES // each)
        return (slice(begin, min(begin + step, asking)) for begin in range(0, asking, step))

    def keys(self, t: Tensor) -> Tensor:
        """Of rows [N, heads * features] those that are asked; 0 where there is no token."""
        return self._padded(t, slice(0, self._inputs.max_seqlen))

    def queries(self, t: Tensor, part: slice) -> Tensor:
        """Of rows [N, heads * features] those that ask."""
        if self._inputs.first_only:
            return self._by_head(t[self._first : self._end, None])
        return self._padded(t, part)

    def mask(self) -> Tensor | None:
        """[c, 1, 1, keys], whether there is a key; None where all are there."""
        return None if self._is_full else self._there[:, None, None]

    def put_keys(self, result: Tensor, values: Tensor) -> None:
        """Writes what :meth:`keys` has the shape of into rows."""
        result.index_copy_(0, self._rows.flatten(), self._as_rows(values, result))

    def put_queries(self, result: Tensor, values: Tensor, part: slice) -> None:
        """Writes what :meth:`queries` has the shape of into rows."""
        rows = self._as_rows(values, result)
        if self._inputs.first_only:
            # Without a key the softmax is no number.
            result[self._first : self._end] = rows.masked_fill(self._is_empty, 0.0)
        else:
            result.index_copy_(0, self._rows[:, part].flatten(), rows)

    def _padded(self, t: Tensor, part: slice) -> Tensor:
        if self._is_full:
            length = self._inputs.max_seqlen
            rows = t[self._first * length : self._end * length]
            return self._by_head(rows.reshape(-1, length, t.shape[1])[:, part])
        rows = self._rows[:, part]
        # An absent token reads a row of another, which must not count, not even as NaN.
        found = t.index_select(0, rows.flatten().clamp(max=t.shape[0] - 1))
        found = found.view(*rows.shape, t.shape[1])
        return self._by_head(found.masked_fill_(~self._there[:, part, None], 0.0))

    def _by_head(self, t: Tensor) -> Tensor:
        sequences, tokens, width = t.shape
        heads = self._inputs.num_heads
        return t.view(sequences, tokens, heads, width // heads).transpose(1, 2)

    @staticmethod
    def _as_rows(values: Tensor, like: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(-1, like.shape[1]).to(like.dtype)


def _is_full(inputs: AttentionInputs) -> bool:
    """Whether every sequence is ``max_seqlen`` long."""
    return inputs.key_rows == inputs.batch * inputs.max_seqlen


def _blocks(inputs: AttentionInputs) -> Iterator[_Block]:
    if inputs.key_rows == 0 or inputs.max_seqlen == 0:
        return
    asking = 1 if inputs.first_only else inputs.max_seqlen
    count = max(1, _SCORES // (inputs.num_heads * asking * inputs.max_seqlen))
    for first in range(0, inputs.batch, count):
        yield _Block(inputs, first, min(first + count, inputs.batch))


class _Result:
    """Rows that blocks write to, with one more for what is no token's."""

    def __init__(
        self, inputs: AttentionInputs, rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        self._more = not _is_full(inputs)
        device = inputs.cu_seqlens.device
        self.rows = torch.zeros((rows + self._more, columns), dtype=dtype, device=device)

    def take(self) -> Tensor:
        # A copy and no view: a result of an op can be written to.
        return self.rows[:-1].clone() if self._more else self.rows


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
    """By scaled_dot_product_attention, without ``save`` and dropout; otherwise, as that gives no
    log-sum-exp and takes no mask of ours, by products and a softmax, some sequences at a time."""
    op = "attention"
    check_floating(op, "query", query)
    inputs = AttentionInputs(op, query, key, value, cu_seqlens, max_seqlen, num_heads, first_only)
    p, site, seed = check_dropout(op, dropout_p, site, seed)
    rows, statistics = inputs.query_rows, statistics_dtype(query.dtype)
    out = _Result(inputs, rows, inputs.width, query.dtype)
    if not save and seed is None:
        for block in _blocks(inputs):
            part = slice(0, max_seqlen)
            mixed = F.scaled_dot_product_attention(
                block.queries(query, part),
                block.keys(key),
                block.keys(value),
                attn_mask=block.mask(),
                scale=scale,
            )
            block.put_queries(out.rows, mixed, part)
        return out.take(), query.new_empty(0, dtype=statistics)
    lse = _Result(inputs, rows, num_heads, statistics)
    generator = None if seed is None else _generator(query.device, site, seed)
    for block in _blocks(inputs):
        keys, values = _wide(block.keys(key)), _wide(block.keys(value))
        for part in block.parts():
            scores = _scores(_wide(block.queries(query, part)), keys, scale, block.mask())
            probabilities = scores.softmax(-1)
            if generator is not None:
                probabilities.mul_(_mask(probabilities, p, generator))
            block.put_queries(out.rows, probabilities @ values, part)
            block.put_queries(lse.rows, scores.logsumexp(-1, keepdim=True), part)
    saved = lse.rows[:rows].t().contiguous() if save else lse.rows.new_empty(0)
    return out.take(), saved


def _scores(queries: Tensor, keys: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[c, heads, queries, keys]; minus infinity where there is no key."""
    scores: Tensor = (queries @ keys.transpose(2, 3)).mul_(scale)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores


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
    check_floating(op, "query", query)
    inputs = AttentionInputs(op, query, key, value, cu_seqlens, max_seqlen, num_heads, first_only)
    inputs.check_backward(grad_out, out, lse)
    p, site, seed = check_dropout(op, dropout_p, site, seed)
    dquery, dkey, dvalue = (
        _Result(inputs, t.shape[0], inputs.width, query.dtype) for t in (query, key, value)
    )
    generator = None if seed is None else _generator(query.device, site, seed)
    for block in _blocks(inputs):
        keys, values = _wide(block.keys(key)), _wide(block.keys(value))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for part in block.parts():
            queries = _wide(block.queries(query, part))
            grad = _wide(block.queries(grad_out, part))
            # As the forward has them, so neither its result nor its log-sum-exp is needed.
            probabilities = _scores(queries, keys, scale, block.mask()).softmax(-1)
            kept, dkept = probabilities, grad @ values.transpose(2, 3)
            if generator is not None:
                mask = _mask(probabilities, p, generator)
                kept, dkept = probabilities * mask, dkept.mul_(mask)
            dvalues += kept.transpose(2, 3) @ grad
            # P * (dP - rowsum(P * dP))
            dscores = aten._softmax_backward_data(dkept, probabilities, -1, dkept.dtype)
            dscores.mul_(scale)
            block.put_queries(dquery.rows, dscores @ keys, part)
            dkeys += dscores.transpose(2, 3) @ queries
        block.put_keys(dkey.rows, dkeys)
        block.put_keys(dvalue.rows, dvalues)
    return dquery.take(), dkey.take(), dvalue.take()


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
    mask = _row_mask(op, x, dropout_p, site, seed)
    total = x
    if mask is not None or residual is not None:
        wide = _wide(x) if mask is None else mask.mul_(x)
        total = (wide if residual is None else wide + residual).to(x.dtype)
    y, mean, rstd = _normalise(_wide(total), weight, bias, eps)
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
    y, mean, rstd = torch.native_layer_norm(
        total, [total.shape[1]], _wide(weight), _wide(bias), eps
    )
    return y, mean.view(-1), rstd.view(-1)


def _normalise_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, need_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dtotal, dweight, dbias, in the types of ``weight``."""
    # Contiguous: the operator takes the strides of its statistics for granted.
    grad, total, mean, rstd, wide = (
        t.contiguous() for t in (grad, total, mean[:, None], rstd[:, None], _wide(weight))
    )
    dtotal, dweight, dbias = aten.native_layer_norm_backward(
        grad, total, [total.shape[1]], mean, rstd, wide, wide, [True, need_params, need_params]
    )
    if not need_params:
        dweight = dbias = weight.new_empty(0)
    return dtotal, dweight.to(weight.dtype), dbias.to(weight.dtype)


def layer_norm_backward(
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
    op = "residual_layer_norm backward"
    check_floating(op, "grad_y", grad_y)
    check_layer_norm_backward(op, grad_y, sum, mean, rstd, weight)
    mask = _row_mask(op, sum, dropout_p, site, seed)
    dsum, dweight, dbias = _normalise_backward(
        _wide(grad_y), _wide(sum), mean, rstd, weight, need_params
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
    return _wide(words) + _wide(positions) + _wide(types)


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
    mask = _row_mask(op, y, dropout_p, site, seed)
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
    mask = _row_mask(op, grad_y, dropout_p, site, seed)
    wide, dweight, dbias = _normalise_backward(
        _wide(grad_y) if mask is None else mask.mul_(grad_y), _embedding_sum(inputs), mean, rstd,
        weight, need_params,
    )  # fmt: skip
    dsum = wide.to(grad_y.dtype)

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
