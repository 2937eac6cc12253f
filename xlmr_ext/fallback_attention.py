"""Attention over packed sequences by torch's own operators; for `fallback.py`.

Sequences are padded some at a time, so that memory grows with the tokens and not with the square of
a batch's length; sizes alone say how, and the host waits for no value.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xlmr_ext import fallback_dropout as dropout
from xlmr_ext._checks import (
    AttentionInputs,
    check_dropout,
    check_floating,
    statistics_dtype,
    wide,
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
    generator = None if seed is None else dropout.generator(query.device, site, seed)
    for block in _blocks(inputs):
        keys, values = wide(block.keys(key)), wide(block.keys(value))
        for part in block.parts():
            scores = _scores(wide(block.queries(query, part)), keys, scale, block.mask())
            probabilities = scores.softmax(-1)
            if generator is not None:
                probabilities.mul_(dropout.mask(probabilities, p, generator))
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
    generator = None if seed is None else dropout.generator(query.device, site, seed)
    for block in _blocks(inputs):
        keys, values = wide(block.keys(key)), wide(block.keys(value))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for part in block.parts():
            queries = wide(block.queries(query, part))
            grad = wide(block.queries(grad_out, part))
            # As the forward has them, so neither its result nor its log-sum-exp is needed.
            probabilities = _scores(queries, keys, scale, block.mask()).softmax(-1)
            kept, dkept = probabilities, grad @ values.transpose(2, 3)
            if generator is not None:
                mask = dropout.mask(probabilities, p, generator)
                kept, dkept = probabilities * mask, dkept.mul_(mask)
            dvalues += kept.transpose(2, 3) @ grad
            # P * (dP - rowsum(P * dP))
            dscores = torch.ops.aten._softmax_backward_data(dkept, probabilities, -1, dkept.dtype)
            dscores.mul_(scale)
            block.put_queries(dquery.rows, dscores @ keys, part)
            dkeys += dscores.transpose(2, 3) @ queries
        block.put_keys(dkey.rows, dkeys)
        block.put_keys(dvalue.rows, dvalues)
    return dquery.take(), dkey.take(), dvalue.take()
