"""``xlmr-ext finetune``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import (
    PROGRAM,
    above_zero,
    add_columns,
    add_hub,
    count,
    not_negative,
    share,
)
from xlmr_ext.cli.console import hub, input_format, refuse_missing, use_threads

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.tokenization import XLMRobertaTokenizer
    from xlmr_ext.training import EpochRecord

NAME = "finetune"
SUMMARY = "train a classifier"
DESCRIPTION = """\
Fine-tune a classifier and keep the best epoch.

TRAIN and DEV are files with a column of texts and a column of labels, in UTF-8:
  .csv    quoted as spreadsheets do, with a header line
  .tsv    split on tabs and line feeds alone, no quoting, with a header line
  .jsonl  a JSON object a line
The labels of TRAIN become the model's, unless the model already has labels that cover them.

Learning rate: linear warm-up, then linear decay to 0, with AdamW. After every epoch the model is
evaluated on DEV; OUTPUT holds the weights of the best epoch (macro F1, then accuracy), or, without
DEV, of the latest. OUTPUT is a checkpoint in Hugging Face's layout."""

EXAMPLES = """\
examples:
  xlmr-ext finetune --model FacebookAI/xlm-roberta-base --train train.csv --dev dev.csv \\
      --output topics
  xlmr-ext finetune --model ./checkpoint --train train.tsv --label-column category --output topics
  xlmr-ext finetune --model topics --train more.jsonl --output topics2 --learning-rate 2e-5
  xlmr-ext finetune --model ./checkpoint --train pairs.csv --text-column premise \\
      --pair-column hypothesis --output nli --max-length 256

A run that does no better than guessing after its warm-up says so, and what to change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="NAME", required=True, help="directory or hub name")
    data.add_argument("--train", metavar="FILE", required=True, type=Path, help="rows to learn")
    data.add_argument("--dev", metavar="FILE", type=Path, help="rows to choose the best epoch by")
    data.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="where the checkpoint goes"
    )
    add_columns(data, label_default="label")
    recipe = parser.add_argument_group("recipe")
    for name, kind, default, text in (
        ("--epochs", count, 5, "passes over TRAIN"),
        ("--batch-size", count, 16, "rows a step"),
        ("--learning-rate", above_zero, 5e-5, "the peak, after warm-up"),
        ("--warmup-ratio", share, 0.1, "share of the steps that warm up"),
        ("--weight-decay", not_negative, 0.01, "of matrices, not of biases and LayerNorm"),
        ("--max-grad-norm", above_zero, 1.0, "2-norm that a step's gradient is clipped to"),
        ("--max-length", count, 128, "tokens that a text is cut to"),
        ("--bucket-batches", count, 1, "batches sorted by length together; 1 only shuffles"),
    ):
        recipe.add_argument(name, metavar="N", type=kind, default=default, help=text)
    add_hub(parser)


def run(arguments: argparse.Namespace) -> int:
    train_format = input_format(arguments, str(arguments.train))
    dev_format = None if arguments.dev is None else input_format(arguments, str(arguments.dev))
    threads = use_threads(arguments)
    from xlmr_ext.data import label_list, read_labelled
    from xlmr_ext.training import finetune, seed_everything

    columns = {
        "text_column": arguments.text_column,
        "label_column": arguments.label_column,
        "pair_column": arguments.pair_column,
        "errors": arguments.encoding_errors,
    }
    train = read_labelled(arguments.train, format=train_format, **columns)
    dev = (
        None
        if arguments.dev is None
        else read_labelled(arguments.dev, format=dev_format, **columns)
    )
    # A new head is drawn while the model is loaded.
    seed_everything(arguments.seed)
    model, tokenizer, new = _load_to_train(arguments, label_list(train.labels))
    rows = f"{len(train)} rows to train" + ("" if dev is None else f", {len(dev)} to evaluate")
    print(
        f"{rows}, {model.config.num_labels} labels ({'a new' if new else 'the given'} classifier "
        f"head), {threads} threads",
        flush=True,
    )
    result = finetune(
        model,
        tokenizer,
        train,
        dev=dev,
        output_dir=arguments.output,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        max_length=arguments.max_length,
        seed=arguments.seed,
        bucket_batches=arguments.bucket_batches,
        on_epoch=lambda record: _print_epoch(record, arguments.epochs),
    )
    print(
        f"{result.steps} steps in {result.seconds:.1f} s; {arguments.output} holds the weights of "
        f"epoch {result.best_epoch}\nlabel texts: {PROGRAM} predict --model {arguments.output} "
        "--input FILE",
        flush=True,
    )
    return 0


def _print_epoch(record: EpochRecord, epochs: int) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    line = f"epoch {record.epoch}/{epochs}  loss {record.train_loss:.4f}"
    if record.dev_accuracy is not None and record.dev_macro_f1 is not None:
        line += f"  dev loss {record.dev_loss:.4f}  dev accuracy {record.dev_accuracy:.1%}"
        line += f"  dev macro F1 {record.dev_macro_f1:.4f}"
    tqdm.write(f"{line}  ({record.seconds:.1f} s)", file=sys.stdout)
    sys.stdout.flush()


def _load_to_train(
    arguments: argparse.Namespace, labels: list[str]
) -> tuple[XLMRobertaForSequenceClassification, XLMRobertaTokenizer, bool]:
    """The model, the tokenizer, and whether the classifier's head starts anew."""
    from xlmr_ext import (
        XLMRobertaConfig,
        XLMRobertaForSequenceClassification,
        XLMRobertaTokenizer,
    )

    where = hub(arguments)
    config = XLMRobertaConfig.from_pretrained(arguments.model, **where)
    own = {str(label) for label in config.id2label.values()}
    chosen: dict[str, Any] = {}
    if len(labels) > 1 and not set(labels) <= own:
        # Other labels than the checkpoint's: its head, if it has one, answers another question.
        chosen = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    model, loading = XLMRobertaForSequenceClassification.from_pretrained(
        arguments.model, output_loading_info=True, **chosen, **where
    )
    refuse_missing(arguments.model, loading, "roberta.", "is no XLM-R checkpoint")
    new = bool(loading["missing_keys"] or loading["mismatched_keys"])
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **where), new
