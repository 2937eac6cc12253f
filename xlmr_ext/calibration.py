"""Means of what enters the products of the layers, by which 8-bit weights keep their results' mean.

A weight that rounding moves by dW moves its product by dW x: on average by dW E[x], which is the
same for every token, and which a bias takes back (Nagel et al. 2019, "Data-free quantization
through weight equalization and bias correction", arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.layers import Dropout
from xlmr_ext.packing import PackedBatch

__all__ = ["LayerMeans", "corrected_bias", "input_means", "random_sequences"]

_TEXTS, _TOKENS = 32, 32
_BATCH = 16


@dataclass(frozen=True)
class LayerMeans:
    """Means over tokens, float64.

    Args:
        hidden: of the layer's input [hidden], which query, key and value read.
        context: of attention's output [hidden].
        attended: of the feed-forward's input [hidden].
        inner: of its activations [inner].
    """

    hidden: Tensor
    context: Tensor
    attended: Tensor
    inner: Tensor


def random_sequences(config: XLMRobertaConfig) -> list[list[int]]:
    """32 sequences of 32 ids, or what the position table holds: random words, always the same,
    between <s> and </s>. A sentencepiece vocabulary begins with what is frequent, so that a word's
    rank is drawn as texts have it, with a probability of about 1 / rank (Zipf's law)."""
    begin, end = int(config.bos_token_id or 0), int(config.eos_token_id or 0)
    special = max(begin, end, int(config.pad_token_id))
    first_word = special + 1 if special + 1 < config.vocab_size else 0
    words = int(config.vocab_size) - first_word
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand((_TEXTS, _TOKENS - 2), generator=generator, dtype=torch.float64)
    ranks = (uniform * math.log(words + 1)).exp().long().clamp(max=words)
    ids = (ranks + (first_word - 1)).tolist()
    return [[begin, *row, end][: config.longest_input] for row in ids]


def input_means(model: Any, sequences: Sequence[Sequence[int]]) -> list[LayerMeans]:
    """Runs a model without head, in float32, over sequences of ids.

    Args:
        model: whose layers are plain (:func:`xlmr_ext.layers.is_fused`), in eval mode.
        sequences: with special tokens, without padding.

    Returns:
        The means of every layer.

    Raises:
        ValueError: no sequence holds a token, one is longer than the position table, or an id is
            out of range.
    """
    sums: list[list[Tensor]] = [[] for _ in model.encoder.layer]
    tokens = 0
    dropout = Dropout(model.config, training=False)
    pad_token_id = int(model.config.pad_token_id)
    with torch.inference_mode():
        for begin in range(0, len(sequences), _BATCH):
            batch = PackedBatch.from_sequences(sequences[begin : begin + _BATCH], pad_token_id)
            tokens += batch.input_ids.numel()
            hidden = model.embeddings(batch.input_ids, None, batch.position_ids, None, dropout)
            for layer, found in zip(model.encoder.layer, sums, strict=True):
                places, hidden = _through(layer, hidden, batch, dropout)
                added = [rows.double().sum(0) for rows in places]
                found[:] = [a + b for a, b in zip(found, added, strict=True)] if found else added
    if tokens == 0:
        raise ValueError("calibration: no tokens came; give texts, or None")
    return [LayerMeans(*(total / tokens for total in found)) for found in sums]


def _through(
    layer: Any, hidden: Tensor, batch: PackedBatch, dropout: Dropout
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What LayerMeans are means of, and the layer's output."""
    attention = layer.attention
    context, _ = attention.self(hidden, batch.cu_seqlens, batch.max_seqlen, dropout, 0)
    attended = attention.output(context, hidden, dropout, 0)
    inner = layer.intermediate(attended)
    return (hidden, context, attended, inner), layer.output(inner, attended, dropout, 0)


def corrected_bias(
    bias: Tensor | None, weight: Tensor, codes: Tensor, scale: Tensor, mean: Tensor
) -> Tensor:
    """The bias under which codes * scale give the mean that weight gave with ``bias``.

    Args:
        bias: [out], or None for zeros.
        weight: [out, in].
        codes, scale: what :func:`xlmr_ext.quantization.quantize_rows` made of it.
        mean: of the input, float64 [in].

    Returns:
        float32 [out].
    """
    lost = weight.detach().double() @ mean - (codes.double() @ mean) * scale.double()
    return (lost if bias is None else bias.detach().double() + lost).float()
