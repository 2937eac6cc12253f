"""Telling a model that has learned from one that guesses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xlmr_ext.prediction import Evaluation

# A loss within this share of guessing's is at chance.
_MARGIN = 0.03


class ChanceWarning(UserWarning):
    """Training has not moved the model away from guessing."""


def guessing_loss(labels: Sequence[int]) -> float:
    """Mean cross entropy in nats of the best answer that does not look at the text.

    That answer gives every label the probability of its share in ``labels``, so the loss is the
    entropy of the shares: ln(number of labels) where all are as frequent, less otherwise.
    """
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -sum(share * math.log(share) for share in shares)


def signs_of_chance(
    losses: Sequence[float], guessing: float, evaluation: Evaluation | None
) -> list[str]:
    """What says that a model guesses, as clauses for a sentence; empty where nothing does.

    Args:
        losses: of the latest steps after warm-up, at least one.
        guessing: mean loss of the best answer that does not look at the text, see
            :func:`guessing_loss`.
        evaluation: of a classifier on dev data, or None.
    """
    signs = []
    loss = sum(losses) / len(losses)
    if loss >= (1 - _MARGIN) * guessing:
        signs.append(
            f"the mean loss of the last {len(losses)} steps is {loss:.3f}, and guessing without "
            f"a look at the text gives {guessing:.3f}"
        )
    answer = None if evaluation is None else _only_answer(evaluation)
    if evaluation is not None and answer is not None:
        signs.append(f"every dev row is labelled {answer!r} (accuracy {evaluation.accuracy:.1%})")
    return signs


def _only_answer(evaluation: Evaluation) -> str | None:
    """The one label given to every row although the rows differ, or None."""
    given = [sum(column) for column in zip(*evaluation.confusion, strict=True)]
    answers = [label for label, count in zip(evaluation.labels, given, strict=True) if count]
    classes = sum(any(row) for row in evaluation.confusion)
    return answers[0] if len(answers) == 1 and classes > 1 else None
