"""``pipeline(task, model)``: the tasks under Hugging Face's names, with its arguments and results.

Each pipeline is a thin wrapper of the object that does the work, which may as well be used itself:
:func:`xlmr_ext.prediction.predict`, :class:`xlmr_ext.EntityRecognizer`,
:class:`xlmr_ext.QuestionAnswerer`, :class:`xlmr_ext.ZeroShotClassifier`,
:class:`xlmr_ext.MaskFiller`. Their texts say how they differ from transformers, where they do.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.data import check_vocabulary
from xlmr_ext.masked_lm import XLMRobertaForMaskedLM
from xlmr_ext.modeling import XLMRobertaModel
from xlmr_ext.prediction import (
    classify,
    in_eval_mode,
    label_names,
    longest_input,
    packed_batches,
    single_texts,
    softmax,
    windows,
)
from xlmr_ext.tasks.entities import EntityRecognizer
from xlmr_ext.tasks.fill_mask import MaskFiller
from xlmr_ext.tasks.question_answerer import QuestionAnswerer
from xlmr_ext.tasks.registry import head_class, refuse_missing, task_of_architectures
from xlmr_ext.tasks.zero_shot import ZeroShotClassifier
from xlmr_ext.tokenization import XLMRobertaTokenizer

if TYPE_CHECKING:
    from xlmr_ext.prediction import Text
    from xlmr_ext.pretrained import PreTrainedModel

__all__ = ["Pipeline", "pipeline"]

_ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
# Arguments of transformers' that choose among ways to the same result.
_NO_EFFECT = ("framework", "num_workers", "padding", "trust_remote_code", "use_fast")
_BATCH_SIZE = 32
# Inputs sorted by length together: of a list, and batches of what is read as it goes.
_WINDOW = 1024
_WINDOW_BATCHES = 4


class Pipeline(ABC):
    """A model and its tokenizer, called with what is to be answered.

    A call with a str (or whatever one input of the task is) gives its result, one with a list or a
    tuple a list of results, and one with another iterable an iterator, which reads it as it goes.

    Args:
        batch_size: inputs run at once. A result does not depend on it.
        **options: of the calls, where they are not given there.

    Raises:
        TypeError: an option that the task does not have.
    """

    task: ClassVar[str]
    _options: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: Any,
        tokenizer: XLMRobertaTokenizer,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._batch_size = _BATCH_SIZE if batch_size is None else batch_size
        self._given = self._checked(options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The result of one input, or the results of several; see the class."""
        chosen = {**self._given, **self._checked(options)}
        batch_size = int(chosen.pop("batch_size", self._batch_size))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if self._is_one(inputs, chosen):
            return next(self._results([inputs], chosen, batch_size))
        if not isinstance(inputs, Iterable):
            raise TypeError(f"{self.task} takes a text or several, got {type(inputs).__name__}")
        results = self._results(inputs, chosen, batch_size)
        return list(results) if isinstance(inputs, list | tuple) else results

    def _is_one(self, inputs: Any, options: Mapping[str, Any]) -> bool:
        return isinstance(inputs, str | Mapping)

    @abstractmethod
    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        """The result of each input, in order."""

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in (*self._options, "batch_size", *_NO_EFFECT):
                raise TypeError(
                    f"{self.task} has no option {name!r}: expected one of "
                    f"{', '.join((*self._options, 'batch_size'))}"
                )
        return {name: value for name, value in options.items() if name not in _NO_EFFECT}

    def _tokenized(
        self, texts: Sequence[str], pairs: Sequence[str] | None, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Token ids of texts; ValueError for one that is too long and not to be cut."""
        limit = longest_input(self.model)
        truncation = options.get("truncation")
        max_length = options.get("max_length")
        if truncation not in (None, False, "do_not_truncate") and max_length is None:
            max_length = min(limit, self.tokenizer.model_max_length)
        columns = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=truncation,
            max_length=max_length,
            verbose=False,
        )
        sequences: list[list[int]] = columns["input_ids"]
        for text, sequence in zip(texts, sequences, strict=True):
            if len(sequence) > limit:
                raise ValueError(
                    f"the text {text[:40]!r} has {len(sequence)} tokens, and the model takes "
                    f"{limit}: pass truncation=True to have it cut"
                )
        check_vocabulary(sequences, int(self.model.config.vocab_size))
        return sequences


class TextClassificationPipeline(Pipeline):
    """A label for each text, or for each ``{"text": ..., "text_pair": ...}``.

    A result is ``{"label": ..., "score": ...}``; with ``top_k`` a list of that many of them (of all
    for None), the best first. Without ``top_k`` in its call, a single str gives its result within a
    list, as transformers has it.

    Options:
        top_k: number of labels, None for all.
        function_to_apply: "softmax", "sigmoid" or "none" (the logits); by default what the model's
            ``problem_type`` and number of labels ask for.
        return_all_scores: true, without ``top_k``: a list of all labels in the model's order, as
            transformers 4 had it.
        truncation, max_length: as the tokenizer has them. Without, a text that is too long is
            refused.
    """

    task = "text-classification"
    _options = ("top_k", "function_to_apply", "return_all_scores", "truncation", "max_length")

    def __call__(self, inputs: Any, **options: Any) -> Any:
        result = super().__call__(inputs, **options)
        return [result] if isinstance(inputs, str) and "top_k" not in options else result

    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        function = _lower(options.get("function_to_apply"), self._function())
        if function not in ("softmax", "sigmoid", "none"):
            raise ValueError(
                f"function_to_apply must be 'softmax', 'sigmoid' or 'none', got {function!r}"
            )
        labels = label_names(self.model)
        window = _window(inputs, batch_size)
        for rows in windows(map(_text_and_pair, inputs), window):
            pairs = None if rows[0][1] is None else [pair or "" for _, pair in rows]
            sequences = self._tokenized([text for text, _ in rows], pairs, options)
            for logits in classify(self.model, sequences, batch_size=batch_size).tolist():
                scores = _applied(function, logits)
                if options.get("return_all_scores") and "top_k" not in options:
                    yield [
                        {"label": label, "score": score}
                        for label, score in zip(labels, scores, strict=True)
                    ]
                    continue
                order = sorted(range(len(labels)), key=lambda index: -scores[index])
                found = [{"label": labels[index], "score": scores[index]} for index in order]
                yield found[: options["top_k"]] if "top_k" in options else found[0]

    def _function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        several = config.problem_type != "multi_label_classification" and config.num_labels > 1
        return "softmax" if several else "sigmoid"


class TokenClassificationPipeline(Pipeline):
    """The entities of texts: a list of dicts for each, see :meth:`xlmr_ext.tasks.entities.Entity`.

    Options:
        aggregation_strategy: "none" (the default: every token by itself), "simple", "first",
            "average" or "max".
        ignore_labels, stride: as :class:`xlmr_ext.EntityRecognizer` has them. A long text is never
            cut.
        is_split_into_words: inputs are lists of words.
        delimiter: what stands between words in the text that the places are of.
    """

    task = "token-classification"
    _options = (
        "aggregation_strategy",
        "ignore_labels",
        "stride",
        "is_split_into_words",
        "delimiter",
    )

    def __call__(self, inputs: Any, **options: Any) -> Any:
        words = {**self._given, **options}.get("is_split_into_words")
        if words and isinstance(inputs, list) and not all(isinstance(i, list) for i in inputs):
            inputs = [inputs]
        return super().__call__(inputs, **options)

    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        chosen = {name: options[name] for name in ("ignore_labels", "stride") if name in options}
        recognizer = EntityRecognizer(
            self.model,
            self.tokenizer,
            _lower(options.get("aggregation_strategy"), "none"),
            batch_size=batch_size,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        window = _window(inputs, batch_size)
        if not options.get("is_split_into_words"):
            inputs = single_texts(inputs)
        delimiter = options.get("delimiter")
        for entities in recognizer.stream(
            inputs, window=window, delimiter=" " if delimiter is None else delimiter
        ):
            yield [entity.as_dict() for entity in entities]


class QuestionAnsweringPipeline(Pipeline):
    """Answers to questions about contexts: ``{"score", "start", "end", "answer"}``.

    Called with ``question=`` and ``context=`` (lists of them for several), or with
    ``{"question": ..., "context": ...}`` or several of these, as transformers 4 had it (there a
    list of one was taken as that one). With ``top_k`` above 1 a result is a list of dicts.

    Options:
        top_k, handle_impossible_answer: see :class:`xlmr_ext.QuestionAnswerer`.
        max_seq_len (384), doc_stride (128), max_answer_len (15): its ``max_length``, ``doc_stride``
            and ``max_answer_length``.
        align_to_words: must be false: an answer begins and ends with a token.
    """

    task = "question-answering"
    _options = (
        "top_k",
        "handle_impossible_answer",
        "max_seq_len",
        "doc_stride",
        "max_answer_len",
        "align_to_words",
    )

    def __call__(
        self, inputs: Any = None, *, question: Any = None, context: Any = None, **options: Any
    ) -> Any:
        if inputs is None:
            inputs = _questions(question, context)
        elif question is not None or context is not None:
            raise TypeError("give either inputs or question and context")
        return super().__call__(inputs, **options)

    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        if options.get("align_to_words"):
            raise ValueError("align_to_words must be false: an answer begins and ends with a token")
        top_k = options.get("top_k", 1)
        answerer = QuestionAnswerer(
            self.model,
            self.tokenizer,
            max_length=options.get("max_seq_len"),
            doc_stride=options.get("doc_stride"),
            max_answer_length=options.get("max_answer_len", 15),
            top_k=top_k,
            handle_impossible_answer=options.get("handle_impossible_answer", False),
            batch_size=batch_size,
        )
        for answers in answerer.stream(map(_question_and_context, inputs)):
            found = [asdict(answer) for answer in answers]
            yield found if top_k > 1 else found[0]


class ZeroShotClassificationPipeline(Pipeline):
    """Any labels for texts: ``{"sequence", "labels", "scores"}``, the best label first.

    Options:
        candidate_labels: a list, or a str with commas between them.
        hypothesis_template, multi_label: see :class:`xlmr_ext.ZeroShotClassifier`.
        truncation: of no effect, as in transformers: a text that is too long is always cut, a
            label never.
    """

    task = "zero-shot-classification"
    _options = ("candidate_labels", "hypothesis_template", "multi_label", "truncation")

    def __call__(self, inputs: Any, candidate_labels: Any = None, **options: Any) -> Any:
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **options)

    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        if "candidate_labels" not in options:
            raise TypeError("zero-shot-classification needs candidate_labels")
        classifier = ZeroShotClassifier(self.model, self.tokenizer)
        return classifier.stream(
            inputs,
            **{name: value for name, value in options.items() if name != "truncation"},
            batch_size=batch_size,
            window=_window(inputs, batch_size),
        )


class FillMaskPipeline(Pipeline):
    """Words for the ``<mask>`` of texts: a list of ``{"score", "token", "token_str", "sequence"}``.

    A text with several masks has a list of such lists. A list of one text gives a list of one
    result; transformers gives that result.

    Options:
        top_k (5), targets: see :class:`xlmr_ext.MaskFiller`.
        truncation, max_length: as the tokenizer has them, also within ``tokenizer_kwargs``.
            Without, a text that is too long is refused.
    """

    task = "fill-mask"
    _options = ("top_k", "targets", "tokenizer_kwargs", "truncation", "max_length")

    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        tokenizing = {**options, **self._checked(options.get("tokenizer_kwargs") or {})}
        top_k = 5 if options.get("top_k") is None else int(options["top_k"])
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        filler = MaskFiller(self.model, self.tokenizer)
        targets = options.get("targets")
        ids = None if targets is None else filler.target_ids(targets)
        for rows in windows(single_texts(inputs), _window(inputs, batch_size)):
            texts = [text for text, _ in rows]
            sequences = self._tokenized(texts, None, tokenizing)
            filler.check_masks(texts, sequences)
            yield from filler.fill(sequences, top_k, ids, batch_size)


class FeatureExtractionPipeline(Pipeline):
    """The encoder's last hidden states of texts: a list [1][tokens][hidden_size] for each.

    One vector a text, pooled and normalised, is :class:`xlmr_ext.SentenceEncoder`'s.

    Options:
        return_tensors: true: tensors [1, tokens, hidden_size] instead.
        truncation, max_length: as the tokenizer has them, also within ``tokenize_kwargs``. Without,
            a text that is too long is refused.
    """

    task = "feature-extraction"
    _options = ("return_tensors", "tokenize_kwargs", "truncation", "max_length")

    def _results(
        self, inputs: Iterable[Any], options: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        tokenizing = {**options, **self._checked(options.get("tokenize_kwargs") or {})}
        for rows in windows(single_texts(inputs), batch_size):
            sequences = self._tokenized([text for text, _ in rows], None, tokenizing)
            found: dict[int, torch.Tensor] = {}
            with in_eval_mode(self.model):
                for places, batch in packed_batches(self.model, sequences, batch_size=batch_size):
                    states = self.model(packed=batch).last_hidden_state.cpu()
                    parts = states.split([len(sequences[place]) for place in places])
                    found.update(zip(places, parts, strict=True))
            for place in range(len(rows)):
                states = found[place][None]
                yield states.clone() if options.get("return_tensors") else states.tolist()


_PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind
    for kind in (
        TextClassificationPipeline,
        TokenClassificationPipeline,
        QuestionAnsweringPipeline,
        ZeroShotClassificationPipeline,
        FillMaskPipeline,
        FeatureExtractionPipeline,
    )
}
# What the models of a pipeline are trained for, in the registry's words; fill-mask's are language
# models, others take an encoder.
_HEADS = {
    "text-classification": "classification",
    "token-classification": "tokens",
    "question-answering": "qa",
    "zero-shot-classification": "classification",
}


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    *,
    tokenizer: str | os.PathLike[str] | XLMRobertaTokenizer | None = None,
    config: XLMRobertaConfig | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    device: Any = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline for a task, with the arguments and results of ``transformers.pipeline``.

    >>> pipeline("text-classification", "topics")("Der Zug nach Paris hat Verspätung.")
    [{'label': 'travel', 'score': 0.97}]

    Args:
        task: "text-classification" (or "sentiment-analysis"), "token-classification" ("ner"),
            "question-answering", "zero-shot-classification", "fill-mask", "feature-extraction".
            None: what the model's head is for.
        model: a directory, a hub name, or a model of this package. There is no default.
        tokenizer: the same; None takes what belongs to the model.
        config, revision, token, cache_dir, local_files_only, dtype, torch_dtype, device_map,
            model_kwargs: of ``from_pretrained``.
        device: where the model is put; -1 is the CPU. A checkpoint is packed for inference there
            alone (``optimize_for_inference``).
        **options: of the task, see its class, for all calls; and ``batch_size``.

    Raises:
        OSError: a file is not there or cannot be read.
        ValueError: an unknown task, or a checkpoint whose head is not trained for it.
        TypeError: a model of another task, or an option that the task does not have.
    """
    if model is None:
        raise ValueError("model must be given: a directory, a hub name or a model")
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else ""
    task = _task(task, model, hub)
    place = "cpu" if device == -1 else device
    if name:
        loaded = _loaded(
            task,
            name,
            **hub,
            **({} if config is None else {"config": config}),
            dtype=dtype,
            torch_dtype=torch_dtype,
            device_map=device_map if place is None else place,
            **(model_kwargs or {}),
        )
    else:
        loaded = _checked_model(task, model)
        if place is not None:
            loaded.to(place)
        # As transformers has it, a model knows where it came from.
        name = getattr(loaded, "name_or_path", "")
    if tokenizer is None and not name:
        raise ValueError("tokenizer must be given: the model does not tell where it came from")
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        tokenizer = XLMRobertaTokenizer.from_pretrained(
            name if tokenizer is None else tokenizer, **hub
        )
    return _PIPELINES[task](loaded, tokenizer, **options)


def _task(task: str | None, model: Any, hub: Mapping[str, Any]) -> str:
    """The canonical name of a task, or that of the model's head."""
    if task is not None:
        found = _ALIASES.get(task, task)
        if found not in _PIPELINES:
            known = ", ".join([*_PIPELINES, *_ALIASES])
            hint = "; use xlmr_ext.ChoiceAnswerer" if task == "multiple-choice" else ""
            raise ValueError(f"task must be one of {known}, got {task!r}{hint}")
        return found
    if isinstance(model, str | os.PathLike):
        names = XLMRobertaConfig.from_pretrained(model, **hub).architectures
    else:
        names = [kind.__name__ for kind in type(model).__mro__]
    if XLMRobertaForMaskedLM.__name__ in (names or ()):
        return FillMaskPipeline.task
    head = task_of_architectures(names)
    for name, its in _HEADS.items():
        if its == head:
            return name
    raise ValueError(
        f"task must be given, one of {', '.join(_PIPELINES)}: the model, {', '.join(names or ())}, "
        "does not tell it"
    )


def _class(task: str) -> type[PreTrainedModel]:
    if task == FillMaskPipeline.task:
        return XLMRobertaForMaskedLM
    return head_class(_HEADS[task]) if task in _HEADS else XLMRobertaModel


def _loaded(task: str, name: str, **options: Any) -> PreTrainedModel:
    kind = _class(task)
    if kind is XLMRobertaModel:
        options["add_pooling_layer"] = False
    model, loading = kind.from_pretrained(name, output_loading_info=True, **options)
    refuse_missing(loading["missing_keys"], f"{name} is not trained for {task}")
    # What is packed runs on the CPU.
    return model.optimize_for_inference() if model.device.type == "cpu" else model


def _checked_model(task: str, model: Any) -> PreTrainedModel:
    expected = _class(task)
    if not isinstance(model, expected):
        raise TypeError(
            f"model must be a name, a directory or an xlmr_ext.{expected.__name__} for {task}, got "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    return model


def _window(inputs: Iterable[Any], batch_size: int) -> int:
    """Inputs to be sorted by length together: few of those that are still to come."""
    return _WINDOW if isinstance(inputs, list | tuple) else _WINDOW_BATCHES * batch_size


def _lower(choice: Any, default: str) -> Any:
    """A name in any case, as transformers takes it; what is none is for others to refuse."""
    if choice is None:
        return default
    return choice.lower() if isinstance(choice, str) else choice


def _text_and_pair(given: Any) -> Text:
    if isinstance(given, str):
        return given
    if isinstance(given, Mapping) and set(given) <= {"text", "text_pair"} and "text" in given:
        pair = given.get("text_pair")
        text: Text = given["text"] if pair is None else (given["text"], pair)
        return text
    raise TypeError(
        'an input must be a text or {"text": ..., "text_pair": ...}, got '
        f"{type(given).__name__} {str(given)[:60]}"
    )


def _questions(question: Any, context: Any) -> Any:
    """{"question", "context"} of two str, or a list of them."""
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    questions = [question] if isinstance(question, str) else question
    if not isinstance(questions, list | tuple) or not isinstance(context, str | list | tuple):
        raise TypeError(
            "question and context must be texts or lists of texts, got "
            f"{type(question).__name__} and {type(context).__name__}"
        )
    contexts = [context] * len(questions) if isinstance(context, str) else context
    if len(contexts) != len(questions):
        raise ValueError(
            f"context has {len(contexts)} entries, expected one for each of the {len(questions)} "
            "questions"
        )
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]


def _question_and_context(given: Any) -> tuple[str, str]:
    if not isinstance(given, Mapping) or not {"question", "context"} <= set(given):
        raise TypeError(
            'an input must be {"question": ..., "context": ...}, got '
            f"{type(given).__name__} {str(given)[:60]}"
        )
    return given["question"], given["context"]


def _applied(function: str, logits: Sequence[float]) -> list[float]:
    if function == "none":
        return list(logits)
    if function == "sigmoid":
        return [
            1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in logits
        ]
    return softmax(logits)
