"""The oracle: every differentiable op of this package in plain torch, clear rather than fast.

The six functions have the names, the arguments and the results of those in
:mod:`xlmr_ext.autograd`; they take any floating dtype and device, and autograd differentiates
them. The tests run them in float64 and hold the kernels to the result. They are never a path of
production.

Shapes: N is the number of packed rows (the tokens of all sequences, back to back), sequence ``b``
is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "activate",
    "attention",
    "attention_lse",
    "dropout_mask",
    "dropout_threshold",
    "embedding",
    "feed_forward",
    "linear",
    "philox4x32",
    "qkv_linear",
    "residual_layer_norm",
]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of ``a * b``, both below 2^32, without leaving int64."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", 3.3).

    ``counter`` is four int64 tensors that broadcast together, ``key`` two integers, all of them
    words below 2^32; so are the four tensors that come back.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_words(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_words(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """The word below which an element is dropped: p scaled to 32 bits, rounded down."""
    return min(int(p * 2.0**32), _WORD)


def dropout_mask(
    p: float, site: int, seed: Tensor | int | None, heads: int, rows: int, columns: int
) -> Tensor:
    """The mask of inverted dropout, [heads, rows, columns] in float64: 0 or ``1 / (1 - p)``.

    ``seed`` is one int64 (its two halves are the key), ``site`` names the place in the model.
    Element (h, r, c) takes word ``c % 4`` of counter ``(c // 4, r, h, site)``.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: got {p}, expected a probability in [0, 1)")
    if p == 0.0:
        return torch.ones(heads, rows, columns, dtype=torch.float64)
    if seed is None:
        raise ValueError("seed: got None, expected one int64, because p is not 0")
    bits = int(seed)
    groups = -(-columns // 4)
    words = philox4x32(
        (
            torch.arange(groups).view(1, 1, groups),
            torch.arange(rows).view(1, rows, 1),
            torch.arange(heads).view(heads, 1, 1),
            torch.tensor(site & _WORD),
        ),
        (bits & _WORD, (bits >> 32) & _WORD),
    )
    word = torch.stack(words, dim=-1).reshape(heads, rows, groups * 4)[:, :, :columns]
    return (word >= dropout_threshold(p)).double() / (1.0 - p)


def _drop(x: Tensor, p: float, site: int, seed: Tensor | int | None) -> Tensor:
    """Dropout of [N, columns] rows."""
    if p == 0.0:
        return x
    return x * dropout_mask(p, site, seed, 1, x.shape[0], x.shape[1])[0].to(x)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name, element by element."""
    if activation == "none":
        return x
    if activation == "tanh":
        return torch.tanh(x)
    if activation == "gelu":  # Hendrycks & Gimpel 2016 (arXiv 1606.08415), eq. 1
        return F.gelu(x)
    if activation == "gelu_tanh":  # the same paper, eq. 2
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    raise ValueError(
        f"activation: got {activation!r}, expected 'none', 'tanh', 'gelu', 'gelu_tanh' or 'relu'"
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x weight^T + bias + addend)``: x [N, in], weight [out, in], result [N, out]."""
    z = F.linear(x, weight, bias)
    return activate(z if addend is None else z + addend, activation)


def qkv_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """One linear map per weight over the same rows: x [N, in], each result [N, out]."""
    if biases is None:
        return tuple(F.linear(x, weight) for weight in weights)
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


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
    """``act(x W1^T + b1 + hidden_addend) W2^T + b2 + addend``: x and result [N, hidden]."""
    inner = linear(x, up_weight, up_bias, addend=hidden_addend, activation=activation)
    return linear(inner, down_weight, down_bias, addend=addend)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[S, H * D] to [H, S, D]."""
    return x.reshape(x.shape[0], num_heads, x.shape[1] // num_heads).transpose(0, 1)


def _scores(query: Tensor, key: Tensor, num_heads: int, scale: float | None) -> Tensor:
    """The scaled logits of one sequence, [H, S, S]."""
    q, k = _split_heads(query, num_heads), _split_heads(key, num_heads)
    return (q @ k.transpose(1, 2)) * (1.0 / math.sqrt(q.shape[2]) if scale is None else scale)


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
    seed: Tensor | int | None = None,
    first_only: bool = False,
) -> Tensor:
    """``softmax(scale Q K^T) V`` within every sequence and head (Vaswani et al. 2017, eq. 1).

    query, key, value and the result are [N, H * D]; cu_seqlens [B + 1]; max_seqlen is at least
    the longest sequence; scale is 1 / sqrt(D) where it is None. Dropout acts on the
    probabilities, at (head, packed query row, key within its sequence). With ``first_only`` the
    first token of each sequence asks alone: query and result are [B, H * D], and the result is 0
    where the sequence is empty.
    """
    ends = cu_seqlens.tolist()
    mask: Tensor | None = None
    if dropout_p != 0.0:
        mask = dropout_mask(dropout_p, site, seed, num_heads, key.shape[0], max_seqlen)
        mask = mask.to(query)
    outputs = [query[:0]]
    for index, (begin, end) in enumerate(pairwise(ends)):
        asking = query[index : index + 1] if first_only else query[begin:end]
        if first_only and begin == end:
            outputs.append(torch.zeros_like(asking))
            continue
        logits = _scores(asking, key[begin:end], num_heads, scale)
        probabilities = torch.softmax(logits, dim=-1)
        if mask is not None:
            probabilities = probabilities * mask[:, begin : begin + len(asking), : end - begin]
        mixed = probabilities @ _split_heads(value[begin:end], num_heads)
        outputs.append(mixed.transpose(0, 1).reshape(asking.shape))
    return torch.cat(outputs)


def attention_lse(
    query: Tensor, key: Tensor, cu_seqlens: Tensor, num_heads: int, *, scale: float | None = None
) -> Tensor:
    """log sum exp of the scaled logits over the keys of a row's sequence, [H, N]."""
    ends = cu_seqlens.tolist()
    parts = [query.new_zeros(num_heads, 0)]
    for begin, end in pairwise(ends):
        logits = _scores(query[begin:end], key[begin:end], num_heads, scale)
        parts.append(torch.logsumexp(logits, dim=-1))
    return torch.cat(parts, dim=1)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    site: int = 0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """``LayerNorm(dropout(x) + residual)`` over the columns (Ba et al. 2016), [N, hidden]."""
    total = _drop(x, dropout_p, site, seed)
    if residual is not None:
        total = total + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps)


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
    seed: Tensor | int | None = None,
    inputs_embeds: Tensor | None = None,
) -> Tensor:
    """``dropout(LayerNorm(word[id] + position[position_id] + token_type[type_id]))``.

    Ids are int64 [N], tables [rows, hidden], the result [N, hidden]. ``inputs_embeds``
    [N, hidden] stands for the word rows where it is given; no token_type_ids means type 0. Rows
    equal to padding_idx get no gradient in word and position (-1: every row gets one).
    """

    def look_up(table: Tensor, ids: Tensor) -> Tensor:
        # torch counts a negative padding_idx from the end, and refuses one beyond the table.
        inside = 0 <= padding_idx < table.shape[0]
        return F.embedding(ids, table, padding_idx=padding_idx if inside else None)

    if inputs_embeds is not None:
        words = inputs_embeds
    elif input_ids is not None and word is not None:
        words = look_up(word, input_ids)
    else:
        raise ValueError("input_ids: got None, expected input_ids and word, or inputs_embeds")
    types = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
    total = words + look_up(position, position_ids) + F.embedding(types, token_type)
    normal = F.layer_norm(total, weight.shape, weight, bias, eps)
    return _drop(normal, dropout_p, site, seed)
