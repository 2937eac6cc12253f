"""Task heads on the encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.layers import Linear, dense_tanh
from xlmr_ext.modeling import XLMRobertaModel, first_rows
from xlmr_ext.outputs import SequenceClassifierOutput
from xlmr_ext.packing import PackedBatch
from xlmr_ext.pretrained import PreTrainedModel


class XLMRobertaClassificationHead(nn.Module):
    """dropout, dense, tanh, dropout, out_proj on the hidden state of ``<s>``."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        p = config.classifier_dropout
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
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
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classifies a padded batch, or a packed one.

        Args:
            labels: [B] class indices, [B, num_labels] of 0 and 1 (multi-label), or [B] numbers
                (regression). The others: see :meth:`XLMRobertaModel.forward`.

        Returns:
            :class:`SequenceClassifierOutput`.

        Raises:
            TypeError, ValueError: as :meth:`XLMRobertaModel.forward`, or labels of another type,
                shape or range than the loss takes.
        """
        roberta = self.roberta
        outputs = roberta(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            packed=packed,
        )
        first = _first_tokens(outputs.last_hidden_state, attention_mask, packed)
        logits = self.classifier(first)
        loss = None if labels is None else self.loss(logits, labels)
        output = SequenceClassifierOutput(loss, logits, outputs.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits [B, num_labels] under ``labels``; see the class."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels are {type(labels).__name__}; expected a tensor")
        if labels.device != logits.device:
            raise ValueError(f"labels are on {labels.device}; the model is on {logits.device}")
        problem = self.config.problem_type or _problem_type(self.num_labels, labels)
        if problem == "single_label_classification":
            return self._cross_entropy(logits, labels.reshape(-1))
        # With one output, [B] and [B, 1] are the same.
        if labels.shape != logits.shape and not (
            self.num_labels == 1 and labels.numel() == logits.numel()
        ):
            raise ValueError(
                f"labels have shape {list(labels.shape)}; expected {list(logits.shape)} for "
                f"{problem}"
            )
        targets = labels.reshape(logits.shape).to(logits.dtype)
        if problem == "regression":
            return F.mse_loss(logits, targets)
        return F.binary_cross_entropy_with_logits(logits, targets)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels are {labels.dtype}; expected class indices (torch.int64)")
        if labels.shape[0] != logits.shape[0]:
            raise ValueError(f"{labels.shape[0]} labels came for a batch of {logits.shape[0]}")
        if not torch.compiler.is_compiling():
            counted = labels[labels != -100]  # torch's mark for "does not count"
            if counted.numel():
                low, high = (int(x) for x in torch.aminmax(counted))
                if low < 0 or high >= self.num_labels:
                    raise ValueError(
                        f"labels hold {low if low < 0 else high}; expected 0 to "
                        f"{self.num_labels - 1}, or -100"
                    )
        return F.cross_entropy(logits, labels.long())


def _problem_type(num_labels: int, labels: Tensor) -> str:
    if num_labels == 1:
        return "regression"
    if labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"


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
