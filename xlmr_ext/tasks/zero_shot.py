"""Labels that a model was never trained on, by natural-language inference.

Yin et al. 2019, "Benchmarking zero-shot text classification" (arXiv 1909.00161): the text is the
premise, "This example is LABEL." the hypothesis, and the label fits where the premise entails it.
Arguments, results and numbers are those of transformers' zero-shot-classification pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypedDict, overload

from xlmr_ext.data import check_vocabulary
from xlmr_ext.prediction import check_max_length, classify, single_texts, softmax, windows
from xlmr_ext.tasks.hypotheses import TEMPLATE, fill_template, parse_labels

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["ZeroShotClassifier", "ZeroShotResult", "parse_labels"]

# Pairs of texts and labels that are held at once.
_WINDOW_PAIRS = 1024
# <s> A </s></s> B </s>
_SPECIAL_TOKENS = 4


class ZeroShotResult(TypedDict):
    """A text with the candidate labels, the most probable first, and their probabilities."""

    sequence: str
    labels: list[str]
    scores: list[float]


class ZeroShotClassifier:
    """Scores any labels for a text with a model of natural-language inference.

    Args:
        model: a sequence classifier with a label for entailment.
        tokenizer: the one that belongs to it.
        entailment_label: the name of that label; None: the first whose name begins with "entail",
            in any case.
        max_length: tokens a pair is cut to, by its text; None takes the shorter of what the model
            and the tokenizer take.

    Raises:
        ValueError: the model has no such label, or an argument is out of range.

    The label against which entailment is weighed with ``multi_label`` is the one whose name begins
    with "contradict", or, where there is none, as in transformers, label 0, or the last one where
    label 0 is entailment. (transformers does not look at that label's name.)
    """

    def __init__(
        self,
        model: XLMRobertaForSequenceClassification,
        tokenizer: XLMRobertaTokenizer,
        *,
        entailment_label: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        self.entailment_id = _entailment(names, entailment_label)
        self.contradiction_id = _contradiction(names, self.entailment_id)
        self.max_length = (
            min(check_max_length(model, None), tokenizer.model_max_length)
            if max_length is None
            else check_max_length(model, max_length)
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str
        self,
        texts: str,
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        *,
        batch_size: int = ...,
    ) -> ZeroShotResult: ...
    @overload
    def __call__(
        self,
        texts: Iterable[str],
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        *,
        batch_size: int = ...,
    ) -> list[ZeroShotResult]: ...
    def __call__(
        self,
        texts: str | Iterable[str],
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = TEMPLATE,
        multi_label: bool = False,
        *,
        batch_size: int = 128,
    ) -> ZeroShotResult | list[ZeroShotResult]:
        """Scores labels for a text, or for each of several.

        Args:
            texts: one text, or several.
            candidate_labels: a list, or a str with commas between them.
            hypothesis_template: holds ``{}`` where the label goes.
            multi_label: score each label by itself (softmax of entailment and contradiction)
                instead of all against each other (softmax of their entailment). A single label is
                always scored by itself.
            batch_size: most pairs of a text and a label a batch.

        Returns:
            A dict with ``sequence``, ``labels`` and ``scores``, the best label first and equal ones
            in the order given; a list of them for several texts.

        Raises:
            TypeError: a text or a label is not a str.
            ValueError: there is no label, the template has no place for it, or a hypothesis leaves
                no room for the text.
            ArithmeticError: where the model answers with NaN or infinity.
        """
        single = isinstance(texts, str)
        results = self.stream(
            [texts] if isinstance(texts, str) else texts,
            candidate_labels,
            hypothesis_template,
            multi_label,
            batch_size=batch_size,
        )
        return next(results) if single else list(results)

    def stream(
        self,
        texts: Iterable[str],
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = TEMPLATE,
        multi_label: bool = False,
        *,
        batch_size: int = 128,
        window: int = _WINDOW_PAIRS,
    ) -> Iterator[ZeroShotResult]:
        """The result of each text as they come, in order and in constant memory.

        Args:
            window: most texts that are read ahead; never more than make 1024 pairs.

        The other arguments and the errors are those of a call.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, got a str")
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        labels = parse_labels(candidate_labels)
        if (multi_label or len(labels) == 1) and self.contradiction_id == self.entailment_id:
            raise ValueError("multi_label needs a model with a label besides entailment")
        hypotheses = self._hypotheses(labels, hypothesis_template)
        window = max(1, min(window, _WINDOW_PAIRS // len(labels)))
        return self._stream(texts, labels, hypotheses, multi_label, batch_size, window)

    def _stream(
        self,
        texts: Iterable[str],
        labels: list[str],
        hypotheses: list[list[int]],
        multi_label: bool,
        batch_size: int,
        window: int,
    ) -> Iterator[ZeroShotResult]:
        for rows in windows(single_texts(texts), window):
            group = [text for text, _ in rows]
            pairs = self._pairs(self._premises(group), hypotheses)
            logits: list[tuple[float, float]] = []
            while sequences := list(islice(pairs, _WINDOW_PAIRS)):
                found = classify(self.model, sequences, batch_size=batch_size)
                chosen = found[:, [self.contradiction_id, self.entailment_id]]
                logits += [(against, entails) for against, entails in chosen.tolist()]
            for index, text in enumerate(group):
                own = logits[index * len(labels) : (index + 1) * len(labels)]
                yield _result(text, labels, own, multi_label)

    def _hypotheses(self, labels: list[str], template: str) -> list[list[int]]:
        """Token ids of the hypothesis of each label, without special tokens."""
        texts = fill_template(template, labels)
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        check_vocabulary(ids, self.model.config.vocab_size)
        for label, tokens in zip(labels, ids, strict=True):
            if len(tokens) + _SPECIAL_TOKENS > self.max_length:
                raise ValueError(
                    f"the hypothesis of label {label[:60]!r} has {len(tokens)} tokens, which "
                    f"leaves no room for a text in {self.max_length} tokens"
                )
        return ids

    def _premises(self, texts: list[str]) -> list[list[int]]:
        """Token ids of the texts without special tokens, as many as could ever be needed."""
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=self.max_length
        )["input_ids"]
        check_vocabulary(ids, self.model.config.vocab_size)
        return ids

    def _pairs(self, premises: list[list[int]], hypotheses: list[list[int]]) -> Iterator[list[int]]:
        """``<s> A </s></s> B </s>`` of every premise with every hypothesis; A is cut, never B."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        keeps_end = self.tokenizer.truncation_side == "left"
        for premise in premises:
            for hypothesis in hypotheses:
                room = self.max_length - _SPECIAL_TOKENS - len(hypothesis)
                first = max(0, len(premise) - room) if keeps_end else 0
                cut = premise[first : first + room]
                yield [start, *cut, end, end, *hypothesis, end]


def _entailment(names: list[str], wanted: str | None) -> int:
    for index, name in enumerate(names):
        if name.lower() == wanted.lower() if wanted is not None else _begins(name, "entail"):
            return index
    what = "label for entailment" if wanted is None else f"label {wanted!r}"
    hint = "; name it with entailment_label" if wanted is None else ""
    raise ValueError(f"the model has no {what}, its labels are {', '.join(names[:20])}{hint}")


def _contradiction(names: list[str], entailment: int) -> int:
    named = [index for index, name in enumerate(names) if _begins(name, "contradict")]
    if named and named[0] != entailment:
        return named[0]
    return len(names) - 1 if entailment == 0 else 0


def _begins(name: str, start: str) -> bool:
    return name.lower().startswith(start)


def _result(
    text: str, labels: list[str], logits: list[tuple[float, float]], multi_label: bool
) -> ZeroShotResult:
    """The scores of one text from its labels' logits (against, for entailment)."""
    if multi_label or len(labels) == 1:
        scores = [softmax(pair)[1] for pair in logits]
    else:
        scores = softmax([entails for _, entails in logits])
    order = sorted(range(len(labels)), key=lambda index: -scores[index])
    return {
        "sequence": text,
        "labels": [labels[index] for index in order],
        "scores": [scores[index] for index in order],
    }
