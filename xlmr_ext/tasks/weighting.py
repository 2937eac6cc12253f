"""Cross entropy with smoothed labels and weighted classes, as torch's cross_entropy has them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from xlmr_ext.losses import IGNORED

BALANCED = "balanced"


@dataclass(frozen=True)
class LabelWeighting:
    """How the labels of a classifier count in its training loss.

    Args:
        smoothing: the share of a target that is spread evenly over all labels (Szegedy et al. 2016,
            arXiv 1512.00567, section 7).
        weights: of each label, by id, or None. The loss is a mean weighted by those of the right
            labels.
    """

    smoothing: float
    weights: tuple[float, ...] | None

    @classmethod
    def of(
        cls,
        smoothing: float,
        weights: Sequence[float] | str | None,
        names: Sequence[str],
        labels: Sequence[int],
    ) -> LabelWeighting:
        """From the arguments of :func:`xlmr_ext.training.finetune`.

        Args:
            names: the labels by id.
            labels: the ids of the training data, for balanced weights: all rows / (labels that
                occur * rows of the label), so that each weighs as much as the others; 1 for a label
                that does not occur.

        Raises:
            ValueError: there is not one weight above 0 for every label.
        """
        if weights is None:
            return cls(smoothing, None)
        if isinstance(weights, str):
            if weights != BALANCED:
                raise ValueError(
                    f"class_weights must be 'balanced' or a weight for each label, got {weights!r}"
                )
            counts = Counter(labels)
            share = len(labels) / len(counts)
            return cls(
                smoothing,
                tuple(
                    share / counts[label] if counts[label] else 1.0 for label in range(len(names))
                ),
            )
        if len(weights) != len(names):
            shown = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
            raise ValueError(
                f"class_weights has {len(weights)} weights, expected one for each of the "
                f"{len(names)} labels: {shown}"
            )
        for name, weight in zip(names, weights, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"class_weights must be above 0, got {weight} for {name!r}")
        return cls(smoothing, tuple(map(float, weights)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the labels that are not :data:`xlmr_ext.losses.IGNORED`."""
        weight = None if self.weights is None else logits.new_tensor(self.weights)
        return F.cross_entropy(
            logits, labels, weight=weight, ignore_index=IGNORED, label_smoothing=self.smoothing
        )

    def items(self, labels: Sequence[int]) -> float:
        """What the loss of these labels is the mean over: the sum of their weights."""
        if self.weights is None:
            return float(len(labels))
        return math.fsum(self.weights[label] for label in labels)

    def guessing_loss(self, labels: Sequence[int], count: int) -> float:
        """Loss in nats of the best answer that does not look at the text, of ``count`` labels.

        Summed over the rows, a label's target is its own weight times (1 - smoothing) a row that
        has it and smoothing / count a row; the best answer has the labels' shares in that sum.
        """
        weights = self.weights or (1.0,) * count
        counts, rows = Counter(labels), len(labels)
        targets = [
            weights[label] * ((1 - self.smoothing) * counts[label] + self.smoothing / count * rows)
            for label in range(count)
        ]
        total = math.fsum(targets)
        loss = -math.fsum(t * math.log(t / total) for t in targets if t)
        return loss / self.items(labels)


def check_smoothing(smoothing: float) -> None:
    """ValueError where it is not from 0 to below 1."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing must be from 0 to below 1, got {smoothing}")
