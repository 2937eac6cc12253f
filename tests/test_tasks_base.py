"""What tasks share: features, labels, the table of tasks, and running models over many rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_classifier import StubClassifier, StubTokenizer

from xlmr_ext import prediction
from xlmr_ext.prediction import check_finite, in_eval_mode, packed_batches
from xlmr_ext.tasks import registry
from xlmr_ext.tasks.base import Features, settle_labels
from xlmr_ext.tasks.classification import ClassificationTask
from xlmr_ext.training import finetune


def test_features_have_rows_and_lengths_by_example() -> None:
    features = Features([[0, 2], [0, 5, 2], [0, 5, 5, 2], [0]], [1, 0], rows_per_example=2)
    assert len(features) == 2
    assert features.rows([1, 0]) == [2, 3, 0, 1]
    assert features.lengths() == [5, 5]
    assert Features([[0, 2], [0]], ["a", "b"]).lengths() == [2, 1]
    with pytest.raises(ValueError, match="3 sequences for 2 examples of 2 rows each"):
        Features([[0], [0], [0]], [1, 0], rows_per_example=2)


def test_every_task_is_found_by_name_head_and_file() -> None:
    import xlmr_ext.heads

    for name, entry in registry.TASKS.items():
        assert registry.task_class(name).name == name
        assert registry.head_class(name) is getattr(xlmr_ext.heads, entry.head)
    names = {"a.CSV": "classification", "a.jsonl": "classification", "a.json": "qa"}
    names |= {"b/a.iob2": "tokens", "a.conll": "tokens"}
    assert {path: registry.task_of_file(path) for path in names} == names


def test_a_task_is_told_by_the_head() -> None:
    from pairs import make_config

    from xlmr_ext import XLMRobertaForMultipleChoice, XLMRobertaModel

    class Own(XLMRobertaForMultipleChoice):
        pass

    assert registry.task_of_model(Own(make_config())) == "choice"
    with pytest.raises(TypeError, match=r"XLMRobertaModel, which tells no task: .* give the task"):
        registry.task_of_model(XLMRobertaModel(make_config()))
    with pytest.raises(ValueError, match="task must be one of classification, tokens, qa, choice"):
        registry.head_class("poems")


def test_max_length_is_the_tasks_or_the_models() -> None:
    model: Any = StubClassifier()  # takes 32 tokens
    task = registry.make_task("classification", model, StubTokenizer())  # type: ignore[arg-type]
    assert task.max_length == 32
    model.config.longest_input = 512
    task = registry.make_task("classification", model, StubTokenizer())  # type: ignore[arg-type]
    assert task.max_length == 128
    with pytest.raises(ValueError, match=r"from 3 to 512, .* got 600"):
        registry.make_task("classification", model, StubTokenizer(), max_length=600)  # type: ignore[arg-type]


def test_a_task_and_its_arguments_belong_together() -> None:
    model: Any = StubClassifier()
    tokenizer: Any = StubTokenizer()
    task = ClassificationTask(model, tokenizer, max_length=16)
    data = [("w10", "a"), ("w11", "b")]
    with pytest.raises(ValueError, match="max_length came with a task, which has its own, 16"):
        finetune(model, tokenizer, data, task=task, max_length=8, output_dir=None)
    with pytest.raises(ValueError, match="task was made on another model"):
        finetune(StubClassifier(), tokenizer, data, task=task, output_dir=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="StubClassifier, which tells no task"):
        finetune(model, tokenizer, data, output_dir=None)


@pytest.mark.parametrize(
    ("own", "found", "expected"),
    [
        (["LABEL_0", "LABEL_1"], ["a", "b"], ["a", "b"]),
        (["LABEL_0", "LABEL_1"], ["1"], ["0", "1"]),
        (["LABEL_0", "LABEL_1"], ["LABEL_1"], ["LABEL_0", "LABEL_1"]),
        (["c", "b", "a"], ["a", "b"], ["c", "b", "a"]),
    ],
)
def test_labels_are_settled(own: list[str], found: list[str], expected: list[str]) -> None:
    model: Any = StubClassifier(num_labels=len(own))
    model.config.id2label = dict(enumerate(own))
    assert settle_labels(model, found, "d.csv") == expected
    assert list(model.config.id2label.values()) == expected


def test_other_numbers_of_labels_are_refused() -> None:
    model: Any = StubClassifier()
    with pytest.raises(ValueError, match=r"d\.csv has 3 labels and the model 2: .*num_labels=3"):
        settle_labels(model, ["a", "b", "c"], "d.csv")


@pytest.mark.parametrize("each", [1, 3])
def test_batches_have_whole_examples_and_bounded_size(
    monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    monkeypatch.setattr(prediction, "_BATCH_TOKENS", 60)
    model: Any = StubClassifier()
    sequences = [[0, *[10 + row] * (row * 7 % 13), 2] for row in range(12 * each)]
    seen = []
    for examples, batch in packed_batches(model, sequences, batch_size=4, rows_per_example=each):
        rows = [example * each + row for example in examples for row in range(each)]
        assert batch.input_ids.tolist() == [token for row in rows for token in sequences[row]]
        assert len(examples) <= 4
        assert len(examples) == 1 or batch.cu_seqlens.diff().max() * len(rows) <= 60
        seen += examples
    assert sorted(seen) == list(range(12))
    assert list(packed_batches(model, [], batch_size=4)) == []


def test_eval_mode_ends_with_the_block_whatever_happens() -> None:
    model = StubClassifier()
    model.norm.eval()
    modes = []

    def fail() -> None:
        modes.append((model.training, torch.is_inference_mode_enabled()))
        raise KeyError

    with pytest.raises(KeyError), in_eval_mode(model):
        fail()
    assert modes == [(False, True)]
    assert model.training
    assert not model.norm.training
    assert not torch.is_inference_mode_enabled()


def test_an_answer_that_is_not_finite_is_named() -> None:
    check_finite(torch.zeros(3, 2))
    check_finite(torch.zeros(0, 2))
    answers = torch.zeros(3, 12)
    answers[1, 11] = math.inf
    with pytest.raises(ArithmeticError, match=r"row 2 of 3 is not finite \(\[0.0, .*, \.\.\.\]\)"):
        check_finite(answers)


def test_data_of_a_path_are_read_by_the_tasks_reader(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("text\tlabel\nw10\ta\nw11\tb\n")
    task = ClassificationTask(StubClassifier(), StubTokenizer(), max_length=16)  # type: ignore[arg-type]
    assert task.load(path, "train").labels == ["a", "b"]
    assert task.load([("w10", "a")], "dev").source == "dev"
    with pytest.raises(ValueError, match="dev has no rows"):
        task.load([], "dev")
