"""XLMRobertaModel: the encoder, and the door where batches are checked, packed and unpacked.

Conneau et al. 2020, "Unsupervised cross-lingual representation learning at scale"
(arXiv 1911.02116); names, arguments and outputs are Hugging Face's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlmr_ext.batch_checks import no_effect
from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.encoder_input import EncoderInput, from_packed, from_padded
from xlmr_ext.frozen import FrozenEncoder
from xlmr_ext.layers import (
    Dropout,
    XLMRobertaEmbeddings,
    XLMRobertaEncoder,
    XLMRobertaPooler,
    first_rows,
    is_bare,
    is_fused,
)
from xlmr_ext.outputs import BaseModelOutputWithPooling
from xlmr_ext.packing import PackedBatch
from xlmr_ext.pretrained import PreTrainedModel


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
        self.encoder: XLMRobertaEncoder | FrozenEncoder = XLMRobertaEncoder(config)
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encodes a padded batch, or a packed one.

        Args:
            input_ids: [B, S] whole numbers in [0, vocab_size).
            attention_mask: [B, S] of 1 (token) and 0 (padding, anywhere in the row); None: all 1.
            token_type_ids: [B, S]; None: type 0.
            position_ids: [B, S] or [1, S] rows of the position table; None: counted over the ids
                that are not padding, from ``pad_token_id + 1``.
            inputs_embeds: [B, S, hidden], instead of ``input_ids``.
            output_attentions: also return every layer's attention probabilities. They cost memory
                of length x length, and, in time, the attention again for each ``head_size`` of
                length; they are differentiable, and in train mode those after dropout.
            output_hidden_states: also return the embeddings' and every layer's output.
            return_dict: False returns a tuple.
            packed: a batch without padding, instead of all the above.
            **kwargs: further arguments of transformers' forward, while they change nothing
                (``use_cache``, ``past_key_values=None``, ...).

        Returns:
            :class:`BaseModelOutputWithPooling`. Masked places hold zeros.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range; the message names
                it, what came and what was expected.
        """
        no_effect(kwargs)
        batch = self._enter(
            packed,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        keep = self._wants(output_hidden_states, "output_hidden_states")
        attend = self._wants(output_attentions, "output_attentions")
        rows, inputs, probabilities = self.encode(batch, keep, attend)
        last = batch.unpack(rows)
        pooled = None if self.pooler is None else self.pooler(first_rows(rows, batch.cu_seqlens))
        states = (*(batch.unpack(h) for h in inputs), last) if keep else None
        attentions = tuple(batch.square(p) for p in probabilities) if attend else None
        output = BaseModelOutputWithPooling(last, pooled, states, attentions)
        return self._as_asked(output, return_dict)

    def encode(
        self,
        batch: EncoderInput,
        keep: bool = False,
        attend: bool = False,
        first_only: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """-> packed hidden states [N, hidden] (with ``first_only`` [B, hidden], of each text's
        first token); with ``keep`` the input of every layer; with ``attend`` its attention
        probabilities [N, heads, max_seqlen]."""
        if isinstance(self.encoder, FrozenEncoder):
            if attend:
                raise ValueError(
                    "output_attentions=True: the frozen encoder keeps no queries and keys; load "
                    "the model again without optimize_for_inference()"
                )
            hidden, kept = self._frozen(batch, first_only=first_only, keep=keep)
            return hidden, kept, []
        dropout = Dropout(self.config, self.training)
        hidden = self.embeddings(
            batch.input_ids,
            batch.inputs_embeds,
            batch.position_ids,
            batch.token_type_ids,
            dropout,
        )
        rows, inputs, probabilities = self.encoder(
            hidden, batch.cu_seqlens, batch.max_seqlen, dropout, keep, attend, first_only
        )
        return rows, inputs, probabilities

    def _frozen(
        self, batch: EncoderInput, *, first_only: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        run: Any = FrozenEncoder.forward
        if torch.compiler.is_compiling():
            # One native call is no graph.
            from xlmr_ext import uncompiled

            run = uncompiled.frozen
        out: tuple[Tensor, list[Tensor]] = run(
            self.encoder, self.embeddings, batch, first_only=first_only, keep=keep
        )
        return out

    def computes_first_alone(
        self, output_attentions: bool | None, output_hidden_states: bool | None
    ) -> bool:
        """Whether :meth:`first_states` may stand for a call of this model: nobody asks for more,
        and nobody else (a hook, an adapter, a wrapper) would see a part of the rows alone."""
        return (
            is_bare(self)
            and self._compiled_call_impl is None
            and _ends_at_first(self.encoder)
            and not self._wants(output_hidden_states, "output_hidden_states")
            and not self._wants(output_attentions, "output_attentions")
        )

    def first_states(self, packed: PackedBatch | None, **padded: Tensor | None) -> Tensor:
        """[B, hidden]: the last hidden state of each text's first token, 0 where it has none.

        The last layer computes keys and values for all tokens and the rest for these alone. The
        arguments are those of :meth:`forward`, by name.
        """
        return self.encode(self._enter(packed, **padded), first_only=True)[0]

    def _wants(self, argument: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if argument is None else argument)

    def _enter(self, packed: PackedBatch | None, **padded: Tensor | None) -> EncoderInput:
        if packed is not None:
            given = [name for name, value in padded.items() if value is not None]
            if given:
                raise ValueError(
                    f"packed came together with {', '.join(given)}; give one or the other"
                )
            return from_packed(packed, self.device)
        if torch.compiler.is_compiling():
            # A compiled model breaks its graph here, once.
            from xlmr_ext import uncompiled

            batch: EncoderInput = uncompiled.from_padded(self.config, self.device, **padded)
            return batch
        return from_padded(self.config, self.device, **padded)


def _ends_at_first(encoder: XLMRobertaEncoder | FrozenEncoder) -> bool:
    """Whether the encoder's last layer can go on with the first tokens alone."""
    if isinstance(encoder, FrozenEncoder):
        return True
    layers: Any = encoder.layer
    return (
        type(encoder) is XLMRobertaEncoder
        and is_bare(encoder)
        and len(layers) > 0
        and is_fused(layers[-1])
    )
