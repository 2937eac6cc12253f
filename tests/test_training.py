"""Fine-tuning: recipe, best epoch, labels, failures. A stub model keeps it to what is tested."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stub_classifier import VOCABULARY, StubClassifier, StubTokenizer
from stub_runs import rows, run
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from xlmr_ext.chance import ChanceWarning, guessing_loss, signs_of_chance
from xlmr_ext.data import LabelledTexts, LengthBatches
from xlmr_ext.optim import NarrowVocabulary, linear_schedule, parameter_groups, warmup_steps
from xlmr_ext.prediction import Evaluation, agreement
from xlmr_ext.saving import replace_checkpoint
from xlmr_ext.tasks import classification
from xlmr_ext.training import (
    LOG_NAME,
    STATE_NAME,
    STEPS_NAME,
    SaveError,
    TrainingInterrupted,
)

WORDS = "roberta.embeddings.word_embeddings.weight"


def noise(count: int) -> LabelledTexts:
    """Labels that no text tells."""
    source = random.Random(5)
    texts = [f"w{source.randrange(10, 50)} w{source.randrange(10, 50)}" for _ in range(count)]
    return LabelledTexts(texts, [("ant", "bee")[index % 2] for index in range(count)])


@pytest.fixture
def steps() -> Iterator[list[dict[str, Any]]]:
    """What the optimiser is given at every step: rates, weight decays, the gradient's 2-norm."""
    seen: list[dict[str, Any]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        gradients = [p.grad.flatten() for group in groups for p in group["params"]]
        seen.append(
            {
                "kind": type(optimizer),
                "rates": {group["lr"] for group in groups},
                "decays": [group["weight_decay"] for group in groups],
                "norm": float(torch.cat(gradients).norm()),
            }
        )

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def test_schedule_rises_to_the_peak_and_falls_to_zero_after_the_last_step() -> None:
    factors = [linear_schedule(step, 10, 2) for step in range(1, 12)]
    assert factors[:3] == [0.5, 1.0, 8 / 9]
    assert factors[-2] == pytest.approx(1 / 9)
    assert factors[-1] == 0.0
    assert linear_schedule(1, 10, 0) == pytest.approx(10 / 11)
    assert [warmup_steps(220, 0.1), warmup_steps(3, 0.1), warmup_steps(9, 0.0)] == [22, 1, 0]
    assert linear_schedule(3, 3, warmup_steps(3, 1.0)) == 1.0


def test_weight_decay_spares_biases_and_layer_norm() -> None:
    model = StubClassifier()
    model.classifier.weight.requires_grad_(False)
    decayed, spared = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(VOCABULARY, 8)]
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in spared["params"]} == {
        id(p) for p in (model.norm.weight, model.norm.bias, model.classifier.bias)
    }
    assert spared["weight_decay"] == 0.0


def test_recipe_reaches_the_optimiser(steps: list[dict[str, Any]]) -> None:
    result = run(StubClassifier(), rows(60), max_grad_norm=0.01, weight_decay=0.2, epochs=2)
    assert result.steps == len(steps) == len(result.losses) == 16
    assert {step["kind"] for step in steps} == {torch.optim.AdamW}
    expected = [0.1 * linear_schedule(step, 16, 2) for step in range(1, 17)]
    assert [step["rates"] for step in steps] == [{rate} for rate in expected]
    assert steps[0]["decays"] == [0.2, 0.0]
    assert max(step["norm"] for step in steps) == pytest.approx(0.01, rel=1e-4)


def test_learns_evaluates_saves_and_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = StubClassifier()
    records: list[Any] = []
    result = run(
        model,
        rows(64),
        dev=rows(20, 1),
        output_dir=tmp_path / "new" / "out",
        on_epoch=records.append,
    )
    assert result.best.dev_accuracy == result.best.dev_macro_f1 == 1.0
    assert result.history == records
    assert [record.step for record in records] == [8, 16, 24]
    assert result.history[-1].train_loss < 0.1 < result.history[0].train_loss
    assert not result.at_chance
    assert not model.training
    assert result.labels == ["ant", "bee"]
    assert model.config.label2id == {"ant": 0, "bee": 1}
    assert capfd.readouterr().err == ""  # no progress bar where stderr is no terminal
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.txt", LOG_NAME, STEPS_NAME]
    )
    log = json.loads((out / LOG_NAME).read_text())
    assert log["settings"]["learning_rate"] == 0.1
    assert (log["task"], log["labels"]) == ("classification", ["ant", "bee"])
    assert log["history"][0]["epoch"] == 1
    assert log["history"][-1]["dev_macro_f1"] == 1.0
    assert result.scores is not None
    assert result.scores.details.confusion == [[10, 0], [0, 10]]
    saved = load_file(out / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


def test_a_progress_bar_where_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    run(StubClassifier(), rows(16), progress=True)
    assert "epoch 3/3" in capfd.readouterr().err


def test_the_seed_decides_everything() -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(1)
        model = StubClassifier()
        torch.manual_seed(random.randrange(1000))  # what ran before must not matter
        return run(model, rows(40), seed=seed).losses

    first = losses(7)
    assert losses(7) == first
    assert losses(8) != first


@pytest.mark.parametrize("narrow", [True, False])
def test_the_losses_are_those_of_a_loop_of_plain_torch(narrow: bool) -> None:
    torch.manual_seed(2)
    model, plain = StubClassifier(3), StubClassifier(3)
    plain.load_state_dict(model.state_dict())
    data = rows(50, labels=("ant", "bee", "cat"))
    result = run(
        model,
        data,
        epochs=2,
        learning_rate=0.01,
        weight_decay=0.2,
        warmup_ratio=0.25,
        max_grad_norm=0.5,
        bucket_batches=2,
        narrow_vocabulary=narrow,
    )
    texts = [[0, *(int(word[1:]) for word in text.split()), 2] for text in data.texts]
    gold = torch.tensor([["ant", "bee", "cat"].index(label) for label in data.labels])
    biases = [plain.norm.weight, plain.norm.bias, plain.classifier.bias]
    matrices = [plain.roberta.embeddings.word_embeddings.weight, plain.classifier.weight]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": biases, "weight_decay": 0.0}]
    )
    order = LengthBatches([len(ids) for ids in texts], 8, seed=42, bucket_batches=2)
    losses = []
    for batch in [*order.epoch(1), *order.epoch(2)]:
        step = len(losses) + 1  # of 14, of which the first 4 (3.5, rounded to even) warm up
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step / 4 if step <= 4 else (15 - step) / 11)
        words = plain.roberta.embeddings.word_embeddings
        means = torch.stack([words(torch.tensor(texts[row])).mean(0) for row in batch])
        loss = F.cross_entropy(plain.classifier(plain.norm(means)), gold[batch])
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert [record.step for record in result.history] == [7, 14]
    counts = [len(batch) for batch in order.epoch(2)]
    mean = sum(n * loss for n, loss in zip(counts, losses[7:], strict=True)) / 50
    assert result.history[1].train_loss == pytest.approx(mean, rel=1e-5)


def test_narrow_vocabulary_gives_what_the_whole_table_gives() -> None:
    torch.manual_seed(3)
    narrow, whole = StubClassifier(), StubClassifier()
    whole.load_state_dict(narrow.state_dict())
    before = narrow.state_dict()[WORDS].clone()
    table = narrow.roberta.embeddings.word_embeddings.weight
    options: dict[str, Any] = {"dev": rows(10, 1), "weight_decay": 0.5}
    results = [
        run(narrow, rows(40), **options),
        run(whole, rows(40), narrow_vocabulary=False, **options),
    ]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    # The same parameter as before, with the rows that no text has decayed.
    embedding = narrow.roberta.embeddings.word_embeddings
    assert embedding.weight is table
    assert embedding.num_embeddings == VOCABULARY
    assert (table[100:] / before[100:] < 0.95).all()


def test_narrow_vocabulary_stands_back_where_the_table_is_not_plain() -> None:
    assert NarrowVocabulary.applies(StubClassifier())  # type: ignore[arg-type]
    hooked = StubClassifier()
    hooked.roberta.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
    frozen = StubClassifier()
    frozen.roberta.embeddings.word_embeddings.weight.requires_grad_(False)
    tied = StubClassifier()
    tied.decoder = torch.nn.Linear(8, VOCABULARY)
    tied.decoder.weight = tied.roberta.embeddings.word_embeddings.weight
    masked = StubClassifier()  # the usual way to freeze some rows
    masked.roberta.embeddings.word_embeddings.weight.register_hook(lambda gradient: gradient)
    for model in (hooked, frozen, tied, masked):
        assert not NarrowVocabulary.applies(model)  # type: ignore[arg-type]
    before = frozen.state_dict()[WORDS].clone()
    run(frozen, rows(16))
    assert torch.equal(frozen.state_dict()[WORDS], before)


def test_a_callback_sees_the_whole_vocabulary_and_changes_nothing() -> None:
    shapes: list[int] = []
    results = []
    for looks in (True, False):
        torch.manual_seed(3)
        model = StubClassifier()
        words = model.roberta.embeddings.word_embeddings

        def look(_: Any, words: torch.nn.Embedding = words) -> None:
            shapes.append(words.weight.shape[0])

        callback = {"on_epoch": look} if looks else {}
        run(model, rows(40), dev=rows(10, 1), epochs=3, weight_decay=0.5, **callback)
        results.append(model.state_dict())
    assert shapes == [VOCABULARY] * 3
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[tuple[float, float]]) -> None:
    """Dev evaluations of these (macro F1, accuracy), whatever the model."""
    remaining = iter(scores)

    def evaluate(*_: Any, **__: Any) -> Evaluation:
        macro_f1, accuracy = next(remaining)
        return Evaluation(4, accuracy, macro_f1, 0.1, [[1, 1], [1, 1]], ["ant", "bee"])

    monkeypatch.setattr(classification, "evaluate_ids", evaluate)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 0.5), (0.9, 0.6), (0.7, 0.9)], 2),  # macro F1 before accuracy
        ([(0.9, 0.5), (0.9, 0.6), (0.9, 0.6)], 2),  # then accuracy, then the earlier
        ([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], 3),
    ],
)
def test_the_best_epoch_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[tuple[float, float]],
    best: int,
    save: bool,
) -> None:
    scripted(monkeypatch, scores)
    model = StubClassifier()
    classifiers = []

    def remember(_: Any) -> None:
        classifiers.append(model.classifier.weight.detach().clone())

    result = run(
        model,
        rows(40),
        dev=rows(4),
        weight_decay=0.5,
        output_dir=tmp_path if save else None,
        on_epoch=remember,
    )
    assert result.best_epoch == best
    assert torch.equal(model.classifier.weight, classifiers[best - 1])
    assert (best == 3) == torch.equal(model.classifier.weight, classifiers[2])
    if save:
        saved = load_file(tmp_path / "model.safetensors")
        for name, value in model.state_dict().items():
            assert torch.equal(saved[name], value), name


def test_without_dev_the_last_epoch_is_kept(tmp_path: Path) -> None:
    model = StubClassifier()
    result = run(model, rows(16), output_dir=tmp_path)
    assert result.best_epoch == 3
    assert result.best.dev_accuracy is None
    assert torch.equal(load_file(tmp_path / "model.safetensors")[WORDS], model.state_dict()[WORDS])


def test_a_run_at_chance_says_so_and_what_to_change() -> None:
    with pytest.warns(ChanceWarning) as caught:
        result = run(StubClassifier(), noise(64), dev=noise(16), learning_rate=1e-6, epochs=4)
    assert result.at_chance
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "training sits at chance after epoch 2: the mean loss of the last 8 steps" in message
    assert "guessing without a look at the text gives 0.693" in message
    assert "raise the learning rate (now 1e-06)" in message
    assert "more epochs (now 4), or try another seed (now 42)" in message
    with pytest.warns(ChanceWarning, match="lower the learning rate"):
        run(StubClassifier(), noise(64), learning_rate=2e-5)


def test_signs_of_chance() -> None:
    assert guessing_loss([0, 1, 2, 3]) == pytest.approx(math.log(4))
    assert guessing_loss([0] * 9 + [1]) == pytest.approx(0.325, abs=1e-3)
    good = Evaluation(4, 1.0, 1.0, 0.1, [[2, 0], [0, 2]], ["a", "b"])
    stuck = Evaluation(4, 0.5, 0.33, 0.7, [[0, 2], [0, 2]], ["a", "b"])
    alike = Evaluation(4, 1.0, 1.0, 0.1, [[0, 0], [0, 4]], ["a", "b"])
    assert signs_of_chance([0.3, 0.2], 0.693, good) == []
    assert signs_of_chance([0.3, 0.2], 0.693, alike) == []
    assert signs_of_chance([0.3], 0.693, stuck) == [
        "every dev row is labelled 'b' (accuracy 50.0%)"
    ]
    assert len(signs_of_chance([0.69, 0.7], 0.693, stuck)) == 2


def test_agreement_by_hand() -> None:
    # a: F1 = 2*2/(3+2) = 0.8; b: 2*1/(1+2) = 2/3; c occurs nowhere.
    accuracy, macro_f1 = agreement([[2, 1, 0], [0, 1, 0], [0, 0, 0]])
    assert accuracy == 0.75
    assert macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert agreement([[0, 0], [0, 0]]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("train", "own", "expected"),
    [
        (("ant", "bee"), None, ["ant", "bee"]),
        (("10", "9"), None, ["9", "10"]),
        (("1", "0"), None, ["0", "1"]),
        (("ant", "bee"), ["bee", "cat", "ant"], ["bee", "cat", "ant"]),
        (("0", "2"), ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"]),
    ],
)
def test_labels_are_the_models_or_the_sorted_ones_of_the_data(
    train: tuple[str, ...], own: list[str] | None, expected: list[str]
) -> None:
    model = StubClassifier(num_labels=len(own or train))
    if own:
        model.config.id2label = dict(enumerate(own))
    assert run(model, rows(32, labels=train), learning_rate=0.1).labels == expected
    assert model.config.id2label == dict(enumerate(expected))


def test_a_file_will_do(tmp_path: Path) -> None:
    data = rows(64)
    lines = [f"{text},{label}" for text, label in zip(data.texts, data.labels, strict=True)]
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "\n".join(lines))
    assert run(StubClassifier(), path, dev=str(path)).best.dev_accuracy == 1.0


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        (rows(8, labels=("ant",)), {}, ValueError, "one class only, 'ant', from data.0. to"),
        (rows(9, labels=("a", "b", "c")), {}, ValueError, "3 labels .* model 2: .*num_labels=3"),
        ([], {}, ValueError, "train has no rows"),
        (rows(8), {"dev": []}, ValueError, "dev has no rows"),
        (rows(8), {"dev": [("w1", "cat")]}, ValueError, r"dev\[0\]: label 'cat' is not one of"),
        ([("w299 w300", "a"), ("w1", "b")], {}, ValueError, "token id 300 is outside .* 300"),
        (rows(8), {"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        (rows(8), {"epochs": 1.5}, TypeError, "epochs must be an int, got float"),
        (rows(8), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (rows(8), {"learning_rate": math.nan}, ValueError, "learning_rate must be above 0"),
        (rows(8), {"warmup_ratio": 1.1}, ValueError, "warmup_ratio must be from 0 to 1"),
        (rows(8), {"weight_decay": -1.0}, ValueError, "weight_decay must be 0 or more"),
        (rows(8), {"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be above 0"),
        (rows(8), {"max_length": 33}, ValueError, "max_length must be from 3 to 32, .* got 33"),
        (rows(8), {"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_bad_data_and_arguments_are_named(
    train: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(StubClassifier(), train, **options)


def test_other_problems_than_single_label_are_refused() -> None:
    model = StubClassifier()
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"single-label classifier .* problem_type 'regression'"):
        run(model, rows(8))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = StubClassifier()
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    with pytest.raises(
        ArithmeticError,
        match=r"diverged in epoch 1 of 3, after step 0 of 3: the loss is nan on the batch of "
        r"(data\[\d\](, )?){8} at a learning rate of 0.1; .* nothing was saved",
    ):
        run(model, rows(8), output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STEPS_NAME]


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    model = StubClassifier()
    model.classifier.weight.register_hook(lambda gradient: gradient * math.inf)
    before = model.norm.weight.detach().clone()
    with pytest.raises(ArithmeticError, match=r"the gradient's norm is (nan|inf)"):
        run(model, rows(8))
    assert torch.equal(model.norm.weight, before)


def test_ctrl_c_says_where_it_stopped_and_what_was_saved(tmp_path: Path) -> None:
    model = StubClassifier()
    table = model.roberta.embeddings.word_embeddings.weight
    before = table.detach().clone()
    model.interrupt_at = 7  # 5 steps an epoch: the second step of the second epoch
    with pytest.raises(TrainingInterrupted) as caught:
        run(model, rows(40), output_dir=tmp_path)
    assert str(caught.value) == (
        f"stopped in epoch 2 of 3, after step 6 of 15; {tmp_path} holds the weights of epoch 1"
    )
    # The model is whole and as far as training got.
    assert model.roberta.embeddings.word_embeddings.weight is table
    assert not torch.equal(table[10:50], before[10:50])
    model = StubClassifier()
    model.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 15; nothing was saved"):
        run(model, rows(40), output_dir=tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    class FullDisk(StubTokenizer):
        saves = 0

        def save_pretrained(self, directory: Path) -> None:
            self.saves += 1
            if self.saves == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(directory))
            super().save_pretrained(directory)

    before: dict[str, bytes] = {}

    def checkpoint_files() -> dict[str, bytes]:
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert files.pop(STEPS_NAME).startswith(b'{"event": "start"')  # grows while it trains
        files.pop(STATE_NAME, None)  # written after each epoch's checkpoint
        return files

    def remember(_: Any) -> None:
        before.update(checkpoint_files())

    model = StubClassifier()
    with pytest.raises(SaveError) as caught:
        run(model, rows(40), tokenizer=FullDisk(), output_dir=tmp_path, on_epoch=remember)
    assert str(caught.value) == (
        f"could not save epoch 2 to {tmp_path}: No space left on device; "
        "the weights of epoch 1 are still there"
    )
    assert checkpoint_files() == before
    assert model.roberta.embeddings.word_embeddings.num_embeddings == VOCABULARY


def checkpoint(folder: Path, version: str, weights: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.txt", LOG_NAME, *weights):
        (folder / name).write_text(version)


SINGLE = ("model.safetensors",)
SHARDS = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("before", [SINGLE, SHARDS])
@pytest.mark.parametrize("after", [SINGLE, SHARDS])
def test_no_kill_leaves_a_mixture(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[str, ...],
    after: tuple[str, ...],
) -> None:
    """Killed at each of its moves in turn: the old set, the new set, or a folder without config."""

    class Killed(BaseException):
        pass

    states = []
    for moves in itertools.count():
        folder = tmp_path / str(moves)
        checkpoint(folder, "old", before)
        (folder / "notes.txt").write_text("mine")
        left = [moves]

        def move(path: Path, *rest: Any, left: list[int] = left, name: str, **more: Any) -> Any:
            if rest or path.parent == folder:  # noqa: B023
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            return getattr(PosixPath, f"_{name}")(path, *rest, **more)

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(PosixPath, f"_{name}", getattr(PosixPath, name), raising=False)
                patch.setattr(PosixPath, name, functools.partialmethod(move, name=name))
            try:
                replace_checkpoint(folder, lambda fresh: checkpoint(fresh, "new", after))
            except Killed:
                pass
            else:
                break
            finally:
                patch.undo()
        there = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        assert there.pop("notes.txt") == "mine"
        states.append(there)
        if "config.json" in there:
            assert set(there.values()) <= {there["config.json"]}, there
    assert len(states) >= 5
    assert "config.json" not in states[-1]
    final = {path.name: path.read_text() for path in folder.iterdir()}
    expected = {"config.json", "tokenizer.txt", LOG_NAME, *after}
    assert final == {**dict.fromkeys(expected, "new"), "notes.txt": "mine"}


@pytest.mark.parametrize("before", [SINGLE, SHARDS])
@pytest.mark.parametrize("after", [SINGLE, SHARDS])
def test_a_disk_that_is_full_at_the_flush_costs_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[str, ...],
    after: tuple[str, ...],
) -> None:
    """Some file systems tell of it no earlier."""
    checkpoint(tmp_path, "old", before)
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_checkpoint(tmp_path, lambda fresh: checkpoint(fresh, "new", after))
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == there


def test_later_epochs_replace_the_weights_in_one_move(tmp_path: Path) -> None:
    checkpoint(tmp_path, "same", SINGLE)
    config = (tmp_path / "config.json").stat()

    def write(fresh: Path) -> None:
        checkpoint(fresh, "same", ())
        (fresh / LOG_NAME).write_text("epoch 2")
        (fresh / "model.safetensors").write_text("epoch 2")
        assert (tmp_path / "config.json").exists()

    seen: list[set[str]] = []
    real = Path.replace

    def look(path: Path, target: Path) -> Path:
        seen.append({entry.name for entry in tmp_path.iterdir() if entry.is_file()})
        return real(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", look)
        replace_checkpoint(tmp_path, write)
    everything = {"config.json", "tokenizer.txt", LOG_NAME, "model.safetensors"}
    assert all(names == everything for names in seen)
    assert (tmp_path / "model.safetensors").read_text() == "epoch 2"
    assert (tmp_path / LOG_NAME).read_text() == "epoch 2"
    assert (tmp_path / "config.json").stat().st_size == config.st_size


def test_ctrl_c_waits_for_the_checkpoint(tmp_path: Path) -> None:
    class Slow(StubTokenizer):
        def save_pretrained(self, directory: Path) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().save_pretrained(directory)

    # A job in the background is started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(TrainingInterrupted) as caught:
            run(StubClassifier(), rows(40), tokenizer=Slow(), output_dir=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(caught.value) == (
        f"stopped in epoch 1 of 3, after step 5 of 15; {tmp_path} holds the weights of epoch 1"
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.txt",
        LOG_NAME,
        STEPS_NAME,
    }


def test_a_bad_output_directory_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = StubClassifier()
    with pytest.raises(SaveError, match=r"cannot write to the output directory .*file"):
        run(model, rows(8), output_dir=tmp_path / "file")
    assert model.batches == []
