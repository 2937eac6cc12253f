"""XLMRobertaModel: the encoder, and the door where batches are checked, packed and unpacked.

Conneau et al. 2020, "Unsupervised cross-lingual representation learning at scale"
(arXiv 1911.02116); names, arguments and outputs are Hugging Face's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlmr_ext.batch_checks import in_range, integers, on_device, token_mask
from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.layers import (
    Dropout,
    XLMRobertaEmbeddings,
    XLMRobertaEncoder,
    XLMRobertaPooler,
)
from xlmr_ext.outputs import BaseModelOutputWithPooling
from xlmr_ext.packing import Kept, PackedBatch, position_ids_of
from xlmr_ext.pretrained import PreTrainedModel


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
        return rows if self.kept is None else self.kept.padded(rows)


class XLMRobertaModel(PreTrainedModel):
    """The XLM-R encoder, with Hugging Face's optional pooler.

    Args:
        config: shape and settings.
        add_pooling_layer: whether ``pooler_output`` is computed (XLM-R was trained without it).
    """

    base_model_prefix = "roberta"

    def __init__(self, config: XLMRobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = XLMRobertaEmbeddings(config)
        self.encoder = XLMRobertaEncoder(config)
        self.pooler = XLMRobertaPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        packed: PackedBatch | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encodes a padded batch, or a packed one.

        Args:
            input_ids: [B, S] whole numbers in [0, vocab_size).
            attention_mask: [B, S] of 1 (token) and 0 (padding, anywhere in the row); None: all 1.
            token_type_ids: [B, S]; None: type 0.
            position_ids: [B, S] or [1, S] rows of the position table; None: counted over the ids
                that are not padding, from ``pad_token_id + 1``.
            inputs_embeds: [B, S, hidden], instead of ``input_ids``.
            output_hidden_states: also return the embeddings' and every layer's output.
            return_dict: False returns a tuple.
            packed: a batch without padding, instead of all the above.

        Returns:
            :class:`BaseModelOutputWithPooling`. Masked places hold zeros.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range; the message names
                it, what came and what was expected.
        """
        keep = self._wants(output_hidden_states, "output_hidden_states")
        if self._wants(output_attentions, "output_attentions"):
            raise ValueError(
                "output_attentions=True: the attention kernel never forms the probabilities; for "
                "them load the same checkpoint in transformers with attn_implementation='eager'"
            )
        batch = self._enter(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packed
        )
        rows, kept = self.encode(batch, keep)
        last = batch.unpack(rows)
        pooled = None if self.pooler is None else self.pooler(first_rows(rows, batch.cu_seqlens))
        states = None
        if keep:
            states = (*(batch.unpack(h) for h in kept), last)
        output = BaseModelOutputWithPooling(last, pooled, states)
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def encode(self, batch: EncoderInput, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
        """-> packed hidden states [N, hidden], and, with ``keep``, the input of every layer."""
        dropout = Dropout(self.config, self.training)
        hidden = self.embeddings(
            batch.input_ids,
            batch.inputs_embeds,
            batch.position_ids,
            batch.token_type_ids,
            dropout,
        )
        rows, kept = self.encoder(hidden, batch.cu_seqlens, batch.max_seqlen, dropout, keep)
        return rows, kept

    def _wants(self, argument: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if argument is None else argument)

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _enter(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        packed: PackedBatch | None,
    ) -> EncoderInput:
        padded = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if packed is not None:
            if not isinstance(packed, PackedBatch):
                raise TypeError(f"packed is {type(packed).__name__}; expected a PackedBatch")
            given = [name for name, value in padded.items() if value is not None]
            if given:
                raise ValueError(
                    f"packed came together with {', '.join(given)}; give one or the other"
                )
            for name in ("input_ids", "position_ids", "cu_seqlens", "token_type_ids"):
                if getattr(packed, name) is not None:
                    on_device(f"packed.{name}", getattr(packed, name), self.device)
            return EncoderInput(
                packed.input_ids,
                None,
                packed.position_ids,
                packed.token_type_ids,
                packed.cu_seqlens,
                packed.max_seqlen,
                None,
            )
        batch: EncoderInput = self._pack(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        return batch

    # Packing reads sizes from the data; a compiled model breaks its graph here, once.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pack(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> EncoderInput:
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            which = "neither" if input_ids is None else "both"
            raise ValueError(f"{which} of input_ids and inputs_embeds came; expected one of them")
        if input_ids is not None:
            input_ids = integers("input_ids", input_ids, None, self.device)
            in_range("input_ids", input_ids, 0, config.vocab_size)
            shape = tuple(input_ids.shape)
        else:
            assert inputs_embeds is not None
            on_device("inputs_embeds", inputs_embeds, self.device)
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
                raise ValueError(
                    f"inputs_embeds has shape {list(inputs_embeds.shape)}; expected [batch, "
                    f"length, {config.hidden_size}]"
                )
            shape = tuple(inputs_embeds.shape[:2])
        longest = config.max_position_embeddings - config.pad_token_id - 1
        if attention_mask is not None:
            attention_mask = token_mask(attention_mask, shape, self.device)
        like = input_ids if input_ids is not None else inputs_embeds
        assert like is not None
        if position_ids is not None:
            position_ids = integers("position_ids", position_ids, shape, self.device)
            in_range("position_ids", position_ids, 0, config.max_position_embeddings)
        elif input_ids is not None:
            position_ids = position_ids_of(input_ids, config.pad_token_id)
        else:
            start = config.pad_token_id + 1
            position_ids = torch.arange(start, start + shape[1], device=like.device).expand(shape)
        if token_type_ids is not None:
            token_type_ids = integers("token_type_ids", token_type_ids, shape, self.device)
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


def first_rows(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, hidden] to [B, hidden]: the first token of each sequence, zero where it has none."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if rows.shape[0] == 0:
        return rows.new_zeros((starts.shape[0], rows.shape[1]))
    first = rows.index_select(0, starts.clamp(max=rows.shape[0] - 1))
    return torch.where((ends > starts)[:, None], first, torch.zeros_like(first))
