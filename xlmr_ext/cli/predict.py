"""``xlmr-ext predict``."""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from xlmr_ext.cli.arguments import (
    TEXT_FORMATS,
    add_columns,
    add_device,
    add_dtype,
    add_hub,
    count,
)
from xlmr_ext.cli.console import check_device, input_format, say, use_threads
from xlmr_ext.cli.inputs import Rows, T, add_input, check_paths, interactive, opened, read_sources
from xlmr_ext.cli.outputs import (
    add_output,
    format_of,
    is_device,
    one_line,
    opened_output,
    replace_output,
    to_bytes,
    write_stream,
)
from xlmr_ext.cli.task_arguments import (
    add_option,
    add_task_name,
    load_to_run,
    refuse_others,
    task_of_checkpoint,
)
from xlmr_ext.tasks.registry import task_of_file

if TYPE_CHECKING:
    from xlmr_ext.data import Row
    from xlmr_ext.prediction import Prediction
    from xlmr_ext.tasks.choice import ChoiceQuestion
    from xlmr_ext.tasks.entities import Entity
    from xlmr_ext.tasks.question_answerer import Answer
    from xlmr_ext.tasks.squad import Question

    Words = str | list[str]

A = TypeVar("A")

NAME = "predict"
SUMMARY = "run a fine-tuned model on texts"
DESCRIPTION = """\
Run a fine-tuned model on texts, in order and in constant memory. What it does is told by the head
of MODEL (or by --task), and so is what is read and written:

  classification  standard input and .txt: a text a line; .csv, .tsv, .jsonl: a column of texts
                  (see `xlmr-ext finetune --help`). With --label-column, accuracy and macro F1
                  are printed on stderr
      tsv         label, score, text (and pair), with a header line; tabs and line breaks in a
                  text become spaces
      jsonl       an object with text, label, score, and the scores of all labels
  tokens          the same, or .iob2: a word and its tag a line, an empty line after a sentence
      tsv         a row for each entity: start, end (code points of the text), entity, score, the
                  entity as the text has it, and the number of the text, from 1
      jsonl       an object with text and entities for each text
      iob2        the words with the tags that the model gives them (of .iob2 alone)
  qa              .json: SQuAD's; standard input and .jsonl: question and context, id at will
      jsonl       an object with id, answer, score, start and end for each question
      squad       one object of answers by id, as SQuAD's evaluation script reads it
  choice          standard input and .jsonl: see `xlmr-ext finetune --help`
      jsonl       an object with index (of the best choice, from 0), choice, score, scores"""

EXAMPLES = """\
examples:
  echo "Der Zug nach Paris hat Verspätung." | xlmr-ext predict --model topics
  xlmr-ext predict --model topics --input a.txt b.txt --output labelled.tsv
  xlmr-ext predict --model topics --input reviews.csv --text-column review --format jsonl
  xlmr-ext predict --model topics --input test.tsv --label-column category > /dev/null
  zcat big.jsonl.gz | xlmr-ext predict --model topics --input-format jsonl | head
  xlmr-ext predict --model entities --input news.txt --aggregation first
  xlmr-ext predict --model answers --input xquad.de.json --format squad --output answers.json"""

# What each task reads, the first from standard input, and writes, the first unless told otherwise.
_INPUTS = {
    "classification": ("txt", "csv", "tsv", "jsonl"),
    "tokens": ("txt", "csv", "tsv", "jsonl", "iob2"),
    "qa": ("jsonl", "json"),
    "choice": ("jsonl",),
}
_OUTPUTS = {
    "classification": ("tsv", "jsonl"),
    "tokens": ("tsv", "jsonl", "iob2"),
    "qa": ("jsonl", "squad"),
    "choice": ("jsonl",),
}
# The tasks of the options that not all have.
_OWNERS = {
    "text_column": ("classification", "tokens"),
    "encoding_errors": ("classification", "tokens"),
    "pair_column": ("classification",),
    "label_column": ("classification",),
    "aggregation": ("tokens",),
    "stride": ("tokens",),
    "token_column": ("tokens",),
    "doc_stride": ("qa",),
    "max_answer_length": ("qa",),
    "no_answer": ("qa",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    add_task_name(data, "what the model's head is for")
    add_input(data)
    add_output(data)
    data.add_argument(
        "--format",
        choices=tuple(dict.fromkeys(name for names in _OUTPUTS.values() for name in names)),
        help="of the output (default: by the suffix, else tsv, or jsonl for qa and choice)",
    )
    add_columns(data, label_default=None, formats=(*TEXT_FORMATS, "iob2", "json"))
    tokens = parser.add_argument_group("--task tokens")
    tokens.add_argument(
        "--aggregation",
        choices=("none", "simple", "first", "average", "max"),
        help="how tokens become entities: simple joins tokens of one type; the others label whole "
        "words, by their first token, their mean or their surest token; none: every token by "
        "itself (default: simple)",
    )
    for name in ("stride", "token_column"):
        add_option(tokens, "tokens", name)
    answers = parser.add_argument_group("--task qa")
    for name in ("doc_stride", "max_answer_length"):
        add_option(answers, "qa", name)
    answers.add_argument(
        "--no-answer",
        action="store_true",
        help='"no answer" (an empty one) may be the best, as in SQuAD 2.0',
    )
    size = parser.add_argument_group("size")
    add_device(size)
    add_dtype(size)
    size.add_argument(
        "--batch-size", metavar="N", type=count, default=32, help="rows (or questions) a batch"
    )
    size.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to, or that a window has (default: what the model takes; "
        "qa 384)",
    )
    size.add_argument(
        "--window",
        metavar="N",
        type=count,
        default=1024,
        help="texts read ahead to be sorted by length; 1 answers every line at once",
    )
    add_hub(parser)


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    formats = [input_kind(arguments, path) for path in arguments.input]
    check_paths(arguments, arguments.input)
    task = task_of_checkpoint(arguments)
    _check_task(arguments, task, formats)
    use_threads(arguments)
    if interactive(arguments.input):
        arguments.window = 1
    job = _JOBS[task](arguments, *load_to_run(arguments, task))
    if arguments.format == "squad":
        _write_answers(arguments.output, job)
        return 0
    write_stream(
        arguments.output,
        job.rows,
        job.lines,
        header=job.header,
        flush=lambda: not job.rows.waiting,
    )
    if job.verdict is not None:
        say(job.verdict())
    return 0


def input_kind(arguments: argparse.Namespace, path: str) -> str | None:
    """The format of an input; None where it is for the task to say. Bad usage (exit code 2) where
    no task could read it."""
    if arguments.input_format is None and path != "-":
        of_suffix = {"tokens": "iob2", "qa": "json"}.get(task_of_file(path))
        if of_suffix is not None:
            return of_suffix
    # Also refuses columns of what has none.
    found: str = input_format(arguments, path)
    if path == "-" and found == "json":
        arguments.parser.error("standard input cannot be json: SQuAD's json needs a file")
    return None if path == "-" and arguments.input_format is None else found


def check_kind(
    parser: argparse.ArgumentParser, path: str, found: str | None, task: str, of: str | None = None
) -> None:
    """Bad usage (exit code 2) where a task does not read inputs of a format.

    Args:
        of: the task whose inputs it reads; None: its own.
    """
    reads = _INPUTS[of or task]
    if found not in reads:
        parser.error(
            f"{path} is {found}, and {task} reads {', '.join(reads)} (--input-format tells another "
            "format than the suffix does)"
        )


def _check_task(arguments: argparse.Namespace, task: str, formats: Iterable[str | None]) -> None:
    """Settles ``sources`` (path and format of every input) and the output's format; bad usage where
    they are not the task's."""
    parser: argparse.ArgumentParser = arguments.parser
    refuse_others(arguments, task, _OWNERS)
    arguments.sources = [
        (path, found or _INPUTS[task][0])
        for path, found in zip(arguments.input, formats, strict=True)
    ]
    for path, found in arguments.sources:
        check_kind(parser, path, found, task)
    arguments.format = (
        arguments.format or format_of(arguments.output, _OUTPUTS[task]) or _OUTPUTS[task][0]
    )
    if arguments.format not in _OUTPUTS[task]:
        parser.error(
            f"--format {arguments.format} is not one of {task}: {', '.join(_OUTPUTS[task])}"
        )
    if arguments.format == "iob2":
        if any(found != "iob2" for _, found in arguments.sources):
            parser.error("--format iob2 needs words: inputs that are .iob2 (--input-format iob2)")
        if arguments.aggregation is not None:
            parser.error("--aggregation is not for --format iob2, which labels words")


class _Asked(Rows[T]):
    """The rows of the inputs; ``waiting`` holds those that are read and not answered."""

    def __init__(self, rows: Iterable[T]) -> None:
        super().__init__(rows)
        self.waiting: deque[T] = deque()

    def __iter__(self) -> Iterator[T]:
        for row in super().__iter__():
            self.waiting.append(row)
            yield row

    def with_answers(self, answers: Iterable[A]) -> Iterator[tuple[T, A]]:
        """Each row with its answer; the rows are in the order of the answers."""
        for answer in answers:
            yield self.waiting.popleft(), answer


class _Job(NamedTuple):
    """What is to be written: ``lines`` has an item, of any number of lines, for each row."""

    rows: _Asked[Any]
    lines: Iterator[str]
    header: str = ""
    verdict: Callable[[], str] | None = None


def _classification(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> _Job:
    from xlmr_ext.prediction import predict

    rows = _Asked(_labelled(arguments, model))
    predictions = predict(
        model,
        tokenizer,
        (row.text if row.pair is None else (row.text, row.pair) for row in rows),
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        window=arguments.window,
    )
    counts: dict[tuple[str, str], int] = {}

    def lines() -> Iterator[str]:
        for row, prediction in rows.with_answers(predictions):
            if row.label is not None:
                pair = (row.label, prediction.label)
                counts[pair] = counts.get(pair, 0) + 1
            yield _classified(prediction, arguments.format)

    pair = "" if arguments.pair_column is None else "\tpair"
    return _Job(
        rows,
        lines(),
        f"label\tscore\ttext{pair}\n" if arguments.format == "tsv" else "",
        None if arguments.label_column is None else lambda: _verdict(counts),
    )


def _labelled(arguments: argparse.Namespace, model: Any) -> Iterator[Row]:
    """The rows of the inputs; their labels, where they have some, are the model's.

    As `eval` has it, a file's labels may be numbers where the model has no names for its own; here
    the first row of a file decides. DataError for a label that the model does not have.
    """
    from xlmr_ext.data import unknown_label
    from xlmr_ext.prediction import classifier_labels
    from xlmr_ext.tasks.classification import label_numbers

    names = classifier_labels(model)
    for path, format in arguments.sources:
        known: dict[str, str] = {}
        for row in read_sources(arguments, [(path, format)]):
            if row.label is None:
                yield row
                continue
            if not known:
                numbers = label_numbers(names)
                chosen = numbers if row.label in numbers else names
                known = dict(zip(chosen, names, strict=True))
            if row.label not in known:
                where = f"{'standard input' if path == '-' else path}:{row.line}"
                raise unknown_label(where, row.label, list(known))
            yield row._replace(label=known[row.label])


def _verdict(counts: Mapping[tuple[str, str], int]) -> str:
    """Accuracy and macro F1 of (label, predicted label), counted."""
    from xlmr_ext.data import label_list
    from xlmr_ext.prediction import agreement

    labels = label_list(label for pair in counts for label in pair)
    accuracy, macro_f1 = agreement([[counts.get((g, p), 0) for p in labels] for g in labels])
    return f"{sum(counts.values())} rows, accuracy {accuracy:.2%}, macro F1 {macro_f1:.4f}"


def _classified(prediction: Prediction, format: str) -> str:
    texts = [prediction.text] + ([] if prediction.pair is None else [prediction.pair])
    if format == "tsv":
        shown = [one_line(text) for text in texts]
        return "\t".join([prediction.label, f"{prediction.score:.6f}", *shown]) + "\n"
    return _json_line(
        **dict(zip(("text", "pair"), texts, strict=False)),
        label=prediction.label,
        score=prediction.score,
        scores=prediction.scores,
    )


def _tokens(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> _Job:
    from xlmr_ext.tasks.entities import EntityRecognizer

    tags = arguments.format == "iob2"
    recognizer = EntityRecognizer(
        model,
        tokenizer,
        # As training and evaluation have it: a word's first token speaks for it.
        "first" if tags else arguments.aggregation or "simple",
        max_length=arguments.max_length,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
    )
    if tags:
        _check_iob2(arguments.model, recognizer.labels)
    rows = _Asked(texts_or_words(arguments))
    answers = rows.with_answers(recognizer.stream(rows, window=arguments.window))
    if tags:
        return _Job(rows, (_tagged(words, found) for words, found in answers))
    texts = ((row if isinstance(row, str) else " ".join(row), found) for row, found in answers)
    if arguments.format == "jsonl":
        return _Job(
            rows,
            (_json_line(text=text, entities=[e.as_dict() for e in found]) for text, found in texts),
        )
    return _Job(
        rows,
        (_entity_rows(number, *answer) for number, answer in enumerate(texts, 1)),
        "start\tend\tentity\tscore\tword\ttext\n",
    )


def texts_or_words(arguments: argparse.Namespace) -> Iterator[Words]:
    """The texts of ``sources``; of .iob2, each sentence's words."""
    from xlmr_ext.tasks.iob2 import read_sentences

    for path, format in arguments.sources:
        if format == "iob2":
            with opened(path) as (stream, name):
                sentences = read_sentences(
                    stream, token_column=arguments.token_column, errors="ignore", name=name
                )
                yield from (sentence.words for sentence in sentences)
        else:
            yield from (row.text for row in read_sources(arguments, [(path, format)]))


def _entity_rows(number: int, text: str, entities: Iterable[Entity]) -> str:
    return "".join(
        f"{e.start}\t{e.end}\t{one_line(e.entity_group)}\t{e.score:.6f}\t"
        f"{one_line(text[e.start : e.end])}\t{number}\n"
        for e in entities
    )


def _check_iob2(name: str, labels: Iterable[str]) -> None:
    for label in labels:
        if label != "O" and not label.startswith(("B-", "I-")):
            raise ValueError(
                f"--format iob2 needs a model whose labels are O, B-TYPE and I-TYPE; {name} has "
                f"{label!r}"
            )


def _tagged(words: Words, entities: Iterable[Entity]) -> str:
    """A sentence in IOB2, from the entities of its words with a space between each two."""
    starts = list(accumulate((len(word) + 1 for word in words), initial=0))[:-1]
    tags = ["O"] * len(words)
    for entity in entities:
        first = bisect_right(starts, entity.start) - 1
        # A word's first token may stand for the space before it alone, and so for no code point.
        end = max(bisect_left(starts, entity.end), first + 1)
        kind = entity.entity_group
        tags[first:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - first - 1)
    return "".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)) + "\n"


def _qa(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> _Job:
    from xlmr_ext.tasks.question_answerer import QuestionAnswerer

    options = {
        name: getattr(arguments, name)
        for name in ("doc_stride", "max_answer_length")
        if getattr(arguments, name) is not None
    }
    answerer = QuestionAnswerer(
        model,
        tokenizer,
        max_length=arguments.max_length,
        handle_impossible_answer=arguments.no_answer,
        batch_size=min(arguments.batch_size, arguments.window),
        **options,
    )
    rows = _Asked(answerer.checked(questions(arguments)))
    answers = rows.with_answers(answerer.stream(rows))
    if arguments.format == "squad":
        return _Job(rows, _members(answers))
    return _Job(
        rows,
        (
            _json_line(
                id=question.id,
                answer=best.answer,
                score=best.score,
                start=best.start,
                end=best.end,
            )
            for question, (best, *_) in answers
        ),
    )


def _members(answers: Iterable[tuple[Question, list[Answer]]]) -> Iterator[str]:
    """The members of an object of answers by id."""
    seen: set[str] = set()
    for question, (best, *_) in answers:
        if question.id in seen:
            raise ValueError(f"{question.where}: another question has the id {question.id!r}")
        seen.add(question.id)
        yield f"{_json(question.id)}: {_json(best.answer)}"


def _write_answers(output: Path | None, job: _Job) -> None:
    """One object, when all answers are there."""
    members = list(job.lines)
    job.rows.finish(0)
    content = to_bytes("{\n" + ",\n".join(members) + "\n}\n")
    if output is None or is_device(output):
        with opened_output(output) as file:
            file.write(content)
            file.flush()
    else:
        replace_output(output, lambda file: file.write(content))


def questions(arguments: argparse.Namespace) -> Iterator[Question]:
    """The questions of ``sources``."""
    from xlmr_ext.tasks.squad import iterate_questions, read_squad

    for path, format in arguments.sources:
        if format == "json":
            yield from read_squad(path)
        else:
            with opened(path) as (stream, name):
                yield from iterate_questions(stream, name)


def _choice(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> _Job:
    from xlmr_ext.tasks.choice import ChoiceAnswerer

    answerer = ChoiceAnswerer(
        model, tokenizer, max_length=arguments.max_length, batch_size=arguments.batch_size
    )
    rows = _Asked(choice_questions(arguments))
    answers = rows.with_answers(answerer.answers(rows, window=arguments.window))
    return _Job(
        rows,
        (
            _json_line(
                index=found.index, choice=found.choice, score=found.score, scores=found.scores
            )
            for _, found in answers
        ),
    )


def choice_questions(arguments: argparse.Namespace) -> Iterator[ChoiceQuestion]:
    """The questions of ``sources``, with their choices."""
    from xlmr_ext.tasks.choice import iterate_choices

    for path, _ in arguments.sources:
        with opened(path) as (stream, name):
            yield from iterate_choices(stream, name)


_JOBS: dict[str, Callable[[argparse.Namespace, Any, Any], _Job]] = {
    "classification": _classification,
    "tokens": _tokens,
    "qa": _qa,
    "choice": _choice,
}


def _json_line(**row: Any) -> str:
    return _json(_rounded(row)) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _rounded(value: Any) -> Any:
    """Probabilities with 6 decimals, wherever they are."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
