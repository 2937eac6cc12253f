"""Multiple choice: its files, its rows, training as transformers does, answers, command line."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_config, randomize, twin
from stub_classifier import StubTokenizer
from torch.nn import functional as F
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaForMultipleChoice, XLMRobertaTokenizer, prediction
from xlmr_ext.cli import main
from xlmr_ext.data import DataError, LengthBatches
from xlmr_ext.tasks.choice import ChoiceAnswerer, ChoiceQuestion, ChoiceTask, read_choices
from xlmr_ext.training import finetune


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def questions(count: int, seed: int = 0, choices: int = 3) -> list[ChoiceQuestion]:
    """The right choice has the context's word."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        words = source.sample(range(10, 30), choices)
        label = source.randrange(choices)
        texts = [f"w{word} " * source.randint(1, 3) for word in words]
        made.append(ChoiceQuestion(f"w{words[label]} w40", texts, label))
    return made


def make_model(**overrides: Any) -> XLMRobertaForMultipleChoice:
    return randomize(XLMRobertaForMultipleChoice(make_config(**overrides))).eval()


def test_files_of_several_shapes_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {"context": "c", "choices": ["a", "b"], "label": 1},
        {"question": "q", "choice0": "a", "choice1": "b", "label": "0"},
        "",
        {"premise": "p", "question": "cause", "choice1": "a", "choice2": "b", "label": 0, "id": 7},
        {"sent1": "s", "sent2": "t", "ending1": "b", "ending0": "", "label": None},
    )
    read = read_choices(path)
    assert [(q.context, q.question, list(q.choices), q.label) for q in read] == [
        ("c", "", ["a", "b"], 1),
        ("", "q", ["a", "b"], 0),
        ("p", "cause", ["a", "b"], 0),
        ("s", "t", ["", "b"], None),
    ]
    assert [q.where for q in read] == [f"{path}:{line}" for line in (1, 2, 4, 5)]
    # As transformers' examples pair SWAG's and RACE's texts.
    assert read[1].pairs() == [("q", "a"), ("q", "b")]
    assert read[2].pairs() == [("p", "cause a"), ("p", "cause b")]


def test_more_than_ten_choices_keep_their_order(tmp_path: Path) -> None:
    row = {f"choice{number}": f"c{number}" for number in range(12)} | {"context": "x", "label": 11}
    (read,) = read_choices(write(tmp_path / "d.jsonl", row))
    assert list(read.choices) == [f"c{number}" for number in range(12)]


GOOD = {"context": "c", "choices": ["a", "b"], "label": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "malformed JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"choices": ["a", "b"], "label": 0}, "has no text: expected a column context or premise"),
        ({**GOOD, "premise": "p"}, "columns 'context' and 'premise' mean the same"),
        ({**GOOD, "context": 3}, "column 'context' must hold a text, got int 3"),
        ({**GOOD, "choices": "ab"}, "column 'choices' must hold a list, got str ab"),
        ({**GOOD, "choices": ["a", None]}, "choice 1 must be a text, got null"),
        ({**GOOD, "choices": ["a"]}, "expected 2 choices or more, got 1"),
        ({**GOOD, "choices": ["a", "b", "c"]}, "3 choices, expected 2 as at .*bad.jsonl:1"),
        ({**GOOD, "choice0": "a"}, "has the column 'choices' and numbered ones as well"),
        ({"context": "c", "label": 0}, "expected a list 'choices', .* it has 'context', 'label'"),
        ({"context": "c", "choice0": "a", "choice2": "b"}, "without a gap"),
        ({"context": "c", "choice2": "a", "choice3": "b"}, "without a gap"),
        ({"context": "c", "choice0": "a", "ending1": "b"}, "without a gap"),
        ({**GOOD, "label": 2}, "number of the right choice, 0 to 1, got 2"),
        ({**GOOD, "label": -1}, "0 to 1, got -1"),
        ({**GOOD, "label": "a"}, "0 to 1, got 'a'"),
        ({**GOOD, "label": 0.5}, "0 to 1, got 0.5"),
        ({**GOOD, "label": True}, "0 to 1, got True"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}"):
        read_choices(path)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl has no rows"):
        read_choices(write(tmp_path / "d.jsonl", ""))


def test_data_from_python_are_checked_as_well() -> None:
    task = ChoiceTask(make_model(), StubTokenizer(), max_length=16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="choices must be a list of texts, got str ab"):
        ChoiceQuestion("c", "ab")
    with pytest.raises(TypeError, match="context must be a text, got null"):
        ChoiceQuestion(None, ["a", "b"])  # type: ignore[arg-type]
    good = ChoiceQuestion("c", ["a", "b"], 0)
    with pytest.raises(DataError, match="x:3: has no label"):
        task.features([good, ChoiceQuestion("c", ["a", "b"], where="x:3")], training=True)
    with pytest.raises(DataError, match="x:4: 3 choices, expected 2 as at question"):
        task.features([good, ChoiceQuestion("c", list("abc"), 0, where="x:4")], training=False)


def test_rows_are_pairs_cut_from_the_longer_text(tmp_path: Path) -> None:
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path))
    model = make_model(vocab_size=len(tokenizer))
    asked = ChoiceQuestion("The quick brown fox", ["dog", "the lazy cat"], 1, "jumps")
    features = ChoiceTask(model, tokenizer, max_length=38).features([asked], training=True)
    context = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    for row, choice in zip(features.sequences, asked.choices, strict=True):
        second = tokenizer.encode(f"jumps {choice}", add_special_tokens=False)
        assert list(row) == [0, *context, 2, 2, *second, 2]
    assert (features.targets, features.rows_per_example) == ([1], 2)
    cut = ChoiceTask(model, tokenizer, max_length=10).features([asked], training=True)
    assert all(len(row) == 10 for row in cut.sequences)


def padded(rows: list[list[int]], choices: int) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [1] * (length - len(row)) for row in rows])
    ids = ids.reshape(-1, choices, length)
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
def test_training_and_evaluation_as_with_transformers() -> None:
    """The losses of a run, and those of transformers' model in a loop of plain torch."""
    model = make_model()
    theirs = twin(model, torch.float32).train()  # type: ignore[arg-type]
    task = ChoiceTask(model, StubTokenizer(), max_length=16)  # type: ignore[arg-type]
    train, dev = questions(20), questions(10, 1)
    rows = [list(row) for row in task.features(train, training=True).sequences]
    dev_rows = [list(row) for row in task.features(dev, training=False).sequences]
    lengths = [sum(map(len, rows[3 * e : 3 * e + 3])) for e in range(20)]

    result = finetune(
        model,
        StubTokenizer(),  # type: ignore[arg-type]
        train,
        dev=dev,
        task=task,
        output_dir=None,
        epochs=2,
        batch_size=6,
        bucket_batches=2,
        learning_rate=1e-3,
        weight_decay=0.1,
    )

    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    batches = LengthBatches(lengths, 6, seed=42, bucket_batches=2)
    expected = []
    for epoch in (1, 2):
        for batch in batches.epoch(epoch):
            for group in optimizer.param_groups:
                step = len(expected) + 1
                group["lr"] = 1e-3 * (1.0 if step == 1 else (9 - step) / 8)
            inputs = padded([rows[3 * e + r] for e in batch for r in range(3)], 3)
            labels = torch.tensor([train[e].label for e in batch])
            loss = theirs(**inputs, labels=labels).loss
            expected.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert result.losses == pytest.approx(expected, rel=2e-4)
    with torch.no_grad():
        logits = theirs.eval()(**padded(dev_rows, 3)).logits
    gold = torch.tensor([question.label for question in dev])
    assert result.history[-1].dev is not None
    assert result.history[-1].dev["loss"] == pytest.approx(
        F.cross_entropy(logits, gold).item(), rel=1e-3
    )
    assert result.history[-1].dev["accuracy"] == pytest.approx(
        (logits.argmax(-1) == gold).float().mean().item()
    )


def test_guessing_is_at_random() -> None:
    task = ChoiceTask(make_model(), StubTokenizer(), max_length=16)  # type: ignore[arg-type]
    features = task.features(questions(4, choices=5), training=True)
    assert task.guessing_loss(features) == pytest.approx(math.log(5))


def test_answers_are_the_softmax_of_transformers_logits() -> None:
    model, tokenizer = make_model(), StubTokenizer()
    model.train()
    theirs = twin(model, torch.float64).eval()  # type: ignore[arg-type]
    answerer = ChoiceAnswerer(model, tokenizer, batch_size=2)  # type: ignore[arg-type]
    # The number of choices changes on the way.
    asked = [*questions(5), *questions(3, 1, choices=2), *questions(2, 2, choices=3)]
    answers = list(answerer.answers(asked))
    assert len(answers) == 10
    assert model.training
    for question, answer in zip(asked, answers, strict=True):
        first, second = zip(*question.pairs(), strict=True)
        rows = tokenizer(first, second, truncation=True, max_length=38)["input_ids"]
        with torch.no_grad():
            scores = theirs(**padded(rows, len(rows))).logits.softmax(-1)[0]
        assert answer.scores == pytest.approx(scores.tolist(), abs=1e-5)
        assert answer.index == int(scores.argmax())
        assert answer.score == answer.scores[answer.index]
        assert answer.choice == question.choices[answer.index]
    assert answerer(asked[0].context, asked[0].choices) == answers[0]
    assert list(answerer.answers([])) == []


def test_questions_are_read_no_further_than_a_window() -> None:
    taken = 0

    def source() -> Any:
        nonlocal taken
        for question in questions(20):
            taken += 1
            yield question

    answers = ChoiceAnswerer(make_model(), StubTokenizer()).answers(source(), window=4)  # type: ignore[arg-type]
    assert taken == 0
    next(answers)
    assert taken == 4


@pytest.mark.parametrize("length", [10, 45, 500])
def test_long_questions_are_held_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Their characters count as often as the context is repeated: once a choice."""
    monkeypatch.setattr(prediction, "_WINDOW_CHARACTERS", 1000)
    asked = [ChoiceQuestion("w10 ".ljust(length), ["w1", "w2"]) for _ in range(40)]
    held: list[int] = []

    class Watched(ChoiceAnswerer):
        def _answer(self, questions: list[ChoiceQuestion]) -> Any:
            held.append(len(questions))
            return super()._answer(questions)

    answerer = Watched(make_model(), StubTokenizer())  # type: ignore[arg-type]
    assert len(list(answerer.answers(iter(asked)))) == 40
    most = max(1, 1000 // (2 * (length + 2)))
    assert held == [most] * (40 // most) + [40 % most] * (40 % most > 0)


def test_bad_arguments_of_the_answerer() -> None:
    model, tokenizer = make_model(), StubTokenizer()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ChoiceAnswerer(model, tokenizer, batch_size=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length must be from 3 to 38"):
        ChoiceAnswerer(model, tokenizer, max_length=39)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ChoiceAnswerer(model, tokenizer).answers([], window=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected 2 choices or more, got 1"):
        ChoiceAnswerer(model, tokenizer)("c", ["a"])  # type: ignore[arg-type]
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="row 1 of 1 is not finite"):
        ChoiceAnswerer(model, tokenizer)("c", ["a", "b"])  # type: ignore[arg-type]


def test_the_command_line_learns_and_the_library_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    """From a pretrained encoder without a head: the right choice repeats the context's word."""
    from xlmr_ext import XLMRobertaConfig, XLMRobertaModel

    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path))
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = random.Random(1)

    def row() -> dict[str, Any]:
        label = source.randrange(2)
        good, bad = source.choice(["fox", "dog"]), source.choice(["Stadt", "Buch"])
        endings = [bad, bad]
        endings[label] = good
        return {"sent1": "brown lazy", "ending0": endings[0], "ending1": endings[1], "label": label}

    train = write(tmp_path / "train.jsonl", *(row() for _ in range(120)))
    dev = write(tmp_path / "dev.jsonl", *(row() for _ in range(20)))
    call = ["finetune", "--task", "choice", "--model", tmp_path / "base", "--train", train]
    call += ["--dev", dev, "--learning-rate", "3e-3", "--epochs", "3", "--threads", "1"]
    assert main([*map(str, call), "--output", str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "120 questions to train, 20 to evaluate, a new head for choice, 1 threads"
    assert re.fullmatch(
        r"epoch 3/3  loss \d\.\d{4}  dev loss \d\.\d{4}  dev accuracy 100\.00%  \(.* s\)", lines[3]
    )
    assert lines[5:] == [f"run it: xlmr-ext predict --model {tmp_path / 'out'} --input FILE"]

    model = XLMRobertaForMultipleChoice.from_pretrained(tmp_path / "out")
    answer = ChoiceAnswerer(model, XLMRobertaTokenizer.from_pretrained(tmp_path / "out"))
    assert answer("brown lazy", ["Stadt", "dog"]).index == 1
    log = json.loads((tmp_path / "out" / "xlmr_ext_training.json").read_text())
    assert (log["task"], log["labels"], log["settings"]["max_length"]) == ("choice", [], 64)
    assert log["history"][-1]["dev_accuracy"] == 1.0

    # On with the trained head, and in lines for a program.
    call[4] = tmp_path / "out"
    assert main([*map(str, call), "--output", str(tmp_path / "more"), "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row.get("epoch") for row in rows] == [1, 2, 3, None]
    assert rows[0]["dev_accuracy"] == 1.0
    assert rows[3]["task"] == "choice"

    write(dev, {"context": "c", "choices": ["a", "b", "c"], "label": 0})
    with train.open("a") as file:
        file.write('{"context": "c", "choices": ["a"], "label": 0}\n')
    assert main([*map(str, call), "--output", str(tmp_path / "bad")]) == 1
    assert f"{train}:121: expected 2 choices or more, got 1" in capfd.readouterr().err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "t.json", "--text-column", "x"], "--text-column is an option of --task class"),
        (["--train", "t.iob2", "--doc-stride", "9"], "--doc-stride is an option of --task qa, and"),
        (["--train", "t.csv", "--tag-errors", "repair"], "--tag-errors is an option of --task tok"),
        (["--train", "t.json", "--doc-stride", "-1"], "a whole number of 0 or more, got '-1'"),
        (["--train", "t.csv", "--task", "poems"], "invalid choice: 'poems'"),
    ],
)
def test_options_of_another_task_are_bad_usage(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "--model", "nowhere", "--output", "o", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_an_encoder_of_other_sizes_is_no_new_head(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    train = write(tmp_path / "t.jsonl", GOOD)
    call = ["finetune", "--task", "choice", "--model", tmp_path, "--train", train, "--output"]
    assert main([*map(str, call), str(tmp_path / "out"), "--threads", "1"]) == 1
    assert "lacks 1 weights of the sizes that its config says, roberta.embeddings.word" in (
        capfd.readouterr().err
    )
