"""Task heads on the encoder; parameter names, arguments and outputs as in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xlmr_ext.batch_checks import no_effect
from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.layers import Linear, dense_tanh, first_rows
from xlmr_ext.losses import classification_loss, cross_entropy, span_loss
from xlmr_ext.modeling import XLMRobertaModel
from xlmr_ext.outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from xlmr_ext.packing import PackedBatch
from xlmr_ext.pretrained import PreTrainedModel


class XLMRobertaClassificationHead(nn.Module):
    """dropout, dense, tanh, dropout, out_proj on the hidden state of ``<s>``."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(head_dropout(config))
        self.out_proj = Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, hidden] to [B, num_labels]."""
        logits: Tensor = self.out_proj(self.dropout(dense_tanh(self.dense, self.dropout(first))))
        return logits


class XLMRobertaForSequenceClassification(PreTrainedModel):
    """XLM-R with a classifier on ``<s>``; arguments, losses and outputs as in transformers.

    With ``labels`` the loss follows ``config.problem_type``, or, where that is None, is regression
    (one label), single-label (whole-number labels) or multi-label classification.
    """

    base_model_prefix = "roberta"
    accepts_loss_kwargs = True

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.classifier = XLMRobertaClassificationHead(config)
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
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classifies a padded batch, or a packed one.

        Args:
            labels: [B] class indices, [B, num_labels] of 0 and 1 (multi-label), or [B] numbers
                (regression).
            num_items_in_batch: the loss is the sum over the batch, divided by this, instead of the
                mean: for gradients accumulated over several batches, the number of all their
                labels. The others: see :meth:`XLMRobertaModel.forward`.

        Returns:
            :class:`SequenceClassifierOutput`.

        Raises:
            TypeError, ValueError: as :meth:`XLMRobertaModel.forward`, or labels of another type,
                shape or range than the loss takes.
        """
        hidden_states = attentions = None
        if _first_alone(self.roberta, output_attentions, output_hidden_states):
            no_effect(kwargs)
            first = self.roberta.first_states(
                packed,
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
            )
        else:
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
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
            first = _first_tokens(outputs.last_hidden_state, attention_mask, packed)
        logits = self.classifier(first)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        output = SequenceClassifierOutput(loss, logits, hidden_states, attentions)
        return self._as_asked(output, return_dict)


class XLMRobertaForTokenClassification(PreTrainedModel):
    """XLM-R with a classifier on every token."""

    base_model_prefix = "roberta"
    accepts_loss_kwargs = True

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = Linear(config.hidden_size, config.num_labels)
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
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Classifies the tokens of a padded batch, or of a packed one.

        Args:
            labels: [B, S] class indices, [N] for packed input; -100 does not count (the places of
                padding, as a rule). The others: see :meth:`XLMRobertaModel.forward` and
                :meth:`XLMRobertaForSequenceClassification.forward`.

        Returns:
            :class:`TokenClassifierOutput`.

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
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self._as_asked(output, return_dict)


class XLMRobertaForQuestionAnswering(PreTrainedModel):
    """XLM-R with two scores a token: of being an answer's first, and its last.

    Masked places take no part in the softmax of the loss, so that a text has the same loss alone
    and in a batch; transformers lets them take part.
    """

    base_model_prefix = "roberta"

    def __init__(self, config: XLMRobertaConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels is {config.num_labels}; an answer has 2, start and end (num_labels=2)"
            )
        super().__init__(config)
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.qa_outputs = Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        packed: PackedBatch | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Scores the tokens of a padded batch, or of a packed one.

        Args:
            start_positions, end_positions: [B] the answer's first and last token, counted in its
                row; S or more does not count. The others: see :meth:`XLMRobertaModel.forward`.

        Returns:
            :class:`QuestionAnsweringModelOutput`.

        Raises:
            TypeError, ValueError: as :meth:`XLMRobertaModel.forward`, or positions of another type,
                shape or range, or at a masked place.
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
        logits = self.qa_outputs(outputs.last_hidden_state)
        if attention_mask is not None:
            masked = (attention_mask == 0)[..., None]
            logits = logits.masked_fill(masked, torch.finfo(logits.dtype).min)
        start, end = (part.contiguous() for part in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            rows = logits if packed is None else _padded(logits, packed)
            loss = span_loss(rows[..., 0], rows[..., 1], start_positions, end_positions)
        output = QuestionAnsweringModelOutput(
            loss, start, end, outputs.hidden_states, outputs.attentions
        )
        return self._as_asked(output, return_dict)


class XLMRobertaForMultipleChoice(PreTrainedModel):
    """XLM-R that scores each of K continuations of a text; the softmax runs over the K."""

    base_model_prefix = "roberta"
    accepts_loss_kwargs = True

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__(config)
        self.roberta = XLMRobertaModel(config)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        packed: PackedBatch | None = None,
        num_choices: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Scores the choices of a padded batch, or of a packed one.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: [B, K, S].
            inputs_embeds: [B, K, S, hidden], instead of ``input_ids``.
            labels: [B] the right choice, 0 to K - 1.
            packed: B * K sequences, the K of a text one behind the other.
            num_choices: K, for packed input only.
            num_items_in_batch: see :meth:`XLMRobertaForSequenceClassification.forward`.

        Returns:
            :class:`MultipleChoiceModelOutput`.

        Raises:
            TypeError, ValueError: as :meth:`XLMRobertaModel.forward`, or labels of another type,
                shape or range, or sequences that are no multiple of ``num_choices``.
        """
        flat: dict[str, Tensor | None] = {}
        for name, tensor, trailing in (
            ("input_ids", input_ids, 1),
            ("attention_mask", attention_mask, 1),
            ("token_type_ids", token_type_ids, 1),
            ("position_ids", position_ids, 1),
            ("inputs_embeds", inputs_embeds, 2),
        ):
            if isinstance(tensor, Tensor):
                if tensor.dim() != trailing + 2:
                    shape = "[batch, choices, length" + (", hidden]" if trailing == 2 else "]")
                    raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
                tensor = tensor.flatten(0, 1)
            flat[name] = tensor
        choices = self._num_choices(input_ids, inputs_embeds, packed, num_choices)
        hidden_states = attentions = None
        if _first_alone(self.roberta, output_attentions, output_hidden_states):
            no_effect(kwargs)
            pooler: Any = self.roberta.pooler
            pooled = pooler(self.roberta.first_states(packed, **flat))
        else:
            outputs = self.roberta(
                **flat,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                packed=packed,
                **kwargs,
            )
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
            pooled = outputs.pooler_output
        logits = self.classifier(self.dropout(pooled)).reshape(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        output = MultipleChoiceModelOutput(loss, logits, hidden_states, attentions)
        return self._as_asked(output, return_dict)

    @staticmethod
    def _num_choices(
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        packed: PackedBatch | None,
        num_choices: int | None,
    ) -> int:
        if packed is None:
            if num_choices is not None:
                raise ValueError("num_choices came without packed; padded input has its own")
            like = inputs_embeds if input_ids is None else input_ids
            if like is None:
                raise ValueError(
                    "neither of input_ids and inputs_embeds came; expected one of them"
                )
            return like.shape[1]
        if num_choices is None or num_choices < 1 or packed.batch_size % num_choices:
            raise ValueError(
                f"num_choices is {num_choices} for {packed.batch_size} packed sequences; expected "
                "a divisor of their number"
            )
        return num_choices


def head_dropout(config: XLMRobertaConfig) -> float:
    """The heads' dropout probability."""
    p = config.classifier_dropout
    return config.hidden_dropout_prob if p is None else p


def _first_alone(
    base: nn.Module, output_attentions: bool | None, output_hidden_states: bool | None
) -> bool:
    """Whether the first tokens' states are all that is asked of the encoder."""
    # What wraps a model hands on its methods; it wants to be called.
    return type(base) is XLMRobertaModel and base.computes_first_alone(
        output_attentions, output_hidden_states
    )


def _padded(logits: Tensor, packed: PackedBatch) -> Tensor:
    """Packed logits [N, 2] as [B, S, 2]; where there is no token, the lowest number there is."""
    lengths = packed.cu_seqlens.diff()[:, None]
    present = torch.arange(packed.max_seqlen, device=logits.device) < lengths
    full = logits.new_full((*present.shape, logits.shape[1]), torch.finfo(logits.dtype).min)
    return full.masked_scatter(present[..., None], logits)


def _first_tokens(
    hidden: Tensor, attention_mask: Tensor | None, packed: PackedBatch | None
) -> Tensor:
    """The hidden state of each row's first unmasked token, [B, hidden]."""
    if packed is not None:
        return first_rows(hidden, packed.cu_seqlens)
    if attention_mask is None or hidden.shape[1] == 0:
        return hidden[:, 0] if hidden.shape[1] else hidden.new_zeros(hidden.shape[::2])
    # A fully masked row points at its place 0, which holds zeros.
    first = (attention_mask != 0).to(torch.int64).argmax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
