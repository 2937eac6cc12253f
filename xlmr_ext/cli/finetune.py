"""``xlmr-ext finetune``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import (
    PROGRAM,
    above_zero,
    add_course,
    add_device,
    add_hub,
    count,
    count_or_zero,
    not_negative,
    share,
)
from xlmr_ext.cli.config_file import add_config
from xlmr_ext.cli.console import check_device, use_threads
from xlmr_ext.cli.reporting import as_group, make_folder, report, training_curve
from xlmr_ext.cli.task_arguments import (
    add_task,
    check_format,
    check_options,
    load_to_train,
    read_task_data,
    refuse_others,
    refuse_stdin,
    shown_metrics,
    task_options,
)
from xlmr_ext.report import Group
from xlmr_ext.tasks.registry import TASKS, task_of_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from xlmr_ext.training import EpochRecord, FinetuneResult

NAME = "finetune"
SUMMARY = "train a model on a task"
DESCRIPTION = """\
Fine-tune a model on a task and keep the best epoch.

TRAIN and DEV are UTF-8 files:
  classification  a column of texts and a column of labels:
                    .csv    quoted as spreadsheets do, with a header line
                    .tsv    split on tabs and line feeds alone, no quoting, with a header line
                    .jsonl  a JSON object a line
  tokens          .iob2, .conll: a word and its IOB2 tag a line, an empty line after a sentence
  qa              .json: SQuAD's, version 1.1 or 2.0; .jsonl: question, context, answers
  choice          .jsonl: context or question or both; choices (a list) or choice0, choice1, ...;
                  label, the number of the right one from 0
The labels of TRAIN become the model's, unless the model already has labels that cover them.

Learning rate: linear warm-up, then linear decay to 0, with AdamW. After every epoch the model is
evaluated on DEV; OUTPUT holds the weights of the best epoch, or, without DEV, of the latest. The
best is the one with the highest macro F1, then accuracy (classification); F1 of entities, then
accuracy of words (tokens); F1 of words, then exact match (qa); accuracy, then lowest loss (choice).
OUTPUT is a checkpoint in Hugging Face's layout. While the run goes on,
OUTPUT/xlmr_ext_training.jsonl grows by a JSON object for every step and every evaluation.

A run that was stopped, by whatever means, goes on with --resume and otherwise the same command:
from the state that is saved after an epoch, where the last one is five minutes ago (--save-steps),
or, where there is none yet, from the beginning. Where the run had ended, there is nothing to do.
Other data, settings or weights than those of the run are refused."""

EXAMPLES = """\
examples:
  xlmr-ext finetune --model FacebookAI/xlm-roberta-base --train train.csv --dev dev.csv \\
      --output topics
  xlmr-ext finetune --model ./checkpoint --train train.tsv --label-column category --output topics
  xlmr-ext finetune --model topics --train more.jsonl --output topics2 --learning-rate 2e-5
  xlmr-ext finetune --model ./checkpoint --train pairs.csv --text-column premise \\
      --pair-column hypothesis --output nli --max-length 256
  xlmr-ext finetune --config run.toml --seed 2
  xlmr-ext finetune --model ./checkpoint --train train.iob2 --dev dev.iob2 --output entities
  xlmr-ext finetune --model ./checkpoint --train squad.json --output answers --epochs 2
  xlmr-ext finetune --model ./checkpoint --task choice --train copa.jsonl --output choices

A run that does no better than guessing after its warm-up says so, and what to change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="NAME", required=True, help="directory or hub name")
    data.add_argument("--train", metavar="FILE", required=True, type=Path, help="rows to learn")
    data.add_argument("--dev", metavar="FILE", type=Path, help="rows to choose the best epoch by")
    data.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="where the checkpoint goes"
    )
    data.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="write a report of the run here: index.html, charts, metrics.json",
    )
    data.add_argument(
        "--json", action="store_true", help="print a JSON object for every epoch, and for the run"
    )
    data.add_argument(
        "--plan",
        action="store_true",
        help="print what the run will take in memory and in time, and do not start it",
    )
    add_config(data)
    add_task(
        parser,
        data,
        "by the file: .json is qa, .iob2 and .conll are tokens, the others classification",
    )
    recipe = parser.add_argument_group("recipe")
    for name, kind, default, text in (
        ("--epochs", count, 5, "passes over TRAIN"),
        ("--batch-size", count, 16, "rows a step"),
        ("--learning-rate", above_zero, 5e-5, "the peak, after warm-up"),
        ("--warmup-ratio", share, 0.1, "share of the steps that warm up"),
        ("--weight-decay", not_negative, 0.01, "of matrices, not of biases and LayerNorm"),
        ("--layer-decay", share, 1.0, "what a layer's learning rate is of that of the layer above"),
        ("--max-grad-norm", above_zero, 1.0, "2-norm that a step's gradient is clipped to"),
        ("--bucket-batches", count, 1, "batches sorted by length together; 1 only shuffles"),
        (
            "--gradient-accumulation-steps",
            count,
            1,
            "batches of --batch-size whose gradients add up to one step",
        ),
    ):
        recipe.add_argument(name, metavar="N", type=kind, default=default, help=text)
    recipe.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to, or that a window has (default: "
        f"{TASKS['classification'].max_length}, qa {TASKS['qa'].max_length}, less where the model "
        "takes less)",
    )
    recipe.add_argument(
        "--bf16",
        action="store_true",
        help="products in bfloat16, all else in float32: about twice as fast where the processor "
        "has units for it (`xlmr-ext info`), the same as without it on other processors",
    )
    recipe.add_argument(
        "--label-smoothing",
        metavar="N",
        type=share,
        default=0.0,
        help="share of a target that is spread over all labels (classification, tokens)",
    )
    recipe.add_argument(
        "--class-weights",
        metavar="WEIGHTS",
        type=_weights,
        help="balanced, or a number for each label in the order of their ids, such as 1,2.5: what "
        "the labels weigh in the loss (classification, tokens; default: all rows the same)",
    )
    recipe.add_argument(
        "--freeze-embeddings", action="store_true", help="do not train the embeddings"
    )
    recipe.add_argument(
        "--freeze-layers",
        metavar="N",
        type=count_or_zero,
        default=0,
        help="do not train the lowest N layers, nor the embeddings",
    )
    recipe.add_argument(
        "--gradient-checkpointing",
        metavar="EVERY",
        type=count,
        nargs="?",
        const=1,
        default=0,
        help="for less memory and more time, keep the input alone of every layer, or every "
        "EVERY-th, and run the layer again in the backward pass; the result is the same",
    )
    add_device(recipe)
    course = add_course(parser)
    course.add_argument(
        "--eval-steps",
        metavar="N",
        type=count,
        help="evaluate on DEV after every N steps and at the end (default: after every epoch)",
    )
    course.add_argument(
        "--early-stopping-patience",
        metavar="N",
        type=count,
        help="stop after N evaluations in a row without a better one (default: never)",
    )
    course.add_argument(
        "--keep-last",
        action="store_true",
        help="at the end, also write the last weights, to OUTPUT/last",
    )
    course.add_argument(
        "--save-steps",
        metavar="N",
        type=count_or_zero,
        help="save the state that --resume goes on from after every N steps; 0 never (default: "
        "after an epoch, where the last one is five minutes ago)",
    )
    add_hub(parser)


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    name: str = arguments.task or task_of_file(arguments.train)
    check_options(arguments, name)
    labelled = ("classification", "tokens")
    refuse_others(arguments, name, dict.fromkeys(("label_smoothing", "class_weights"), labelled))
    paths = [path for path in (arguments.train, arguments.dev) if path is not None]
    refuse_stdin(arguments, paths)
    for path in paths:
        check_format(arguments, name, path)
    threads = use_threads(arguments)
    if arguments.report is not None and not arguments.plan:
        make_folder(arguments.report)
    from xlmr_ext.tasks.registry import make_task, task_class
    from xlmr_ext.training import finetune, seed_everything

    train = read_task_data(arguments, name, arguments.train)
    dev = None if arguments.dev is None else read_task_data(arguments, name, arguments.dev)
    labels = task_class(name).labels_in(train)
    # A new head is drawn while the model is loaded.
    seed_everything(arguments.seed)
    model, tokenizer, new = load_to_train(arguments, name, labels)
    task = make_task(
        name, model, tokenizer, max_length=arguments.max_length, **task_options(arguments, name)
    )
    # What a run takes depends on these alone.
    sizes: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in (
            "epochs", "batch_size", "gradient_accumulation_steps", "seed", "bucket_batches",
            "bf16", "gradient_checkpointing", "freeze_embeddings", "freeze_layers", "eval_steps",
        )
    }  # fmt: skip
    sizes |= {"dev": dev, "task": task, "output_dir": arguments.output}
    if arguments.plan:
        from xlmr_ext.training.plan import finetune_plan

        plan = finetune_plan(model, tokenizer, train, **sizes)
        print(json.dumps(plan.as_row()) if arguments.json else plan.table(), flush=True)
        return 0
    if not arguments.json:
        size = f"{len(train)} {TASKS[name].unit} to train"
        size += "" if dev is None else f", {len(dev)} to evaluate"
        head = "a new" if new else "the given"
        head += " classifier head" if name == "classification" else f" head for {name}"
        head = f"{model.config.num_labels} labels ({head})" if labels else head
        print(f"{size}, {head}, {threads} threads", flush=True)
    result = finetune(
        model,
        tokenizer,
        train,
        **sizes,
        learning_rate=arguments.learning_rate,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        layer_decay=arguments.layer_decay,
        label_smoothing=arguments.label_smoothing,
        class_weights=arguments.class_weights,
        max_grad_norm=arguments.max_grad_norm,
        early_stopping_patience=arguments.early_stopping_patience,
        keep_last=arguments.keep_last,
        log_steps=arguments.log_steps,
        save_steps=arguments.save_steps,
        resume=arguments.resume,
        on_epoch=_print_json if arguments.json else _printer(arguments),
    )
    _print_end(arguments, result)
    if arguments.report is not None:
        _report(arguments, result, len(train), None if dev is None else len(dev))
    return 0


def _weights(text: str) -> list[float] | str:
    return text if text == "balanced" else [above_zero(part) for part in text.split(",")]


def _print_json(record: EpochRecord) -> None:
    print(json.dumps(record.as_row()), flush=True)


def _printer(arguments: argparse.Namespace) -> Callable[[EpochRecord], None]:
    def show(record: EpochRecord) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        line = f"epoch {record.epoch}/{arguments.epochs}  loss {record.train_loss:.4f}"
        if arguments.eval_steps is not None:
            line = f"step {record.step}  {line}"
        if record.dev is not None:
            line += f"  {shown_metrics(record.dev, 'dev ')}"
        tqdm.write(f"{line}  ({record.seconds:.1f} s)", file=sys.stdout)
        sys.stdout.flush()

    return show


def _print_end(arguments: argparse.Namespace, result: FinetuneResult) -> None:
    if arguments.json:
        row = {
            "task": result.task,
            "output": str(arguments.output),
            "best_epoch": result.best_epoch,
            "best_step": result.best_step,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "resumed_at": result.resumed_at,
            "seconds": result.seconds,
            "at_chance": result.at_chance,
            "labels": result.labels,
        }
        print(json.dumps(row), flush=True)
        return
    best = f"epoch {result.best_epoch}"
    if arguments.eval_steps is not None:
        best = f"step {result.best_step}"
    more = f" (from step {result.resumed_at} on)" if result.resumed_at else ""
    if result.resumed_at == result.steps:
        more = " (the run had already ended)"
    more += ", stopped early" if result.stopped_early else ""
    print(
        f"{result.steps} steps in {result.seconds:.1f} s{more}; {arguments.output} holds the "
        f"weights of {best}"
    )
    what = "label texts" if result.task == "classification" else "run it"
    print(f"{what}: {PROGRAM} predict --model {arguments.output} --input FILE")
    sys.stdout.flush()


def _report(
    arguments: argparse.Namespace, result: FinetuneResult, rows: int, dev_rows: int | None
) -> None:
    """The best epoch on DEV, or, without it, its training loss; the run's losses and settings."""
    unit = TASKS[result.task].unit
    facts = {
        "model": str(arguments.model),
        "task": result.task,
        "train": f"{arguments.train}, {rows} {unit}",
    }
    if dev_rows is not None:
        facts["dev"] = f"{arguments.dev}, {dev_rows} {unit}"
    facts |= {
        "best epoch": f"{result.best_epoch} of {arguments.epochs}",
        "learning rate": f"{arguments.learning_rate:g}",
        "batch size": str(arguments.batch_size),
        "seed": str(arguments.seed),
        "steps": f"{result.steps} in {result.seconds:.1f} s",
    }
    if arguments.eval_steps is not None:
        facts["best step"] = str(result.best_step)
    if arguments.gradient_accumulation_steps > 1:
        facts["batches a step"] = str(arguments.gradient_accumulation_steps)
    if result.at_chance:
        facts["warning"] = "the run ended as good as guessing"
    report(
        arguments.report,
        title=f"Training of {arguments.output.resolve().name}",
        task=result.task,
        groups=[
            Group("train", rows, {"loss": result.best.train_loss})
            if result.scores is None
            else as_group("dev", dev_rows or 0, result.scores)
        ],
        labels=result.labels,
        training=training_curve(result.losses, [record.as_row() for record in result.history]),
        facts=facts,
    )
