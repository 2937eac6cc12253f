"""Streaming prediction and evaluation, on a stub model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stub_classifier import StubClassifier, StubTokenizer

from xlmr_ext import prediction
from xlmr_ext.data import LabelledTexts
from xlmr_ext.prediction import evaluate, predict


def trained() -> StubClassifier:
    """Answers ``even`` or ``odd`` by the number of a one-word text, surely."""
    model = StubClassifier(hidden=4)
    model.config.id2label = {0: "even", 1: "odd"}
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        words = model.roberta.embeddings.word_embeddings.weight
        words.zero_()
        words[4::2, 0] = 9.0
        words[5::2, 1] = 9.0
        model.classifier.weight.copy_(torch.eye(2, 4) * 3)
        model.classifier.bias.zero_()
    return model


def labels(model: Any, texts: Any, **options: Any) -> list[str]:
    return [answer.label for answer in predict(model, StubTokenizer(), texts, **options)]  # type: ignore[arg-type]


def test_order_is_kept_whatever_the_lengths() -> None:
    numbers = [10 + (37 * index) % 89 for index in range(200)]
    texts = [f"w{number} " * (1 + index * 7 % 13) for index, number in enumerate(numbers)]
    expected = [("even", "odd")[number % 2] for number in numbers]
    for window in (1, 7, 1024):
        answers = list(predict(trained(), StubTokenizer(), texts, window=window, batch_size=8))  # type: ignore[arg-type]
        assert [answer.label for answer in answers] == expected
        assert [answer.text for answer in answers] == texts


def test_scores_are_the_softmax_of_the_logits() -> None:
    answer = next(predict(trained(), StubTokenizer(), ["w10"]))  # type: ignore[arg-type]
    # The mean over <s>, the word and </s> has 3.0 at the place of its class.
    assert answer.score == answer.scores["even"] == pytest.approx(1 / (1 + math.exp(-9.0)))
    assert list(answer.scores) == ["even", "odd"]
    assert sum(answer.scores.values()) == pytest.approx(1.0)


def test_reads_no_further_than_a_window() -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for index in range(1000):
            taken += 1
            yield f"w{10 + index % 80}"

    answers = predict(trained(), StubTokenizer(), source(), window=16)  # type: ignore[arg-type]
    assert taken == 0
    for index in range(100):
        next(answers)
        assert taken == 16 * (index // 16 + 1)


def test_windows_and_batches_are_bounded_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_WINDOW_CHARACTERS", 100)
    monkeypatch.setattr(prediction, "_BATCH_TOKENS", 40)
    model = trained()
    texts = ["w10 " * 10] * 7 + ["w11"] * 20 + ["w12 " * 30]
    assert labels(model, texts) == ["even"] * 7 + ["odd"] * 20 + ["even"]
    assert all(len(batch) * max(batch) <= 40 for batch in model.batches)
    assert max(sum(batch) for batch in model.batches) > 20
    assert [12, 12] in model.batches


def test_pairs_go_to_the_tokenizer_together() -> None:
    answers = list(predict(trained(), StubTokenizer(), [("w10", "w12"), "w11", ("w13", "w15")]))  # type: ignore[arg-type]
    assert [(answer.label, answer.text, answer.pair) for answer in answers] == [
        ("even", "w10", "w12"),
        ("odd", "w11", None),
        ("odd", "w13", "w15"),
    ]


def test_nothing_in_nothing_out_and_empty_texts() -> None:
    assert labels(trained(), []) == []
    assert len(labels(trained(), ["", "w11", ""])) == 3


def test_texts_are_cut_to_max_length() -> None:
    model = trained()
    labels(model, ["w10 " * 100])
    labels(model, ["w10 " * 100], max_length=5)
    assert model.batches == [[32], [5]]


def test_the_model_keeps_its_mode_and_records_no_gradient() -> None:
    model = trained().train()
    answers = predict(model, StubTokenizer(), ["w10"] * 3, window=1)  # type: ignore[arg-type]
    next(answers)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert next(answers).label == "even"


def test_an_answer_that_is_not_finite_is_an_error() -> None:
    model = trained()
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[20] = math.nan
    with pytest.raises(ArithmeticError, match=r"row 2 of 3 is not finite \(\[nan, nan\]\)"):
        labels(model, ["w10", "w20", "w11"])


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["w10", 3], {}, TypeError, "text 2 must be a str or a tuple of two str, got int"),
        (["w300"], {}, ValueError, "token id 300 is outside the model's vocabulary of 300"),
        ([], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ([], {"window": 0}, ValueError, "window must be at least 1, got 0"),
        ([], {"max_length": 33}, ValueError, "max_length must be from 3 to 32"),
    ],
)
def test_bad_arguments_are_named(
    texts: Any, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        labels(trained(), texts, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 1}, "with num_labels 1"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"id2label": {0: "a", 1: "a"}}, "must differ from each other"),
    ],
)
def test_models_that_answer_otherwise_are_refused(change: dict[str, Any], message: str) -> None:
    model = trained()
    vars(model.config).update(change)
    with pytest.raises(ValueError, match=message):
        predict(model, StubTokenizer(), [])  # type: ignore[arg-type]


def test_evaluate_counts_and_scores() -> None:
    data = LabelledTexts(["w10", "w11", "w12", "w13"], ["even", "odd", "odd", "odd"])
    result = evaluate(trained(), StubTokenizer(), data)  # type: ignore[arg-type]
    assert result.confusion == [[1, 0], [1, 2]]
    assert result.rows == 4
    assert result.accuracy == 0.75
    assert result.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    # Three answers are right by 9 nats, one is wrong by as much.
    assert result.loss == pytest.approx((9.0 + 4 * math.log1p(math.exp(-9.0))) / 4)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(trained(), StubTokenizer(), LabelledTexts([], []))  # type: ignore[arg-type]
