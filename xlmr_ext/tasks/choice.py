"""Multiple choice: which of K continuations or answers fits a text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from xlmr_ext.data import DataError, check_vocabulary, encode, json_objects, kind_of, text_lines
from xlmr_ext.prediction import (
    check_finite,
    check_max_length,
    groups,
    in_eval_mode,
    packed_batches,
)
from xlmr_ext.tasks.base import Features, Scores, Task

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForMultipleChoice
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

# Names of columns, also those of SWAG (sent1, sent2, ending0 ...) and COPA (premise, choice1 ...).
_CONTEXT = ("context", "premise", "sent1")
_QUESTION = ("question", "sent2")
_NUMBERED = re.compile(r"(?:choice|ending)(\d{1,4})")


@dataclass(frozen=True)
class ChoiceQuestion:
    """One question.

    Args:
        context: what is read first; may be empty only where the question is not.
        choices: K of them, at least 2.
        label: the right one, counted from 0; None where it is not known.
        question: asked of the context: the beginning of every choice, or "".
        where: ``file:line`` it came from, for messages.
    """

    context: str
    choices: Sequence[str]
    label: int | None = None
    question: str = ""
    where: str = "question"

    def __post_init__(self) -> None:
        for name, text in (("context", self.context), ("question", self.question)):
            if not isinstance(text, str):
                raise TypeError(f"{self.where}: {name} must be a text, got {kind_of(text)}")
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence):
            raise TypeError(
                f"{self.where}: choices must be a list of texts, got {kind_of(self.choices)}"
            )
        for number, choice in enumerate(self.choices):
            if not isinstance(choice, str):
                raise TypeError(
                    f"{self.where}: choice {number} must be a text, got {kind_of(choice)}"
                )
        if len(self.choices) < 2:
            raise DataError(f"{self.where}: expected 2 choices or more, got {len(self.choices)}")
        label = self.label
        if label is not None and not (
            isinstance(label, int)
            and not isinstance(label, bool)
            and 0 <= label < len(self.choices)
        ):
            raise DataError(
                f"{self.where}: the label is the number of the right choice, 0 to "
                f"{len(self.choices) - 1}, got {label!r}"
            )

    def pairs(self) -> list[tuple[str, str]]:
        """The texts of the K rows: (context, question and choice); (question, choice) if it is all.

        As transformers' examples for SWAG and RACE have it.
        """
        if not self.context:
            return [(self.question, choice) for choice in self.choices]
        head = f"{self.question} " if self.question else ""
        return [(self.context, head + choice) for choice in self.choices]


@dataclass(frozen=True)
class Choice:
    """An answer.

    Args:
        index: of the most probable choice, from 0.
        score: its probability among the choices.
        scores: probability of each choice.
        choice: its text.
    """

    index: int
    score: float
    scores: list[float]
    choice: str


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """Reads a file of questions: a JSON object a line.

    * the text: ``context`` (or ``premise``, ``sent1``), ``question`` (or ``sent2``), or both;
    * the choices: a list ``choices``, or ``choice0``, ``choice1`` ... (or ``ending0`` ...),
      numbered from 0 or from 1;
    * ``label``: the right one, counted from 0 in the order of the choices; a number, or its digits
      as a text; absent or null in a file that is only to be answered.

    All questions have the same number of choices.

    Raises:
        DataError: naming ``file:line``.
        OSError: where the file cannot be opened or read.
    """
    questions: list[ChoiceQuestion] = []
    with Path(path).open("rb") as stream:
        for question in iterate_choices(stream, str(path)):
            check_choices([*questions[:1], question])
            questions.append(question)
    if not questions:
        raise DataError(f"{path} has no rows")
    return questions


def iterate_choices(stream: BinaryIO, name: str) -> Iterator[ChoiceQuestion]:
    """As :func:`read_choices`, a line at a time; the number of choices may differ.

    ``name`` is what messages call the stream.
    """
    for line, row in json_objects(text_lines(stream, name), name):
        yield _question(row, f"{name}:{line}")


def check_choices(questions: Sequence[ChoiceQuestion]) -> int:
    """The number of choices, K; DataError where two questions differ in it."""
    first = questions[0]
    for question in questions:
        if len(question.choices) != len(first.choices):
            raise DataError(
                f"{question.where}: {len(question.choices)} choices, expected "
                f"{len(first.choices)} as at {first.where}"
            )
    return len(first.choices)


class ChoiceTask(Task):
    """Multiple choice of K, the same K in all of the data.

    Data is a list of :class:`ChoiceQuestion`, or a file (:func:`read_choices`). An example is K
    rows ``<s> context </s></s> question choice </s>``, cut to ``max_length`` from the longer text;
    its target is the right one's number. Metrics: ``loss``, ``accuracy``; the best epoch has the
    highest accuracy, then the lowest loss.
    """

    name = "choice"

    def features(self, data: Sequence[ChoiceQuestion], *, training: bool) -> Features:
        """K rows a question; DataError for one without a label or with another K."""
        choices = check_choices(data)
        targets = []
        for question in data:
            if question.label is None:
                raise DataError(f"{question.where}: has no label")
            targets.append(question.label)
        return Features(
            _rows(self.tokenizer, data, self.max_length),
            targets,
            rows_per_example=choices,
            places=[question.where for question in data].__getitem__,
        )

    def loss(self, model: PreTrainedModel, batch: PackedBatch, targets: Sequence[int]) -> Tensor:
        """Mean cross entropy over the choices, in nats."""
        labels = torch.tensor(targets, dtype=torch.int64, device=model.device)
        choices = batch.batch_size // len(targets)
        loss: Tensor = model(packed=batch, num_choices=choices, labels=labels).loss
        return loss

    def evaluate(self, model: PreTrainedModel, features: Features, *, batch_size: int) -> Scores:
        """See :meth:`Task.evaluate`; the details are the predicted choices, a list of int."""
        logits = choose(
            model,
            features.sequences,
            choices=features.rows_per_example,
            batch_size=batch_size,
        )
        target = torch.tensor(features.targets, dtype=torch.int64)
        loss = float(torch.nn.functional.cross_entropy(logits.double(), target))
        chosen = logits.argmax(dim=-1)
        accuracy = float((chosen == target).double().mean())
        return Scores({"loss": loss, "accuracy": accuracy}, (accuracy, -loss), chosen.tolist())

    def guessing_loss(self, features: Features) -> float:
        """ln K: a choice's place tells the model nothing."""
        return math.log(features.rows_per_example)


class ChoiceAnswerer:
    """Answers multiple-choice questions.

    >>> ChoiceAnswerer(model, tokenizer)("It rains.", ["The sun burns.", "The road is wet."]).index
    1

    Args:
        model: a fine-tuned :class:`xlmr_ext.heads.XLMRobertaForMultipleChoice`.
        max_length: tokens a row is cut to; None takes the model's own limit.
        batch_size: most questions a batch; a batch of long ones holds fewer.
    """

    def __init__(
        self,
        model: XLMRobertaForMultipleChoice,
        tokenizer: XLMRobertaTokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self._max_length = check_max_length(model, max_length)
        self._batch_size = batch_size

    def __call__(self, context: str, choices: Sequence[str], question: str = "") -> Choice:
        """Answers one question; see :class:`ChoiceQuestion`.

        Raises:
            TypeError, ValueError: texts that are none, or fewer than 2 choices.
            ArithmeticError: where the model answers with NaN or infinity.
        """
        return next(self.answers([ChoiceQuestion(context, choices, question=question)]))

    def answers(self, questions: Iterable[ChoiceQuestion], window: int = 256) -> Iterator[Choice]:
        """Answers questions as they come, in order, holding ``window`` of them in memory.

        Fewer of long ones. The number of choices may differ from one to the next.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        return self._answers(questions, window)

    def _answers(self, questions: Iterable[ChoiceQuestion], window: int) -> Iterator[Choice]:
        for group in groups(questions, window, _size, lambda question: len(question.choices)):
            yield from self._answer(group)

    def _answer(self, questions: list[ChoiceQuestion]) -> Iterator[Choice]:
        sequences = _rows(self.tokenizer, questions, self._max_length)
        check_vocabulary(sequences, int(self.model.config.vocab_size))
        logits = choose(
            self.model,
            sequences,
            choices=len(questions[0].choices),
            batch_size=self._batch_size,
        )
        for question, row in zip(questions, logits.double().softmax(-1).tolist(), strict=True):
            index = row.index(max(row))
            yield Choice(index, row[index], row, question.choices[index])


def choose(
    model: Any, sequences: Sequence[Sequence[int]], *, choices: int, batch_size: int
) -> Tensor:
    """Logits ``[n, choices]`` on the CPU for n questions of ``choices`` sequences each, in order.

    Runs in eval mode without autograd and leaves the model in the mode it was in.
    ArithmeticError where a logit is not finite.
    """
    logits = torch.empty(len(sequences) // choices, choices)
    with in_eval_mode(model):
        for examples, batch in packed_batches(
            model, sequences, batch_size=batch_size, rows_per_example=choices
        ):
            answer = model(packed=batch, num_choices=choices).logits
            logits[examples] = answer.to("cpu", torch.float32)
    check_finite(logits)
    return logits


def _size(question: ChoiceQuestion) -> int:
    """Characters of its K rows."""
    return sum(len(first) + len(second) for first, second in question.pairs())


def _rows(
    tokenizer: XLMRobertaTokenizer, questions: Sequence[ChoiceQuestion], max_length: int
) -> list[list[int]]:
    pairs = [pair for question in questions for pair in question.pairs()]
    return encode(
        tokenizer, [pair[0] for pair in pairs], [pair[1] for pair in pairs], max_length=max_length
    )


def _question(row: dict[str, Any], where: str) -> ChoiceQuestion:
    context = _text(row, _CONTEXT, where)
    question = _text(row, _QUESTION, where)
    if not context and not question:
        raise DataError(
            f"{where}: has no text: expected a column {' or '.join((*_CONTEXT, *_QUESTION))}"
        )
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    try:
        return ChoiceQuestion(context, _choices(row, where), label, question, where)
    except TypeError as error:
        raise DataError(str(error)) from None


def _text(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The text of the one of these columns that is there, or ""."""
    there = [name for name in names if name in row]
    if len(there) > 1:
        raise DataError(f"{where}: columns {' and '.join(map(repr, there))} mean the same")
    text = row[there[0]] if there else ""
    if not isinstance(text, str):
        raise DataError(f"{where}: column {there[0]!r} must hold a text, got {kind_of(text)}")
    return text


def _choices(row: dict[str, Any], where: str) -> list[Any]:
    numbered = {
        (name.rstrip("0123456789"), int(found[1])): value
        for name, value in row.items()
        if (found := _NUMBERED.fullmatch(name)) is not None
    }
    if "choices" in row:
        if numbered:
            raise DataError(f"{where}: has the column 'choices' and numbered ones as well")
        listed = row["choices"]
        if not isinstance(listed, list):
            raise DataError(f"{where}: column 'choices' must hold a list, got {kind_of(listed)}")
        return listed
    places = sorted(numbered)
    kinds, numbers = {kind for kind, _ in places}, [number for _, number in places]
    start = numbers[0] if numbers else 0
    if (
        not numbers
        or start > 1
        or len(kinds) > 1
        or numbers != list(range(start, start + len(numbers)))
    ):
        raise DataError(
            f"{where}: expected a list 'choices', or columns choice0, choice1, ... (or ending0, "
            f"...) without a gap; it has {', '.join(map(repr, row))[:200]}"
        )
    return [numbered[place] for place in places]
