"""Answers from contexts of any length, for a stream of questions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, overload

from xlmr_ext.data import DataError, check_vocabulary
from xlmr_ext.prediction import check_max_length, longest_input
from xlmr_ext.tasks.answer_spans import Answer, QuestionWindows, SpanSearch, Window, span_logits
from xlmr_ext.tasks.squad import Question

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["Answer", "QuestionAnswerer"]


class QuestionAnswerer:
    """Finds the answers to questions in their contexts.

    A context that is longer than a row is read in overlapping windows, and the best answer of all
    windows is given; scores are those of :class:`xlmr_ext.tasks.answer_spans.SpanSearch`. A
    question has the same answer and score, bit for bit, whatever is asked together with it.

    Args:
        model: :class:`xlmr_ext.XLMRobertaForQuestionAnswering`.
        tokenizer: the one that belongs to it.
        doc_stride: tokens that two neighbouring windows of a context share; None: 128, or half of
            ``max_length`` if that is less.
        max_length: tokens of a row: of the question, a window and 4 special ones. None is 384, or
            what the model takes if that is less.
        max_answer_length: tokens of the longest answer.
        top_k: answers a question; there may be fewer in a short context.
        handle_impossible_answer: "no answer" (an empty text) takes part as one of the answers.
        batch_size: windows that are run at once.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: XLMRobertaTokenizer,
        *,
        doc_stride: int | None = None,
        max_length: int | None = None,
        max_answer_length: int = 30,
        top_k: int = 1,
        handle_impossible_answer: bool = False,
        batch_size: int = 32,
    ) -> None:
        for name, value in (
            ("max_answer_length", max_answer_length),
            ("top_k", top_k),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_length is None:
            max_length = min(384, longest_input(model))
        self._model = model
        self._windows = QuestionWindows(
            tokenizer, max_length=check_max_length(model, max_length), doc_stride=doc_stride
        )
        self._max_answer_length = max_answer_length
        self._top_k = top_k
        self._none_allowed = handle_impossible_answer
        self._batch_size = batch_size

    @overload
    def __call__(self, question: str, context: str) -> Answer | list[Answer]: ...
    @overload
    def __call__(
        self, question: list[str], context: str | list[str]
    ) -> list[Answer] | list[list[Answer]]: ...
    def __call__(
        self, question: str | list[str], context: str | list[str]
    ) -> Answer | list[Answer] | list[list[Answer]]:
        """The answer to a question, or the answers to a list of them.

        Args:
            context: the context of the question; for a list of questions one each, or one of all.

        Returns:
            An :class:`Answer`, or with ``top_k`` above 1 a list, the best first; for a list of
            questions a list of such.

        Raises:
            TypeError: a question or a context is not a str.
            ValueError: as :meth:`stream`.
        """
        single = isinstance(question, str)
        if not isinstance(context, str if single else (str, list, tuple)):
            expected = "a str, as question is" if single else "a str or a list of them"
            raise TypeError(f"context must be {expected}, got {type(context).__name__}")
        questions = [question] if isinstance(question, str) else list(question)
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        if len(contexts) != len(questions):
            raise ValueError(
                f"context has {len(contexts)} entries, expected one for each of the "
                f"{len(questions)} questions"
            )
        found = list(self.stream(zip(questions, contexts, strict=True)))
        if self._top_k > 1:
            return found[0] if single else found
        best = [answers[0] for answers in found]
        return best[0] if single else best

    def stream(self, questions: Iterable[Question | tuple[str, str]]) -> Iterator[list[Answer]]:
        """The ``top_k`` best answers to each question, in order, as the questions come.

        Holds the contexts and rows of one batch; windows of several questions share a batch.

        Args:
            questions: (question, context) pairs, or :class:`Question` as a reader gives them.

        Raises:
            TypeError: what is neither.
            DataError: an empty question, a context without a token, or a question that leaves no
                room for it; the message names the question.
            ArithmeticError: the model answers with NaN or infinity.
        """
        running: deque[tuple[SpanSearch, Window, bool]] = deque()
        rows = self._rows(questions, running)
        for start_logits, end_logits in span_logits(self._model, rows, batch_size=self._batch_size):
            search, window, last = running.popleft()
            search.add(window, start_logits, end_logits)
            if last:
                yield search.answers(none_allowed=self._none_allowed)

    def checked(self, questions: Iterable[Question]) -> Iterator[Question]:
        """The questions, one at a time; DataError, as of :meth:`stream`, before one that has no
        answer, so that a caller can have those before it answered."""
        for number, question in enumerate(questions, 1):
            _question(question, number)
            # The windows are made one by one, and the context's tokens are kept.
            next(self._windows.rows(question, self._windows.context(question.context)))
            yield question

    def _rows(
        self,
        questions: Iterable[Question | tuple[str, str]],
        running: deque[tuple[SpanSearch, Window, bool]],
    ) -> Iterator[list[int]]:
        """Every window's token ids; ``running`` is told what each belongs to."""
        for number, given in enumerate(questions, 1):
            question = _question(given, number)
            context = self._windows.context(question.context)
            search = SpanSearch(
                context, count=self._top_k, max_answer_length=self._max_answer_length
            )
            for row, window in self._windows.rows(question, context):
                check_vocabulary([row], int(self._model.config.vocab_size))
                last = window.first + window.size == len(context.ids)
                running.append((search, window, last))
                yield row


def _question(given: Question | tuple[str, str], number: int) -> Question:
    if not isinstance(given, Question):
        if not (
            isinstance(given, tuple)
            and len(given) == 2
            and all(isinstance(part, str) for part in given)
        ):
            raise TypeError(
                f"question {number} must be a (question, context) pair of str, got "
                f"{type(given).__name__}"
            )
        given = Question(*given, where=f"question {number}")
    if not given.question.strip():
        raise DataError(f"{given.where}: the question is empty")
    return given
