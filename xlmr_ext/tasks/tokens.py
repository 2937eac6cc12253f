"""A label for every word: fine-tuning named-entity recognition, and measuring it.

What runs it is :class:`xlmr_ext.tasks.entities.EntityRecognizer`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from xlmr_ext.chance import guessing_loss
from xlmr_ext.data import MAX_LABELS, DataError
from xlmr_ext.losses import IGNORED
from xlmr_ext.prediction import check_finite, in_eval_mode, label_names, packed_batches
from xlmr_ext.tasks.base import Features, Scores, Task
from xlmr_ext.tasks.iob2 import TaggedSentences, entity_spans

if TYPE_CHECKING:
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = [
    "EntityCounts",
    "EntityEvaluation",
    "TokenFeatures",
    "TokenTask",
    "Window",
    "check_stride",
    "count_entities",
    "split_windows",
    "token_logits",
]

Tagged = TaggedSentences | str | Path | Iterable[tuple[Sequence[str], Sequence[str]]]


@dataclass(frozen=True)
class EntityCounts:
    """How many entities there are, were found, and were found with the right type and span.

    precision = correct / predicted, recall = correct / gold, f1 = 2 correct / (predicted + gold);
    0 where there is nothing to divide by.
    """

    gold: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float:
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        found = self.predicted + self.gold
        return 2 * self.correct / found if found else 0.0


@dataclass(frozen=True)
class EntityEvaluation:
    """How well predicted tags agree with the gold ones.

    Args:
        words: number of words that have a prediction.
        accuracy: share of them whose tag is right.
        loss: mean cross entropy of their first pieces, in nats.
        overall: of all entities, whatever their type.
        by_type: of the entities of each type.
    """

    words: int
    accuracy: float
    loss: float
    overall: EntityCounts
    by_type: dict[str, EntityCounts]


@dataclass
class TokenFeatures(Features):
    """Windows of sentences; the targets are label ids of the tokens, -100 where none counts.

    Args:
        sentences: the number of the sentence that each window is of, ascending.
    """

    sentences: list[int] = field(default_factory=list)


class TokenTask(Task):
    """Tags of words, learnt and measured as in named-entity recognition.

    Data is :class:`TaggedSentences`, a file (:func:`xlmr_ext.tasks.iob2.read_iob2`), or (words,
    tags) tuples. Each word is tokenized by itself; its label belongs to its first piece, and the
    other pieces do not count. A sentence longer than ``max_length`` becomes windows that overlap,
    cut between words (see :func:`split_windows`); each word counts in one of them, so that nothing
    is lost and nothing counts twice. Words of which the tokenizer leaves nothing (control
    characters) have no prediction and are left out of loss and scores.

    Metrics: ``loss``, ``accuracy`` (of words), and ``precision``, ``recall`` and ``f1`` of
    entities, as seqeval's default mode and conlleval have them (see
    :func:`xlmr_ext.tasks.iob2.entity_spans`). The details of the scores are an
    :class:`EntityEvaluation`. The best epoch has the highest F1, then accuracy.

    Args:
        max_length: tokens of a window, special tokens included.
        stride: tokens that two windows share at most; None: a quarter of ``max_length``.
    """

    name = "tokens"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: XLMRobertaTokenizer,
        *,
        max_length: int,
        stride: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length)
        self.stride = check_stride(stride, self.max_length)

    def load(self, given: Tagged, name: str) -> TaggedSentences:
        """See :meth:`Task.load`; (words, tags) tuples become :class:`TaggedSentences`."""
        if not isinstance(given, str | Path | TaggedSentences):
            given = TaggedSentences.of(given, source=name)
        data = super().load(given, name)
        assert isinstance(data, TaggedSentences)
        return data

    @classmethod
    def labels_in(cls, data: TaggedSentences) -> list[str]:
        """The tags, sorted by code point, so that ``O`` comes last, as in transformers' example.

        A type that occurs has both ``B-`` and ``I-``: other data may have what this has not.
        DataError where no word is in an entity, or beyond :data:`xlmr_ext.data.MAX_LABELS`.
        """
        labels = {"O"}
        for sentence, tags in enumerate(data.tags):
            for word, tag in enumerate(tags):
                if tag in labels:
                    continue
                labels |= {f"B-{tag[2:]}", f"I-{tag[2:]}"}
                if len(labels) > MAX_LABELS:
                    raise DataError(
                        f"{data.where(sentence, word)}: {tag[:60]!r} makes more than {MAX_LABELS} "
                        "labels: is this the column of the tags?"
                    )
        if len(labels) == 1:
            raise DataError(f"{data.source} has no entity: every tag is O")
        return sorted(labels)

    def adopt(self, data: TaggedSentences) -> None:
        """See :meth:`Task.adopt`."""
        self.labels = label_names(self.model)

    def features(self, data: TaggedSentences, *, training: bool) -> TokenFeatures:
        """Windows of at most ``max_length`` tokens; DataError for a tag that is no label."""
        room = self.max_length - 2
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pieces = self._pieces(data.words, room)
        label_ids = {label: index for index, label in enumerate(self.labels)}
        sequences: list[list[int]] = []
        targets: list[list[int]] = []
        sentences: list[int] = []
        for sentence, words in enumerate(data.words):
            rows = [pieces[word] for word in words]
            gold = self._gold(data, sentence, label_ids)
            for window in split_windows([len(row) for row in rows], room, self.stride):
                ids, target = [bos], [IGNORED]
                for word in range(window.start, window.end):
                    ids += rows[word]
                    target += [IGNORED] * len(rows[word])
                    if rows[word] and window.first <= word < window.last:
                        target[-len(rows[word])] = gold[word]
                if any(label != IGNORED for label in target):
                    sequences.append([*ids, eos])
                    targets.append([*target, IGNORED])
                    sentences.append(sentence)
        if not sequences:
            raise DataError(f"{data.source} has no word of which the tokenizer leaves anything")
        places = [data.where(sentence) for sentence in sentences].__getitem__
        return TokenFeatures(sequences, targets, places=places, sentences=sentences)

    def loss(
        self, model: PreTrainedModel, batch: PackedBatch, targets: Sequence[Sequence[int]]
    ) -> Tensor:
        """Mean cross entropy over the words of the batch, in nats."""
        labels = torch.tensor(list(chain.from_iterable(targets)), device=model.device)
        if self.weighting is not None:
            return self.weighting.loss(model(packed=batch).logits, labels)
        loss: Tensor = model(packed=batch, labels=labels).loss
        return loss

    def counted_labels(self, targets: Sequence[Sequence[int]]) -> list[int]:
        """Those of the words, each once."""
        return [label for row in targets for label in row if label != IGNORED]

    def evaluate(self, model: PreTrainedModel, features: Features, *, batch_size: int) -> Scores:
        """See :meth:`Task.evaluate`; the details are an :class:`EntityEvaluation`."""
        assert isinstance(features, TokenFeatures)
        gold: dict[int, list[str]] = {}
        predicted: dict[int, list[str]] = {}
        loss, words, right = 0.0, 0, 0
        answers = token_logits(model, features.sequences, batch_size=batch_size)
        for logits, row, sentence in zip(
            answers, features.targets, features.sentences, strict=True
        ):
            target = torch.tensor(row)
            logits, target = logits[target != IGNORED].double(), target[target != IGNORED]
            loss += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            chosen = logits.argmax(dim=-1)
            words += len(target)
            right += int((chosen == target).sum())
            for tags, ids in ((gold, target), (predicted, chosen)):
                tags.setdefault(sentence, []).extend(self.labels[label] for label in ids.tolist())
        by_type = count_entities(gold.values(), predicted.values())
        overall = EntityCounts(
            sum(counts.gold for counts in by_type.values()),
            sum(counts.predicted for counts in by_type.values()),
            sum(counts.correct for counts in by_type.values()),
        )
        found = EntityEvaluation(words, right / words, loss / words, overall, by_type)
        metrics = {
            "loss": found.loss,
            "accuracy": found.accuracy,
            "precision": overall.precision,
            "recall": overall.recall,
            "f1": overall.f1,
        }
        return Scores(metrics, (overall.f1, found.accuracy), found)

    def guessing_loss(self, features: Features) -> float:
        """The entropy of the labels' shares, see :func:`xlmr_ext.chance.guessing_loss`."""
        labels = self.counted_labels(features.targets)
        if self.weighting is not None:
            return self.weighting.guessing_loss(labels, len(self.labels))
        return guessing_loss(labels)

    def _gold(self, data: TaggedSentences, sentence: int, label_ids: dict[str, int]) -> list[int]:
        found = [label_ids.get(tag, -1) for tag in data.tags[sentence]]
        if -1 in found:
            word = found.index(-1)
            shown = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
            raise DataError(
                f"{data.where(sentence, word)}: tag {data.tags[sentence][word]!r} is not one of "
                f"the model's {len(self.labels)} labels: {shown}"
            )
        return found

    def _pieces(self, sentences: list[list[str]], room: int) -> dict[str, list[int]]:
        """Token ids of every word, at most ``room``; the first is all that a longer one needs."""
        words = list(dict.fromkeys(chain.from_iterable(sentences)))
        if not words:
            return {}
        rows = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return {word: row[:room] for word, row in zip(words, rows, strict=True)}


def count_entities(
    gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]
) -> dict[str, EntityCounts]:
    """Entities by type, in the order of the types' names, of sentences' gold and predicted tags.

    A predicted entity is correct where a gold one has its type, its first and its last word.
    """
    counts: tuple[Counter[str], Counter[str], Counter[str]] = (Counter(), Counter(), Counter())
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        if len(gold_tags) != len(predicted_tags):
            raise ValueError(f"{len(gold_tags)} gold tags but {len(predicted_tags)} predicted")
        right, found = set(entity_spans(gold_tags)), set(entity_spans(predicted_tags))
        for counter, spans in zip(counts, (right, found, right & found), strict=True):
            counter.update(kind for kind, _, _ in spans)
    kinds = sorted(counts[0].keys() | counts[1].keys())
    return {kind: EntityCounts(*(counter[kind] for counter in counts)) for kind in kinds}


class Window(NamedTuple):
    """Units ``start`` to ``end`` (excluded), of which it decides ``first`` to ``last``."""

    start: int
    end: int
    first: int
    last: int


def split_windows(lengths: Sequence[int], room: int, stride: int) -> list[Window]:
    """Cuts a row of units (words, say) into windows that overlap; each unit is decided in one.

    A window holds as many units as fit; the next begins so that both share at most ``stride``
    tokens. A unit in both is decided where the shorter of its contexts, left and right, is longer.

    Args:
        lengths: tokens of each unit, 0 to ``room``.
        room: tokens of a window.
        stride: below ``room``.
    """
    before = list(accumulate(lengths, initial=0))
    windows, start, first = [], 0, 0
    while before[-1] - before[start] > room:
        end = bisect_right(before, before[start] + room) - 1
        # Little enough to share, and room for the unit that did not fit here.
        following = bisect_left(before, max(before[end] - stride, before[end + 1] - room))
        shared = before[following] + before[end]
        last = next(
            (unit for unit in range(following, end) if before[unit] + before[unit + 1] >= shared),
            end,
        )
        windows.append(Window(start, end, first, last))
        start, first = following, last
    windows.append(Window(start, len(lengths), first, len(lengths)))
    return windows


def check_stride(stride: int | None, max_length: int) -> int:
    """``stride`` in tokens, a quarter of ``max_length`` for None; ValueError where it is no less
    than the ``max_length - 2`` tokens of text that a window holds."""
    if stride is None:
        return max_length // 4
    if not 0 <= stride < max_length - 2:
        raise ValueError(
            f"stride must be from 0 to {max_length - 3}, below the tokens of text in a window of "
            f"max_length {max_length}, got {stride}"
        )
    return stride


def token_logits(
    model: Any, sequences: Sequence[Sequence[int]], *, batch_size: int
) -> list[Tensor]:
    """Logits [tokens, num_labels] on the CPU in float32 of each sequence of token ids, in order.

    Runs in eval mode without autograd and leaves the model in the mode it was in. ArithmeticError
    where a logit is not finite.
    """
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    with in_eval_mode(model):
        for rows, batch in packed_batches(model, sequences, batch_size=batch_size):
            logits = model(packed=batch).logits.to("cpu", torch.float32)
            parts = logits.split([len(sequences[row]) for row in rows])
            for row, part in zip(rows, parts, strict=True):
                found[row] = part
    if found:
        check_finite(torch.stack([logits.abs().amax(0) for logits in found]))
    return found
