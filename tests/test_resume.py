"""A run that was stopped goes on to the bits of one that was not; what cannot go on is refused."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nursery import Nursery
from safetensors.torch import load_file
from stub_classifier import StubClassifier
from stub_runs import rows, run

from xlmr_ext import training
from xlmr_ext.files import replace_files
from xlmr_ext.training import (
    LOG_NAME,
    STATE_NAME,
    STEPS_NAME,
    EpochRecord,
    ResumeError,
    SaveError,
    TrainingInterrupted,
    loop,
    state,
)

RECIPE: dict[str, Any] = {"weight_decay": 0.5, "learning_rate": 0.02, "layer_decay": 0.7}
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def _state_after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)


def fresh() -> StubClassifier:
    torch.manual_seed(9)
    return StubClassifier()


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log without what is of the clock, nor that the run was continued."""
    lines = [json.loads(line) for line in (folder / STEPS_NAME).read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines
        if line["event"] != "resume"
    ]


def same_end(ours: Path, theirs: Path) -> None:
    """Weights, log and losses of two runs, bit for bit."""
    for name in ("model.safetensors", "last/model.safetensors"):
        if (theirs / name).exists():
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert log_of(ours) == log_of(theirs)
    logs = [json.loads((folder / LOG_NAME).read_text()) for folder in (ours, theirs)]
    for log in logs:
        log["end"].pop("seconds")
        for record in log["history"]:
            record.pop("seconds")
    assert logs[0] == logs[1]
    assert not (ours / STATE_NAME).exists()


# --- Within one process ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, {"save_steps": 2}),
        (7, {}),  # after the first epoch
        (13, {"save_steps": 4, "dev": rows(8, 1), "eval_steps": 3}),
        (12, {"save_steps": 1, "dev": rows(8, 1), "keep_last": True}),
        (14, {"dev": rows(8, 1), "narrow_vocabulary": False, "log_steps": 4}),
        (11, {"save_steps": 3, "gradient_accumulation_steps": 2, "label_smoothing": 0.1}),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    options = {**RECIPE, **options}
    whole = fresh()
    expected = run(whole, rows(40), output_dir=tmp_path / "whole", **options)
    model = fresh()
    model.interrupt_at = stop
    with pytest.raises(TrainingInterrupted):
        run(model, rows(40), output_dir=tmp_path / "run", **options)
    random.seed(1)
    np.random.seed(1)
    model = fresh()
    result = run(model, rows(40), output_dir=tmp_path / "run", resume=True, **options)
    assert 0 < result.resumed_at < result.steps
    assert result.losses == expected.losses
    assert (result.best_step, result.scores) == (expected.best_step, expected.scores)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    same_end(tmp_path / "run", tmp_path / "whole")


def test_the_generators_go_on(tmp_path: Path) -> None:
    """What a callback draws is what it would have drawn."""

    def numbers(folder: Path, *, stop: bool) -> list[tuple[float, float, float]]:
        drawn: list[tuple[float, float, float]] = []
        model = fresh()

        def draw(record: EpochRecord) -> None:
            drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
            model.interrupt_at = len(model.batches) + 1 if stop and record.epoch == 2 else None

        options: dict[str, Any] = {"output_dir": folder, "on_epoch": draw}
        if stop:
            with pytest.raises(TrainingInterrupted):
                run(model, rows(40), **options)
            model, stop = fresh(), False
            run(model, rows(40), resume=True, **options)
        else:
            run(model, rows(40), **options)
        return drawn

    assert numbers(tmp_path / "a", stop=True) == numbers(tmp_path / "b", stop=False)


def test_a_run_that_has_ended_gives_its_result(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": tmp_path, "dev": rows(8, 1), **RECIPE}
    first = fresh()
    result = run(first, rows(40), **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = fresh()
    again = run(model, rows(40), resume=True, **options)
    assert (
        model.batches == [[len(text.split()) + 2 for text in rows(8, 1).texts]]
        or len(model.batches) == 1
    )  # one evaluation
    assert again.resumed_at == again.steps == 15
    for name in ("history", "losses", "best_step", "best_epoch", "scores", "at_chance", "labels"):
        assert getattr(again, name) == getattr(result, name), name
    for name, value in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.training
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_state_it_begins_at_the_beginning(tmp_path: Path) -> None:
    result = run(fresh(), rows(40), output_dir=tmp_path / "a", resume=True)
    assert (result.resumed_at, result.steps) == (0, 15)
    run(fresh(), rows(40), output_dir=tmp_path / "b")
    same_end(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="resume came without output_dir"):
        run(fresh(), rows(40), resume=True)


def test_no_state_is_left_and_none_is_written_where_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = state.StateFile.save
    monkeypatch.setattr(
        state.StateFile,
        "save",
        lambda self, step, *more: (steps.append(step), real(self, step, *more)),
    )
    for apart, save_steps, expected in (
        (0.0, None, [5, 10]),
        (1e6, None, []),
        (1e6, 4, [4, 8, 12]),
        (1e6, 5, [5, 10]),
        (0.0, 0, []),
    ):
        steps.clear()
        monkeypatch.setattr(loop, "STATE_SECONDS", apart)
        run(fresh(), rows(40), output_dir=tmp_path, save_steps=save_steps)
        assert steps == expected
        assert not (tmp_path / STATE_NAME).exists()


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Path]:
    """A run of 40 rows that was stopped in its second epoch; it must stay as it is."""
    model = fresh()
    model.interrupt_at = 8
    with pytest.raises(TrainingInterrupted):
        run(model, rows(40), output_dir=tmp_path, dev=rows(8, 1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert STATE_NAME in before
    yield tmp_path
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def other_rows() -> Any:
    data = rows(40)
    data.texts[17] += " w12"
    return data


def other_model() -> StubClassifier:
    model = fresh()
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[200] += 1  # a row that no text has
    return model


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (
            rows(40),
            {"epochs": 4, "learning_rate": 0.2},
            r"had other settings: epochs 3 \(now 4\), learning_rate 0.1 \(now 0.2\); give the same",
        ),
        (rows(40), {"class_weights": [1, 2]}, r"class_weights None \(now \[1.0, 2.0\]\)"),
        (rows(40), {"narrow_vocabulary": False}, r"narrow_vocabulary True \(now False\)"),
        (rows(38), {}, "had other data: train had 40 examples, now 38"),
        (other_rows(), {}, r"had other data: train differs at data\[17\]; give the same"),
        (rows(40), {"dev": rows(8, 2)}, r"had other data: dev differs at dev\[0\]|dev differs at"),
        (rows(40), {"dev": None}, "had other data: dev had 8 examples, now 0"),
        (rows(40), {"model": other_model()}, "started from another model: load the same"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    stopped: Path, train: Any, options: dict[str, Any], message: str
) -> None:
    options = {"dev": rows(8, 1), **options}
    model = options.pop("model", None) or fresh()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ResumeError, match=message):
        run(model, train, output_dir=stopped, resume=True, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_another_run_than_the_one_that_ended_is_refused(tmp_path: Path) -> None:
    run(fresh(), rows(16), output_dir=tmp_path)
    with pytest.raises(ResumeError, match=r"epochs 3 \(now 2\)"):
        run(fresh(), rows(16), output_dir=tmp_path, resume=True, epochs=2)
    with pytest.raises(ResumeError, match="train has as many examples, and others among them"):
        run(fresh(), rows(16, 3), output_dir=tmp_path, resume=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"has ended, and its weights, model.safetensors, are"):
        run(fresh(), rows(16), output_dir=tmp_path, resume=True)


def test_a_state_of_another_version_is_refused(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_VERSION", 2)
    with pytest.raises(ResumeError, match="was written by another version of xlmr_ext"):
        run(fresh(), rows(40), dev=rows(8, 1), output_dir=stopped, resume=True)


def damaged(content: bytes) -> Iterator[bytes]:
    """The file cut at several places, and with a bit of each kind turned over."""
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        yield content[:size]
    header = int.from_bytes(content[:8], "little")
    for place in (0, 9, header // 2, header + 9, (header + len(content)) // 2, len(content) - 1):
        yield content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def test_a_damaged_state_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    model = fresh()
    model.interrupt_at = 8
    with pytest.raises(TrainingInterrupted):
        run(model, rows(40), output_dir=tmp_path)
    path = tmp_path / STATE_NAME
    content = path.read_bytes()
    others = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != path}
    for bad in damaged(content):
        path.write_bytes(bad)
        with pytest.raises(ResumeError, match=r"is damaged \(.*\), so the run cannot go on"):
            run(fresh(), rows(40), output_dir=tmp_path, resume=True)
        assert path.read_bytes() == bad
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != path} == others
    path.write_bytes(content)
    assert run(fresh(), rows(40), output_dir=tmp_path, resume=True).resumed_at == 5


def test_every_byte_of_a_state_is_covered(tmp_path: Path) -> None:
    """Turned over at random, the state is refused, or the same as before."""
    model = fresh()
    model.interrupt_at = 8
    with pytest.raises(TrainingInterrupted):
        run(model, rows(40), output_dir=tmp_path)
    path = tmp_path / STATE_NAME
    content = path.read_bytes()
    source = random.Random(3)
    identity = type("Identity", (), {"check": lambda *_: None})()
    for _ in range(60):
        place, bit = source.randrange(len(content)), 1 << source.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(ResumeError, match="is damaged"):
            state.StateFile(tmp_path, identity).load(None, None)  # type: ignore[arg-type]


def test_a_full_disk_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = [0]

    def full(directory: Path, writers: Any) -> None:
        saves[0] += STATE_NAME in writers
        if saves[0] == 3 and STATE_NAME in writers:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_files(directory, writers)

    monkeypatch.setattr(state, "replace_files", full)
    with pytest.raises(SaveError) as caught:
        run(fresh(), rows(40), output_dir=tmp_path / "run", save_steps=2)
    assert str(caught.value) == (
        f"could not save the state of training after step 6 to {tmp_path / 'run'}: No space left "
        "on device; that of step 4 is still there"
    )
    monkeypatch.undo()
    result = run(fresh(), rows(40), output_dir=tmp_path / "run", save_steps=2, resume=True)
    assert result.resumed_at == 4
    run(fresh(), rows(40), output_dir=tmp_path / "whole", save_steps=2)
    same_end(tmp_path / "run", tmp_path / "whole")


# --- Killed ---------------------------------------------------------------------------------------

TRAIN = """
import torch
import xlmr_ext
from xlmr_ext import XLMRobertaConfig, XLMRobertaForSequenceClassification
from xlmr_ext.tasks.classification import ClassificationTask
from xlmr_ext.training import finetune
from stub_classifier import StubTokenizer
from stub_runs import rows

# What AdamW imports when it is made first would be most of a child's time.
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])

def train(folder, tell):
    torch.set_num_threads(1)
    torch.manual_seed(5)
    config = XLMRobertaConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=34, num_labels=2, initializer_range=0.1,
    )
    model = XLMRobertaForSequenceClassification(config)
    tokenizer = StubTokenizer()
    tell()
    result = finetune(
        model, tokenizer, rows(60), dev=rows(16, 1), output_dir=folder, resume=True,
        task=ClassificationTask(model, tokenizer, max_length=16),
        epochs=3, batch_size=4, gradient_accumulation_steps=2, learning_rate=2e-3, progress=False,
        weight_decay=0.3, eval_steps=5, save_steps=3, keep_last=True, layer_decay=0.9,
    )
    print("resumed at", result.resumed_at, flush=True)
"""


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 1), pytest.param(20, 2, marks=pytest.mark.slow, id="20-kills")]
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    tmp_path: Path, kills: int, seed: int
) -> None:
    """SIGKILL, again and again, to a run that is continued each time; then it is left alone.

    The moments are spread over the time that a whole run takes, so that some fall into the saving
    of a state or a checkpoint, and some before there is one.
    """
    nursery = Nursery(TRAIN)
    try:
        resumed = nursery.kill_at_random(tmp_path, kills, seed, same_end)
        assert resumed, "no kill came after a state was saved"
    finally:
        nursery.close()


def test_the_state_does_not_hide_among_weights(tmp_path: Path) -> None:
    """A folder with a state in it is still the checkpoint of the best weights."""
    model = fresh()
    model.interrupt_at = 8
    with pytest.raises(TrainingInterrupted):
        run(model, rows(40), output_dir=tmp_path)
    assert (tmp_path / STATE_NAME).exists()
    assert "classifier.weight" in load_file(tmp_path / "model.safetensors")
    assert training.STATE_NAME == STATE_NAME
