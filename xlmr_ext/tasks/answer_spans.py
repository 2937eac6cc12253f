"""Where answers stand: a context in overlapping windows of tokens, and the best span over them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xlmr_ext.data import DataError
from xlmr_ext.prediction import check_finite, in_eval_mode, packed_batches

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.squad import GoldAnswer, Question
    from xlmr_ext.tokenization import XLMRobertaTokenizer

Logits = NDArray[np.float64]

_SPECIALS = 4  # of <s> question </s></s> context </s>


@dataclass(frozen=True)
class Answer:
    """A span of a context.

    Args:
        score: see :class:`SpanSearch`, 0 to 1.
        start, end: ``context[start:end]``, in code points; 0 and 0 for no answer.
        answer: the text there; "" for no answer.
    """

    score: float
    start: int
    end: int
    answer: str


@dataclass(frozen=True)
class Context:
    """A context of n tokens; token i is ``text[starts[i] : ends[i]]``, no white space around it."""

    text: str
    ids: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def tokens_of(self, answer: GoldAnswer) -> tuple[int, int]:
        """First and last of the tokens that cover an answer; there must be a token."""
        start = answer.end - len(answer.text.lstrip())
        end = answer.start + len(answer.text.rstrip())
        # Several tokens may begin at one place: a letter that normalization makes longer, and
        # the token of a space, which has no text. The last one does.
        first = max(int(self.starts.searchsorted(start, side="right")) - 1, 0)
        last = min(int(self.ends.searchsorted(end)), len(self.ids) - 1)
        return first, max(first, last)


class Window(NamedTuple):
    """``size`` tokens of a context from token ``first`` on, at place ``offset`` of their row."""

    first: int
    size: int
    offset: int


class QuestionWindows:
    """Questions with their contexts as rows ``<s> question </s></s> part of the context </s>``.

    Args:
        max_length: tokens of a row at most.
        doc_stride: tokens that two neighbouring parts of a context share (transformers' ``stride``,
            not the step from one to the next); None: 128, or half of ``max_length`` if that is
            less.
    """

    def __init__(
        self, tokenizer: XLMRobertaTokenizer, *, max_length: int, doc_stride: int | None
    ) -> None:
        if doc_stride is None:
            doc_stride = min(128, max_length // 2)
        if not 0 <= doc_stride < max_length - _SPECIALS:
            raise ValueError(
                f"doc_stride must be from 0 to {max_length - _SPECIALS - 1}, as rows have "
                f"{max_length} tokens and {_SPECIALS} of them are special, got {doc_stride}"
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._doc_stride = doc_stride
        self._context: Context | None = None

    def context(self, text: str) -> Context:
        """The tokens of a context; one that comes again at once is not tokenized again."""
        if self._context is None or self._context.text != text:
            ids, places = self._tokenize(text)
            starts, ends = [], []
            for start, end in places:
                token = text[start:end]
                starts.append(end - len(token.lstrip()))
                ends.append(max(starts[-1], start + len(token.rstrip())))
            self._context = Context(text, ids, _int64(starts), _int64(ends))
        return self._context

    def rows(self, question: Question, context: Context) -> Iterator[tuple[list[int], Window]]:
        """The token ids of each window, in order.

        Raises:
            DataError: the context has no token with a text, or the question leaves no room for
                it; the message begins with ``question.where``.
        """
        asked, _ = self._tokenize(question.question.lstrip())
        total = len(context.ids)
        if not (context.starts < context.ends).any():
            raise DataError(f"{question.where}: the context {context.text[:40]!r} has no token")
        room = self._max_length - _SPECIALS - len(asked)
        if room < 1 or (room <= self._doc_stride and room < total):
            raise DataError(
                f"{question.where}: the question has {len(asked)} tokens, which leaves "
                f"{max(room, 0)} of {self._max_length} for a context of {total} and an overlap of "
                f"{self._doc_stride}; shorten it, raise max_length or lower doc_stride"
            )
        separator = int(self._tokenizer.sep_token_id)
        head = [int(self._tokenizer.cls_token_id), *asked, separator, separator]
        first, end = 0, 0
        while end < total:
            end = min(first + room, total)
            row = [*head, *context.ids[first:end], separator]
            yield row, Window(first, end - first, len(head))
            first += room - self._doc_stride

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # Truncated at a length that no text has: else a text longer than a row is warned of.
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            truncation=True,
            max_length=sys.maxsize,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        return encoded["input_ids"], encoded["offset_mapping"]


class SpanSearch:
    """The best spans of a context, from the logits of its windows in their order.

    Of every span of at most ``max_answer_length`` tokens within a window, exactly; the score is
    softmax(start logits)[first] * softmax(end logits)[last], each softmax over the context's tokens
    of all windows together. "No answer" has the logits of ``<s>`` in the window where their sum is
    least (Devlin et al. 2019, arXiv 1810.04805, section 4.3); where it is asked for, it takes part
    in both softmaxes. With one window these are the scores of transformers' former
    question-answering pipeline without its alignment to words.

    Args:
        count: spans to keep.
    """

    def __init__(self, context: Context, *, count: int, max_answer_length: int) -> None:
        self._context = context
        self._count = count
        self._longest = max_answer_length
        self._spans: dict[tuple[int, int], float] = {}  # (start, end) in code points: sum of logits
        self._totals = (-math.inf, -math.inf)  # log of the sum of exp(logits), start and end
        self._none = (math.inf, math.inf)

    def add(self, window: Window, start_logits: Logits, end_logits: Logits) -> None:
        """One more window: the logits of its row, [tokens of the row] each."""
        if start_logits[0] + end_logits[0] < sum(self._none):
            self._none = (float(start_logits[0]), float(end_logits[0]))
        place = slice(window.offset, window.offset + window.size)
        tokens = slice(window.first, window.first + window.size)
        start, end = start_logits[place], end_logits[place]
        self._totals = _log_add(self._totals, (log_sum_exp(start), log_sum_exp(end)))

        starts, ends = self._context.starts[tokens], self._context.ends[tokens]
        width = min(self._longest, window.size)
        # Row i: the spans from token i of 1, 2, ... tokens.
        scores = start[:, None] + _following(end, width, -math.inf)
        scores[_following(ends, width, 0) <= starts[:, None]] = -math.inf
        flat = scores.reshape(-1)
        order = [int(flat.argmax())] if self._count == 1 else np.argsort(-flat, kind="stable")
        found = 0
        for index in order:
            score = float(flat[index])
            if score == -math.inf or found == self._count:
                break
            first, more = divmod(int(index), width)
            span = (int(starts[first]), int(ends[first + more]))
            found += span not in self._spans
            self._spans[span] = max(score, self._spans.get(span, -math.inf))
        best = sorted(self._spans.items(), key=lambda item: (-item[1], item[0]))
        self._spans = dict(best[: self._count])

    def answers(self, *, none_allowed: bool, none_threshold: float = 0.0) -> list[Answer]:
        """The best first; of equal ones the earlier and shorter first.

        Args:
            none_allowed: "no answer" takes part too.
            none_threshold: "no answer" comes before another only where the sum of its logits is
                above the other's by more than this.
        """
        totals = self._totals
        if none_allowed:
            totals = _log_add(totals, self._none)
        candidates = [
            (total, Answer(math.exp(total - sum(totals)), *span, self._context.text[slice(*span)]))
            for span, total in self._spans.items()
        ]
        if none_allowed:
            none = sum(self._none)
            place = sum(total >= none - none_threshold for total, _ in candidates)
            candidates.insert(place, (none, Answer(math.exp(none - sum(totals)), 0, 0, "")))
        return [answer for _, answer in candidates[: self._count]]


def span_logits(
    model: PreTrainedModel, sequences: Iterable[Sequence[int]], *, batch_size: int
) -> Iterator[tuple[Logits, Logits]]:
    """Start and end logits of each row of token ids, in order; holds ``batch_size`` rows.

    Runs in eval mode without autograd and leaves the model in the mode it was in. ArithmeticError
    where a logit is not finite.
    """
    waiting = iter(sequences)
    while chunk := list(islice(waiting, batch_size)):
        yield from _logits_of(model, chunk, batch_size)


def _logits_of(
    model: PreTrainedModel, sequences: list[Sequence[int]], batch_size: int
) -> list[tuple[Logits, Logits]]:
    found: dict[int, tuple[Logits, Logits]] = {}
    with in_eval_mode(model):
        for rows, batch in packed_batches(model, sequences, batch_size=batch_size):
            output = model(packed=batch)
            start, end = (
                logits.to("cpu", torch.float64).numpy()
                for logits in (output.start_logits, output.end_logits)
            )
            bounds = batch.cu_seqlens.tolist()
            for place, row in enumerate(rows):
                part = slice(bounds[place], bounds[place + 1])
                found[row] = start[part], end[part]
    logits = [found[row] for row in range(len(sequences))]
    check_finite(torch.tensor([[start.sum(), end.sum()] for start, end in logits]))
    return logits


def _following(values: NDArray[Any], width: int, fill: float) -> NDArray[Any]:
    """[n] to [n, width]: each value and the ones that follow it, ``fill`` beyond the end."""
    padded = np.concatenate([values, np.full(width - 1, fill, values.dtype)])
    return np.lib.stride_tricks.sliding_window_view(padded, width)


def log_sum_exp(logits: Logits) -> float:
    """log(sum(exp(logits))), which does not overflow."""
    highest = float(logits.max())
    return highest + math.log(float(np.exp(logits - highest).sum()))


def _log_add(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """log(exp(x) + exp(y)) for both members."""
    first, second = (float(np.logaddexp(x, y)) for x, y in zip(a, b, strict=True))
    return first, second


def _int64(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
