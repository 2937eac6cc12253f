"""Batches without padding: the tokens of all sequences back to back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlmr_ext.batch_checks import integers, token_mask


@dataclass
class PackedBatch:
    """Sequences of B texts, N tokens in all, one behind the other.

    Attributes:
        input_ids: int64 [N].
        position_ids: int64 [N], rows of the position table; the first token of a text has
            ``pad_token_id + 1``.
        cu_seqlens: int32 [B + 1], ascending from 0 to N: where each sequence starts.
        max_seqlen: length of the longest sequence, or more.
        token_type_ids: int64 [N], or None: type 0 everywhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    token_type_ids: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        pad_token_id: int = 1,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Packs lists (or arrays) of token ids that hold no padding.

        Raises:
            TypeError: the ids of a sequence are not whole numbers.
        """
        parts = [torch.as_tensor(s) for s in sequences]
        for index, part in enumerate(parts):
            if part.numel() and (
                part.is_floating_point() or part.is_complex() or part.dtype == torch.bool
            ):
                raise TypeError(f"sequence {index} holds {part.dtype}; expected whole numbers")
            if part.dim() != 1:
                raise ValueError(
                    f"sequence {index} has shape {list(part.shape)}; expected one dimension"
                )
        lengths = [part.numel() for part in parts]
        empty = torch.empty(0, dtype=torch.int64)
        ids = torch.cat([empty, *(part.to(torch.int64) for part in parts)])
        positions = torch.cat([empty, *(torch.arange(n) for n in lengths)]) + (pad_token_id + 1)
        return cls(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            cu_seqlens=cumulative(torch.tensor(lengths, dtype=torch.int64)).to(device),
            max_seqlen=max(lengths, default=0),
        )

    @classmethod
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor | None = None, pad_token_id: int = 1
    ) -> PackedBatch:
        """Packs a padded batch [B, S]; every unmasked token is kept, in order.

        Positions are Hugging Face's: counted over the tokens that are not padding.
        """
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids is {type(input_ids).__name__}; expected a tensor")
        input_ids = integers("input_ids", input_ids, None, input_ids.device)
        if attention_mask is not None:
            shape = tuple(input_ids.shape)
            attention_mask = token_mask(attention_mask, shape, input_ids.device)
        keep = Kept.of(attention_mask, input_ids)
        return cls(
            input_ids=keep.rows(input_ids),
            position_ids=keep.rows(position_ids_of(input_ids, pad_token_id)),
            cu_seqlens=keep.cu_seqlens,
            max_seqlen=keep.max_seqlen,
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on ``device``."""
        types = self.token_type_ids
        return PackedBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.cu_seqlens.to(device),
            self.max_seqlen,
            None if types is None else types.to(device),
        )


@dataclass
class Kept:
    """Which places of a padded batch hold tokens, and the way back."""

    indices: Tensor  # int64 [N] into the flattened batch
    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: int
    batch: int
    length: int

    @classmethod
    def of(cls, attention_mask: Tensor | None, like: Tensor) -> Kept:
        """From a mask [B, S] of 1 (token) and 0, or None: all 1; ``like`` is [B, S, ...]."""
        batch, length = like.shape[:2]
        if attention_mask is None:
            indices = torch.arange(batch * length, device=like.device)
            lengths = torch.full((batch,), length, device=like.device)
        else:
            mask = attention_mask != 0
            indices = mask.flatten().nonzero().squeeze(1)
            lengths = mask.sum(1)
        longest = int(lengths.max()) if batch else 0
        return cls(indices, cumulative(lengths), longest, batch, length)

    @classmethod
    def of_packed(cls, cu_seqlens: Tensor, max_seqlen: int, count: int) -> Kept:
        """Of ``count`` packed rows: each text from place 0 on, in a batch ``max_seqlen`` long."""
        row = torch.arange(count, device=cu_seqlens.device)
        text = torch.searchsorted(cu_seqlens[1:], row, right=True)
        indices = text * max_seqlen + row - cu_seqlens[text]
        return cls(indices, cu_seqlens, max_seqlen, cu_seqlens.shape[0] - 1, max_seqlen)

    def rows(self, padded: Tensor) -> Tensor:
        """[B, S, ...] to [N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.indices)

    def padded(self, rows: Tensor) -> Tensor:
        """[N, ...] to [B, S, ...], zero where there is no token."""
        flat = rows.new_zeros((self.batch * self.length, *rows.shape[1:]))
        flat = flat.index_copy(0, self.indices, rows)
        return flat.reshape(self.batch, self.length, *rows.shape[1:])

    def square(self, rows: Tensor) -> Tensor:
        """[N, heads, keys] to [B, heads, S, S]: from a text's own keys, in order, to their places;
        zero where there is no query or no key."""
        batch, length = self.batch, self.length
        mask = torch.zeros(batch * length, dtype=torch.bool, device=rows.device)
        mask = mask.index_fill(0, self.indices, True).reshape(batch, length)
        if rows.shape[0] == 0:
            return rows.new_zeros((batch, rows.shape[1], length, length))
        key = (mask.cumsum(1) - 1).clamp(min=0)  # which of the text's keys lies at a place
        shape = (batch, rows.shape[1], length, length)
        spread = self.padded(rows).transpose(1, 2).gather(3, key[:, None, None, :].expand(shape))
        return spread.masked_fill(~mask[:, None, None, :], 0.0)


def cumulative(lengths: Tensor) -> Tensor:
    """[B] lengths to int32 [B + 1] offsets."""
    zero = torch.zeros(1, dtype=torch.int32, device=lengths.device)
    return torch.cat([zero, lengths.cumsum(0, dtype=torch.int32)])


def position_ids_of(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """cumsum(ids != pad) * (ids != pad) + pad, as fairseq and transformers number positions."""
    real = (input_ids != pad_token_id).to(torch.int64)
    return real.cumsum(1) * real + pad_token_id
