"""Two models on the same texts: how far their layers part, and how often their answers agree.

Made for a model in 8 bits beside the one in float32 that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlmr_ext.prediction import classifier_labels, in_eval_mode, packed_batches
from xlmr_ext.tasks.embeddings import pool

if TYPE_CHECKING:
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel

__all__ = ["Comparison", "LayerDifference", "compare"]


@dataclass(frozen=True)
class LayerDifference:
    """How far the hidden states of a place in the model part.

    Args:
        relative_rms: root mean square of the difference, over that of the reference.
        cosine: of the two states of a token, the mean over tokens.
    """

    relative_rms: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Args:
        layers: after the embeddings, and after each layer.
        answers: number of answers that were compared.
        agreement: share of them that are the same; of a model without head, the mean cosine of the
            texts' vectors.
        lowest: the lowest of the texts' shares, or cosines.
        tokens: number of tokens that the layers saw.
    """

    layers: list[LayerDifference]
    answers: int
    agreement: float
    lowest: float
    tokens: int


def compare(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    rows_per_example: int = 1,
    batch_size: int = 32,
    pooling: Sequence[str] = ("mean",),
    progress: Callable[[int], object] = lambda examples: None,
) -> Comparison:
    """Runs both models on sequences of token ids.

    The answers are: of a classifier the best label; of a tagger the best label of every token; of a
    question answerer the best span of every sequence; of multiple choice the best one; of a model
    without head the text's vector.

    Args:
        reference, other: of one class and configuration.
        sequences: with special tokens, without padding.
        rows_per_example: the number of choices, of multiple choice.
        batch_size: most examples a batch.
        pooling: how a text's vector is made, see :class:`xlmr_ext.SentenceEncoder`.
        progress: called with the number of examples of every batch that is done.

    Raises:
        ValueError: there are no sequences; or the model is a classifier without single labels.
    """
    if not sequences:
        raise ValueError("there is nothing to compare: no texts came")
    places = int(reference.config.num_hidden_layers) + 1
    squares, errors, cosines = (torch.zeros(places, dtype=torch.float64) for _ in range(3))
    agreed: list[Tensor] = []
    answers = tokens = 0
    answered = _answers_of(reference, pooling)
    options = {"num_choices": rows_per_example} if _has_choices(reference) else {}
    with in_eval_mode(reference), in_eval_mode(other):
        for examples, batch in packed_batches(
            reference, sequences, batch_size=batch_size, rows_per_example=rows_per_example
        ):
            ours, theirs = (
                model(packed=batch, output_hidden_states=True, **options)
                for model in (other, reference)
            )
            pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
            for place, (a, b) in enumerate(pairs):
                a, b = a.double(), b.double()
                squares[place] += b.square().sum()
                errors[place] += (a - b).square().sum()
                cosines[place] += torch.cosine_similarity(a, b, dim=1).sum()
            found = answered(ours, theirs, batch)
            answers += sum(map(len, found))
            agreed += found
            tokens += batch.input_ids.numel()
            progress(len(examples))
    rms = (errors / squares).sqrt()
    return Comparison(
        [
            LayerDifference(*values)
            for values in zip(rms.tolist(), (cosines / tokens).tolist(), strict=True)
        ],
        answers,
        float(torch.cat(agreed).mean()),
        float(min(part.mean() for part in agreed)),
        tokens,
    )


def _has_choices(model: PreTrainedModel) -> bool:
    from xlmr_ext.heads import XLMRobertaForMultipleChoice

    return isinstance(model, XLMRobertaForMultipleChoice)


def _answers_of(
    model: PreTrainedModel, pooling: Sequence[str]
) -> Callable[[Any, Any, PackedBatch], list[Tensor]]:
    """The function that gives, for every text of a batch, how far each of its answers agrees."""
    from xlmr_ext import heads

    if isinstance(model, heads.XLMRobertaForSequenceClassification):
        classifier_labels(model)
        return lambda ours, theirs, _: list(_same(ours.logits, theirs.logits)[:, None])
    if isinstance(model, heads.XLMRobertaForMultipleChoice):
        return lambda ours, theirs, _: list(_same(ours.logits, theirs.logits)[:, None])
    if isinstance(model, heads.XLMRobertaForTokenClassification):
        return lambda ours, theirs, batch: _by_text(_same(ours.logits, theirs.logits), batch)
    if isinstance(model, heads.XLMRobertaForQuestionAnswering):
        return lambda ours, theirs, batch: [
            (a == b).double()[None]
            for a, b in zip(_best_spans(ours, batch), _best_spans(theirs, batch), strict=True)
        ]

    def cosines(ours: Any, theirs: Any, batch: PackedBatch) -> list[Tensor]:
        a, b = (
            torch.cat([pool(o.last_hidden_state, batch.cu_seqlens, how) for how in pooling], 1)
            for o in (ours, theirs)
        )
        return list(torch.cosine_similarity(a, b, dim=1)[:, None])

    return cosines


def _same(a: Tensor, b: Tensor) -> Tensor:
    """1 where the best of the last dimension is the same."""
    return (a.argmax(-1) == b.argmax(-1)).double()


def _by_text(rows: Tensor, batch: PackedBatch) -> list[Tensor]:
    return list(rows.split(batch.cu_seqlens.diff().tolist()))


def _best_spans(output: Any, batch: PackedBatch) -> list[Tensor]:
    """Each sequence's best (first, last), as one number: the highest sum of both logits."""
    starts, ends = (_by_text(x, batch) for x in (output.start_logits, output.end_logits))
    return [
        (start[:, None] + end).masked_fill(
            torch.ones(len(start), len(start), dtype=torch.bool).tril(-1), -torch.inf
        ).argmax()
        for start, end in zip(starts, ends, strict=True)
    ]  # fmt: skip
