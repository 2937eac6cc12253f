"""``xlmr-ext zero-shot``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from xlmr_ext.cli.arguments import add_device, add_dtype, add_hub, add_text_format, count
from xlmr_ext.cli.console import check_device, hub, to_run, use_threads
from xlmr_ext.cli.inputs import Texts, add_input, interactive, sources
from xlmr_ext.cli.outputs import add_output, format_of, one_line, write_stream
from xlmr_ext.tasks.hypotheses import TEMPLATE, fill_template, parse_labels

if TYPE_CHECKING:
    from xlmr_ext.tasks.zero_shot import ZeroShotClassifier, ZeroShotResult

NAME = "zero-shot"
SUMMARY = "label texts with labels of your choice, without training"
DESCRIPTION = """\
Label texts with any labels, by a model of natural-language inference (one with a label
"entailment"), in order and in constant memory. A label fits a text as far as the text entails
"This example is LABEL." (--template).

Output, a row for each text:
  tsv     the best label, its score, and the text, with a header line; tabs and line breaks in a
          text become spaces
  jsonl   an object with sequence, labels (the best first) and scores"""

EXAMPLES = """\
examples:
  echo "Der Zug nach Paris hat Verspätung." | xlmr-ext zero-shot \\
      --model joeddav/xlm-roberta-large-xnli --labels "travel,health,sports"
  xlmr-ext zero-shot --model ./nli --labels "urgent,phone,refund" --multi-label \\
      --template "This message is about {}." --input mails.csv --format jsonl"""

_FORMATS = ("tsv", "jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument(
        "--labels",
        metavar="A,B,...",
        type=_labels,
        required=True,
        help="candidate labels, with commas between",
    )
    data.add_argument(
        "--template",
        metavar="TEXT",
        type=_template,
        default=TEMPLATE,
        help="the hypothesis, with {} where the label goes",
    )
    data.add_argument(
        "--multi-label", action="store_true", help="score each label by itself; several may fit"
    )
    data.add_argument(
        "--entailment-label",
        metavar="NAME",
        help="the model's label for entailment (default: the one that begins with entail)",
    )
    add_input(data)
    add_output(data)
    data.add_argument(
        "--format", choices=_FORMATS, help="of the output (default: by the suffix, else tsv)"
    )
    add_text_format(data)
    size = parser.add_argument_group("size")
    add_device(size)
    add_dtype(size)
    size.add_argument(
        "--batch-size", metavar="N", type=count, default=128, help="pairs of text and label a batch"
    )
    size.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a pair is cut to (default: what the model takes)",
    )
    add_hub(parser)
    parser.set_defaults(pair_column=None, label_column=None)


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    inputs = sources(arguments, arguments.input)
    format = arguments.format or format_of(arguments.output, _FORMATS) or "tsv"
    use_threads(arguments)
    classifier = _load(arguments)
    texts = Texts(arguments, inputs)
    at_once = interactive(arguments.input)
    results = classifier.stream(
        texts,
        arguments.labels,
        arguments.template,
        arguments.multi_label,
        batch_size=arguments.batch_size,
        **({"window": 1} if at_once else {}),
    )
    write_stream(
        arguments.output,
        texts,
        (_line(result, format) for result in results),
        header="label\tscore\ttext\n" if format == "tsv" else "",
        flush=lambda: at_once,
    )
    return 0


def _labels(text: str) -> list[str]:
    try:
        return parse_labels(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected labels with commas between them, got {text!r}"
        ) from None


def _template(text: str) -> str:
    try:
        fill_template(text, ["label"])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a text with {{}} where the label goes, got {text!r}"
        ) from None
    return text


def _load(arguments: argparse.Namespace) -> ZeroShotClassifier:
    from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
    from xlmr_ext.tasks.registry import refuse_missing
    from xlmr_ext.tasks.zero_shot import ZeroShotClassifier

    where = hub(arguments)
    model, loading = XLMRobertaForSequenceClassification.from_pretrained(
        arguments.model, output_loading_info=True, **where
    )
    refuse_missing(loading["missing_keys"], f"{arguments.model} is no trained classifier")
    to_run(model, arguments)
    return ZeroShotClassifier(
        model,
        XLMRobertaTokenizer.from_pretrained(arguments.model, **where),
        entailment_label=arguments.entailment_label,
        max_length=arguments.max_length,
    )


def _line(result: ZeroShotResult, format: str) -> str:
    if format == "tsv":
        text = one_line(result["sequence"])
        return f"{one_line(result['labels'][0])}\t{result['scores'][0]:.6f}\t{text}\n"
    row = {**result, "scores": [round(score, 6) for score in result["scores"]]}
    return json.dumps(row, ensure_ascii=False) + "\n"
