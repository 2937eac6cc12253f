"""Entities in texts, with their character spans: running a token classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

from xlmr_ext.data import check_vocabulary
from xlmr_ext.prediction import check_max_length, groups, label_names
from xlmr_ext.tasks.tokens import check_stride, split_windows, token_logits

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForTokenClassification
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["Entity", "EntityRecognizer"]

Strategy = Literal["none", "simple", "first", "average", "max"]
Words = Sequence[str]

_STRATEGIES = ("none", "simple", "first", "average", "max")
_SPACE = "\u2581"  # how sentencepiece writes the space before a word
_GROUP_CHARACTERS = 1 << 20  # of the texts that are held at once


@dataclass(frozen=True)
class Entity:
    """An entity of a text; for the strategy "none", a token of one.

    Args:
        entity_group: its type; for "none", the token's label, such as ``B-PER``.
        score: probability, 0 to 1; of a group, the mean of its tokens' (or words').
        word: its tokens as a text, normalised; ``text[start:end]`` is how it is written.
        start, end: its place in the text, in code points.
        index: for "none", the token's place in the text's row of ids, ``<s>`` being 0; else None.
    """

    entity_group: str
    score: float
    word: str
    start: int
    end: int
    index: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The dict that transformers' token-classification pipeline returns."""
        place = {"start": self.start, "end": self.end}
        if self.index is None:
            group = {"entity_group": self.entity_group, "score": self.score, "word": self.word}
            return group | place
        token = {"entity": self.entity_group, "score": self.score, "index": self.index}
        return token | {"word": self.word} | place


class EntityRecognizer:
    """Finds the entities of texts with a token classifier.

    >>> EntityRecognizer(model, tokenizer)("Sofia was born in Sofia.")
    [Entity(entity_group='PER', score=0.99, word='Sofia', start=0, end=5),
     Entity(entity_group='LOC', score=0.98, word='Sofia', start=18, end=23)]

    The strategies are those of transformers' token-classification pipeline. With "none" every token
    is an entity of its own. The others join neighbours of the same type until the next ``B-``: of
    tokens with "simple", of words with "first" (a word has the label of its first token), "average"
    (the label of the highest mean probability) and "max" (the label of its surest token).

    It differs from that pipeline in this:

    * A text beyond ``max_length`` is not cut off: it is run in windows that share ``stride``
      tokens, and each token is taken from the window that shows more of its surroundings. (The
      pipeline with a stride lets the entities of both windows compete.)
    * Words are the tokenizer's, or those that are given. The pipeline looks for the character
      U+0020 before a token, so that there a line break does not part words, an unknown character
      begins one, and the space piece before a Chinese or Thai word is one by itself.
    * ``word`` keeps the spaces between words for "first", "average" and "max".

    Args:
        model: its ``config.id2label`` names the labels; those without ``B-`` and ``I-`` count as
            ``I-``.
        ignore_labels: entities (or, for "none", labels) that are left out.
        max_length: tokens of a window, special tokens included; None takes the model's limit.
        stride: tokens that two windows share at most; None: a quarter of ``max_length``.
        batch_size: most windows a batch; a batch of long ones holds fewer.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        model: XLMRobertaForTokenClassification,
        tokenizer: XLMRobertaTokenizer,
        aggregation_strategy: Strategy = "simple",
        *,
        ignore_labels: Sequence[str] = ("O",),
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 32,
    ) -> None:
        if aggregation_strategy not in _STRATEGIES:
            raise ValueError(
                f"aggregation_strategy must be one of {', '.join(_STRATEGIES)}, "
                f"got {aggregation_strategy!r}"
            )
        if isinstance(ignore_labels, str):
            raise TypeError(
                f"ignore_labels must be a list of labels, got the str {ignore_labels!r}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.labels = label_names(model)
        self._strategy = aggregation_strategy
        self._ignored = frozenset(ignore_labels)
        self._room = check_max_length(model, max_length) - 2
        self._stride = check_stride(stride, self._room + 2)
        self._batch_size = batch_size

    @overload
    def __call__(self, inputs: str) -> list[Entity]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(
        self, inputs: Sequence[str], *, is_split_into_words: Literal[False] = ...
    ) -> list[list[Entity]]: ...
    @overload
    def __call__(
        self, inputs: Sequence[Any], *, is_split_into_words: bool, delimiter: str = ...
    ) -> list[Any]: ...
    def __call__(
        self, inputs: Any, *, is_split_into_words: bool = False, delimiter: str = " "
    ) -> list[Any]:
        """The entities of a text, or of each of several texts, in the order of the text.

        Args:
            inputs: a text or a list of texts; with ``is_split_into_words`` a list of words or a
                list of such lists, whose entities lie in the text ``delimiter.join(words)``.

        Raises:
            TypeError: what is given is neither.
            ArithmeticError: where the model answers with NaN or infinity.
        """
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            if is_split_into_words or not isinstance(inputs, str):
                expected = "a list of words" if is_split_into_words else "a text or a list of texts"
                raise TypeError(f"inputs must be {expected}, got {type(inputs).__name__}")
            return next(self.stream([inputs]))
        if not is_split_into_words:
            for number, text in enumerate(inputs, 1):
                if not isinstance(text, str):
                    raise TypeError(
                        f"text {number} must be a str, got {type(text).__name__} (lists of words "
                        "need is_split_into_words=True)"
                    )
            return list(self.stream(inputs))
        if inputs and isinstance(inputs[0], str):
            return next(self.stream([inputs], delimiter=delimiter))
        return list(self.stream(inputs, delimiter=delimiter))

    def stream(
        self, inputs: Iterable[str | Words], *, window: int = 1024, delimiter: str = " "
    ) -> Iterator[list[Entity]]:
        """The entities of each text as the texts come, in order.

        Args:
            inputs: texts, or lists of words, which make the text ``delimiter.join(words)``; it is
                consumed lazily.
            window: texts read ahead, to be sorted by length into batches; fewer of long ones.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not isinstance(delimiter, str):
            raise TypeError(f"delimiter must be a str, got {type(delimiter).__name__}")
        return self._stream(inputs, window, delimiter)

    def _stream(
        self, inputs: Iterable[str | Words], window: int, delimiter: str
    ) -> Iterator[list[Entity]]:
        checked = (_checked(item, number) for number, item in enumerate(inputs, 1))
        for group in groups(checked, window, _size, characters=_GROUP_CHARACTERS):
            rows = self._encode(group, delimiter)
            for row, scores in zip(rows, self._scores(rows), strict=True):
                yield self._entities(row, scores)

    def _encode(self, group: Sequence[str | Words], delimiter: str) -> list[_Row]:
        """The tokens of every text: one call of the tokenizer for all of them."""
        strings: dict[str, None] = {}
        for item in group:
            strings.update(dict.fromkeys([item] if isinstance(item, str) else item))
        encoded: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        if strings:
            columns = self.tokenizer(
                list(strings), add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            pairs = zip(columns["input_ids"], columns["offset_mapping"], strict=True)
            encoded.update(zip(strings, pairs, strict=True))
        rows = []
        for item in group:
            if isinstance(item, str):
                ids, spans = encoded[item]
                tokens = self.tokenizer.convert_ids_to_tokens(ids)
                rows.append(_Row(item, ids, spans, [token.startswith(_SPACE) for token in tokens]))
                continue
            row = _Row(delimiter.join(item), [], [], [])
            place = 0
            for word in item:
                ids, spans = encoded[word]
                row.ids.extend(ids)
                row.spans.extend((start + place, end + place) for start, end in spans)
                row.begins.extend(number == 0 for number in range(len(ids)))
                place += len(word) + len(delimiter)
            rows.append(row)
        check_vocabulary((row.ids for row in rows), int(self.model.config.vocab_size))
        return rows

    def _scores(self, rows: Sequence[_Row]) -> list[npt.NDArray[np.float64]]:
        """Probabilities [tokens, labels] of every row, each token's from one window."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        sequences, places = [], []
        for number, row in enumerate(rows):
            units = self._units(row)
            lengths = [end - start for start, end in pairwise(units)]
            for window in split_windows(lengths, self._room, self._stride):
                start, end, first, last = (units[unit] for unit in window)
                if first < last:
                    sequences.append([bos, *row.ids[start:end], eos])
                    places.append((number, start, first, last))
        scores = [np.empty((len(row.ids), len(self.labels))) for row in rows]
        answers = token_logits(self.model, sequences, batch_size=self._batch_size)
        for (number, start, first, last), logits in zip(places, answers, strict=True):
            decided = logits[first - start + 1 : last - start + 1].double()
            scores[number][first:last] = torch.softmax(decided, dim=-1).numpy()
        return scores

    def _units(self, row: _Row) -> list[int]:
        """Where a row may be cut: before words, and before every token of a long word."""
        longest = max(1, self._stride // 2)
        units = [0]
        for start, end in pairwise(row.words()):
            units.extend(range(start + 1, end) if end - start > longest else ())
            units.append(end)
        return units

    def _entities(self, row: _Row, scores: npt.NDArray[np.float64]) -> list[Entity]:
        tokens: list[str] = self.tokenizer.convert_ids_to_tokens(row.ids)
        unknown = self.tokenizer.unk_token_id
        for place, token in enumerate(row.ids):
            if token == unknown:
                start, end = row.spans[place]
                tokens[place] = row.text[start:end]
        alone = self._strategy == "none"
        labelled = self._labelled(row, scores)
        return [
            Entity(
                entity_group=label,
                score=score,
                word=(
                    tokens[first]
                    if alone
                    else self.tokenizer.convert_tokens_to_string(tokens[first:end])
                ),
                start=row.spans[first][0],
                end=row.spans[end - 1][1],
                index=first + 1 if alone else None,
            )
            for label, score, first, end in (labelled if alone else _grouped(labelled))
            if label not in self._ignored
        ]

    def _labelled(self, row: _Row, scores: npt.NDArray[np.float64]) -> Iterator[_Labelled]:
        """The label of every token or, as the strategy has it, of every word."""
        if not row.ids:
            return
        by_token = self._strategy in ("none", "simple")
        bounds = list(range(len(row.ids) + 1)) if by_token else row.words()
        answers = scores[bounds[:-1]]
        if self._strategy == "average":
            answers = np.add.reduceat(scores, bounds[:-1]) / np.diff(bounds)[:, None]
        elif self._strategy == "max":
            surest = scores.max(axis=1)
            answers = scores[
                [first + int(surest[first:end].argmax()) for first, end in pairwise(bounds)]
            ]
        best, top = answers.argmax(axis=1).tolist(), answers.max(axis=1).tolist()
        for label, score, (first, end) in zip(best, top, pairwise(bounds), strict=True):
            yield _Labelled(self.labels[label], score, first, end)


class _Row(NamedTuple):
    """A text as tokens, without ``<s>`` and ``</s>``: ids, spans, and whether one begins a word."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    begins: list[bool]

    def words(self) -> list[int]:
        """The tokens that begin words, and the number of tokens."""
        starts = [place for place, begins in enumerate(self.begins) if begins or place == 0]
        return [*starts, len(self.ids)]


class _Labelled(NamedTuple):
    """Tokens ``first`` to ``end`` (excluded) with one label."""

    label: str
    score: float
    first: int
    end: int


def _grouped(labelled: Iterable[_Labelled]) -> Iterator[_Labelled]:
    """Runs of one type, of which none but the first has ``B-``, with their mean scores."""
    run: list[_Labelled] = []
    for item in labelled:
        if run and (item.label.startswith("B-") or _kind(item.label) != _kind(run[0].label)):
            yield _joined(run)
            run = []
        run.append(item)
    if run:
        yield _joined(run)


def _joined(run: Sequence[_Labelled]) -> _Labelled:
    score = sum(item.score for item in run) / len(run)
    # The last part of a label of any scheme, as in transformers.
    return _Labelled(run[0].label.split("-", 1)[-1], score, run[0].first, run[-1].end)


def _kind(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _size(item: str | Words) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))


def _checked(item: Any, number: int) -> str | Words:
    if not isinstance(item, str | list | tuple) or not all(isinstance(word, str) for word in item):
        raise TypeError(
            f"text {number} must be a str or a list of words, each a str, "
            f"got {type(item).__name__} {str(item)[:60]}"
        )
    return item
