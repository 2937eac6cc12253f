"""The masked language model: a head over the vocabulary, tied to the word embeddings.

Conneau et al. 2020 (arXiv 1911.02116), section 3; names, arguments and outputs are Hugging Face's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.fallback import activate
from xlmr_ext.layers import LayerNorm, Linear, is_bare, is_plain
from xlmr_ext.linear_cross_entropy import linear_cross_entropy
from xlmr_ext.losses import check_classes, counted
from xlmr_ext.modeling import XLMRobertaModel
from xlmr_ext.outputs import MaskedLMOutput
from xlmr_ext.packing import PackedBatch
from xlmr_ext.pretrained import PreTrainedModel
from xlmr_ext.resizing import resize_bias, resize_decoder

__all__ = ["XLMRobertaForMaskedLM", "XLMRobertaLMHead"]


class XLMRobertaLMHead(nn.Module):
    """dense, GELU, layer_norm, decoder.

    Args:
        words: the word embeddings, whose matrix the decoder takes, as it takes ``bias``; None: it
            has its own, and ``bias``, which files hold nevertheless, is without effect.
    """

    def __init__(self, config: XLMRobertaConfig, words: nn.Embedding | None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dense = Linear(hidden, hidden)
        self.layer_norm = LayerNorm(hidden, eps=config.layer_norm_eps)
        # On the meta device: a matrix that the tied one replaces would cost the memory of a second.
        device = None if words is None else "meta"
        self.decoder = Linear(hidden, config.vocab_size, device=device)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if words is not None:
            self.decoder.weight, self.decoder.bias = words.weight, self.bias

    def transform(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]: all but the decoder. GELU is always the exact one."""
        normed: Tensor = self.layer_norm(activate(self.dense(hidden), "gelu"))
        return normed

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab_size]."""
        logits: Tensor = self.decoder(self.transform(hidden))
        return logits


class XLMRobertaForMaskedLM(PreTrainedModel):
    """XLM-R with scores of all words at every token.

    The decoder's matrix is that of the word embeddings, unless ``config.tie_word_embeddings`` is
    false. The loss needs no matrix of logits: only the tokens that have a label go through the
    head, and the vocabulary in parts.
    """

    base_model_prefix = "roberta"
    accepts_loss_kwargs = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__(config)
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        words = self.roberta.embeddings.word_embeddings
        self.lm_head = XLMRobertaLMHead(config, words if self._is_tied() else None)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        packed: PackedBatch | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_logits: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Scores every word at the tokens of a padded batch, or of a packed one.

        Args:
            labels: [B, S] token ids, [N] for packed input; -100 does not count.
            output_logits: whether ``logits`` are returned. None: in eval mode, or without labels.
                A training step has no use for them: 4 GB in 4096 tokens of XLM-R's vocabulary. The
                others: see :meth:`XLMRobertaModel.forward` and
                :meth:`XLMRobertaForSequenceClassification.forward`.

        Returns:
            :class:`MaskedLMOutput`.

        Raises:
            TypeError, ValueError: as :meth:`XLMRobertaModel.forward`, or labels of another type,
                shape or range.
        """
        outputs = self.roberta(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            packed=packed,
            **kwargs,
        )
        states = outputs.last_hidden_state
        loss = None if labels is None else self._loss(states, labels, num_items_in_batch)
        if output_logits is None:
            output_logits = labels is None or not self.training
        logits = self.lm_head(states) if output_logits else None
        output = MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self._as_asked(output, return_dict)

    def _loss(self, states: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The mean over the labels that count, or their sum divided by ``num_items``."""
        targets = check_classes(labels, states.shape[:-1], self.config.vocab_size, states.device)
        places = counted(targets)
        rows = states.reshape(-1, states.shape[-1])
        if places.shape[0] != targets.shape[0]:  # a copy of all rows would only take memory
            rows, targets = rows.index_select(0, places), targets.index_select(0, places)
        head = self.lm_head
        decoder = getattr(head, "decoder", None)
        if (
            type(head) is XLMRobertaLMHead
            and is_bare(head)
            and type(decoder) is Linear
            and is_plain(decoder)
        ):
            features = head.transform(rows)
            total = linear_cross_entropy(features, decoder.weight, decoder.bias, targets)
        else:
            # Somebody wants to see the decoder called: an adapter, a hook, a parametrization.
            total = F.cross_entropy(head(rows), targets, reduction="sum")
        # As torch: the mean of nothing is no number.
        return total / (places.shape[0] if num_items is None else num_items)

    # --- The tied matrix -----------------------------------------------------------------------

    def _is_tied(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", True))

    def get_output_embeddings(self) -> nn.Module:
        """The decoder."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Puts another module in the place of the decoder; :meth:`tie_weights` ties it."""
        self.lm_head.decoder = new_embeddings  # type: ignore[assignment]

    def tie_weights(self) -> None:
        """Gives the decoder the matrix of the word embeddings again, and the head's bias."""
        if not self._is_tied():
            return
        words: Any = self.get_input_embeddings()
        decoder = self.lm_head.decoder
        # In 8 bits the word embeddings are no parameter; the decoder keeps its own.
        if isinstance(getattr(words, "weight", None), nn.Parameter):
            decoder.weight = words.weight
        decoder.bias = self.lm_head.bias

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As :meth:`PreTrainedModel.resize_token_embeddings`, and the decoder with them: new words
        have the mean of the biases, or 0 without ``mean_resizing``."""
        if type(self.lm_head.decoder) is not Linear:
            raise TypeError(
                f"the decoder is {type(self.lm_head.decoder).__name__}; expected the head's own "
                "(resize the embeddings before peft or another library replaces it)"
            )
        words = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        head, rows = self.lm_head, self.config.vocab_size
        resize_decoder(head.decoder, rows, mean_resizing, self._init_weights)
        resize_bias(head.bias, rows, mean_resizing)
        return words

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, XLMRobertaLMHead):
            nn.init.zeros_(module.bias)
        elif module is not self.lm_head.decoder or not self._is_tied():
            # A tied matrix is the word embeddings', with their padding row.
            super()._init_weights(module)
