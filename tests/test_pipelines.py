"""Pipelines beside those of transformers: the same weights, calls, shapes and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import twin
from tiny_heads import POSITIONS, TAGS, make_head
from xlmr_vocabulary import write_tiny_vocabulary

import xlmr_ext
from xlmr_ext import XLMRobertaTokenizer, pipeline
from xlmr_ext.tasks.entities import Entity

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Wir haben gestern in der Stadt ein neues Buch gekauft",
    "a",
    "今天天气很好，我们去公园散步。",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vocabulary(tmp_path_factory.mktemp("vocabulary")).parent


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(folder, model_max_length=POSITIONS - 2)


@pytest.fixture(scope="module")
def their_tokenizer(folder: Path) -> Any:
    return transformers.XLMRobertaTokenizer.from_pretrained(folder, model_max_length=POSITIONS - 2)


Both = Callable[..., tuple[Any, Any]]


@pytest.fixture
def both(tokenizer: XLMRobertaTokenizer, their_tokenizer: Any) -> Both:
    """Our pipeline and theirs on the same weights."""

    def build(task: str, model: Any, **options: Any) -> tuple[Any, Any]:
        return (
            pipeline(task, model=model, tokenizer=tokenizer, **options),
            transformers.pipeline(
                task, model=twin(model, torch.float32), tokenizer=their_tokenizer, **options
            ),
        )

    return build


def same(ours: Any, theirs: Any) -> None:
    """Equal in every type, key, order and text; numbers nearly."""
    if isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for name in theirs:
            same(ours[name], theirs[name])
    elif isinstance(theirs, list):
        assert type(ours) is list
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, str | int):
        assert ours == theirs
    else:
        assert type(ours) is float
        assert ours == pytest.approx(float(theirs), abs=2e-5)


# -- classification

PAIR = {"text": TEXTS[0], "text_pair": TEXTS[1]}


@pytest.mark.parametrize(
    "call",
    [
        (TEXTS[0], {}),
        (TEXTS, {}),
        (TEXTS[:1], {}),
        (TEXTS[0], {"top_k": 1}),
        (TEXTS[0], {"top_k": None}),
        (TEXTS, {"top_k": 2}),
        (TEXTS, {"top_k": 9, "batch_size": 2}),
        (PAIR, {}),
        ([PAIR, PAIR], {"top_k": None}),
        (TEXTS, {"function_to_apply": "sigmoid"}),
        (TEXTS[0], {"function_to_apply": "none", "top_k": None}),
        (TEXTS, {"function_to_apply": "NONE"}),
        (TEXTS[0], {"function_to_apply": None}),
        (TEXTS[0] * 9, {"truncation": True}),
        (TEXTS[0] * 9, {"truncation": True, "max_length": 12}),
        (TEXTS, {"padding": True, "truncation": True}),
    ],
)
def test_text_classification(both: Both, tokenizer: XLMRobertaTokenizer, call: Any) -> None:
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", ["x", "y", "z"])
    inputs, options = call
    ours, theirs = both("sentiment-analysis", model)
    same(ours(inputs, **options), theirs(inputs, **options))


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS])
def test_options_of_all_calls(both: Both, tokenizer: XLMRobertaTokenizer, inputs: Any) -> None:
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", ["x", "y", "z"])
    ours, theirs = both("text-classification", model, top_k=None, function_to_apply="sigmoid")
    same(ours(inputs), theirs(inputs))
    same(ours(inputs, top_k=1), theirs(inputs, top_k=1))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["x"], None),
        (["x"], "regression"),
        (["x", "y", "z"], "multi_label_classification"),
        (["x", "y"], "single_label_classification"),
    ],
)
def test_the_function_is_what_the_model_asks_for(
    both: Both, tokenizer: XLMRobertaTokenizer, labels: list[str], problem: str | None
) -> None:
    model = make_head(
        tokenizer, "XLMRobertaForSequenceClassification", labels, problem_type=problem
    )
    ours, theirs = both("text-classification", model)
    same(ours(TEXTS, top_k=None), theirs(TEXTS, top_k=None))


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_all_scores_as_in_version_4(tokenizer: XLMRobertaTokenizer, function: str) -> None:
    """In the model's order, and of a str within another list; ``top_k`` comes before it."""
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", ["x", "y", "z"])
    classify = pipeline(
        "text-classification", model, tokenizer=tokenizer, function_to_apply=function
    )
    every = classify(TEXTS, top_k=None)
    found = classify(TEXTS, return_all_scores=True)
    assert [[row["label"] for row in rows] for rows in found] == [["x", "y", "z"]] * len(TEXTS)
    assert [sorted(rows, key=lambda row: -row["score"]) for rows in found] == every
    assert classify(TEXTS[0], return_all_scores=True) == [found[0]]
    assert classify(TEXTS[0], return_all_scores=False) == [every[0][0]]
    assert classify(TEXTS, return_all_scores=True, top_k=1) == [rows[:1] for rows in every]


def test_a_text_too_long_is_cut_only_on_request(tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", ["x", "y"])
    classify = pipeline("text-classification", model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"tokens, and the model takes 88: pass truncation=True"):
        classify(TEXTS[0] * 9)
    assert len(classify([TEXTS[0] * 9], truncation=True)) == 1


@pytest.mark.parametrize(
    ("task", "kind", "labels", "options"),
    [
        ("text-classification", "XLMRobertaForSequenceClassification", ["x", "y"], {}),
        ("token-classification", "XLMRobertaForTokenClassification", TAGS, {"ignore_labels": []}),
        (
            "zero-shot-classification",
            "XLMRobertaForSequenceClassification",
            ["contradiction", "entailment"],
            {"candidate_labels": ["a", "dog"]},
        ),
        ("feature-extraction", "XLMRobertaModel", ["x", "y"], {}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_generator_is_answered_as_it_goes(
    tokenizer: XLMRobertaTokenizer,
    task: str,
    kind: str,
    labels: list[str],
    options: Any,
    batch_size: int,
) -> None:
    model = make_head(tokenizer, kind, labels)
    answer = pipeline(task, model, tokenizer=tokenizer, batch_size=batch_size, **options)
    read: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(40):
            read.append(number)
            yield TEXTS[number % len(TEXTS)]

    results = answer(texts())
    assert read == []
    first = next(results)
    assert 1 <= len(read) <= 4 * batch_size
    assert [first, *results] == answer(TEXTS * 10)


# -- entities


@pytest.mark.parametrize("strategy", [None, "none", "simple", "SIMPLE"])
@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS])
def test_token_classification(
    both: Both, tokenizer: XLMRobertaTokenizer, strategy: str | None, inputs: Any
) -> None:
    model = make_head(tokenizer, "XLMRobertaForTokenClassification", TAGS)
    ours, theirs = both("ner", model, aggregation_strategy=strategy)
    same(ours(inputs), theirs(inputs))


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_entities_are_the_recognizers(tokenizer: XLMRobertaTokenizer, strategy: Any) -> None:
    # Which is tested beside theirs, where words are the same for both.
    model = make_head(tokenizer, "XLMRobertaForTokenClassification", TAGS)
    find = pipeline("ner", model, tokenizer=tokenizer, aggregation_strategy=strategy)
    expected = xlmr_ext.EntityRecognizer(model, tokenizer, strategy)(TEXTS)
    assert [[Entity(**row) for row in rows] for rows in find(TEXTS)] == expected


def test_token_classification_options(both: Both, tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForTokenClassification", TAGS)
    ours, theirs = both("ner", model)
    same(ours(TEXTS[:2]), theirs(TEXTS[:2]))
    options: dict[str, Any] = {"ignore_labels": [], "aggregation_strategy": "simple"}
    same(ours(TEXTS[:2], **options), theirs(TEXTS[:2], **options))
    words = TEXTS[0].split()
    same(ours(words, is_split_into_words=True), theirs(words, is_split_into_words=True))
    lists = [words, TEXTS[1].split()]
    for delimiter in (None, "--"):
        more = {"is_split_into_words": True, "delimiter": delimiter}
        same(ours(lists, **more), theirs(lists, **more))


def test_a_long_text_has_entities_to_its_end(tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForTokenClassification", TAGS)
    text = " ".join(TEXTS[:2] * 9)
    found = pipeline("ner", model, tokenizer=tokenizer, stride=8, ignore_labels=[])(text)
    assert found[-1]["end"] == len(text)


# -- answers


def test_question_answering_in_the_shapes_of_version_4(tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForQuestionAnswering", ["a", "b"])
    answer = pipeline("question-answering", model, tokenizer=tokenizer)
    context = " ".join(TEXTS[:2] * 3)
    one = answer(question="Wer?", context=context)
    assert list(one) == ["score", "start", "end", "answer"]
    assert one["answer"] == context[one["start"] : one["end"]]
    expected = xlmr_ext.QuestionAnswerer(
        model, tokenizer, max_length=88, doc_stride=44, max_answer_length=15
    )("Wer?", context)
    assert tuple(one.values()) == (expected.score, expected.start, expected.end, expected.answer)
    assert answer({"question": "Wer?", "context": context}) == one
    several = answer(question=["Wer?", "a?"], context=context)
    assert several[0] == one
    assert several == answer([{"question": q, "context": context} for q in ("Wer?", "a?")])
    assert several == answer(question=("Wer?", "a?"), context=[context, context])
    best = answer(question="Wer?", context=context, top_k=3)
    assert [len(best), best[0]] == [3, one]
    short = answer(question="Wer?", context=context, max_answer_len=1, max_seq_len=30, doc_stride=4)
    assert len(short["answer"]) <= 12
    none = answer(question="Wer?", context=context, handle_impossible_answer=True, top_k=9999)
    assert "" in [row["answer"] for row in none]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"question": "a"}, TypeError, "question and context must be texts or lists of texts"),
        ({"question": ["a"], "context": ["b", "c"]}, ValueError, "context has 2 entries"),
        ({"inputs": "a"}, TypeError, '{"question": ..., "context": ...}, got str a'),
        ({"inputs": {"question": "a", "context": "b"}, "context": "c"}, TypeError, "either inputs"),
        (
            {"question": "a", "context": "b", "align_to_words": True},
            ValueError,
            "align_to_words must be false",
        ),
        ({"question": "a", "context": "b", "topk": 2}, TypeError, "has no option 'topk'"),
    ],
)
def test_bad_questions(
    tokenizer: XLMRobertaTokenizer, arguments: Any, error: type[Exception], message: str
) -> None:
    model = make_head(tokenizer, "XLMRobertaForQuestionAnswering", ["a", "b"])
    answer = pipeline("question-answering", model, tokenizer=tokenizer)
    with pytest.raises(error, match=message.replace("{", r"\{").replace("(", r"\(")):
        answer(arguments.pop("inputs", None), **arguments)


# -- labels of choice


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS[:1], TEXTS])
def test_zero_shot_classification(
    both: Both, tokenizer: XLMRobertaTokenizer, multi_label: bool, inputs: Any
) -> None:
    labels = ["contradiction", "neutral", "entailment"]
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", labels)
    ours, theirs = both("zero-shot-classification", model)
    same(
        ours(inputs, ["fox", "Buch", "a"], multi_label=multi_label),
        theirs(inputs, ["fox", "Buch", "a"], multi_label=multi_label),
    )
    options = {"candidate_labels": "dog, chat", "hypothesis_template": "Das ist {}."}
    same(ours(inputs, **options), theirs(inputs, **options))
    long = {"candidate_labels": ["fox"], "truncation": True}
    same(ours(TEXTS[0] * 9, **long), theirs(TEXTS[0] * 9, **long))
    with pytest.raises(TypeError, match="needs candidate_labels"):
        ours(inputs)


# -- hidden states


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS])
def test_feature_extraction(both: Both, tokenizer: XLMRobertaTokenizer, inputs: Any) -> None:
    model = make_head(tokenizer, "XLMRobertaModel", ["x", "y"])
    ours, theirs = both("feature-extraction", model)
    same(ours(inputs), theirs(inputs))
    options = {"tokenize_kwargs": {"truncation": True, "max_length": 6}}
    same(ours(inputs, **options), theirs(inputs, **options))
    found = ours(inputs, return_tensors=True)
    expected = theirs(inputs, return_tensors=True)
    for one, other in zip(
        *([x] if isinstance(inputs, str) else x for x in (found, expected)), strict=True
    ):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


# -- making one


def test_from_a_folder(tokenizer: XLMRobertaTokenizer, tmp_path: Path) -> None:
    labels = ["contradiction", "neutral", "entailment"]
    for kind, task in (
        ("XLMRobertaForSequenceClassification", "text-classification"),
        ("XLMRobertaForTokenClassification", "token-classification"),
        ("XLMRobertaForQuestionAnswering", "question-answering"),
        ("XLMRobertaForMaskedLM", "fill-mask"),
    ):
        folder = tmp_path / kind
        model = make_head(tokenizer, kind, labels[: 2 if "Question" in kind else 3])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # The head tells the task, and a model knows where it came from.
        for made in (
            pipeline(model=folder),
            pipeline(task, str(folder), device=-1),
            pipeline(model=type(model).from_pretrained(folder)),
            pipeline(task, model, tokenizer=folder, device="cpu"),
        ):
            assert made.task == task
            assert made.device == torch.device("cpu")
            if task != "question-answering":
                text = "The quick <mask> fox" if task == "fill-mask" else TEXTS[0]
                assert made(text) == pipeline(task, model, tokenizer=tokenizer)(text)
    features = pipeline("feature-extraction", tmp_path / "XLMRobertaForSequenceClassification")
    assert len(features("fox")[0][0]) == 24


def test_what_cannot_be_made(tokenizer: XLMRobertaTokenizer, tmp_path: Path) -> None:
    classifier = make_head(tokenizer, "XLMRobertaForSequenceClassification", ["x", "y"])
    encoder = make_head(tokenizer, "XLMRobertaModel", ["x", "y"])
    encoder.save_pretrained(tmp_path)
    known = (
        "text-classification, token-classification, question-answering, "
        "zero-shot-classification, fill-mask, feature-extraction, sentiment-analysis, ner"
    )
    with pytest.raises(ValueError, match=f"task must be one of {known}, got 'summarization'"):
        pipeline("summarization", classifier)
    with pytest.raises(ValueError, match=r"use xlmr_ext\.ChoiceAnswerer"):
        pipeline("multiple-choice", classifier)
    with pytest.raises(ValueError, match="model must be given"):
        pipeline("ner")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        pipeline("text-classification", classifier)
    with pytest.raises(TypeError, match=r"xlmr_ext\.XLMRobertaForTokenClassification for token-cl"):
        pipeline("ner", classifier, tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"got transformers\."):
        pipeline("text-classification", twin(classifier, torch.float32), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="is not trained for token-classification: it lacks 2"):
        pipeline("ner", tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"task must be given, one of .*XLMRobertaModel"):
        pipeline(model=tmp_path)
    with pytest.raises(TypeError, match="text-classification has no option 'return_every_score'"):
        pipeline("text-classification", classifier, tokenizer=tokenizer, return_every_score=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (((3,), {}), TypeError, "takes a text or several, got int"),
        ((([["a", "b"]],), {}), TypeError, "an input must be a text or"),
        ((("a",), {"function_to_apply": "tanh"}), ValueError, "'sigmoid' or 'none', got 'tanh'"),
        ((("a",), {"batch_size": 0}), ValueError, "batch_size must be at least 1"),
        ((("a",), {"stride": 0}), TypeError, "has no option 'stride'"),
    ],
)
def test_bad_calls(
    tokenizer: XLMRobertaTokenizer, call: Any, error: type[Exception], message: str
) -> None:
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", ["x", "y"])
    classify = pipeline("text-classification", model, tokenizer=tokenizer)
    with pytest.raises(error, match=message):
        classify(*call[0], **call[1])
