"""The course of a run: accumulated gradients, evaluations by steps, early stopping, the log."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stub_classifier import VOCABULARY, StubClassifier
from stub_runs import rows, run
from tiny_heads import TAGS, make_head
from torch.optim.optimizer import register_optimizer_step_pre_hook
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.data import packed
from xlmr_ext.prediction import Evaluation
from xlmr_ext.tasks import classification
from xlmr_ext.tasks.iob2 import TaggedSentences
from xlmr_ext.tasks.tokens import TokenTask
from xlmr_ext.training import STEPS_NAME, EpochRecord, finetune


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Dev evaluations of these macro F1, whatever the model."""
    remaining = iter(scores)

    def evaluate(*_: Any, **__: Any) -> Evaluation:
        return Evaluation(4, 0.5, next(remaining), 0.1, [[1, 1], [1, 1]], ["ant", "bee"])

    monkeypatch.setattr(classification, "evaluate_ids", evaluate)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / STEPS_NAME).read_text().splitlines()]


# --- Accumulated gradients ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
def test_accumulated_batches_take_the_steps_of_one_large_batch() -> None:
    """The last step of an epoch has a batch that is smaller than the others."""
    results, weights = [], []
    for size, steps in ((24, 1), (8, 3), (5, 5)):
        torch.manual_seed(4)
        model = StubClassifier()
        result = run(
            model,
            rows(44),
            batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.01,
            max_grad_norm=0.5,
        )
        results.append(result)
        weights.append(model.state_dict())
    assert [result.steps for result in results] == [6, 6, 6]  # 24 + 20, or 25 + 19
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    assert results[1].history[-1].train_loss == pytest.approx(results[0].history[-1].train_loss)
    assert results[2].losses != pytest.approx(results[0].losses, rel=1e-5)  # other steps


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
def test_words_weigh_the_same_whatever_batch_they_are_in(tmp_path: Path) -> None:
    """Sentences of 1 to 9 words: a mean of the batches' means would be another gradient."""
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path))
    words = ["Anna", "fuhr", "nach", "Paris", "und", "las", "das", "Buch", "."]
    sentences = TaggedSentences.of(
        [
            (words[: 1 + 3 * index % 9], ["B-PER", *["O"] * 8][: 1 + 3 * index % 9])
            for index in range(10)
        ]
    )
    losses, gradients = [], []
    for size, steps in ((8, 1), (2, 4)):
        model = make_head(tokenizer, "XLMRobertaForTokenClassification", TAGS)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
        seen: list[Any] = []
        # The gradient as AdamW first sees it.
        handle = register_optimizer_step_pre_hook(
            lambda optimizer, *_, seen=seen: seen.append(
                [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            )
        )
        result = finetune(
            model,
            tokenizer,
            sentences,
            task=TokenTask(model, tokenizer, max_length=32),
            output_dir=None,
            epochs=1,
            batch_size=size,
            gradient_accumulation_steps=steps,
            max_grad_norm=None,
            learning_rate=1e-4,
        )
        handle.remove()
        losses.append(result.losses)
        gradients.append(seen[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for one, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-5 * largest)


def test_a_step_has_no_more_in_memory_than_a_batch() -> None:
    model = StubClassifier()
    run(model, rows(40), batch_size=4, gradient_accumulation_steps=4, epochs=1)
    assert sorted(map(len, model.batches)) == [4] * 10


# --- Evaluations ----------------------------------------------------------------------------------


def test_evaluations_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 steps an epoch, 15 in all: at 4, 8, 12 and the end."""
    scripted(monkeypatch, [0.1, 0.9, 0.3, 0.2])
    model = StubClassifier()
    kept: list[torch.Tensor] = []

    def remember(_: EpochRecord) -> None:
        kept.append(model.classifier.weight.detach().clone())

    result = run(model, rows(40), dev=rows(4), output_dir=tmp_path, eval_steps=4, on_epoch=remember)
    assert [(record.epoch, record.step) for record in result.history] == [
        (1, 4),
        (2, 8),
        (3, 12),
        (3, 15),
    ]
    assert (result.best_epoch, result.best_step, result.stopped_early) == (2, 8, False)
    assert result.best is result.history[1]
    assert result.steps == 15
    mean = sum(result.losses[4:8]) / 4
    assert result.history[1].train_loss == pytest.approx(mean, rel=1e-6)
    assert torch.equal(model.classifier.weight, kept[1])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["classifier.weight"], kept[1])
    log = json.loads((tmp_path / "xlmr_ext_training.json").read_text())
    assert (log["epoch"], log["step"], len(log["losses"])) == (2, 8, 15)
    assert [row["step"] for row in log["history"]] == [4, 8, 12, 15]


def test_training_goes_on_in_train_mode_after_an_evaluation() -> None:
    model = StubClassifier()
    modes: list[bool] = []
    model.norm.register_forward_hook(lambda *_: modes.append(model.training))

    def leave_in_eval_mode(_: EpochRecord) -> None:
        model.eval()

    run(model, rows(16), dev=rows(4), epochs=2, eval_steps=1, on_epoch=leave_in_eval_mode)
    assert modes == [True, False] * 4


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.5, 0.4, 0.6, 0.6, 0.5, 0.9])
    model = StubClassifier()
    kept: list[torch.Tensor] = []
    result = run(
        model,
        rows(16),
        dev=rows(4),
        epochs=6,
        early_stopping_patience=2,
        output_dir=tmp_path,
        on_epoch=lambda _: kept.append(model.classifier.weight.detach().clone()),
    )
    assert [record.epoch for record in result.history] == [1, 2, 3, 4, 5]
    assert (result.best_epoch, result.steps, result.stopped_early) == (3, 10, True)
    assert torch.equal(model.classifier.weight, kept[2])
    assert log_of(tmp_path)[-1] == {
        "event": "end",
        "step": 10,
        "best_step": 6,
        "stopped_early": True,
    }


@pytest.mark.parametrize("best", [0, 2])
def test_best_and_last_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """The rows that no text has are decayed as far as the weights beside them."""
    scripted(monkeypatch, [0.9 if epoch == best else 0.1 for epoch in range(3)])
    weights = {}
    for epochs in (best + 1, 3):
        torch.manual_seed(6)
        model = StubClassifier()
        run(
            model,
            rows(16),
            dev=rows(4),
            output_dir=tmp_path,
            keep_last=epochs == 3,
            weight_decay=0.5,
            warmup_ratio=0.0,
        )
        weights[epochs] = {name: value.clone() for name, value in model.state_dict().items()}
        if epochs == 3:
            break
        monkeypatch.undo()
        scripted(monkeypatch, [0.9 if epoch == best else 0.1 for epoch in range(3)])
    torch.manual_seed(6)
    whole = StubClassifier()
    run(whole, rows(16), weight_decay=0.5, warmup_ratio=0.0)
    last = load_file(tmp_path / "last" / "model.safetensors")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(last[name], value, rtol=1e-5, atol=1e-6)
    saved = load_file(tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name
    assert (best == 2) == torch.equal(saved["classifier.weight"], last["classifier.weight"])
    table = "roberta.embeddings.word_embeddings.weight"
    assert (best == 2) == torch.equal(saved[table][100:], last[table][100:])
    log = json.loads((tmp_path / "last" / "xlmr_ext_training.json").read_text())
    assert (log["epoch"], len(log["history"])) == (3, 3)
    assert model.roberta.embeddings.word_embeddings.num_embeddings == VOCABULARY


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps must be at"),
        ({"eval_steps": 0, "dev": rows(4)}, ValueError, "eval_steps must be at least 1, got 0"),
        ({"eval_steps": 2}, ValueError, "eval_steps came without dev"),
        ({"early_stopping_patience": 2}, ValueError, "early_stopping_patience came without dev"),
        ({"early_stopping_patience": 1.5, "dev": rows(4)}, TypeError, "must be an int, got float"),
        ({"log_steps": 0}, ValueError, "log_steps must be at least 1"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(StubClassifier(), rows(8), **options)


# --- The log --------------------------------------------------------------------------------------


def test_the_log_has_every_step_and_evaluation_as_they_come(tmp_path: Path) -> None:
    counts: list[int] = []
    result = run(
        StubClassifier(),
        rows(40),
        dev=rows(8, 1),
        output_dir=tmp_path,
        on_epoch=lambda _: counts.append(len(log_of(tmp_path))),
    )
    assert counts == [7, 13, 19]  # the beginning, 5 steps and an evaluation; 6 more; 6 more
    first, *lines, end = log_of(tmp_path)
    assert first["event"] == "start"
    assert (first["task"], first["train_examples"], first["dev_examples"]) == (
        "classification",
        40,
        8,
    )
    assert first["settings"]["batch_size"] == 8
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert [line["loss"] for line in steps] == result.losses
    assert [line["epoch"] for line in steps] == [1] * 5 + [2] * 5 + [3] * 5
    assert all(line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in steps)
    lengths = sum(len(text.split()) + 2 for text in rows(40).texts)
    assert steps[-1]["tokens"] == 3 * lengths
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    assert [line["dev_macro_f1"] for line in evaluations] == [
        record.dev_macro_f1 for record in result.history
    ]
    assert [line["step"] for line in evaluations if line["best"]][-1] == result.best_step
    assert (end["event"], end["step"]) == ("end", 15)


def test_a_line_for_every_few_steps(tmp_path: Path) -> None:
    result = run(StubClassifier(), rows(40), output_dir=tmp_path, log_steps=4)
    steps = [line for line in log_of(tmp_path) if line["event"] == "step"]
    assert [line["step"] for line in steps] == [4, 8, 12, 15]
    means = [sum(part) / len(part) for part in (result.losses[4:8], result.losses[12:])]
    assert [steps[1]["loss"], steps[3]["loss"]] == pytest.approx(means)
    assert [line["event"] for line in log_of(tmp_path)].count("epoch") == 3  # without dev data


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.write, [3]

    class Full:
        """A file of a disk that is full after three lines."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return real(self.file.fileno(), data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *more, **options: (
            Full(opened(path, *more, **options))
            if path.name == STEPS_NAME and more
            else opened(path, *more, **options)
        ),
    )
    with pytest.warns(RuntimeWarning, match=r"the log .* ends here: No space left on device"):
        result = run(StubClassifier(), rows(40), output_dir=tmp_path)
    assert result.steps == 15
    assert len((tmp_path / STEPS_NAME).read_bytes().splitlines()) == 3
    assert (tmp_path / "model.safetensors").exists()


def test_the_bar_shows_loss_speed_and_the_time_left(capfd: pytest.CaptureFixture[str]) -> None:
    run(StubClassifier(), rows(40), progress=True)
    err = capfd.readouterr().err
    assert "epoch 3/3" in err
    assert "15/15" in err
    assert "tokens/s" in err
    assert "loss 0." in err


def test_one_batch_of_tokens_is_counted_in_words() -> None:
    task = TokenTask.__new__(TokenTask)
    assert task.items([[-100, 1, -100, 0], [-100, 2, -100]]) == 3.0
    assert packed([[0, 5, 2]], [0], pad_token_id=1).input_ids.numel() == 3


# --- A loss that is not finite --------------------------------------------------------------------


def test_the_batch_of_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """And the checkpoint of before it stays."""
    data = rows(40)
    lines = [f"{text},{label}" for text, label in zip(data.texts, data.labels, strict=True)]
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "\n".join(lines))
    model = StubClassifier()
    saved: dict[str, bytes] = {}

    def spoil(record: EpochRecord) -> None:
        if record.epoch == 1:
            saved["weights"] = (tmp_path / "out" / "model.safetensors").read_bytes()
            # Of one word of row 30, line 32.
            word = int(data.texts[30].split()[0][1:])
            with torch.no_grad():
                model.roberta.embeddings.word_embeddings.weight[word] = torch.nan

    with pytest.raises(ArithmeticError) as caught:
        run(model, path, output_dir=tmp_path / "out", on_epoch=spoil, narrow_vocabulary=False)
    message = str(caught.value)
    assert "training diverged in epoch 2 of 3, after step " in message
    named = [int(line) for line in re.findall(rf"{re.escape(str(path))}:(\d+)", message)]
    word = data.texts[30].split()[0]
    assert len(named) == 8
    assert any(word in data.texts[line - 2].split() for line in named)
    assert f"{tmp_path / 'out'} holds the weights of epoch 1" in message
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == saved["weights"]
    last = log_of(tmp_path / "out")[-1]
    assert (last["event"], last["message"]) == ("error", message)
