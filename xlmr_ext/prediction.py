"""Labels for a stream of texts, in constant memory and in order; and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from xlmr_ext.data import LabelledTexts, check_vocabulary, encode, label_ids, packed

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

Text = str | tuple[str, str]
T = TypeVar("T")

# Bounds on what is held at once: characters of a window of texts, tokens of a batch.
_WINDOW_CHARACTERS = 1 << 22
_BATCH_TOKENS = 1 << 14


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text.

    Args:
        label: the most probable label.
        score: its probability, 0 to 1.
        scores: probability of every label, in the order of the model's label ids.
        text: the text as it was given.
        pair: the second text, or None.
    """

    label: str
    score: float
    scores: dict[str, float]
    text: str
    pair: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """How well predictions agree with the labels of ``rows`` rows.

    Args:
        accuracy: share of rows labelled right.
        macro_f1: see :func:`agreement`.
        loss: mean cross entropy in nats.
        confusion: ``confusion[gold][predicted]`` counts rows, by label id.
        labels: the label names, by label id.
    """

    rows: int
    accuracy: float
    macro_f1: float
    loss: float
    confusion: list[list[int]]
    labels: list[str]


def agreement(confusion: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Accuracy and macro F1 of a confusion matrix ``[gold][predicted]``.

    accuracy = sum of the diagonal / rows. F1 of a label = 2 TP / (2 TP + FP + FN), which is
    2 TP / (rows of that label + predictions of that label); macro F1 is the plain mean over the
    labels that occur as gold or as prediction. Both are 0 for an empty matrix.
    """
    rows = sum(map(sum, confusion))
    if rows == 0:
        return 0.0, 0.0
    scores = []
    for label, counts in enumerate(confusion):
        occurrences = sum(counts) + sum(row[label] for row in confusion)
        if occurrences:
            scores.append(2 * counts[label] / occurrences)
    correct = sum(confusion[label][label] for label in range(len(confusion)))
    return correct / rows, sum(scores) / len(scores)


def longest_input(model: PreTrainedModel) -> int:
    """Tokens that the model's position table holds, special tokens included."""
    return int(model.config.longest_input)


def classifier_labels(model: XLMRobertaForSequenceClassification) -> list[str]:
    """Label names by id; ValueError where the model is not a single-label classifier."""
    config = model.config
    kind = config.problem_type
    if kind not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            "the model must be a single-label classifier of at least 2 labels, got "
            f"problem_type {kind!r} with num_labels {config.num_labels}"
        )
    return label_names(model)


def label_names(model: PreTrainedModel) -> list[str]:
    """Label names by id; ValueError where two are the same."""
    config = model.config
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    if len(set(labels)) != len(labels):
        raise ValueError(f"the model's labels must differ from each other, got {labels}")
    return labels


def check_max_length(model: PreTrainedModel, max_length: int | None) -> int:
    """``max_length`` in tokens, the model's own limit for None; ValueError beyond it."""
    limit = longest_input(model)
    if max_length is None:
        return limit
    if not 3 <= max_length <= limit:
        raise ValueError(
            f"max_length must be from 3 to {limit}, the tokens this model takes, got {max_length}"
        )
    return max_length


def predict(
    model: XLMRobertaForSequenceClassification,
    tokenizer: XLMRobertaTokenizer,
    texts: Iterable[Text],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    window: int = 1024,
) -> Iterator[Prediction]:
    """Labels texts as they come, in order, holding one window of them in memory.

    Args:
        texts: any iterable of texts, or of (text, second text) tuples; it is consumed lazily.
        batch_size: most texts a batch; a batch of long texts holds fewer.
        max_length: tokens a text is cut to; None takes the model's own limit.
        window: texts read ahead, to be sorted by length into batches.

    Raises:
        ValueError: for a model that is not a single-label classifier, or arguments out of range.
        TypeError: for a text that is not a str.
        ArithmeticError: where the model answers with NaN or infinity.
    """
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    labels = classifier_labels(model)
    length = check_max_length(model, max_length)
    return _predict(model, tokenizer, texts, labels, batch_size, length, window)


def evaluate(
    model: XLMRobertaForSequenceClassification,
    tokenizer: XLMRobertaTokenizer,
    data: LabelledTexts,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Evaluation:
    """Accuracy, macro F1 and loss on labelled texts; the arguments are those of ``predict``."""
    labels = classifier_labels(model)
    gold = label_ids(data, labels)
    sequences = encode(
        tokenizer, data.texts, data.pairs, max_length=check_max_length(model, max_length)
    )
    return evaluate_ids(model, sequences, gold, labels, batch_size=batch_size)


def evaluate_ids(
    model: XLMRobertaForSequenceClassification,
    sequences: Sequence[Sequence[int]],
    gold: Sequence[int],
    labels: list[str],
    *,
    batch_size: int,
) -> Evaluation:
    """As :func:`evaluate`, for texts that are token ids already."""
    if not sequences:
        raise ValueError("there is nothing to evaluate: the data has no rows")
    logits = classify(model, sequences, batch_size=batch_size)
    target = torch.tensor(gold, dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(logits.double(), target)
    confusion = [[0] * len(labels) for _ in labels]
    for expected, predicted in zip(gold, logits.argmax(dim=-1).tolist(), strict=True):
        confusion[expected][predicted] += 1
    accuracy, macro_f1 = agreement(confusion)
    return Evaluation(len(gold), accuracy, macro_f1, float(loss), confusion, labels)


def classify(
    model: XLMRobertaForSequenceClassification,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> torch.Tensor:
    """Logits ``[n, num_labels]`` on the CPU for n sequences of token ids, in their order.

    Runs in eval mode without autograd and leaves the model in the mode it was in.
    ArithmeticError where a logit is not finite.
    """
    logits = torch.empty(len(sequences), model.config.num_labels)
    with in_eval_mode(model):
        for rows, batch in packed_batches(model, sequences, batch_size=batch_size):
            logits[rows] = model(packed=batch).logits.to("cpu", torch.float32)
    check_finite(logits)
    return logits


def check_finite(answers: torch.Tensor) -> None:
    """ArithmeticError that names the first of n answers ``[n, k, ...]`` that is not finite."""
    finite = torch.isfinite(answers).flatten(1).all(dim=-1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        values = answers[row].flatten().tolist()
        shown = str(values[:8]) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"
        raise ArithmeticError(
            f"the model's answer for row {row + 1} of {len(answers)} is not finite "
            f"({shown}): its weights are damaged, or training diverged"
        )


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without autograd; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def packed_batches(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    rows_per_example: int = 1,
) -> Iterator[tuple[list[int], PackedBatch]]:
    """All examples in batches of similar length, on the model's device, with their numbers.

    Args:
        batch_size: most examples a batch; a batch of long ones holds fewer.
        rows_per_example: example e is the sequences from ``e * rows_per_example`` on, and a batch
            has them all.
    """
    each = rows_per_example
    # As long as its longest row, for each of its rows.
    lengths = [
        each * max(map(len, sequences[first : first + each]))
        for first in range(0, len(sequences), each)
    ]
    for examples in batches_by_length(lengths, batch_size):
        rows = [example * each + row for example in examples for row in range(each)]
        yield (
            examples,
            packed(
                sequences, rows, pad_token_id=int(model.config.pad_token_id), device=model.device
            ),
        )


def _predict(
    model: XLMRobertaForSequenceClassification,
    tokenizer: XLMRobertaTokenizer,
    texts: Iterable[Text],
    labels: list[str],
    batch_size: int,
    max_length: int,
    window: int,
) -> Iterator[Prediction]:
    for rows in windows(texts, window):
        first = [row[0] for row in rows]
        second = None if rows[0][1] is None else [row[1] or "" for row in rows]
        sequences = encode(tokenizer, first, second, max_length=max_length)
        check_vocabulary(sequences, model.config.vocab_size)
        logits = classify(model, sequences, batch_size=batch_size)
        for (text, pair), row in zip(rows, logits.tolist(), strict=True):
            yield _prediction(labels, row, text, pair)


def windows(texts: Iterable[Text], window: int) -> Iterator[list[tuple[str, str | None]]]:
    """Groups of texts of bounded number and bounded size; all with a pair, or all without."""
    return groups(
        (_row(text, number) for number, text in enumerate(texts)),
        window,
        lambda row: len(row[0]) + len(row[1] or ""),
        lambda row: row[1] is None,
    )


def groups(
    items: Iterable[T],
    window: int,
    size: Callable[[T], int],
    kind: Callable[[T], object] | None = None,
    *,
    characters: int | None = None,
) -> Iterator[list[T]]:
    """Items in groups of bounded number and bounded size, and of one kind each.

    Args:
        window: most items of a group; a full one does not wait for the next item, which may take
            its time.
        size: characters that holding an item takes.
        kind: what the items of a group have in common.
        characters: most of a group of several items; None is 2**22.
    """
    most = _WINDOW_CHARACTERS if characters is None else characters
    group: list[T] = []
    held = 0
    for item in items:
        own = size(item)
        if group and (held + own > most or (kind is not None and kind(item) != kind(group[0]))):
            yield group
            group, held = [], 0
        group.append(item)
        held += own
        if len(group) == window:
            yield group
            group, held = [], 0
    if group:
        yield group


def single_texts(texts: Iterable[Any], prefix: str = "") -> Iterator[str]:
    """Each text with ``prefix`` before it; TypeError for what is not a str."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TypeError(f"text {number} must be a str, got {type(text).__name__}")
        yield prefix + text


def _row(text: Any, number: int) -> tuple[str, str | None]:
    if isinstance(text, str):
        return text, None
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return text[0], text[1]
    raise TypeError(
        f"text {number + 1} must be a str or a tuple of two str, got {type(text).__name__}"
    )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows by length, at most ``batch_size`` rows and a bounded number of tokens together."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    start = 0
    while start < len(order):
        # The rows are sorted, so the last one of a batch bounds the others.
        end = min(start + batch_size, len(order))
        while end - start > 1 and (end - start) * lengths[order[end - 1]] > _BATCH_TOKENS:
            end -= 1
        yield order[start:end]
        start = end


def _prediction(
    labels: list[str], logits: Sequence[float], text: str, pair: str | None
) -> Prediction:
    scores = dict(zip(labels, softmax(logits), strict=True))
    best = labels[logits.index(max(logits))]
    return Prediction(best, scores[best], scores, text, pair)


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities in Python's floats, a row at a time: they cannot depend on rows beside it."""
    highest = max(logits)
    weights = [math.exp(value - highest) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
