"""SQuAD's json and its measures, by values worked out by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xlmr_ext.data import DataError
from xlmr_ext.tasks.squad import GoldAnswer, Question, iterate_questions, read_squad
from xlmr_ext.tasks.squad_metric import exact_match, normalize, word_f1

CONTEXT = "Der 🐻 Bär schläft\nin Köln."


def squad() -> dict[str, Any]:
    first = {
        "id": "q1",
        "question": "Wo?",
        "answers": [
            {"text": "Köln", "answer_start": 21},
            {"text": "in Köln", "answer_start": 18},
        ],
    }
    second = {
        "id": 7,
        "question": "Wann?",
        "is_impossible": True,
        "answers": [],
        "plausible_answers": [{"text": "nie", "answer_start": 0}],
    }
    third = {"id": 'a "q\\', "question": "Wer?"}
    paragraphs = [
        {"context": "A b.", "qas": [third]},
        {"context": CONTEXT, "qas": [first, second]},
    ]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def write(data: object, path: Path = Path("q.json"), **options: Any) -> Path:
    path.write_text(json.dumps(data, **options), encoding="utf-8")
    return path


def first_question(data: dict[str, Any]) -> dict[str, Any]:
    question: dict[str, Any] = data["data"][0]["paragraphs"][1]["qas"][0]
    return question


# -- json -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascii_only", [True, False])
def test_reads_both_versions(ascii_only: bool) -> None:
    path = write(squad(), indent=1, ensure_ascii=ascii_only)
    lines = path.read_text(encoding="utf-8").split("\n")
    third, first, second = read_squad(path)
    assert first.answers == (GoldAnswer("Köln", 21), GoldAnswer("in Köln", 18))
    assert [CONTEXT[a.start : a.end] for a in first.answers] == ["Köln", "in Köln"]
    assert (first.id, first.question, first.context) == ("q1", "Wo?", CONTEXT)
    assert second.answers == ()
    assert second.id == "7"
    assert third.answers is None
    assert third.id == 'a "q\\'
    for question, text in ((first, '"q1"'), (second, "7"), (third, '"a \\"q\\\\"')):
        line = next(n for n, line in enumerate(lines, 1) if f'"id": {text}' in line)
        assert question.where == f"q.json:{line}"


def test_text_that_looks_like_an_id_is_no_id() -> None:
    data = squad()
    data["data"][0]["paragraphs"][0]["context"] = 'Say "id": "q1" aloud.'
    path = write(data, indent=1)
    line = next(n for n, s in enumerate(path.read_text().split("\n"), 1) if '"id": "q1"' in s)
    assert read_squad(path)[1].where == f"q.json:{line}"


def test_byte_order_mark_is_no_text() -> None:
    path = write(squad())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_squad(path)) == 3


def change(data: dict[str, Any], **members: Any) -> dict[str, Any]:
    first_question(data).update(members)
    return data


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    del first_question(data)[key]
    return data


def in_paragraph(data: dict[str, Any], **members: Any) -> dict[str, Any]:
    data["data"][0]["paragraphs"][1].update(members)
    return data


def answer(text: Any, start: Any) -> list[dict[str, Any]]:
    return [{"text": text, "answer_start": start}]


AT = r"q.json:\d+: data\[0\]\.paragraphs\[1\]\.qas\[0\] \(id 'q1'\): "
BROKEN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (
        lambda d: change(d, answers=answer("Köln", 22)),
        AT + r"answers\[0\]: the answer 'Köln' is not in the context at answer_start 22 "
        r"\(code points\): there stands 'öln\.', and the answer stands at 21",
    ),
    # In UTF-16 units, as some tools count.
    (lambda d: change(d, answers=answer("Bär", 7)), AT + ".*there stands 'är ', .* stands at 6"),
    (lambda d: change(d, answers=answer("Rom", 0)), AT + ".*'Der', .* nowhere in the context"),
    (lambda d: change(d, answers=answer("Köln", -5)), AT + ".*start -5 .*stands nothing"),
    (lambda d: change(d, answers=answer("Köln.", 99)), AT + ".*stands '', .*at 21"),
    (lambda d: change(d, answers=answer(" ", 3)), AT + r"answers\[0\]: the answer ' ' is blank"),
    (lambda d: change(d, answers=answer(3, 3)), AT + ".*text must be a string, got int 3"),
    (lambda d: change(d, answers=answer("D", "0")), AT + ".*answer_start must be a number"),
    (lambda d: change(d, answers=answer("D", True)), AT + ".*answer_start must be a number"),
    (lambda d: change(d, answers=[{"text": "D"}]), AT + ".*has no 'answer_start'"),
    (lambda d: change(d, answers=["D"]), AT + r"answers\[0\]: expected an object"),
    (lambda d: change(d, answers="D"), AT + "answers must be a list, got str D"),
    (lambda d: change(d, is_impossible=True), AT + "is_impossible is true and there are 2"),
    (lambda d: change(d, is_impossible="no"), AT + "is_impossible must be true or false"),
    (lambda d: change(d, question=None), AT + "question must be a string, got null"),
    (lambda d: without(d, "question"), AT + "has no 'question'"),
    (lambda d: without(d, "id"), r"q.json: data\[0\]\.paragraphs\[1\]\.qas\[0\]: has no 'id'"),
    (lambda d: change(d, id=[1]), r"qas\[0\]: id must be a string, got list"),
    (lambda d: change(d, id="7"), r"q.json:\d+: .*qas\[1\] \(id '7'\): another question has"),
    (lambda d: in_paragraph(d, context=3), r"q.json: data\[0\]\.paragraphs\[1\]: context must"),
    (lambda d: in_paragraph(d, qas={}), r"paragraphs\[1\]: qas must be a list"),
    (lambda d: in_paragraph(d, qas=[0]), r"paragraphs\[1\]\.qas\[0\]: expected an object, got int"),
    (lambda d: d["data"], r"q.json: expected a JSON object, got list"),
    (lambda d: {"rows": []}, "q.json: has no 'data'"),
    (lambda d: {"data": []}, "q.json has no questions"),
    (lambda d: {"data": [{}]}, r"q.json: data\[0\]: has no 'paragraphs'"),
]


@pytest.mark.parametrize(("alter", "message"), BROKEN)
def test_wrong_file_is_refused_at_its_place(
    alter: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_squad(write(alter(squad()), indent=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "data": [\n}', r"q.json:3: malformed JSON: .* at column 1"),
        (b"", "q.json:1: malformed JSON"),
        (b'{"a":\n"\xff"}', "q.json:2: not UTF-8 .byte 0xff"),
        (b"[" * 100_000, "q.json: malformed JSON"),
        (b"9" * 10_000, "q.json: malformed JSON"),
    ],
)
def test_damaged_file_is_refused(content: bytes, message: str) -> None:
    Path("q.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_squad("q.json")


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="no such"):
        read_squad("no such.json")


# -- a question a line ------------------------------------------------------------------------


def test_reads_a_question_a_line() -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Wo?", "context": CONTEXT},
        {"question": "Wo?", "context": CONTEXT, "id": "x", "answers": answer("Köln", 21)},
        {
            "question": "Wo?",
            "context": CONTEXT,
            "answers": {"text": ["Köln", "Der"], "answer_start": [21, 0]},
        },
        {"question": "Wo?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ]
    text = "\n\n".join(map(json.dumps, rows))
    path = Path("q.jsonl")
    path.write_text(text)
    read = read_squad(path)
    assert read[0] == Question("Wo?", CONTEXT, "1", None, "q.jsonl:1")
    assert read[1] == Question("Wo?", CONTEXT, "x", (GoldAnswer("Köln", 21),), "q.jsonl:3")
    assert read[2].answers == (GoldAnswer("Köln", 21), GoldAnswer("Der", 0))
    assert read[3].answers == ()
    assert list(iterate_questions(io.BytesIO(text.encode()), "q.jsonl")) == read


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "in:2: malformed JSON"),
        ("[]", "in:2: expected a JSON object"),
        ('{"context": "a"}', "in:2: has no 'question'"),
        ('{"question": "a"}', "in:2: has no 'context'"),
        ('{"question": "a", "context": 3}', "in:2: context must be a string"),
        ('{"question": "a", "context": "b", "id": null}', "in:2: id must be a string, got null"),
        (
            '{"question": "a", "context": "b", "answers": [{"text": "a", "answer_start": 0}]}',
            r"in:2: answers\[0\]: the answer 'a' is not in the context at answer_start 0",
        ),
        (
            '{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": []}}',
            "in:2: answers: 1 texts for 0",
        ),
        ('{"question": "a", "context": "b", "answers": {"text": "b"}}', "in:2: answers: text must"),
    ],
)
def test_wrong_line_is_refused(row: str, message: str) -> None:
    stream = io.BytesIO(b'{"question": "a", "context": "b"}\n' + row.encode())
    questions = iterate_questions(stream, "in")
    assert next(questions).id == "1"
    with pytest.raises(DataError, match=message):
        next(questions)


# -- measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, a DOG!", "cat dog"),
        ("an-the", "anthe"),  # punctuation goes first
        ("theory of a", "theory of"),
        ("Der Bär", "der bär"),
        ("«24»", "«24»"),  # ASCII punctuation alone
        ("6½ sacks.", "6½ sacks"),
        ("日本。", "日本。"),
        ("A", ""),
        ("", ""),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("given", "right", "em", "f1"),
    [
        ("the 24 points", ["24 points"], 1, 1),
        ("24 points", ["24", "points 24"], 0, 1),
        # 1 of 3 words given, 1 of 2 right ones: 2 * 1 / 5.
        ("a b c d", ["b x"], 0, 2 / 5),
        # Twice in both counts twice, once in one counts once.
        ("x x y", ["x x z"], 0, 4 / 6),
        ("x x", ["x"], 0, 2 / 3),
        ("p", ["q"], 0, 0),
        ("", [], 1, 1),
        ("p", [], 0, 0),
        ("", ["p"], 0, 0),
        # Nothing is left of "the": SQuAD 2.0's script drops it from the right ones.
        ("the", ["the", "dog"], 0, 0),
        ("the", ["the"], 1, 1),
    ],
)
def test_measures(given: str, right: list[str], em: float, f1: float) -> None:
    assert exact_match(given, right) == em
    assert word_f1(given, right) == pytest.approx(f1, abs=1e-15)


# -- XQuAD ------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "de"])
def test_xquad_reads_whole(language: str, data_dir: Path) -> None:
    path = data_dir / f"xquad/xquad.{language}.json"
    questions = read_squad(path)
    assert len(questions) == 1190
    lines = path.read_text(encoding="utf-8").split("\n")
    for question in questions:
        assert question.answers
        text = question.answers[0].text
        assert exact_match(text, [text]) == word_f1(text, [text]) == 1
        line = int(question.where.rpartition(":")[2])
        assert f'"id": "{question.id}"' in lines[line - 1]
