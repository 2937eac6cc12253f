"""From what a caller gives to what the encoder takes: a padded batch is checked and packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xlmr_ext.batch_checks import in_range, integers, on_device, token_mask
from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.packing import Kept, PackedBatch, position_ids_of


@dataclass
class EncoderInput:
    """One checked batch, packed."""

    input_ids: Tensor | None  # [N]
    inputs_embeds: Tensor | None  # [N, hidden]
    position_ids: Tensor  # [N]
    token_type_ids: Tensor | None  # [N]
    cu_seqlens: Tensor  # [B + 1]
    max_seqlen: int
    kept: Kept | None  # the way back; None where the caller packed

    def unpack(self, rows: Tensor) -> Tensor:
        """[N, ...] as the caller's batch is: [B, S, ...] or packed."""
        return rows if self.kept is None else self.kept.padded(rows)

    def square(self, rows: Tensor) -> Tensor:
        """[N, heads, max_seqlen], by a text's own keys, to [B, heads, S, S]."""
        kept = self.kept
        if kept is None:
            kept = Kept.of_packed(self.cu_seqlens, self.max_seqlen, rows.shape[0])
        return kept.square(rows)


def from_packed(packed: PackedBatch, device: torch.device) -> EncoderInput:
    """The batch as it is; the ops check its shapes and ranges."""
    if not isinstance(packed, PackedBatch):
        raise TypeError(f"packed is {type(packed).__name__}; expected a PackedBatch")
    for name in ("input_ids", "position_ids", "cu_seqlens", "token_type_ids"):
        if getattr(packed, name) is not None:
            on_device(f"packed.{name}", getattr(packed, name), device)
    return EncoderInput(
        packed.input_ids,
        None,
        packed.position_ids,
        packed.token_type_ids,
        packed.cu_seqlens,
        packed.max_seqlen,
        None,
    )


def from_padded(
    config: XLMRobertaConfig,
    device: torch.device,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> EncoderInput:
    """Checks and packs a padded batch; arguments and errors of XLMRobertaModel.forward."""
    if (input_ids is None) == (inputs_embeds is None):
        which = "neither" if input_ids is None else "both"
        raise ValueError(f"{which} of input_ids and inputs_embeds came; expected one of them")
    if input_ids is not None:
        input_ids = integers("input_ids", input_ids, None, device)
        in_range("input_ids", input_ids, 0, config.vocab_size)
        shape = tuple(input_ids.shape)
    else:
        assert inputs_embeds is not None
        on_device("inputs_embeds", inputs_embeds, device)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {list(inputs_embeds.shape)}; expected [batch, "
                f"length, {config.hidden_size}]"
            )
        shape = tuple(inputs_embeds.shape[:2])
    longest = config.longest_input
    if attention_mask is not None:
        attention_mask = token_mask(attention_mask, shape, device)
    like = input_ids if input_ids is not None else inputs_embeds
    assert like is not None
    if position_ids is not None:
        position_ids = integers("position_ids", position_ids, shape, device)
        in_range("position_ids", position_ids, 0, config.max_position_embeddings)
    elif input_ids is not None:
        position_ids = position_ids_of(input_ids, config.pad_token_id)
    else:
        start = config.pad_token_id + 1
        position_ids = torch.arange(start, start + shape[1], device=like.device).expand(shape)
    if token_type_ids is not None:
        token_type_ids = integers("token_type_ids", token_type_ids, shape, device)
        in_range("token_type_ids", token_type_ids, 0, config.type_vocab_size)
    kept = Kept.of(attention_mask, like)
    positions = kept.rows(position_ids)
    if positions.numel() and int(positions.max()) >= config.max_position_embeddings:
        tokens = int(positions.max()) - config.pad_token_id
        raise ValueError(
            f"a text has {tokens} tokens; this model takes at most {longest} (truncate with "
            f"the tokenizer: truncation=True, max_length={longest})"
        )
    return EncoderInput(
        None if input_ids is None else kept.rows(input_ids),
        None if inputs_embeds is None else kept.rows(inputs_embeds),
        positions,
        None if token_type_ids is None else kept.rows(token_type_ids),
        kept.cu_seqlens,
        kept.max_seqlen,
        kept,
    )
