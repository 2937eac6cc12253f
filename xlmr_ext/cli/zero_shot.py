"""``xlmr-ext zero-shot``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from xlmr_ext.cli.arguments import add_hub, add_text_format, count
from xlmr_ext.cli.console import hub, refuse_missing, use_threads
from xlmr_ext.cli.inputs import Texts, add_input, interactive, one_line, sources, to_bytes
from xlmr_ext.cli.outputs import opened_output

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument(
        "--labels", metavar="A,B,...", required=True, help="candidate labels, with commas between"
    )
    data.add_argument(
        "--template",
        metavar="TEXT",
        default="This example is {}.",
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
    data.add_argument("--output", metavar="FILE", type=Path, help="instead of standard output")
    data.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="of the output")
    add_text_format(data)
    size = parser.add_argument_group("size")
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
    inputs = sources(arguments, arguments.input)
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
    written = 0
    try:
        with opened_output(arguments.output) as output:
            if arguments.format == "tsv":
                output.write(b"label\tscore\ttext\n")
            for result in results:
                output.write(to_bytes(_line(result, arguments.format)))
                written += 1
                if at_once:
                    output.flush()
            output.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {written} rows were written") from None
    texts.finish(written)
    return 0


def _load(arguments: argparse.Namespace) -> ZeroShotClassifier:
    from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
    from xlmr_ext.tasks.zero_shot import ZeroShotClassifier

    where = hub(arguments)
    model, loading = XLMRobertaForSequenceClassification.from_pretrained(
        arguments.model, output_loading_info=True, **where
    )
    refuse_missing(arguments.model, loading, "", "is no trained classifier")
    return ZeroShotClassifier(
        model.optimize_for_inference(),
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
