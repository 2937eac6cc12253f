"""Zero-shot labels: transformers' pipeline on the same weights says the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaConfig, XLMRobertaForSequenceClassification, XLMRobertaTokenizer
from xlmr_ext.tasks import zero_shot
from xlmr_ext.tasks.zero_shot import ZeroShotClassifier, ZeroShotResult, parse_labels

TEXTS = [
    "The quick brown fox jumps over the lazy dog while seven wizards watch.",
    "Wir haben gestern in der Stadt ein neues Buch gekauft.",
    "a",
    "Le petit chat noir dort sous la table de la cuisine depuis ce matin. " * 4,
]
LABELS = ["books", "animals", "the kitchen table", "food", "city"]
XNLI = ["contradiction", "neutral", "entailment"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of inference, random, with logits that differ by several units."""
    path = tmp_path_factory.mktemp("nli")
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(path), model_max_length=64)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=30,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=37,
        max_position_embeddings=66,
        initializer_range=0.4,
        id2label=dict(enumerate(XNLI)),
    )
    torch.manual_seed(0)
    XLMRobertaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(folder: Path, names: list[str] = XNLI, **options: Any) -> ZeroShotClassifier:
    model = XLMRobertaForSequenceClassification.from_pretrained(
        folder, id2label=dict(enumerate(names)), ignore_mismatched_sizes=len(names) != 3
    )
    return ZeroShotClassifier(model, XLMRobertaTokenizer.from_pretrained(folder), **options)


def pipeline(folder: Path, names: list[str] = XNLI) -> Any:
    transformers = pytest.importorskip("transformers")
    model = transformers.XLMRobertaForSequenceClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)


def assert_same(found: list[ZeroShotResult], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["sequence"] == theirs["sequence"]
        assert ours["labels"] == theirs["labels"]
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("names", [XNLI, ["Entailment", "neutral", "contradiction"]])
@pytest.mark.parametrize("multi_label", [False, True])
def test_labels_and_scores_are_the_pipeline_s(
    folder: Path, multi_label: bool, names: list[str]
) -> None:
    ours, theirs = load(folder, names), pipeline(folder, names)
    for template in ("This example is {}.", "{} !"):
        expected = theirs(TEXTS, LABELS, hypothesis_template=template, multi_label=multi_label)
        found = ours(TEXTS, LABELS, hypothesis_template=template, multi_label=multi_label)
        assert_same(found, expected)
    # Random weights, yet not the same answer for everything.
    assert len({tuple(result["labels"]) for result in found}) > 1


def test_one_text_one_label_and_labels_in_a_string(folder: Path) -> None:
    ours, theirs = load(folder), pipeline(folder)
    assert_same([ours(TEXTS[0], LABELS)], [theirs(TEXTS[0], LABELS)])
    assert_same([ours(TEXTS[0], "animals")], [theirs(TEXTS[0], "animals")])
    assert_same(
        [ours(TEXTS[0], " books,animals , food,")], [theirs(TEXTS[0], " books,animals , food,")]
    )
    assert ours(TEXTS[0], ["animals"])["scores"][0] < 1  # scored against contradiction
    assert ours([TEXTS[0]], LABELS) == [ours(TEXTS[0], LABELS)]


def test_logits_are_the_pipeline_s_to_rounding(folder: Path) -> None:
    """The pairs' ids are the tokenizer's own, and so are the logits of each pair alone."""
    ours, theirs = load(folder), pipeline(folder)
    hypotheses = ours._hypotheses(LABELS, zero_shot.TEMPLATE)
    pairs = list(ours._pairs(ours._premises(TEXTS), hypotheses))
    assert len(pairs) == len(TEXTS) * len(LABELS)
    assert max(map(len, pairs)) == 64  # the last text is cut
    found = zero_shot.classify(ours.model, pairs, batch_size=128)
    for row, (text, label) in enumerate((text, label) for text in TEXTS for label in LABELS):
        expected = ours.tokenizer(
            text, f"This example is {label}.", truncation="only_first", max_length=64
        )
        assert pairs[row] == expected["input_ids"]
        with torch.no_grad():
            logits = theirs.model(torch.tensor([pairs[row]])).logits[0]
        assert found[row].tolist() == pytest.approx(logits.tolist(), rel=1e-5, abs=1e-5)


def test_the_text_s_end_is_kept_where_the_tokenizer_says_so(folder: Path) -> None:
    ours = load(folder)
    ours.tokenizer.truncation_side = "left"
    pairs = list(ours._pairs(ours._premises(TEXTS), ours._hypotheses(LABELS, zero_shot.TEMPLATE)))
    expected = ours.tokenizer(
        TEXTS[3], f"This example is {LABELS[0]}.", truncation="only_first", max_length=64
    )
    assert pairs[3 * len(LABELS)] == expected["input_ids"]


class Recorder:
    """A tokenizer that keeps the texts it was given."""

    def __init__(self, tokenizer: XLMRobertaTokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_all_pairs_are_one_batch_and_each_text_is_tokenized_once(folder: Path) -> None:
    ours = load(folder)
    batches: list[int] = []
    ours.model.register_forward_pre_hook(
        lambda _, __, kwargs: batches.append(kwargs["packed"].batch_size), with_kwargs=True
    )
    recorder: Any = Recorder(ours.tokenizer)
    ours.tokenizer = recorder
    ours(TEXTS, LABELS)
    assert batches == [len(TEXTS) * len(LABELS)]
    assert sorted(recorder.texts) == sorted(TEXTS + [f"This example is {x}." for x in LABELS])


def test_windows_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(folder)
    expected = ours(TEXTS * 3, LABELS)
    for pairs in (1, 3, 7, 40):
        monkeypatch.setattr(zero_shot, "_WINDOW_PAIRS", pairs)
        assert ours(TEXTS * 3, LABELS, batch_size=2) == expected
        assert list(ours.stream(TEXTS * 3, LABELS, window=2)) == expected


def test_a_stream_reads_no_further_than_it_must(folder: Path) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for text in TEXTS * 500:
            taken += 1
            yield text

    results = load(folder).stream(source(), [f"label {i}" for i in range(100)])
    assert taken == 0
    assert next(results)["sequence"] == TEXTS[0]
    assert taken == 10  # 1024 pairs of 100 labels


def test_equal_scores_keep_the_order_given(folder: Path) -> None:
    ours = load(folder)
    with torch.no_grad():
        ours.model.classifier.out_proj.weight.zero_()
    result = ours("a", LABELS)
    assert result["labels"] == LABELS
    assert result["scores"] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize(
    ("names", "entailment", "contradiction"),
    [
        (XNLI, 2, 0),
        (["entailment", "neutral", "contradiction"], 0, 2),
        (["ENTAILMENT", "not_entailment"], 0, 1),
        (["no", "entails"], 1, 0),
        (["neutral", "entailment", "contradiction"], 1, 2),
        (["a", "entailment", "b"], 1, 0),
    ],
)
def test_which_logits_count(
    folder: Path, names: list[str], entailment: int, contradiction: int
) -> None:
    ours = load(folder, names)
    assert (ours.entailment_id, ours.contradiction_id) == (entailment, contradiction)
    result = ours("fox", ["food"])
    ids = ours._hypotheses(["food"], zero_shot.TEMPLATE)
    pairs = list(ours._pairs(ours._premises(["fox"]), ids))
    logits = zero_shot.classify(ours.model, pairs, batch_size=1)[0].tolist()
    odds = math.exp(logits[entailment] - logits[contradiction])
    assert result["scores"] == [pytest.approx(odds / (1 + odds))]


def test_the_label_of_entailment_can_be_named(folder: Path) -> None:
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(
        ValueError, match=r"no label for entailment, its labels are LABEL_0, .*; name it with enta"
    ):
        load(folder, names)
    ours = load(folder, names, entailment_label="label_2")
    assert ours(TEXTS, LABELS) == load(folder)(TEXTS, LABELS)
    with pytest.raises(ValueError, match="the model has no label 'yes', its labels are LABEL_0"):
        load(folder, names, entailment_label="yes")


def test_bad_arguments(folder: Path) -> None:
    ours = load(folder)
    for labels in ([], "", " , "):
        with pytest.raises(ValueError, match="candidate_labels must hold at least one label"):
            ours("a", labels)
    with pytest.raises(TypeError, match=r"candidate_labels\[1\] must be a str, got int"):
        ours("a", ["x", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"'This is it' has no \{\} where"):
        ours("a", LABELS, hypothesis_template="This is it")
    for template in ("{} {}", "{label}", "{", "{0.x}"):
        with pytest.raises(ValueError, match=r"hypothesis_template .* cannot take a label"):
            ours("a", LABELS, hypothesis_template=template)
    with pytest.raises(ValueError, match=r"label 'fox fox .* leaves no room for a text in 64 tok"):
        ours("a", ["dog", "fox " * 40])
    with pytest.raises(TypeError, match="text 2 must be a str, got None"):
        ours(["a", None], LABELS)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must be an iterable of str"):
        ours.stream("a", LABELS)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ours("a", LABELS, batch_size=0)
    with pytest.raises(ValueError, match="max_length must be from 3 to 64"):
        load(folder, max_length=65)
    assert ours([], LABELS) == []
    with pytest.raises(ValueError, match="needs a model with a label besides entailment"):
        load(folder, ["entailment"])("a", LABELS, multi_label=True)


def test_labels_of_a_string() -> None:
    assert parse_labels(" a b ,c,, d") == ["a b", "c", "d"]
    assert parse_labels(("a,b", "c")) == ["a,b", "c"]
