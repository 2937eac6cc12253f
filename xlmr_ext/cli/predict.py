"""``xlmr-ext predict``."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xlmr_ext.cli.arguments import PROGRAM, add_columns, add_hub, count
from xlmr_ext.cli.console import hub, input_format, refuse_missing, say, use_threads

if TYPE_CHECKING:
    from xlmr_ext.data import Format, Row
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.prediction import Prediction
    from xlmr_ext.tokenization import XLMRobertaTokenizer

NAME = "predict"
SUMMARY = "label texts"
DESCRIPTION = """\
Label texts with a fine-tuned classifier, in order and in constant memory.

Standard input and .txt files hold a text a line; .csv, .tsv and .jsonl files have a column of
texts (see `xlmr-ext finetune --help`). With --label-column the labels are compared with those of
that column, and accuracy and macro F1 are printed on stderr.

Output, a row for each text:
  tsv     label, score, text (and pair), with a header line; tabs and line breaks in a text
          become spaces
  jsonl   an object with text, label, score, and the scores of all labels"""

EXAMPLES = """\
examples:
  echo "Der Zug nach Paris hat Verspätung." | xlmr-ext predict --model topics
  xlmr-ext predict --model topics --input a.txt b.txt --output labelled.tsv
  xlmr-ext predict --model topics --input reviews.csv --text-column review --format jsonl
  xlmr-ext predict --model topics --input test.tsv --label-column category > /dev/null
  zcat big.jsonl.gz | xlmr-ext predict --model topics --input-format jsonl | head"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument(
        "--input",
        metavar="FILE",
        nargs="+",
        default=["-"],
        help="files, read one after the other; - is standard input (default: standard input)",
    )
    data.add_argument("--output", metavar="FILE", type=Path, help="instead of standard output")
    data.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="of the output")
    add_columns(data, label_default=None)
    speed = parser.add_argument_group("size")
    speed.add_argument("--batch-size", metavar="N", type=count, default=32, help="rows a batch")
    speed.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to (default: what the model takes)",
    )
    speed.add_argument(
        "--window",
        metavar="N",
        type=count,
        default=1024,
        help="texts read ahead to be sorted by length; 1 answers every line at once",
    )
    add_hub(parser)


def run(arguments: argparse.Namespace) -> int:
    sources = [(path, input_format(arguments, path)) for path in arguments.input]
    for path, _ in sources:
        if path != "-":
            _check_input(arguments, path)
    use_threads(arguments)
    from xlmr_ext.prediction import predict

    model, tokenizer = _load_to_predict(arguments)
    interactive = "-" in arguments.input and sys.stdin.isatty()
    rows = _Rows(arguments, sources)
    predictions = predict(
        model,
        tokenizer,
        rows,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        window=1 if interactive else arguments.window,
    )
    written = 0
    try:
        with ExitStack() as stack:
            output: BinaryIO = (
                sys.stdout.buffer
                if arguments.output is None
                else stack.enter_context(arguments.output.open("wb"))
            )
            if arguments.format == "tsv":
                pair = "" if arguments.pair_column is None else "\tpair"
                output.write(f"label\tscore\ttext{pair}\n".encode())
            for prediction in predictions:
                # The escape of a lone surrogate is also JSON's.
                output.write(
                    _line(prediction, arguments.format).encode("utf-8", "backslashreplace")
                )
                written += 1
                if rows.answered(prediction.label):
                    output.flush()
            output.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {written} rows were written") from None
    if rows.error is not None:
        raise ValueError(f"{rows.error}; the {written} rows before it were written")
    if arguments.label_column is not None:
        say(rows.verdict())
    return 0


def _load_to_predict(
    arguments: argparse.Namespace,
) -> tuple[XLMRobertaForSequenceClassification, XLMRobertaTokenizer]:
    from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer

    where = hub(arguments)
    model, loading = XLMRobertaForSequenceClassification.from_pretrained(
        arguments.model, output_loading_info=True, **where
    )
    refuse_missing(
        arguments.model, loading, "", f"is no trained classifier (make one: {PROGRAM} finetune)"
    )
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **where)


def _check_input(arguments: argparse.Namespace, path: str) -> None:
    """Finds a bad file now, not after the files before it were labelled."""
    kind = Path(path).stat()
    # A pipe can be opened once only.
    if stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode):
        with Path(path).open("rb"):
            pass
    output = arguments.output
    if output is not None and output.exists() and os.path.samestat(kind, output.stat()):
        arguments.parser.error(f"--output {output} is an input, which would be lost")


class _Rows:
    """The texts of the inputs as `predict` takes them; keeps the labels of those under way."""

    def __init__(self, arguments: argparse.Namespace, sources: list[tuple[str, Format]]) -> None:
        self.error: ValueError | None = None
        self._arguments = arguments
        self._sources = sources
        self._waiting: deque[str | None] = deque()
        self._counts: dict[tuple[str, str], int] = {}

    def __iter__(self) -> Iterator[str | tuple[str, str]]:
        from xlmr_ext.data import DataError

        try:
            for row in self._rows():
                self._waiting.append(row.label)
                yield row.text if row.pair is None else (row.text, row.pair)
        except DataError as error:
            # The rows before it are still to be labelled; the command fails after that.
            self.error = error

    def answered(self, label: str) -> bool:
        """Takes the answer to the oldest row; True where it was the last one under way."""
        gold = self._waiting.popleft()
        if gold is not None:
            self._counts[gold, label] = self._counts.get((gold, label), 0) + 1
        return not self._waiting

    def verdict(self) -> str:
        """Accuracy and macro F1 of the answers so far."""
        from xlmr_ext.data import label_list
        from xlmr_ext.prediction import agreement

        labels = label_list(label for pair in self._counts for label in pair)
        confusion = [[self._counts.get((g, p), 0) for p in labels] for g in labels]
        accuracy, macro_f1 = agreement(confusion)
        rows = sum(self._counts.values())
        return f"{rows} rows, accuracy {accuracy:.2%}, macro F1 {macro_f1:.4f}"

    def _rows(self) -> Iterator[Row]:
        from xlmr_ext.data import read_rows

        for path, format in self._sources:
            yield from read_rows(
                sys.stdin.buffer if path == "-" else path,
                format=format,
                text_column=self._arguments.text_column,
                pair_column=self._arguments.pair_column,
                label_column=self._arguments.label_column,
                name="standard input" if path == "-" else path,
                errors=self._arguments.encoding_errors,
            )


def _line(prediction: Prediction, format: str) -> str:
    texts = [prediction.text] + ([] if prediction.pair is None else [prediction.pair])
    if format == "tsv":
        shown = [text.translate(_SPACES) for text in texts]
        return "\t".join([prediction.label, f"{prediction.score:.6f}", *shown]) + "\n"
    row: dict[str, Any] = dict(zip(("text", "pair"), texts, strict=False))
    row["label"] = prediction.label
    row["score"] = round(prediction.score, 6)
    row["scores"] = {label: round(score, 6) for label, score in prediction.scores.items()}
    return json.dumps(row, ensure_ascii=False) + "\n"


_SPACES = str.maketrans("\t\r\n", "   ")
