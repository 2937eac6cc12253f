"""Extractive question answering: the answer to a question is a span of the context it came with.

The features are those of transformers' example ``run_qa``; its evaluation looks at the 20 best
first and last tokens of a window only, this one at every span.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from xlmr_ext.tasks.answer_spans import (
    Answer,
    Context,
    QuestionWindows,
    SpanSearch,
    Window,
    log_sum_exp,
    span_logits,
)
from xlmr_ext.tasks.base import Features, Scores, Task
from xlmr_ext.tasks.squad import Question
from xlmr_ext.tasks.squad_metric import exact_match, word_f1

if TYPE_CHECKING:
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["Answer", "AnswerFeatures", "QATask"]


@dataclass
class AnswerFeatures(Features):
    """One example a window: its target is the answer's first and last token, counted in the row.

    Both are 0, the place of ``<s>``, where the window does not hold the whole answer.

    Args:
        questions: the questions, and ``contexts`` the context of each.
        windows: each row's question, by its number, and what the row holds of the context.
    """

    questions: Sequence[Question] = ()
    contexts: Sequence[Context] = ()
    windows: Sequence[tuple[int, Window]] = ()


class QATask(Task):
    """Question answering on one model; the data are a list of :class:`Question`, or a file's path.

    Args:
        max_length: tokens of a row: of the question, a part of the context and 4 special ones.
        doc_stride: tokens that two neighbouring parts of a context share; None: 128, or half of
            ``max_length`` if that is less.
        max_answer_length: tokens of the longest answer that an evaluation gives.
        n_best: answers a question that ``Scores.details`` holds.
        null_threshold: an evaluation says that there is no answer where the logits of ``<s>`` are
            above the best answer's by more than this; only on data that has such questions.
    """

    name: ClassVar[str] = "qa"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: XLMRobertaTokenizer,
        *,
        max_length: int = 384,
        doc_stride: int | None = None,
        max_answer_length: int = 30,
        n_best: int = 20,
        null_threshold: float = 0.0,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length)
        for name, value in (("max_answer_length", max_answer_length), ("n_best", n_best)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not math.isfinite(null_threshold):
            raise ValueError(f"null_threshold must be a number, got {null_threshold}")
        self.max_answer_length = max_answer_length
        self.n_best = n_best
        self.null_threshold = null_threshold
        self._windows = QuestionWindows(
            tokenizer, max_length=self.max_length, doc_stride=doc_stride
        )

    def features(self, data: Sequence[Question], *, training: bool) -> AnswerFeatures:
        """The windows of every question. The first right answer is the one to learn.

        Raises:
            ValueError: a question without right answers (an empty tuple is one: there is none), a
                context without a token, or a question that leaves no room for it.
        """
        sequences: list[list[int]] = []
        targets: list[tuple[int, int]] = []
        contexts: list[Context] = []
        windows: list[tuple[int, Window]] = []
        for number, question in enumerate(data):
            if question.answers is None:
                raise ValueError(f"{question.where}: the question {question.id!r} has no answers")
            contexts.append(self._windows.context(question.context))
            for row, window in self._windows.rows(question, contexts[-1]):
                sequences.append(row)
                targets.append(_target(question, contexts[-1], window))
                windows.append((number, window))
        return AnswerFeatures(
            sequences,
            targets,
            places=lambda example: data[windows[example][0]].where,
            questions=data,
            contexts=contexts,
            windows=windows,
        )

    def loss(self, model: PreTrainedModel, batch: PackedBatch, targets: Sequence[Any]) -> Tensor:
        positions = torch.tensor(targets, dtype=torch.int64, device=batch.input_ids.device)
        output = model(packed=batch, start_positions=positions[:, 0], end_positions=positions[:, 1])
        loss: Tensor = output.loss
        return loss

    def evaluate(self, model: PreTrainedModel, features: Features, *, batch_size: int) -> Scores:
        """``exact_match`` and ``f1`` of SQuAD's script, over the questions; ``loss`` a window.

        ``details`` is, for each question, a list of its best answers, the given one first.
        """
        if not isinstance(features, AnswerFeatures) or not features.questions:
            raise ValueError("there is nothing to evaluate: the data has no questions")
        searches = [
            SpanSearch(context, count=self.n_best, max_answer_length=self.max_answer_length)
            for context in features.contexts
        ]
        loss = 0.0
        rows = span_logits(model, features.sequences, batch_size=batch_size)
        for (number, window), target, logits in zip(
            features.windows, features.targets, rows, strict=True
        ):
            searches[number].add(window, *logits)
            for values, place in zip(logits, target, strict=True):
                loss += (log_sum_exp(values) - float(values[place])) / 2
        none_allowed = any(question.answers == () for question in features.questions)
        details = [
            search.answers(none_allowed=none_allowed, none_threshold=self.null_threshold)
            for search in searches
        ]
        matches, f1 = 0.0, 0.0
        for question, answers in zip(features.questions, details, strict=True):
            given = answers[0].answer
            right = [answer.text for answer in question.answers or ()]
            matches += exact_match(given, right)
            f1 += word_f1(given, right)
        total = len(features.questions)
        metrics = {
            "loss": loss / len(features.windows),
            "exact_match": matches / total,
            "f1": f1 / total,
        }
        return Scores(metrics, (metrics["f1"], metrics["exact_match"]), details)

    def guessing_loss(self, features: Features) -> float | None:
        """Of an answer that knows the share of windows without one, and no place in the others."""
        assert isinstance(features, AnswerFeatures)
        places = [
            window.size
            for (_, window), target in zip(features.windows, features.targets, strict=True)
            if target != (0, 0)
        ]
        total = len(features.windows)
        shares = [share for share in (len(places) / total, 1 - len(places) / total) if share]
        return -sum(p * math.log(p) for p in shares) + sum(map(math.log, places)) / total


def _target(question: Question, context: Context, window: Window) -> tuple[int, int]:
    """First and last token of the answer within a window's row."""
    if not question.answers:
        return 0, 0
    first, last = context.tokens_of(question.answers[0])
    if first < window.first or last >= window.first + window.size:
        return 0, 0
    shift = window.offset - window.first
    return first + shift, last + shift
