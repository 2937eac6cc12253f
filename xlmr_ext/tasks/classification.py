"""One label a text: fine-tuning it. What runs it is :func:`xlmr_ext.prediction.predict`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlmr_ext.chance import guessing_loss
from xlmr_ext.data import LabelledTexts, encode, label_ids, training_labels
from xlmr_ext.prediction import classifier_labels, evaluate_ids
from xlmr_ext.tasks.base import Features, Scores, Task

if TYPE_CHECKING:
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel

Labelled = LabelledTexts | str | Path | Iterable[tuple[str, str | int]]


class ClassificationTask(Task):
    """Single-label classification of texts or pairs of texts.

    Data is :class:`LabelledTexts`, a file with columns ``text`` and ``label``, or (text, label)
    tuples; the target of an example is its label's id. Metrics: ``loss``, ``accuracy``,
    ``macro_f1`` (see :class:`xlmr_ext.prediction.Evaluation`, which is the scores' details). The
    best epoch has the highest macro F1, then accuracy.
    """

    name = "classification"

    def load(self, given: Labelled, name: str) -> LabelledTexts:
        """See :meth:`Task.load`; (text, label) tuples become :class:`LabelledTexts`."""
        if not isinstance(given, str | Path | LabelledTexts):
            given = LabelledTexts.of(given, source=name)
        data = super().load(given, name)
        assert isinstance(data, LabelledTexts)
        return data

    @classmethod
    def labels_in(cls, data: LabelledTexts) -> list[str]:
        """See :meth:`Task.labels_in`; 2 labels or more, up to :data:`xlmr_ext.data.MAX_LABELS`."""
        return training_labels(data)

    def settle(self, train: LabelledTexts) -> None:
        """See :meth:`Task.settle`; ValueError where the model is no single-label classifier."""
        classifier_labels(self.model)  # type: ignore[arg-type]
        super().settle(train)

    def adopt(self, data: LabelledTexts) -> None:
        """See :meth:`Task.adopt`; the numbers of the labels where the model has no names for them
        and ``data`` has numbers. ValueError where the model is no single-label classifier."""
        names = classifier_labels(self.model)  # type: ignore[arg-type]
        numbers = label_numbers(names)
        self.labels = numbers if numbers and set(data.labels) <= set(numbers) else names

    def features(self, data: LabelledTexts, *, training: bool) -> Features:
        """Token ids cut to ``max_length``; DataError for a label that the model does not have."""
        targets = label_ids(data, self.labels)
        sequences = encode(self.tokenizer, data.texts, data.pairs, max_length=self.max_length)
        return Features(sequences, targets, places=data.places)

    def loss(self, model: PreTrainedModel, batch: PackedBatch, targets: Sequence[int]) -> Tensor:
        """Mean cross entropy in nats."""
        labels = torch.tensor(targets, dtype=torch.int64, device=model.device)
        if self.weighting is not None:
            return self.weighting.loss(model(packed=batch).logits, labels)
        loss: Tensor = model(packed=batch, labels=labels).loss
        return loss

    def counted_labels(self, targets: Sequence[int]) -> Sequence[int]:
        """One a text."""
        return targets

    def evaluate(self, model: Any, features: Features, *, batch_size: int) -> Scores:
        """See :meth:`Task.evaluate`; the details are an :class:`xlmr_ext.prediction.Evaluation`."""
        found = evaluate_ids(
            model, features.sequences, features.targets, self.labels, batch_size=batch_size
        )
        return Scores(
            {"loss": found.loss, "accuracy": found.accuracy, "macro_f1": found.macro_f1},
            (found.macro_f1, found.accuracy),
            found,
        )

    def guessing_loss(self, features: Features) -> float:
        """The entropy of the labels' shares, see :func:`xlmr_ext.chance.guessing_loss`."""
        if self.weighting is not None:
            return self.weighting.guessing_loss(features.targets, len(self.labels))
        return guessing_loss(features.targets)


def label_numbers(names: Sequence[str]) -> list[str]:
    """``0``, ``1`` ... for labels that have the default names ``LABEL_0`` ...; else empty."""
    numbers = [str(number) for number in range(len(names))]
    return numbers if list(names) == [f"LABEL_{number}" for number in numbers] else []
