"""``xlmr-ext predict`` for tokens, answers and choices: what is read, written and refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_heads import TAGS, write_head

from xlmr_ext import (
    ChoiceAnswerer,
    EntityRecognizer,
    QuestionAnswerer,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForTokenClassification,
    XLMRobertaTokenizer,
)
from xlmr_ext.cli.main import main
from xlmr_ext.tasks.choice import read_choices
from xlmr_ext.tasks.iob2 import read_iob2, to_iob2
from xlmr_ext.tasks.squad import read_squad
from xlmr_ext.tasks.tokens import token_logits

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "Wir haben gestern\tin der Stadt",
    "今天天气很好",
    "Le petit chat noir dort sous la table " * 4,
]
# A comment, a word without a token, a Chinese word (whose first token is a space), a hash.
SENTENCES = [
    ["The", "dog", "\x07", "jumps"],
    ["今天", "fox", "#"],
    ["Le", "chat", "dort", "sous", "table"],
]
IOB2 = "# a comment\n" + "\n".join(
    "".join(f"{word} {'B-PER' if word == 'dog' else 'O'}\n" for word in words)
    for words in SENTENCES
)
CONTEXT = "The quick 🦊 jumps over the lazy dog. Wir haben ein neues Buch gekauft."
QUESTIONS = ["Wer?", "What jumps?", "Was?"]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "paragraphs": [
                {
                    "context": CONTEXT * 3,
                    "qas": [
                        {"id": f"q{number}", "question": question}
                        for number, question in enumerate(QUESTIONS)
                    ],
                }
            ]
        }
    ],
}
CHOICES = [
    {"premise": "The fox jumps", "choice1": "over the dog", "choice2": "Buch", "label": 0},
    {"context": "Wir", "question": "haben", "choices": ["ein", "neues", "Buch"]},
    {"question": "Le petit chat", "choices": ["dort", "sous la table"]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_head(folder / "tokens", "XLMRobertaForTokenClassification", TAGS)
    write_head(folder / "qa", "XLMRobertaForQuestionAnswering", ["a", "b"])
    write_head(folder / "choice", "XLMRobertaForMultipleChoice", ["a", "b"])
    write_head(folder / "topics", "XLMRobertaForSequenceClassification", ["x", "y", "z"])
    return folder


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], restore_threads: None
) -> Callable[..., tuple[int, str, str]]:
    """Runs predict in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["predict", "--threads", "1", *map(str, arguments)])
        sys.stdout.flush()
        return code, *capfd.readouterr()

    return call


Cli = Callable[..., tuple[int, str, str]]


def write(path: Path, content: Any) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), "utf-8")
    return path


def loaded(kind: Any, folder: Path) -> tuple[Any, XLMRobertaTokenizer]:
    return kind.from_pretrained(folder), XLMRobertaTokenizer.from_pretrained(folder)


def feed(patch: pytest.MonkeyPatch, lines: Iterator[bytes] | list[bytes]) -> None:
    """Standard input of these lines, read one at a time."""
    patch.setattr(sys, "stdin", SimpleNamespace(buffer=lines, isatty=lambda: False))


# -- tokens


@pytest.mark.parametrize("strategy", [None, "none", "first"])
def test_entities_of_lines(models: Path, cli: Cli, tmp_path: Path, strategy: Any) -> None:
    path = write(tmp_path / "a.txt", "".join(f"{line}\n" for line in LINES))
    options = [] if strategy is None else ["--aggregation", strategy]
    code, out, err = cli("--model", models / "tokens", "--input", path, *options)
    assert (code, err) == (0, "")
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert header == ["start", "end", "entity", "score", "word", "text"]
    model = loaded(XLMRobertaForTokenClassification, models / "tokens")
    expected = EntityRecognizer(*model, strategy or "simple")(LINES)
    assert rows == [
        [
            *(str(entity.start), str(entity.end), entity.entity_group, f"{entity.score:.6f}"),
            *(LINES[number - 1][entity.start : entity.end].replace("\t", " "), str(number)),
        ]
        for number, found in enumerate(expected, 1)
        for entity in found
    ]
    assert {row[-1] for row in rows} >= {"1", "3", "5"}


def test_entities_as_json_of_a_column_and_of_words(models: Path, cli: Cli, tmp_path: Path) -> None:
    csv = write(tmp_path / "a.csv", "id,body\n1,the lazy fox\n2,Buch\n")
    words = write(tmp_path / "b.iob2", IOB2)
    code, out, err = cli(
        *["--model", models / "tokens", "--input", csv, words, csv, "--format", "jsonl"],
        *["--text-column", "body", "--batch-size", 2, "--window", 2],
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    sentences = [" ".join(words) for words in SENTENCES]
    assert [row["text"] for row in rows] == [
        *("the lazy fox", "Buch", *sentences, "the lazy fox", "Buch")
    ]
    assert rows[:2] == rows[-2:]
    recognizer = EntityRecognizer(*loaded(XLMRobertaForTokenClassification, models / "tokens"))
    expected = [
        *recognizer(["the lazy fox", "Buch"]),
        *recognizer([text.split(" ") for text in sentences], is_split_into_words=True),
    ]
    for row, entities in zip(rows, expected, strict=False):
        assert len(row["entities"]) == len(entities)
        for found, entity in zip(row["entities"], entities, strict=True):
            assert found == {**entity.as_dict(), "score": round(entity.score, 6)}


def word_tags(folder: Path, sentences: list[list[str]]) -> list[list[str]]:
    """The label of each word's first token, as IOB2; a word without a token is inside or O."""
    model, tokenizer = loaded(XLMRobertaForTokenClassification, folder)
    tags = []
    for words in sentences:
        rows = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        ids = [0, *(token for row in rows for token in row), 2]
        (logits,) = token_logits(model, [ids], batch_size=1)
        chosen, place = [], 1
        for row in rows:
            if row:
                chosen.append(TAGS[int(logits[place].argmax())])
            place += len(row)
        fixed = iter(to_iob2(chosen))
        tags.append([next(fixed) if row else "?" for row in rows])
    return tags


def test_iob2_in_iob2_out(models: Path, cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "in.iob2", IOB2)
    output = tmp_path / "out.iob2"
    command = ["--model", models / "tokens", "--format", "iob2"]
    code, out, err = cli(*command, "--input", path, "--output", output)
    assert (code, out, err) == (0, "", "")
    # What is written is what the strict reader reads.
    found, given = read_iob2(output), read_iob2(path)
    assert found.words == given.words == SENTENCES
    expected = word_tags(models / "tokens", given.words)
    assert len({tag for tags in expected for tag in tags}) > 2
    for tags, right in zip(found.tags, expected, strict=True):
        assert [t for t, r in zip(tags, right, strict=True) if r != "?"] == [
            r for r in right if r != "?"
        ]
    # The tags of the input do not matter, and need not be there.
    bare = "".join(line.split(" ")[0] + "\n" for line in IOB2.splitlines()[1:])
    code, out, err = cli(*command, "--input", write(tmp_path / "bare.iob2", bare))
    assert (code, err) == (0, "")
    assert out == output.read_text("utf-8")
    counted = "".join(f"{n}\tNN\t{w}\n" for n, w in enumerate(SENTENCES[0], 1))
    code, out, err = cli(
        *[*command, "--token-column", 3, "--input", write(tmp_path / "c.conll", counted)]
    )
    assert (code, err) == (0, "")
    assert out == output.read_text("utf-8").split("\n\n")[0] + "\n\n"


def test_every_word_of_a_long_sentence_has_a_tag(models: Path, cli: Cli, tmp_path: Path) -> None:
    words = LINES[4].split() * 4
    path = write(tmp_path / "long.iob2", "".join(f"{word}\tO\n" for word in words))
    command = ["--model", models / "tokens", "--input", path, "--format", "iob2"]
    code, out, err = cli(*command, "--max-length", 40, "--stride", 20)
    assert (code, err) == (0, "")
    assert [line.split("\t")[0] for line in out.splitlines()] == [*words, ""]
    # Far from the edges of windows the answers are those of a sentence that fits.
    short = write(tmp_path / "s.iob2", "".join(f"{word}\tO\n" for word in LINES[4].split()))
    code, alone, _ = cli("--model", models / "tokens", "--input", short, "--format", "iob2")
    assert code == 0
    assert out.splitlines()[:3] == alone.splitlines()[:3]


def test_iob2_needs_such_labels(cli: Cli, tmp_path: Path) -> None:
    model = write_head(tmp_path / "pos", "XLMRobertaForTokenClassification", ["NOUN", "VERB", "O"])
    path = write(tmp_path / "a.iob2", IOB2)
    code, out, err = cli("--model", model, "--input", path, "--format", "iob2")
    assert (code, out) == (1, "")
    assert "a model whose labels are O, B-TYPE and I-TYPE; " in err
    assert err.endswith("/pos has 'NOUN'\n")


# -- answers


def test_answers_to_squad(models: Path, cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "squad.json", SQUAD)
    code, out, err = cli("--model", models / "qa", "--input", path)
    assert (code, err) == (0, "")
    answerer = QuestionAnswerer(*loaded(XLMRobertaForQuestionAnswering, models / "qa"))
    expected = [answers[0] for answers in answerer.stream(read_squad(path))]
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "id": f"q{number}",
            "answer": answer.answer,
            "score": round(answer.score, 6),
            "start": answer.start,
            "end": answer.end,
        }
        for number, answer in enumerate(expected)
    ]
    output = tmp_path / "predictions.json"
    command = ["--model", models / "qa", "--input", path, "--format", "squad"]
    code, out, err = cli(*command, "--output", output, "--batch-size", 1)
    assert (code, out, err) == (0, "", "")
    assert json.loads(output.read_text("utf-8")) == {
        f"q{number}": answer.answer for number, answer in enumerate(expected)
    }
    code, out, _ = cli(*command, "--max-answer-length", 1, "--max-length", 40, "--doc-stride", 9)
    assert code == 0
    assert json.loads(out).keys() == {"q0", "q1", "q2"}
    assert json.loads(out) != json.loads(output.read_text("utf-8"))


def test_no_answer_takes_part_on_request(models: Path, cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "Wer?", "context": CONTEXT}])
    model = loaded(XLMRobertaForQuestionAnswering, models / "qa")
    scores = []
    for options, allowed in (([], False), (["--no-answer"], True)):
        code, out, _ = cli("--model", models / "qa", "--input", path, *options)
        assert code == 0
        answer = QuestionAnswerer(*model, handle_impossible_answer=allowed)("Wer?", CONTEXT)
        assert json.loads(out)["score"] == round(answer.score, 6)
        scores.append(answer.score)
    assert scores[0] != scores[1]


def test_questions_a_line(models: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": "Wer?", "context": CONTEXT},
        {"id": "x", "question": "Was?", "context": CONTEXT},
    ]
    feed(monkeypatch, [json.dumps(row).encode() + b"\n" for row in rows])
    code, out, err = cli("--model", models / "qa")
    assert (code, err) == (0, "")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["1", "x"]


def test_squad_predictions_are_whole_or_not_written(models: Path, cli: Cli, tmp_path: Path) -> None:
    row = json.dumps({"question": "Wer?", "context": CONTEXT, "id": "q0"})
    output = write(tmp_path / "old.json", "old")
    command = ["--model", models / "qa", "--format", "squad", "--output", output, "--input"]
    code, _, err = cli(*command, write(tmp_path / "a.jsonl", f"{row}\n{{\n"))
    assert code == 1
    assert "a.jsonl:2: malformed JSON" in err
    assert err.endswith("; nothing was written\n")
    code, _, err = cli(*command, write(tmp_path / "b.jsonl", f"{row}\n{row}\n"))
    assert code == 1
    assert err.endswith("/b.jsonl:2: another question has the id 'q0'\n")
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "old.json"]


# -- choices


def test_choices(models: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, [json.dumps(row).encode() + b"\n" for row in CHOICES])
    code, out, err = cli("--model", models / "choice")
    assert (code, err) == (0, "")
    answerer = ChoiceAnswerer(*loaded(XLMRobertaForMultipleChoice, models / "choice"))
    questions = [
        read_choices(write(tmp_path / f"{number}.jsonl", [row]))[0]
        for number, row in enumerate(CHOICES)
    ]
    rows = [json.loads(line) for line in out.splitlines()]
    for row, found in zip(rows, answerer.answers(questions), strict=True):
        assert row == {
            "index": found.index,
            "choice": found.choice,
            "score": round(found.score, 6),
            "scores": [round(score, 6) for score in found.scores],
        }
    code, out, err = cli(
        *["--model", models / "choice", "--input", write(tmp_path / "a.jsonl", [*CHOICES, {}])]
    )
    assert (code, len(out.splitlines())) == (1, 3)
    assert "a.jsonl:4: has no text" in err
    assert err.endswith("; the 3 rows before it were written\n")


# -- streams


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("topics", "fox"),
        ("tokens", "fox jumps"),
        ("qa", json.dumps({"question": "Wer?", "context": CONTEXT})),
        ("choice", json.dumps(CHOICES[0])),
    ],
)
def test_answers_are_written_while_the_input_is_read(
    models: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, line: str
) -> None:
    output = tmp_path / "out.txt"

    def lines() -> Iterator[bytes]:
        for number in range(20):
            if number in (6, 13):
                # The windows before this one are answered, and on the disk.
                assert output.stat().st_size > 0, number
                sizes.append(output.stat().st_size)
            yield line.encode() + b"\n"
        raise KeyboardInterrupt

    sizes: list[int] = []
    feed(monkeypatch, lines())
    code, _, err = cli("--model", models / task, "--output", output, "--window", 1)
    assert code == 1
    assert err.startswith("xlmr-ext: stopped after ")
    assert err.endswith(" rows were written\n")
    assert sizes[0] < sizes[1] < output.stat().st_size


# -- refusals


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("tokens", ["--input", "a.json"], "a.json is json, and tokens reads txt, csv, tsv, jsonl,"),
        ("topics", ["--input", "a.iob2"], "a.iob2 is iob2, and classification reads txt, csv, tsv"),
        ("topics", ["--input", "a.json"], "a.json is json, and classification reads"),
        ("choice", ["--input", "a.csv"], "a.csv is csv, and choice reads jsonl"),
        ("qa", ["--input", "a.txt"], "a.txt is txt, and qa reads jsonl, json"),
        ("qa", ["--input-format", "txt"], "- is txt, and qa reads jsonl, json"),
        ("qa", ["--input-format", "json"], "standard input cannot be json"),
        ("qa", ["--format", "tsv"], "--format tsv is not one of qa: jsonl, squad"),
        ("topics", ["--format", "iob2"], "--format iob2 is not one of classification: tsv, jsonl"),
        ("tokens", ["--format", "iob2"], "--format iob2 needs words: inputs that are .iob2"),
        (
            "tokens",
            ["--input", "a.iob2", "a.txt", "--format", "iob2"],
            "--format iob2 needs words: inputs that are .iob2",
        ),
        (
            "tokens",
            ["--input", "a.iob2", "--format", "iob2", "--aggregation", "max"],
            "--aggregation is not for --format iob2",
        ),
        (
            "tokens",
            ["--input", "a.csv", "--label-column", "x"],
            "--label-column is an option of --task classification, and this is tokens",
        ),
        ("topics", ["--aggregation", "max"], "--aggregation is an option of --task tokens, and"),
        ("topics", ["--no-answer"], "--no-answer is an option of --task qa, and this is classif"),
        ("qa", ["--text-column", "x"], "is an option of --task classification and tokens, and"),
    ],
)
def test_bad_usage(
    models: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in options:
        if option.startswith("a."):
            write(Path(option), "The O\n")
    code, out, err = cli("--model", models / task, *options)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_head_of_another_task(models: Path, cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "fox\n")
    code, _, err = cli("--model", models / "qa", "--task", "tokens", "--input", path)
    assert code == 1
    assert "has no trained head for tokens (make one: xlmr-ext finetune): it lacks 2 w" in err
    # Told by the checkpoint, --task says nothing new.
    for task in ([], ["--task", "tokens"]):
        assert cli("--model", models / "tokens", "--input", path, *task)[0] == 0
