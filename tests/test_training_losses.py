"""Smoothed labels, weighted classes and learning rates by layer."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_classifier import StubClassifier
from stub_runs import rows, run
from tiny_heads import TAGS, make_head
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.data import LabelledTexts, packed
from xlmr_ext.optim import linear_schedule, parameter_groups
from xlmr_ext.tasks.choice import ChoiceQuestion
from xlmr_ext.tasks.classification import ClassificationTask
from xlmr_ext.tasks.iob2 import TaggedSentences
from xlmr_ext.tasks.tokens import TokenTask
from xlmr_ext.tasks.weighting import LabelWeighting
from xlmr_ext.training import finetune

OPTIONS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1, "class_weights": None},
    {"label_smoothing": 0.0, "class_weights": (0.5, 2.0, 1.0, 3.0, 0.25)},
    {"label_smoothing": 0.2, "class_weights": (0.5, 2.0, 1.0, 3.0, 0.25)},
    {"label_smoothing": 0.0, "class_weights": "balanced"},
]
LABELS = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path))


def balanced(labels: list[int]) -> tuple[float, ...]:
    present = set(labels)
    return tuple(
        len(labels) / (len(present) * labels.count(label)) if label in present else 1.0
        for label in range(5)
    )


def by_hand(
    logits: torch.Tensor, labels: list[int], smoothing: float, weights: Any
) -> torch.Tensor:
    """The loss written out, in float64; -100 does not count."""
    logits = logits.double().log_softmax(-1)
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        own = 1.0 if weights is None else weights[label]
        total = total - (1 - smoothing) * own * row[label]
        for other in range(len(row)):
            spread = 1.0 if weights is None else weights[other]
            total = total - smoothing / len(row) * spread * row[other]
        weight += own
    return total / weight


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["classification", "tokens"])
def test_loss_and_gradient_are_those_of_torch(
    tokenizer: XLMRobertaTokenizer, kind: str, options: dict[str, Any]
) -> None:
    if kind == "tokens":
        model = make_head(tokenizer, "XLMRobertaForTokenClassification", TAGS)
        task: Any = TokenTask(model, tokenizer, max_length=32)
        data: Any = TaggedSentences.of(
            [
                (["Anna", "fuhr", "nach", "Paris"], ["B-PER", "O", "O", "B-LOC"]),
                (["Das", "Buch"], ["O", "O"]),
            ]
        )
    else:
        model = make_head(tokenizer, "XLMRobertaForSequenceClassification", LABELS)
        task = ClassificationTask(model, tokenizer, max_length=32)
        data = LabelledTexts.of([("Anna", "ant"), ("fuhr nach", "cat"), ("das Buch", "cat")])
    task.settle(data)
    features = task.features(data, training=True)
    task.weigh(features, **options)
    batch = packed(features.sequences, range(len(features)), pad_token_id=1)
    loss = task.loss(model, batch, features.targets)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    flat = features.targets if kind == "classification" else chain(*features.targets)
    labels = torch.tensor(list(flat))
    counted = [label for label in labels.tolist() if label != -100]
    weights = options["class_weights"]
    weights = balanced(counted) if weights == "balanced" else weights
    logits = model(packed=batch).logits
    expected = F.cross_entropy(
        logits,
        labels,
        weight=None if weights is None else torch.tensor(weights),
        label_smoothing=options["label_smoothing"],
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert len(ours) > 30
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=0)
    written_out = by_hand(logits.detach(), labels.tolist(), options["label_smoothing"], weights)
    assert float(loss.detach()) == pytest.approx(float(written_out), rel=1e-5)
    assert task.items(features.targets) == pytest.approx(
        len(counted) if weights is None else sum(weights[label] for label in counted)
    )


def test_options_that_are_not_given_leave_the_model_s_own_loss() -> None:
    task = ClassificationTask(StubClassifier(), None, max_length=16)  # type: ignore[arg-type]
    features = type("F", (), {"targets": [0, 1]})()
    task.labels = ["ant", "bee"]
    task.weigh(features, label_smoothing=0.1, class_weights=None)
    assert task.weighting == LabelWeighting(0.1, None)
    task.weigh(features, label_smoothing=0.0, class_weights=None)
    assert task.weighting is None


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
@pytest.mark.parametrize("options", [OPTIONS[0], {"class_weights": [1.0, 4.0]}])
def test_accumulated_batches_weigh_by_their_labels(options: dict[str, Any]) -> None:
    results = []
    for size, steps in ((24, 1), (8, 3)):
        torch.manual_seed(4)
        model = StubClassifier()
        more = {"batch_size": size, "gradient_accumulation_steps": steps, **options}
        results.append((run(model, rows(44), learning_rate=0.01, **more), model.state_dict()))
    (one, weights), (parts, others) = results
    assert parts.losses == pytest.approx(one.losses, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)])
def test_guessing_loss_is_the_least_of_a_constant_answer(smoothing: float, weights: Any) -> None:
    labels = [0, 0, 0, 1, 1, 2]
    weighting = LabelWeighting(smoothing, weights)
    answer = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([answer], max_iter=100, tolerance_grad=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = weighting.loss(answer.expand(6, 3), torch.tensor(labels))
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    least = float(loss().detach())
    assert weighting.guessing_loss(labels, 3) == pytest.approx(least, abs=1e-5)


def test_balanced_weights() -> None:
    weighting = LabelWeighting.of(0.0, "balanced", LABELS, [0, 0, 0, 2])
    assert weighting.weights == pytest.approx((2 / 3, 1.0, 2.0, 1.0, 1.0))
    assert weighting.guessing_loss([0, 0, 0, 2], 5) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0"),
        ({"class_weights": "even"}, "class_weights must be 'balanced' or a weight for each label"),
        (
            {"class_weights": [1.0]},
            r"has 1 weights, expected one for each of the 2 labels: 'ant', 'bee'",
        ),
        ({"class_weights": [1.0, 0.0]}, "class_weights must be above 0, got 0.0 for 'bee'"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(StubClassifier(), rows(8), **options)


def test_tasks_without_labels_refuse_them(tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForMultipleChoice", ["a"])
    questions = [ChoiceQuestion("Anna", ["fuhr", "las"], label=0)]
    with pytest.raises(ValueError, match="are for classification and tokens, and the task is cho"):
        finetune(model, tokenizer, questions, output_dir=None, label_smoothing=0.1, max_length=16)


# --- Learning rates by layer ----------------------------------------------------------------------


def test_rates_fall_from_the_head_to_the_embeddings(tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForSequenceClassification", LABELS)
    layers = model.config.num_hidden_layers
    scale = {
        id(parameter): (group["scale"], group["weight_decay"])
        for group in parameter_groups(model, 0.1, 0.5)
        for parameter in group["params"]
    }
    assert len(scale) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        depth = 0
        if "embeddings" in name:
            depth = layers + 1
        elif "layer." in name:
            depth = layers - int(name.split("layer.")[1].split(".")[0])
        decay = 0.1 if parameter.ndim > 1 else 0.0
        assert scale[id(parameter)] == (0.5**depth, decay), name


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
@pytest.mark.parametrize("narrow", [True, False])
def test_every_group_follows_the_schedule(narrow: bool) -> None:
    """Head and LayerNorm at the whole rate, embeddings, one layer below, at a quarter of it."""
    seen: list[list[tuple[float, int]]] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(
            [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
        )
    )
    model = StubClassifier()
    table = model.roberta.embeddings.word_embeddings.weight
    before = table.detach().clone()
    run(
        model,
        rows(40),
        learning_rate=0.01,
        layer_decay=0.25,
        weight_decay=0.5,
        epochs=1,
        narrow_vocabulary=narrow,
    )
    handle.remove()
    rates = [0.01 * linear_schedule(step, 5, 1) for step in range(1, 6)]
    assert seen == [[(rate, 1), (rate, 3), (0.25 * rate, 1)] for rate in rates]
    # Rows that no text has decay at the embeddings' own rate.
    decayed = math.prod(1 - 0.25 * rate * 0.5 for rate in rates)
    torch.testing.assert_close(table[100:], before[100:] * decayed, rtol=1e-5, atol=0)
