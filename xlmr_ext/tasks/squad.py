"""Questions about contexts: SQuAD's json, versions 1.1 and 2.0, and a question a line.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (arXiv
1606.05250); Rajpurkar et al. 2018 (arXiv 1806.03822) for questions that have no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xlmr_ext.data import DataError, json_objects, kind_of, text_lines

__all__ = ["GoldAnswer", "Question", "iterate_questions", "read_squad"]

# A key "id" and its value. Inside a JSON string the quotes would have backslashes before them.
_ID = re.compile(r'"id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')
_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number"}


@dataclass(frozen=True)
class GoldAnswer:
    """A right answer: ``text`` is ``context[start : start + len(text)]``."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The code point behind the last."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Args:
        id: as in the file; the line's number where a jsonl row has none.
        answers: right answers; empty where the context holds none; None where nothing is known.
        where: what messages call it, ``file:line`` as a rule.
    """

    question: str
    context: str
    id: str = ""
    answers: tuple[GoldAnswer, ...] | None = None
    where: str = ""


def read_squad(path: str | Path) -> list[Question]:
    """The questions of a file, in its order.

    * ``.jsonl`` and ``.ndjson``: see :func:`iterate_questions`.
    * Everything else: SQuAD's json, ``{"data": [{"paragraphs": [{"context": ..., "qas": [{"id":
      ..., "question": ..., "answers": [{"text": ..., "answer_start": ...}]}]}]}]}``, with
      ``answer_start`` in code points. In version 2.0 a question with ``"is_impossible": true`` has
      no answer; its ``plausible_answers`` are not read. Without ``answers`` nothing is known.

    Raises:
        DataError: for what is not such a file, an id that comes twice, or an answer that does not
            stand in the context at its place. The message names the file, the line where the
            question has an id, and the place in the json.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        with path.open("rb") as stream:
            return list(iterate_questions(stream, str(path)))
    return list(_Squad(path).questions())


def iterate_questions(stream: BinaryIO, name: str) -> Iterator[Question]:
    """A question a line: ``{"question": ..., "context": ...}``, and ``id`` and ``answers`` at will.

    ``answers`` are a list of ``{"text": ..., "answer_start": ...}``, or, as the datasets library
    writes them, one object with a list of each; an empty one says that there is no answer. Holds
    one line at a time.

    Raises:
        DataError: naming ``name:line``.
    """
    for number, row in json_objects(text_lines(stream, name), name):
        where = f"{name}:{number}"
        answers = row.get("answers")
        if isinstance(answers, dict):
            texts = _member(answers, "text", list, f"{where}: answers")
            starts = _member(answers, "answer_start", list, f"{where}: answers")
            if len(texts) != len(starts):
                raise DataError(
                    f"{where}: answers: {len(texts)} texts for {len(starts)} of answer_start"
                )
            pairs = zip(texts, starts, strict=True)
            row["answers"] = [{"text": text, "answer_start": start} for text, start in pairs]
        row.setdefault("id", str(number))
        yield _question(row, _member(row, "context", str, where), where, where)


class _Squad:
    """One file of SQuAD's json, and where its questions stand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
            ) from None
        try:
            self.root = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: malformed JSON: {error}") from None
        self.lines = _lines_of_ids(text)

    def questions(self) -> Iterator[Question]:
        if not isinstance(self.root, dict):
            raise DataError(f"{self.path}: expected a JSON object, got {kind_of(self.root)}")
        seen: set[str] = set()
        for article, place in self._objects(self.root, "data", ""):
            for paragraph, within in self._objects(article, "paragraphs", place):
                context = _member(paragraph, "context", str, self._where(within))
                for row, at in self._objects(paragraph, "qas", within):
                    name = _identity(row, self._where(at))
                    line = self.lines.get(name)
                    short = str(self.path) if line is None else f"{self.path}:{line}"
                    where = f"{short}: {at} (id {name!r})"
                    if name in seen:
                        raise DataError(f"{where}: another question has the same id")
                    seen.add(name)
                    yield _question(row, context, where, short)
        if not seen:
            raise DataError(f"{self.path} has no questions")

    def _objects(self, parent: dict[str, Any], key: str, at: str) -> Iterator[tuple[Any, str]]:
        """The objects of a list in the json, each with its place."""
        for index, item in enumerate(_member(parent, key, list, self._where(at))):
            place = f"{at}.{key}[{index}]".removeprefix(".")
            if not isinstance(item, dict):
                raise DataError(f"{self._where(place)}: expected an object, got {kind_of(item)}")
            yield item, place

    def _where(self, at: str) -> str:
        return f"{self.path}: {at}" if at else str(self.path)


def _lines_of_ids(text: str) -> dict[str, int]:
    """The line at which each id stands last; a file is wrong that has one twice."""
    lines: dict[str, int] = {}
    line, before = 1, 0
    for match in _ID.finditer(text):
        line += text.count("\n", before, match.start())
        before = match.start()
        lines[str(json.loads(match[1]))] = line
    return lines


def _question(row: dict[str, Any], context: str, where: str, short: str) -> Question:
    """A question of its JSON object; ``where`` begins the messages, ``short`` is kept."""
    question = _member(row, "question", str, where)
    impossible = row.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{where}: is_impossible must be true or false, got {kind_of(impossible)}")
    given = row.get("answers")
    answers = None
    if given is not None:
        listed = _member(row, "answers", list, where)
        answers = tuple(
            _answer(item, context, f"{where}: answers[{index}]")
            for index, item in enumerate(listed)
        )
    if impossible:
        if answers:
            raise DataError(f"{where}: is_impossible is true and there are {len(answers)} answers")
        answers = ()
    return Question(question, context, _identity(row, where), answers, short)


def _answer(item: Any, context: str, where: str) -> GoldAnswer:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object, got {kind_of(item)}")
    text = _member(item, "text", str, where)
    start = _member(item, "answer_start", int, where)
    if not text.strip():
        raise DataError(f"{where}: the answer {text!r} is blank")
    if start < 0 or context[start : start + len(text)] != text:
        found = context.find(text)
        stands = repr(_shown(context[start : start + len(text)])) if start >= 0 else "nothing"
        raise DataError(
            f"{where}: the answer {_shown(text)!r} is not in the context at answer_start {start} "
            f"(code points): there stands {stands}, and the answer "
            + (f"stands at {found}" if found >= 0 else "stands nowhere in the context")
        )
    return GoldAnswer(text, start)


def _identity(row: dict[str, Any], where: str) -> str:
    """The id; whole numbers, which some sets of questions have, as their decimal text."""
    name = row.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    return str(_member(row, "id", str, where))


def _member(parent: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in parent:
        raise DataError(f"{where}: has no {key!r}")
    value = parent[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key} must be {_NAMES[kind]}, got {kind_of(value)}")
    return value


def _shown(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
